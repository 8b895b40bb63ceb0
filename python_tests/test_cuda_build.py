"""The CUDA kernels without a GPU: what nvcc makes of them, what the emulated probe finds, and what
a machine without a device is told. What they compute is tested by `make test-cpp`."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tml_core import _ext
from tml_core.errors import InvalidArgument, Unsupported
from tml_core.ops import cuda

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "csrc" / "cuda"
BIN = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
FLAGS = [
    "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr",
    "--fmad=false", "-lineinfo", "-I", str(ROOT / "csrc"),
]  # fmt: skip

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
needs_cuobjdump = pytest.mark.skipif(
    not (BIN / "cuobjdump").exists() or not (BIN / "nvdisasm").exists(),
    reason="needs pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
)

# File -> instructions it must hold, and the registers a thread of its largest kernel may take.
EXPECTED = {
    "gemm/linear_bf16_n8.cu": (["HGMMA.64x8x16.F32.BF16", "UBLKCP", "LDGSTS", "ACQBULK"], 128),
    "gemm/linear_bf16_n256.cu": (["HGMMA.64x256x16.F32.BF16", "UBLKCP", "USETMAXREG"], 168),
    "gemm/wgrad_bf16.cu": (["HGMMA.64x128x16.F32.BF16", "UBLKCP", "USETMAXREG"], 168),
    "gemm/moe_swiglu_n16.cu": (["HGMMA.64x16x16.F32.BF16", "UBLKCP", "LDGSTS", "MOVM"], 128),
    "gemm/session_attn_d64.cu": (["HMMA.16816.F32.BF16", "UBLKCP", "LDSM"], 255),
    "sconv_norm.cu": (["ACQBULK"], 80),
}
# One of each kind; nvcc takes three to six seconds a file.
QUICK = {"gemm/linear_bf16_n8.cu", "gemm/moe_swiglu_n16.cu", "gemm/session_attn_d64.cu"}
HOST_ONLY = {"device.cu", "session_attn.cu"}
REST = sorted(
    str(path.relative_to(FOLDER))
    for path in FOLDER.rglob("*.cu")
    if str(path.relative_to(FOLDER)) not in EXPECTED and path.name not in HOST_ONLY
)


def cubin_of(name: str, folder: Path) -> Path:
    out = folder / "kernel.cubin"
    command = ["nvcc", *FLAGS, "-cubin", "-o", str(out), str(FOLDER / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    return out


def dump(path: Path, option: str) -> str:
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [str(BIN / "cuobjdump"), option, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def check_resources(path: Path, max_registers: int) -> None:
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump(path, "-res-usage"))
    assert usage
    assert all(int(stack) == 0 and int(local) == 0 for _, stack, local in usage), usage
    assert max(int(registers) for registers, _, _ in usage) <= max_registers, usage


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in EXPECTED],
)
def test_kernels_use_the_units_they_are_written_for(name: str, tmp_path: Path) -> None:
    instructions, max_registers = EXPECTED[name]
    cubin = cubin_of(name, tmp_path)
    check_resources(cubin, max_registers)
    sass = dump(cubin, "-sass")
    for instruction in instructions:
        assert instruction in sass, f"{name} has no {instruction}"
    assert not re.search(r"\b(LDL|STL)\b", sass), f"{name} spills"


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("name", REST)
def test_every_kernel_compiles_without_spilling(name: str, tmp_path: Path) -> None:
    check_resources(cubin_of(name, tmp_path), 255)


# ---- the numerics probe ----


def numerics() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "gpu_numerics", ROOT / "bench" / "gpu_numerics.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_probe_tells_the_models_apart() -> None:
    """Emulated by the default model, the probe must find that model and no other."""
    report = numerics().probe(1, emulated=True)
    assert report["device"] == "emulated"
    assert report["all_forms_equal"]
    fitting = [model for model in report["models"] if not any(model["misses"].values())]
    assert len(report["models"]) > len(fitting) == 1
    assert fitting[0]["fraction_bits"] == 25


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_probe_says_what_it_needs() -> None:
    command = [sys.executable, str(ROOT / "bench" / "gpu_numerics.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert "gpu_numerics: needs nvcc, an H100 or H200" in done.stderr


# ---- refusals ----


@pytest.mark.skipif(_ext.WITH_CUDA, reason="built with CUDA")
def test_a_build_without_cuda_says_so() -> None:
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match="device: 'cuda' asked for, but this tml_core was"):
        cuda.require()
    with pytest.raises(Unsupported, match="cuda_rms_norm: this tml_core was built without"):
        cuda.rms_norm(x, x[0], 1e-6)


@pytest.mark.skipif(not _ext.WITH_CUDA, reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_machine_without_a_device_says_so() -> None:
    with pytest.raises(Unsupported, match="no CUDA device can be used"):
        cuda.require()
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    with pytest.raises(InvalidArgument, match="cuda_rms_norm: x must be on a CUDA device, got a"):
        cuda.rms_norm(x, x[0], 1e-6)


def test_shapes_are_refused_by_name() -> None:
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    weight = cuda.CudaWeight(torch.zeros(4096, dtype=torch.bfloat16), 64, 32)
    with pytest.raises(InvalidArgument, match=r"cuda_linear: x must be \[T, 32\], got \[3, 64\]"):
        cuda.linear(x, weight)
    with pytest.raises(InvalidArgument, match=r"cuda_pack_weight: w must be \[N, K\], got \[3\]"):
        cuda.pack_weight(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(InvalidArgument, match="cuda_pack_experts: gate_up and down must be 3-dim"):
        cuda.pack_experts(x, x)
    with pytest.raises(InvalidArgument, match="cuda_linear: x requires grad"):
        cuda.linear(torch.zeros(1, 32, requires_grad=True), weight)
