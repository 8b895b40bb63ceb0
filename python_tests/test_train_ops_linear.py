"""Gradients of linear and hmlp: value, contract, bits on every ISA and thread count, refusals."""

import pytest
import torch

from tml_core import _ext, errors
from tml_core.contract import GRAD_BLOCK
from tml_core.ops.hmlp import HmlpWeights, hmlp, hmlp_reference
from tml_core.ops.linear import linear, linear_dgrad, linear_wgrad, pack_weight

DTYPES = [torch.float32, torch.bfloat16]
# (tokens, outputs, inputs): empty, single, odd, more than one block of tokens
SHAPES = [(0, 8, 4), (1, 1, 1), (19, 100, 75), (257, 33, 64), (1100, 45, 37)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "k"), SHAPES)
@pytest.mark.parametrize("is_fp32_out", [False, True])
def test_linear_of_a_plain_weight_has_the_bits_of_a_packed_one(
    dtype: torch.dtype, t: int, n: int, k: int, is_fp32_out: bool
) -> None:
    x, w = draw(t, k, dtype=dtype), draw(n, k, dtype=dtype, seed=1)
    out_dtype = torch.float32 if is_fp32_out else None
    expected = linear(x, pack_weight(w), out_dtype)
    assert torch.equal(linear(x, w, out_dtype), expected)
    x.requires_grad_()
    assert torch.equal(linear(x, w.requires_grad_(), out_dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "k"), SHAPES)
def test_linear_gradients_match_float64(dtype: torch.dtype, t: int, n: int, k: int) -> None:
    x = draw(t, k, dtype=dtype).requires_grad_()
    w = draw(n, k, dtype=dtype, seed=1).requires_grad_()
    dy = draw(t, n, dtype=dtype, seed=2)
    linear(x, w).backward(dy)
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.dtype == w.grad.dtype == dtype
    # fp32: chains of n or t terms of about 1; bf16: one rounding besides, half of 2^-7
    rtol = 1e-4 if dtype == torch.float32 else 2.0**-8
    for got, want, depth in (
        (x.grad, dy.double() @ w.detach().double(), n),
        (w.grad, dy.double().T @ x.detach().double(), t),
    ):
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-6 * (depth + 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "k"), SHAPES)
def test_linear_dgrad_is_linear_on_the_transposed_weight(
    dtype: torch.dtype, t: int, n: int, k: int
) -> None:
    dy, w = draw(t, n, dtype=dtype), draw(n, k, dtype=dtype, seed=1)
    assert torch.equal(linear_dgrad(dy, w), linear(dy, pack_weight(w.T.contiguous())))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "k"), SHAPES)
