"""linear: value, bits on every ISA and thread count, refusals."""

import pytest
import torch

from tml_core import _ext, errors
from tml_core.ops.linear import linear, linear_reference, pack_weight


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("t", "n", "k"), [(0, 8, 4), (1, 1, 1), (19, 100, 75), (257, 33, 64)])
def test_linear_matches_reference(dtype: torch.dtype, t: int, n: int, k: int) -> None:
    x, w = draw(t, k, dtype=dtype), draw(n, k, dtype=dtype, seed=1)
    y = linear(x, pack_weight(w), out_dtype=torch.float32)
    # fp32 sums of k terms in another order: eps * k * |x||w| with |.| about 1
    torch.testing.assert_close(y, linear_reference(x, w, torch.float32), rtol=0, atol=1e-5 * k)


def test_linear_rounds_once() -> None:
    x, w = draw(5, 64, dtype=torch.bfloat16), draw(40, 64, dtype=torch.bfloat16, seed=1)
    packed = pack_weight(w)
    assert torch.equal(linear(x, packed), linear(x, packed, torch.float32).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_bits_do_not_depend_on_batch_threads_or_isa(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    x, packed = draw(40, 75, dtype=dtype), pack_weight(draw(100, 75, dtype=dtype, seed=1))
    expected = linear(x, packed, torch.float32)
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(linear(x, packed, torch.float32), expected)
            rows = [linear(x[i : i + 1], packed, torch.float32) for i in range(40)]
            assert torch.equal(torch.cat(rows), expected)


def test_linear_ignores_rows_of_a_wider_buffer() -> None:
    wide = draw(7, 100, dtype=torch.float32)
    wide[:, 64:] = float("nan")
    packed = pack_weight(draw(8, 64, dtype=torch.float32, seed=1))
    assert torch.equal(linear(wide[:, :64], packed), linear(wide[:, :64].contiguous(), packed))


def test_linear_refusals() -> None:
    packed = pack_weight(draw(8, 64, dtype=torch.float32))
    with pytest.raises(errors.InvalidArgument, match=r"linear: x must be \[T, 64\], got \[3, 63\]"):
        linear(torch.zeros(3, 63), packed)
    with pytest.raises(errors.InvalidArgument, match="linear: weight must be bfloat16, got"):
        linear(torch.zeros(3, 64, dtype=torch.bfloat16), packed)
    with pytest.raises(errors.InvalidArgument, match="linear: x must be float32 or bfloat16"):
        linear(torch.zeros(3, 64, dtype=torch.int32), packed)
    with pytest.raises(errors.InvalidArgument, match="linear: x must be dense in its last dim"):
        linear(torch.zeros(64, 3).T, packed)
    with pytest.raises(errors.InvalidArgument, match="linear: x requires grad"):
        linear(torch.zeros(3, 64, requires_grad=True), packed)
    with pytest.raises(errors.InvalidArgument, match="pack_weight: w must be float32 or bfloat16"):
        pack_weight(torch.zeros(3, 64, dtype=torch.int64))
    with pytest.raises(errors.InvalidType, match=r"linear: x must be a torch\.Tensor, got list"):
        _ext.linear([1], packed.data, torch.zeros(1, 8), 1)
