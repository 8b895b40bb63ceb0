"""Cost of crossing into the compiled module, against torch's own dispatch and a pybind11 peer."""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from tml_core import _ext
from tml_core.ops.linear import linear, pack_weight

PEER = r"""
#include <pybind11/pybind11.h>
namespace py = pybind11;
// What a hand-written pybind11 module does with a tensor: ask Python for its pointer and its shape.
static long touch(const py::object& a, const py::object& b, const py::object& c, int threads) {
  long sum = threads;
  for (const py::object* t : {&a, &b, &c}) {
    sum += t->attr("data_ptr")().cast<long>() & 63;
    sum += t->attr("shape").cast<py::tuple>().size();
  }
  return sum;
}
PYBIND11_MODULE(tml_bench_peer, m) {
  m.def("nothing", [] {});
  m.def("touch", &touch);
}
"""


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The peer module, compiled here (some 10 s)."""
    pybind11 = pytest.importorskip("pybind11", reason="the peer needs pybind11 (extra: dev)")
    folder: Path = tmp_path_factory.mktemp("peer")
    (folder / "peer.cpp").write_text(PEER)
    target = folder / f"tml_bench_peer{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    subprocess.run(
        ["g++", "-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"]
        + [f"-I{path}" for path in includes]
        + [str(folder / "peer.cpp"), "-o", str(target)],
        check=True,
    )
    spec = importlib.util.spec_from_file_location("tml_bench_peer", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_call_without_arguments(measure: Any, peer: Any) -> None:
    measure("call, no argument", _ext.isa, peer=peer.nothing, peer_name="pybind11")


def test_call_with_three_tensors(measure: Any, peer: Any) -> None:
    """linear of no tokens: three tensors are taken and checked, and nothing is computed."""
    x, y = torch.zeros(0, 64), torch.zeros(0, 32)
    weight = pack_weight(torch.ones(32, 64)).data
    measure(
        "call, 3 tensors",
        lambda: _ext.linear(x, weight, y, 1),
        peer=lambda: peer.touch(x, weight, y, 1),
        peer_name="pybind11",
    )


def test_op_with_its_python_half(measure: Any) -> None:
    """The public op on one token (checks, output allocation, call) against torch's dispatch."""
    x, w = torch.ones(1, 64), torch.ones(32, 64)
    packed = pack_weight(w)
    torch.testing.assert_close(linear(x, packed), torch.nn.functional.linear(x, w))
    measure(
        "ops.linear 1x64x32",
        lambda: linear(x, packed),
        peer=lambda: torch.nn.functional.linear(x, w),
    )
