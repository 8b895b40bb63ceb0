"""Gradients of rms_norm, embed and dmel_embed: value, folds, bits on every ISA and thread count."""

import pytest
import torch

from tml_core import _ext, errors
from tml_core.contract import GRAD_BLOCK
from tml_core.ops.embed import dmel_embed, embed
from tml_core.ops.rms_norm import rms_norm

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
# fp32: sums in another order. bf16: the kernel differentiates at rounded values, a few roundings of
# half of 2^-7 each.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}
OPS = torch.ops.tml


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def draw_ids(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, high, shape, generator=generator).to(dtype)


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of the whole tensor's norm."""
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def norm64(
    x: torch.Tensor, weight: torch.Tensor, divisor: float = 1.0, activation: str | None = None
) -> torch.Tensor:
    y = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) / divisor
    return torch.nn.functional.gelu(y) if activation == "gelu" else y


def leaf64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "h"), [(0, 16), (1, 1), (19, 257), (1100, 64), (3, 0)])
@pytest.mark.parametrize(
    ("divisor", "activation"), [(1.0, None), (3.0, None), (1.0, "gelu"), (0.7, "gelu")]
)
def test_rms_norm_gradients_match_float64(
    dtype: torch.dtype, n: int, h: int, divisor: float, activation: str | None
) -> None:
    x = (3 * draw(n, h, dtype=dtype)).requires_grad_()
    weight = draw(h, dtype=dtype, seed=1).requires_grad_()
    dy = draw(n, h, dtype=dtype, seed=2)
    got = torch.autograd.grad(rms_norm(x, weight, EPS, divisor, activation), (x, weight), dy)
    leaves = (leaf64(x), leaf64(weight))
    want = torch.autograd.grad(norm64(*leaves, divisor, activation), leaves, dy.double())
    if h == 1:  # the gradient of a row of one cancels: only its scale can be judged
        assert got[0].abs().max() <= TOLERANCE[dtype] * dy.abs().max()
    else:
        assert_near(got[0], want[0], dtype)
    assert_near(got[1], want[1], dtype)


def test_rms_norm_recorded_has_the_bits_of_the_direct_call() -> None:
    x, weight = draw(19, 57, dtype=torch.bfloat16), draw(57, dtype=torch.bfloat16, seed=1)
    expected = rms_norm(x, weight, EPS, 3.0, "gelu")
    recorded = rms_norm(x.requires_grad_(), weight, EPS, 3.0, "gelu")
    assert recorded.requires_grad
    assert torch.equal(recorded, expected)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS, 3.0, "gelu"), expected)


