"""rms_norm: value, rounding points, bits on every ISA and thread count, refusals."""

import pytest
import torch

from tml_core import _ext, errors
from tml_core.ops.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
# Another order of the sum moves rstd by an ulp of fp32; bf16 may then round to a neighbour at each
# of the stages (normalise, weight, divisor, gelu), and an ulp is at most 2^-7 of the value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4 * 2.0**-7}


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "h"), [(0, 16), (1, 1), (19, 257), (257, 64), (3, 0)])
@pytest.mark.parametrize(
    ("divisor", "activation"), [(1.0, None), (3.0, None), (1.0, "gelu"), (0.7, "gelu")]
)
def test_rms_norm_matches_reference(
    dtype: torch.dtype, n: int, h: int, divisor: float, activation: str | None
) -> None:
    x, weight = 3 * draw(n, h, dtype=dtype), draw(h, dtype=dtype, seed=1)
    y = rms_norm(x, weight, EPS, divisor, activation)
    expected = rms_norm_reference(x, weight, EPS, divisor, activation)
    assert y.dtype == dtype
    # gelu near its zero loses relative precision: allow fp32 noise of values about 1
    torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype], atol=1e-5)


def test_rms_norm_rounds_before_the_weight_and_before_the_divisor() -> None:
    x, weight = draw(19, 100, dtype=torch.bfloat16), draw(100, dtype=torch.bfloat16, seed=1)
    normal = rms_norm(x, torch.ones(100, dtype=torch.bfloat16), EPS)
    weighted = (normal.float() * weight.float()).bfloat16()
    assert torch.equal(rms_norm(x, weight, EPS), weighted)
    assert torch.equal(rms_norm(x, weight, EPS, 3.0), (weighted.float() / 3.0).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_bits_do_not_depend_on_batch_threads_or_isa(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    # enough elements that two threads really share them
    x, weight = draw(400, 257, dtype=dtype), draw(257, dtype=dtype, seed=1)
    x[1] *= 1e-38  # products that are denormal, which every level flushes
    weight[::3] *= 1e-38
    expected = rms_norm(x, weight, EPS, 3.0, "gelu")
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(rms_norm(x, weight, EPS, 3.0, "gelu"), expected)
        rows = [rms_norm(x[i : i + 1], weight, EPS, 3.0, "gelu") for i in range(40)]
        assert torch.equal(torch.cat(rows), expected[:40])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_ignores_rows_of_a_wider_buffer(dtype: torch.dtype) -> None:
    wide = draw(7, 100, dtype=dtype)
    wide[:, 57:] = float("nan")
    weight = draw(57, dtype=dtype, seed=1)
    expected = rms_norm(wide[:, :57].contiguous(), weight, EPS)
    assert torch.equal(rms_norm(wide[:, :57], weight, EPS), expected)


def test_rms_norm_refusals() -> None:
    x, weight = torch.zeros(3, 8), torch.ones(8)
    with pytest.raises(errors.InvalidArgument, match=r"rms_norm: weight must be of shape \[8\]"):
        rms_norm(x, torch.ones(7), EPS)
    with pytest.raises(errors.InvalidArgument, match="rms_norm: weight must be float32, got bf"):
        rms_norm(x, weight.bfloat16(), EPS)
    with pytest.raises(errors.InvalidArgument, match="rms_norm: x must be float32 or bfloat16"):
        rms_norm(x.int(), weight, EPS)
    with pytest.raises(errors.InvalidArgument, match="rms_norm: x must be 2-dimensional"):
        rms_norm(x[0], weight, EPS)
    with pytest.raises(errors.InvalidArgument, match="rms_norm: x must be dense in its last dim"):
        rms_norm(torch.zeros(8, 3).T, weight, EPS)
    with pytest.raises(errors.InvalidArgument, match='activation must be None or "gelu", got'):
        rms_norm(x, weight, EPS, activation="relu")
    with pytest.raises(errors.InvalidType, match=r"rms_norm: x must be a torch\.Tensor, got list"):
        _ext.rms_norm([1.0], torch.ones(8), EPS, 1.0, False, torch.zeros(3, 8), 1)