def test_linear_wgrad_folds_blocks_of_tokens(dtype: torch.dtype, t: int, n: int, k: int) -> None:
    dy, x = draw(t, n, dtype=dtype), draw(t, k, dtype=dtype, seed=1)
    expected = torch.zeros(n, k)
    for dy_block, x_block in zip(dy.split(GRAD_BLOCK), x.split(GRAD_BLOCK), strict=True):
        packed = pack_weight(x_block.T.contiguous())
        expected = expected + linear(dy_block.T.contiguous(), packed, torch.float32)
    assert torch.equal(linear_wgrad(dy, x), expected)
    assert torch.equal(linear_wgrad(dy, x, dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gradient_bits_do_not_depend_on_threads_isa_or_run(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    # enough multiplications that two threads share them
    x, w = draw(600, 75, dtype=dtype), draw(100, 75, dtype=dtype, seed=1)
    dy = draw(600, 100, dtype=dtype, seed=2)
    expected = (linear_dgrad(dy, w), linear_wgrad(dy, x))
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(50 if isa == each_isa[-1] else 1):
                assert torch.equal(linear_dgrad(dy, w), expected[0])
                assert torch.equal(linear_wgrad(dy, x), expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gradients_do_not_depend_on_other_rows_or_padding(dtype: torch.dtype) -> None:
    w, dy, x = (draw(*s, dtype=dtype) for s in ((30, 50), (40, 30), (40, 50)))
    rows = torch.cat([linear_dgrad(dy[i : i + 1], w) for i in range(40)])
    assert torch.equal(linear_dgrad(dy, w), rows)
    pad = torch.nn.functional.pad
    padded = linear_wgrad(pad(dy, (0, 0, 0, 1000)), pad(x, (0, 0, 0, 1000)))
    assert torch.equal(linear_wgrad(dy, x), padded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gradients_ignore_what_surrounds_their_rows(dtype: torch.dtype) -> None:
    def inside(*shape: int) -> torch.Tensor:
        wide = torch.full((shape[0] + 1, shape[1] + 7), float("nan"), dtype=dtype)
        wide[: shape[0], : shape[1]] = draw(*shape, dtype=dtype)
        return wide[: shape[0], : shape[1]]

    dy, w, x = inside(21, 35), inside(35, 50), inside(21, 50)
    dense = [tensor.contiguous() for tensor in (dy, w, x)]
    assert torch.equal(linear_dgrad(dy, w), linear_dgrad(dense[0], dense[1]))
    assert torch.equal(linear_wgrad(dy, x), linear_wgrad(dense[0], dense[2]))
    assert torch.equal(linear(x, w), linear(dense[2], dense[1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_computes_only_the_gradients_that_are_wanted(dtype: torch.dtype) -> None:
    x, w = draw(5, 8, dtype=dtype), draw(6, 8, dtype=dtype, seed=1)
    y = linear(x.requires_grad_(), w)
    assert [t is None for t in y.grad_fn.saved_tensors] == [True, False]
    y.sum().backward()
    assert w.grad is None
    x = x.detach()
    y = linear(x, w.requires_grad_())
    assert [t is None for t in y.grad_fn.saved_tensors] == [False, True]
    y.sum().backward()
    assert w.grad is not None


def test_linear_rounds_the_gradient_of_an_fp32_result() -> None:
    w = draw(6, 8, dtype=torch.bfloat16).requires_grad_()
    x, dy = draw(5, 8, dtype=torch.bfloat16, seed=1), draw(5, 6, seed=2)
    linear(x, w, torch.float32).backward(dy)
    assert w.grad is not None
    assert torch.equal(w.grad, linear_wgrad(dy.bfloat16(), x, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_ops_pass_opcheck(dtype: torch.dtype) -> None:
    x, w = draw(19, 8, dtype=dtype), draw(6, 8, dtype=dtype, seed=1)
    dy = draw(19, 6, dtype=dtype, seed=2)
    ops = torch.ops.tml
    torch.library.opcheck(ops.linear.default, (x.requires_grad_(), w.requires_grad_(), None))
    torch.library.opcheck(ops.linear.default, (x, w, torch.float32))
    torch.library.opcheck(ops.linear_dgrad.default, (dy, w.detach()))
    torch.library.opcheck(ops.linear_wgrad.default, (dy, x.detach(), torch.float32))


def test_linear_compiles_whole() -> None:
    x, w = draw(19, 8).requires_grad_(), draw(6, 8, seed=1).requires_grad_()

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear(x, w).square().sum()

    expected = torch.autograd.grad(loss(x, w), (x, w))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(x, w), (x, w)), expected, strict=True):
        assert torch.equal(got, want)


def test_linear_training_refusals() -> None:
    x, w = draw(3, 8), draw(6, 8).requires_grad_()
    with pytest.raises(errors.InvalidArgument, match=r"linear: x must be \[T, 8\], got \[3, 7\]"):
        linear(x[:, :7], w)
    with pytest.raises(errors.InvalidArgument, match=r"linear: weight must be \[N, K\], got \[8\]"):
        linear(x, w[0])
    with pytest.raises(errors.InvalidArgument, match="linear: weight must be float32, got bfloat"):
        linear(x, w.bfloat16())
    with pytest.raises(errors.InvalidArgument, match="linear: out must be float32, got bfloat16"):
        linear(x, w, torch.bfloat16)
    with pytest.raises(errors.InvalidArgument, match=r"linear_dgrad: weight must be of shape \[6"):
        linear_dgrad(draw(3, 6), draw(5, 8))
    with pytest.raises(errors.InvalidArgument, match=r"linear_wgrad: x must be of shape \[3, \*\]"):
        linear_wgrad(draw(3, 6), draw(4, 8))
    with pytest.raises(errors.InvalidArgument, match="linear_wgrad: dy must be dense in its last"):
        linear_wgrad(draw(6, 3).T, draw(3, 8))
    (gradient,) = torch.autograd.grad(linear(x, w).square().sum(), w, create_graph=True)
    with pytest.raises(errors.Unsupported, match="linear_wgrad: has no gradient formula"):
        gradient.sum().backward()


FOLDS = ((1, 2), (2, 5))


def encoder(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    projections = [draw(24, 12, dtype=dtype, seed=1) / 4, draw(40, 1200, dtype=dtype, seed=2) / 32]
    norms = [1 + draw(24, dtype=dtype, seed=3) / 8]
    return projections, norms, 1 + draw(40, dtype=dtype, seed=4) / 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_patches", [0, 1, 19])
def test_hmlp_of_plain_weights_has_the_bits_of_packed_ones(
    dtype: torch.dtype, num_patches: int
) -> None:
    projections, norms, final = encoder(dtype)
    patches = draw(num_patches, 2, 10, 10, 3)
    packed = HmlpWeights(FOLDS, tuple(map(pack_weight, projections)), tuple(norms), final)
    plain = HmlpWeights(FOLDS, tuple(projections), tuple(norms), final)
    assert plain.patch_shape == packed.patch_shape == (2, 10, 10, 3)
    assert torch.equal(hmlp(patches, plain), hmlp(patches, packed))


def test_hmlp_gradients_match_the_reference() -> None:
    projections, norms, final = encoder(torch.float32)
    leaves = [draw(7, 2, 10, 10, 3), *projections, *norms, final]
    for leaf in leaves:
        leaf.requires_grad_()
    weights = HmlpWeights(FOLDS, tuple(projections), tuple(norms), final)
    dy = draw(7, 40, seed=5)
    got = torch.autograd.grad(hmlp(leaves[0], weights), leaves, dy)
    want = torch.autograd.grad(
        hmlp_reference(leaves[0], FOLDS, projections, norms, final), leaves, dy
    )
    # both are fp32; sums of up to 1200 terms in another order
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