def test_rms_norm_weight_gradient_folds_blocks_of_rows() -> None:
    x, weight, dy = draw(1100, 40), draw(40, seed=1), draw(1100, 40, seed=2)
    expected = torch.zeros(40)
    for dy_block, x_block in zip(dy.split(GRAD_BLOCK), x.split(GRAD_BLOCK), strict=True):
        expected = expected + OPS.rms_norm_bwd(dy_block, x_block, weight, EPS, 1.0, False)[1]
    assert torch.equal(OPS.rms_norm_bwd(dy, x, weight, EPS, 1.0, False)[1], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_gradient_bits_do_not_depend_on_batch_threads_isa_or_run(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    # enough elements that two threads really share them
    x, weight = draw(600, 257, dtype=dtype), draw(257, dtype=dtype, seed=1)
    dy = draw(600, 257, dtype=dtype, seed=2)
    x[1] *= 1e-38  # products that are denormal, which every level flushes
    args = (weight, EPS, 3.0, True)
    expected = OPS.rms_norm_bwd(dy, x, *args)
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(50 if isa == each_isa[-1] else 1):
                got = OPS.rms_norm_bwd(dy, x, *args)
                assert torch.equal(got[0], expected[0])
                assert torch.equal(got[1], expected[1])
        rows = [OPS.rms_norm_bwd(dy[i : i + 1], x[i : i + 1], *args)[0] for i in range(20)]
        assert torch.equal(torch.cat(rows), expected[0][:20])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_gradients_ignore_what_surrounds_their_rows(dtype: torch.dtype) -> None:
    wide, dwide = draw(7, 100, dtype=dtype), draw(7, 100, dtype=dtype, seed=2)
    wide[:, 57:] = dwide[:, 57:] = float("nan")
    args = (draw(57, dtype=dtype, seed=1), EPS, 1.0, True)
    dense = OPS.rms_norm_bwd(dwide[:, :57].contiguous(), wide[:, :57].contiguous(), *args)
    for got, want in zip(OPS.rms_norm_bwd(dwide[:, :57], wide[:, :57], *args), dense, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("t", "vocab", "h"), [(0, 5, 16), (1, 1, 7), (19, 300, 257), (1100, 40, 48)]
)
def test_embed_gradients_match_float64(dtype: torch.dtype, t: int, vocab: int, h: int) -> None:
    ids = draw_ids(vocab, t)
    table = draw(vocab, h, dtype=dtype).requires_grad_()
    weight = draw(h, dtype=dtype, seed=1).requires_grad_()
    dy = draw(t, h, dtype=dtype, seed=2)
    got = torch.autograd.grad(embed(ids, table, weight, EPS), (table, weight), dy)
    leaves = (leaf64(table), leaf64(weight))
    want = torch.autograd.grad(norm64(leaves[0][ids], leaves[1]), leaves, dy.double())
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, dtype)
    unread = torch.ones(vocab, dtype=torch.bool)
    unread[ids] = False
    assert got[0][unread].eq(0).all()


def folded(rows_TH: torch.Tensor, index_T: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Row sums by the contract: blocks of tokens, ascending from 0; blocks added to 0 in order."""
    total = torch.zeros(num_rows, rows_TH.shape[1])
    for rows, index in zip(rows_TH.split(GRAD_BLOCK), index_T.split(GRAD_BLOCK), strict=True):
        block = torch.zeros_like(total)
        for row, i in zip(rows, index.tolist(), strict=True):
            block[i] = block[i] + row
        total = total + block
    return total


def test_embed_table_gradient_folds_blocks_of_tokens() -> None:
    ids, table, weight = draw_ids(9, 1100), draw(9, 33), draw(33, seed=1)
    dy = draw(1100, 33, seed=2)
    drows, dweight = OPS.rms_norm_bwd(dy, table[ids], weight, EPS, 1.0, False)
    got = OPS.embed_bwd(dy, ids, table, weight, EPS)
    assert torch.equal(got[0], folded(drows, ids, 9))
    assert torch.equal(got[1], dweight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("f", "channels", "levels", "h"),
    [(0, 3, 4, 16), (1, 1, 1, 7), (19, 80, 16, 257), (1100, 5, 3, 33)],
)
def test_dmel_embed_gradients_match_float64(
    dtype: torch.dtype, f: int, channels: int, levels: int, h: int
) -> None:
    bins = draw_ids(levels, f, channels, dtype=torch.int32)
    table = draw(channels * levels, h, dtype=dtype).requires_grad_()
    weight = draw(h, dtype=dtype, seed=1).requires_grad_()
    dy = draw(f, h, dtype=dtype, seed=2)
    got = torch.autograd.grad(dmel_embed(bins, table, levels, weight, EPS), (table, weight), dy)
    leaves = (leaf64(table), leaf64(weight))
    rows = bins.long() + levels * torch.arange(channels)
    want = torch.autograd.grad(norm64(leaves[0][rows].sum(1), leaves[1]), leaves, dy.double())
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, dtype)


def test_dmel_embed_table_gradient_folds_blocks_of_frames() -> None:
    channels, levels = 3, 4
    bins = draw_ids(levels, 1100, channels, dtype=torch.int32)
    bins[:, 1] = 2  # a level that every frame has, and three that none has
    table, weight, dy = draw(channels * levels, 33), draw(33, seed=1), draw(1100, 33, seed=2)
    rows = bins.long() + levels * torch.arange(channels)
    summed = torch.zeros(1100, 33)
    for channel in range(channels):
        summed = summed + table[rows[:, channel]]
    dsum, dweight = OPS.rms_norm_bwd(dy, summed, weight, EPS, 1.0, False)
    got = OPS.dmel_embed_bwd(dy, bins, table, levels, weight, EPS)
    for channel in range(channels):
        part = got[0][channel * levels : (channel + 1) * levels]
        assert torch.equal(part, folded(dsum, bins[:, channel], levels))
    assert torch.equal(got[1], dweight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_gradient_bits_do_not_depend_on_threads_isa_or_run(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    ids, table = draw_ids(50, 600), draw(50, 131, dtype=dtype)
    bins, bin_table = draw_ids(4, 600, 12, dtype=torch.int32), draw(48, 131, dtype=dtype)
    weight, dy = draw(131, dtype=dtype, seed=1), draw(600, 131, dtype=dtype, seed=2)

    def run() -> torch.Tensor:
        grads = (
            *OPS.embed_bwd(dy, ids, table, weight, EPS),
            *OPS.dmel_embed_bwd(dy, bins, bin_table, 4, weight, EPS),
        )
        return torch.cat([grad.flatten() for grad in grads])

    expected = run()
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(50 if isa == each_isa[-1] else 1):
                assert torch.equal(run(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_ops_pass_opcheck(dtype: torch.dtype) -> None:
    x, weight = draw(19, 8, dtype=dtype), draw(8, dtype=dtype, seed=1)
    table, ids = draw(12, 8, dtype=dtype), draw_ids(12, 19)
    bins = draw_ids(4, 19, 3, dtype=torch.int32)
    torch.library.opcheck(OPS.rms_norm_bwd.default, (x, x, weight, EPS, 3.0, True))
    torch.library.opcheck(OPS.embed_bwd.default, (x, ids, table, weight, EPS))
    torch.library.opcheck(OPS.dmel_embed_bwd.default, (x, bins, table, 4, weight, EPS))
    for tensor in (x, weight, table):
        tensor.requires_grad_()
    torch.library.opcheck(OPS.rms_norm.default, (x, weight, EPS, 3.0, True))
    torch.library.opcheck(OPS.embed.default, (ids, table, weight, EPS))
    torch.library.opcheck(OPS.dmel_embed.default, (bins, table, 4, weight, EPS))


def test_norm_ops_compile_whole() -> None:
    table, weight, ids = draw(12, 8).requires_grad_(), draw(8, seed=1), draw_ids(12, 19)
    bins = draw_ids(4, 19, 3, dtype=torch.int32)

    def loss(table: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = embed(ids, table, weight, EPS) + dmel_embed(bins, table, 4, weight, EPS)
        return rms_norm(y, weight, EPS, 2.0, "gelu").square().sum()

    inputs = (table, weight.requires_grad_())
    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # grads are added in torch


def test_norm_gradient_refusals() -> None:
    x, weight, table = draw(3, 8), draw(8), draw(5, 8).requires_grad_()
    ids, bins = torch.tensor([0, 4, 5]), torch.zeros(3, 5, dtype=torch.int32)
    with pytest.raises(errors.InvalidArgument, match=r"embed: ids\[2\] must be in \[0, 5\), got 5"):
        embed(ids, table, weight, EPS)
    with pytest.raises(errors.InvalidArgument, match=r"embed_bwd: ids must be in \[0, 5\), got 5"):
        OPS.embed_bwd(x, ids, table.detach(), weight, EPS)
    with pytest.raises(errors.InvalidArgument, match=r"5 channels \* 2 levels high, got 5 rows"):
        OPS.dmel_embed_bwd(x, bins, table.detach(), 2, weight, EPS)
    with pytest.raises(errors.InvalidArgument, match=r"dmel_embed_bwd: bins must be in \[0, 1\)"):
        OPS.dmel_embed_bwd(x, bins + 1, table.detach(), 1, weight, EPS)
    with pytest.raises(errors.InvalidArgument, match=r"rms_norm_bwd: dy must be of shape \[3, 8\]"):
        OPS.rms_norm_bwd(x[:2], x, weight, EPS, 1.0, False)
    with pytest.raises(errors.InvalidArgument, match="rms_norm: weight must be float32, got bfloa"):
        rms_norm(x.requires_grad_(), weight.bfloat16(), EPS)
    (gradient,) = torch.autograd.grad(rms_norm(x, weight, EPS).sum(), x, create_graph=True)
    with pytest.raises(errors.Unsupported, match="rms_norm_bwd: has no gradient formula"):
        gradient.sum().backward()
