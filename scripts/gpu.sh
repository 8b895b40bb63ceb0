#!/bin/bash
# make gpu-check, make gpu-bench: build for sm_90a into build/gpu, then test or measure on the GPU here.
# Installs nothing into the environment of PY, which must hold torch built for CUDA, the test extra,
# scikit-build-core, nanobind and ninja. Skips with the reason where there is no GPU or no nvcc.
set -euo pipefail
cd "$(dirname "$0")/.."
word=${1:?usage: scripts/gpu.sh check|bench}
PY=${PY:-python3}

skip() {
  echo "gpu-$word: skipped: $*"
  exit 0
}
[ -e /proc/driver/nvidia ] || skip "no NVIDIA driver on this machine; run it on an H100 or H200"
command -v nvcc >/dev/null || skip "no nvcc on PATH"
"$PY" -c 'import sys, torch
if not torch.cuda.is_available(): sys.exit("this torch finds no CUDA device")
if torch.cuda.get_device_capability() != (9, 0): sys.exit("the device is no H100 or H200")' \
  2>/tmp/gpu-reason.$$ || skip "$(tail -1 /tmp/gpu-reason.$$)"

site=$PWD/build/gpu/site
TML_CUDA=ON "$PY" -m pip install --quiet --no-build-isolation --no-deps --upgrade --target "$site" \
  -C build-dir=build/gpu/cmake .
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
"$PY" -c 'from tml_core.ops import cuda; cuda.require()'
stamp=bench/results/gpu-$(date -u +%Y%m%d-%H%M%S)
mkdir -p bench/results

if [ "$word" = bench ]; then
  "$PY" bench/gpu_bench.py --json "$stamp-bench.json"
  "$PY" bench/gpu_step.py --json "$stamp-step.json"
  exit
fi
status=0
"$PY" bench/gpu_numerics.py --json "$stamp-numerics.json" || status=1
"$PY" -m pytest python_tests/test_cuda_ops.py python_tests/test_cuda_backbone.py \
  python_tests/test_cuda_build.py -m "slow or not slow" || status=1
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$PY" -m pytest -x python_tests/test_cuda_ops.py \
      -k "moe_is_the_reference and 4 or rms_norm and 19 or linear_is_the_reference and 72" || status=1
  done
else
  echo "gpu-check: no compute-sanitizer on PATH: that part is skipped"
fi
exit $status
