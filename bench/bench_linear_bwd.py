"""Training products on plain matrices: forward, dgrad and wgrad, against torch (bf16: oneDNN)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tml_core.ops.linear import linear, linear_dgrad, linear_wgrad

# (tokens, outputs, inputs): the projections of a small and of a middle-sized model
SHAPES = [(64, 4096, 1024), (512, 4096, 1024), (2048, 1024, 1024), (512, 1024, 4096)]
Case = Callable[[], Tensor]
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def cases(name: str, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Case, Case]:
    """One product, ours and torch's."""
    if name == "forward":
        return lambda: linear(x, w), lambda: x @ w.T
    if name == "dgrad":
        return lambda: linear_dgrad(dy, w), lambda: dy @ w
    return lambda: linear_wgrad(dy, x, dy.dtype), lambda: dy.T @ x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "k"), SHAPES)
@pytest.mark.parametrize("case", ["forward", "dgrad", "wgrad"])
def test_linear_bwd(measure: Any, case: str, t: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w, dy = (torch.randn(*shape).to(dtype) for shape in ((t, k), (n, k), (t, n)))
    ours, theirs = cases(case, x, w, dy)
    got, want = ours().float(), theirs().float()
    # two roundings of sums in different orders
    assert (got - want).norm() <= (1e-5 if dtype == torch.float32 else 2.0**-8) * want.norm()
    measure(
        f"linear_{case} {DTYPES[dtype]} {t}x{n}x{k}",
        ours,
        peer=theirs,
        flops=2 * t * n * k,
        num_bytes=(x.nbytes + w.nbytes + dy.nbytes),
        dtype=dtype,
        rounds=10,
    )
