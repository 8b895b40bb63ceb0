"""The compiled module: what it links, what it refuses, how it is steered, what its stub says."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tml_core
from tml_core import _ext, errors
from tml_core.ops._common import huge_empty
from tml_core.ops.linear import linear, pack_weight

ROOT = Path(__file__).parent.parent
MODULE = Path(str(_ext.__file__))
HUGE_PAGE = 2 << 20

# What the module may ask the loader for. libgomp has the name of torch's own copy on purpose.
ALLOWED_LIBRARIES = re.compile(r"lib(gomp|stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so\.\d+|ld-linux.*")

needs_binutils = pytest.mark.skipif(
    shutil.which("readelf") is None or shutil.which("nm") is None, reason="needs binutils"
)


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run_python(code: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


# ---- the file ----


@needs_binutils
def test_module_links_neither_torch_nor_cuda() -> None:
    dynamic = output_of("readelf", "-d", str(MODULE))
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert needed
    assert [name for name in needed if not ALLOWED_LIBRARIES.fullmatch(name)] == []
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@needs_binutils
def test_module_exports_its_init_function_only() -> None:
    listing = output_of("nm", "-D", "--defined-only", "--format=posix", str(MODULE))
    assert [line.split()[0] for line in listing.splitlines()] == ["PyInit__ext"]


def test_module_is_built_for_the_stable_abi() -> None:
    assert MODULE.name == "_ext.abi3.so"


def test_package_is_typed() -> None:
    assert (Path(tml_core.__path__[0]) / "py.typed").exists()


@needs_binutils
def test_one_libgomp_is_mapped() -> None:
    maps = Path("/proc/self/maps").read_text()
    assert len(set(re.findall(r"\S*/libgomp\S*", maps))) == 1


@needs_binutils
def test_kernel_objects_share_no_code() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "check_objects.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 2:
        pytest.skip("no object files in build/ (installed from elsewhere)")
    assert done.returncode == 0, done.stdout


# ---- the stub ----


def stub_functions() -> dict[str, list[str]]:
    """Name -> argument names of every function of the committed stub."""
    tree = ast.parse((ROOT / "src" / "tml_core" / "_ext.pyi").read_text())
    return {
        node.name: [arg.arg for arg in node.args.args]
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def module_functions() -> dict[str, list[str]]:
    """The same, from the signatures that the compiled functions carry."""
    found = {}
    for name, value in vars(_ext).items():
        if callable(value) and not isinstance(value, type):
            signature = str(value.__doc__).splitlines()[0].partition(" -> ")[0]
            arguments = ast.parse(f"def {signature}: ...").body[0]
            assert isinstance(arguments, ast.FunctionDef)
            found[name] = [arg.arg for arg in arguments.args.args]
    return found


def test_stub_matches_the_module() -> None:
    assert stub_functions() == module_functions()


def test_stub_is_what_nanobind_writes() -> None:
    stubgen = pytest.importorskip("nanobind.stubgen", reason="nanobind is a build tool")
    writer = stubgen.StubGen(_ext)
    writer.put(_ext)
    committed = (ROOT / "src" / "tml_core" / "_ext.pyi").read_text()
    assert ast.dump(ast.parse(writer.get())) == ast.dump(ast.parse(committed)), "run `make stubs`"


# ---- the caster ----


def read(data: Any) -> int:
    return _ext.read_bytes(data, 1)


@pytest.mark.parametrize("value", [1, "x", [1.0], np.zeros(8, np.uint8), torch.uint8])
def test_caster_refuses_what_is_no_tensor(value: Any) -> None:
    kind = type(value).__name__
    with pytest.raises(TypeError, match=f"read_bytes: data must be a torch.Tensor, got {kind}"):
        read(value)


def test_module_refuses_none_where_a_tensor_is_due() -> None:
    with pytest.raises(TypeError, match="read_bytes"):
        read(None)


def test_caster_refusals_are_both_ours_and_the_builtin() -> None:
    with pytest.raises(errors.InvalidType):
        read([1])
    with pytest.raises(errors.InvalidArgument):
        read(torch.zeros(8))
    with pytest.raises(ValueError, match="read_bytes"):
        read(torch.zeros(8))


def test_caster_refuses_tensors_without_storage() -> None:
    with pytest.raises(errors.InvalidType, match="read_bytes: data must be a dense tensor"):
        read(torch.zeros(8, dtype=torch.uint8, device="meta"))
    with pytest.raises(errors.InvalidType, match="read_bytes: data must be a dense tensor"):
        read(torch.zeros(8, dtype=torch.uint8).to_sparse())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float64, torch.int16, torch.bool, torch.complex64]
)
def test_caster_refuses_dtypes_no_kernel_has(dtype: torch.dtype) -> None:
    with pytest.raises(errors.InvalidArgument, match="read_bytes: data has an unsupported dtype"):
        read(torch.zeros(8, dtype=dtype))


def test_caster_names_the_argument_and_what_came() -> None:
    with pytest.raises(errors.InvalidArgument, match="data must be uint8, got float32"):
        read(torch.zeros(8))
    with pytest.raises(errors.InvalidArgument, match=r"data must be 1-dimensional, got \[2, 8\]"):
        read(torch.zeros(2, 8, dtype=torch.uint8))
    with pytest.raises(errors.InvalidArgument, match="data must be contiguous, got strides"):
        read(torch.zeros(16, dtype=torch.uint8)[::2])
    with pytest.raises(errors.InvalidArgument, match="data must be a multiple of 8 bytes long"):
        read(huge_empty((12,), torch.uint8))


def test_caster_refuses_a_misaligned_pointer() -> None:
    with pytest.raises(errors.InvalidArgument, match="data must be aligned to 64 bytes"):
        read(huge_empty((72,), torch.uint8)[8:])


def test_caster_never_converts_an_output() -> None:
    packed = pack_weight(torch.ones(8, 4))
    out = torch.zeros(8, 2).T  # right shape, rows not dense
    with pytest.raises(errors.InvalidArgument, match="linear: out must be dense"):
        _ext.linear(torch.ones(2, 4), packed.data, out, 1)
    assert not out.any()


def test_caster_takes_views_at_their_offset() -> None:
    data = huge_empty((256,), torch.uint8)
    data.copy_(torch.arange(256).to(torch.uint8))
    assert read(data[64:128]) == int(data[64:128].view(torch.int64).sum()) % 2**64


def test_caster_takes_subclasses() -> None:
    x = torch.nn.Parameter(torch.ones(2, 4), requires_grad=False)
    out = torch.zeros(2, 8)
    _ext.linear(x, pack_weight(torch.ones(8, 4)).data, out, 1)
    assert torch.equal(out, torch.full((2, 8), 4.0))


def test_caster_takes_empty_tensors() -> None:
    assert read(torch.zeros(0, dtype=torch.uint8)) == 0


def test_ops_refuse_a_gradient_they_would_lose() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    packed = pack_weight(torch.ones(8, 4))
    with pytest.raises(errors.InvalidArgument, match="linear: x requires grad"):
        linear(x, packed)
    with torch.no_grad():
        assert torch.equal(linear(x, packed), torch.full((2, 8), 4.0))


# ---- threads, scratch, memory ----


@pytest.mark.parametrize("num_words", [0, 1, 31, 32, 33, 4097])
def test_read_bytes_sums_every_word_once(num_words: int, each_isa: list[str]) -> None:
    data = huge_empty((num_words * 8,), torch.uint8)
    data.random_(0, 256, generator=torch.Generator().manual_seed(num_words))
    expected = int(data.numpy().view(np.uint64).sum(dtype=np.uint64))
    for isa in each_isa:
        _ext.set_isa(isa)
        assert [_ext.read_bytes(data, threads) for threads in (1, 2, 3)] == [expected] * 3


def test_dot_peak_counts_operations(each_isa: list[str]) -> None:
    for isa in each_isa:
        _ext.set_isa(isa)
        one = _ext.dot_peak(10, True, 1)
        assert one > 0
        assert _ext.dot_peak(30, True, 1) == 3 * one
        assert _ext.dot_peak(10, False, 1) == one / 2
        assert _ext.dot_peak(10, True, 2) in (one, 2 * one)  # one where threads are limited


def test_machine_functions_refuse_bad_counts() -> None:
    with pytest.raises(errors.InvalidArgument, match="read_bytes: num_threads must be >= 1, got 0"):
        _ext.read_bytes(torch.zeros(0, dtype=torch.uint8), 0)
    with pytest.raises(errors.InvalidArgument, match="dot_peak: num_steps must be >= 0"):
        _ext.dot_peak(-1, True, 1)


@pytest.mark.parametrize("num_bytes", [0, 1, HUGE_PAGE, HUGE_PAGE + 1])
def test_huge_empty_is_zeroed_and_aligned(num_bytes: int) -> None:
    data = _ext.huge_empty(num_bytes)
    assert data.shape == (num_bytes,)
    assert data.dtype == torch.uint8
    assert not data.any()
    assert num_bytes == 0 or data.data_ptr() % HUGE_PAGE == 0
    data.fill_(255)
    assert int(data.sum(dtype=torch.int64)) == 255 * num_bytes


def test_huge_empty_lives_as_long_as_its_views() -> None:
    tail = _ext.huge_empty(4096).fill_(7)[4000:]
    others = [_ext.huge_empty(4096).fill_(1) for _ in range(4)]
    assert tail.tolist() == [7] * 96
    assert len(others) == 4


def test_huge_empty_commits_on_first_touch() -> None:
    data = _ext.huge_empty(1 << 40)  # a terabyte of addresses
    data[-1] = 3
    assert int(data[-1]) == 3


def test_huge_empty_refuses_a_negative_size() -> None:
    with pytest.raises(errors.InvalidArgument, match="huge_empty: num_bytes must be >= 0"):
        _ext.huge_empty(-1)


def test_huge_empty_gives_its_memory_back() -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    before = mapped()
    for _ in range(64):
        _ext.huge_empty(64 << 20)
    assert mapped() - before < 256 << 20


def test_scratch_stops_growing() -> None:
    packed = pack_weight(torch.ones(64, 512))
    x = torch.ones(96, 512)

    def step() -> None:
        for rows in (96, 1, 17):
            linear(x[:rows], packed)

    step()
    before = _ext.num_scratch_growths()
    for _ in range(20):
        step()
    assert _ext.num_scratch_growths() == before


# ---- TML_ISA ----

PRINT_ISA = "from tml_core import _ext; print(_ext.isa())"


def test_tml_isa_chooses_the_kernels() -> None:
    done = run_python(PRINT_ISA, TML_ISA="scalar")
    assert (done.stdout.strip(), done.returncode) == ("scalar", 0), done.stderr


def test_tml_isa_empty_means_the_best() -> None:
    assert run_python(PRINT_ISA, TML_ISA="").stdout.strip() == _ext.supported_isas()[-1]


def test_tml_isa_refuses_an_unknown_name() -> None:
    done = run_python(PRINT_ISA, TML_ISA="sse9")
    assert done.returncode != 0
    assert "InvalidArgument: TML_ISA: expected scalar, avx2, avx512 or avx512bf16" in done.stderr
    assert "got 'sse9'" in done.stderr


def test_set_isa_refuses_an_unknown_name_and_keeps_the_old(each_isa: list[str]) -> None:
    _ext.set_isa(each_isa[0])
    with pytest.raises(errors.InvalidArgument, match=r"isa: expected scalar, .* got 'neon'"):
        _ext.set_isa("neon")
    assert _ext.isa() == each_isa[0]


# ---- import ----


def test_import_runs_no_kernel_and_opens_no_device() -> None:
    code = (
        "import tml_core, sys; from tml_core import _ext;"
        "print(_ext.num_scratch_growths(), 'transformers' in sys.modules)"
    )
    assert run_python(code).stdout.split() == ["0", "False"]


def test_refusals_leak_no_reference() -> None:
    value = [1]
    before = sys.getrefcount(value), sys.getrefcount(errors.InvalidType)
    for _ in range(100):
        with pytest.raises(errors.InvalidType):
            read(value)
    after = sys.getrefcount(value), sys.getrefcount(errors.InvalidType)
    assert max(b - a for a, b in zip(before, after, strict=True)) < 50
