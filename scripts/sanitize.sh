#!/bin/bash
# Builds the module with AddressSanitizer and UBSan into an environment of its own and runs the tests
# that reach the kernels. Usage: scripts/sanitize.sh [pytest arguments]; PY is the base Python, whose
# torch and pytest are borrowed.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-python3}
HOME_DIR=$PWD/build/sanitize
VENV=$HOME_DIR/venv

# A plain path line lends the packages of the base environment without its editable hook.
"$PY" -m venv --without-pip "$VENV"
BORROWED=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
OWN=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$BORROWED" >"$OWN/borrowed.pth"

PATH="$(dirname "$(command -v "$PY")"):$PATH" \
  "$PY" -m pip --python "$VENV/bin/python" --disable-pip-version-check --quiet install \
  --no-build-isolation --no-deps --force-reinstall \
  -C build-dir="$HOME_DIR/wheel" -C cmake.build-type=RelWithDebInfo \
  -C cmake.define.TML_SANITIZE=address,undefined -C cmake.define.TML_CUDA=OFF .

# The module is linked to the sanitizer, the interpreter is not: the runtime must be loaded first,
# and libstdc++ with it, or the first C++ exception aborts.
CXX=${CXX:-g++}
TESTS=("$@")
if [ ${#TESTS[@]} -eq 0 ]; then
  shopt -s nullglob
  TESTS=(python_tests/test_build_boundary.py python_tests/test_ops_*.py python_tests/test_sequence*.py)
fi
export LD_PRELOAD="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
# What the module links is another matter in this build.
exec "$VENV/bin/python" -m pytest "${TESTS[@]}" -k "not links_neither"
