"""router in training: forward bits, gradients against float64 autograd, load balancing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tml_core import _ext, errors
from tml_core.contract import GRAD_BLOCK
from tml_core.ops.linear import pack_weight
from tml_core.ops.router import (
    Routing,
    load_balance_counts,
    router,
    router_reference,
    update_router_bias,
)

SIZES = [(0, 8, 4, 1, 2), (1, 1, 1, 0, 1), (19, 75, 40, 0, 32), (257, 33, 30, 3, 5)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def inputs(
    t: int, h: int, experts: int, shared: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    weight = draw(experts + shared, h, seed=1) * 0.5
    return draw(t, h, dtype=dtype), weight, draw(experts, seed=2) * 0.1


def grads_of(
    route: Callable[[Tensor, Tensor], Routing], x: Tensor, weight: Tensor, logits: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of x and weight in a fixed random sum of weights, gammas and maybe logits."""
    x, weight = (tensor.detach().requires_grad_() for tensor in (x, weight))
    out = route(x, weight)
    parts = [out.weights, out.gammas]
    if logits:
        assert out.logits is not None
        parts.append(out.logits)
    loss = sum((p * draw(*p.shape, seed=20 + i).to(p)).sum() for i, p in enumerate(parts))
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, [x, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_training_forward_has_the_bits_of_serving(
    dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    t, h, experts, shared, top_k = size
    x, weight, bias = inputs(t, h, experts, shared, dtype)
    served = router(x, pack_weight(weight), bias, top_k=top_k, scale=2.5, return_logits=True)
    trained = router(x, weight.requires_grad_(), bias, top_k=top_k, scale=2.5, return_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(served, trained, strict=True))
    assert not trained.expert_ids.requires_grad
    assert router(x, weight, bias, top_k=top_k, scale=2.5).logits is None


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [*SIZES, (1100, 20, 12, 2, 3)])
def test_router_gradients_match_float64(
    dtype: torch.dtype, size: tuple[int, ...], logits: bool
) -> None:
    t, h, experts, shared, top_k = size
    x, weight, bias = inputs(t, h, experts, shared, dtype)

    def ours(x: Tensor, weight: Tensor) -> Routing:
        return router(x, weight, bias, top_k=top_k, scale=2.5, return_logits=True)

    def exact(x: Tensor, weight: Tensor) -> Routing:
        return router_reference(x, weight, bias.double(), top_k=top_k, scale=2.5)

    ids = ours(x, weight).expert_ids
    assert torch.equal(ids, exact(x.double(), weight.double()).expert_ids)
    got = grads_of(ours, x, weight, logits)
    want = grads_of(exact, x.double(), weight.double(), logits)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    # sums of up to t terms in fp32; dx of bf16 is rounded to 8 bits
    tolerances = (1e-4 if dtype == torch.float32 else 2**-8, 1e-4)
    for g, w, rtol in zip(got, want, tolerances, strict=True):
        scale = w.abs().max().item() if w.numel() else 0.0
        torch.testing.assert_close(g.double(), w, rtol=rtol, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_gradient_bits_do_not_depend_on_threads_isa_or_time(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    t = 2 * GRAD_BLOCK + 61
    x, weight, bias = inputs(t, 150, 20, 2, dtype)

    def run(logits: bool = False) -> tuple[Tensor, ...]:
        def route(x: Tensor, weight: Tensor) -> Routing:
            return router(x, weight, bias, top_k=4, scale=2.5, return_logits=logits)

        return grads_of(route, x, weight, logits)

    for logits in (False, True):
        expected = run(logits)
        for isa in each_isa:
            _ext.set_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert all(torch.equal(g, w) for g, w in zip(run(logits), expected, strict=True))
    expected = run()
    for _ in range(50):
        assert all(torch.equal(g, w) for g, w in zip(run(), expected, strict=True))


def test_token_gradients_do_not_depend_on_the_batch() -> None:
    x, weight, bias = inputs(60, 50, 20, 2, torch.bfloat16)
    dweights, dgammas = draw(60, 4, seed=20), draw(60, 2, seed=21)

    def dx_of(part: slice) -> Tensor:
        leaf = x[part].clone().requires_grad_()
        out = router(leaf, weight, bias, top_k=4, scale=2.5)
        return torch.autograd.grad(
            [out.weights, out.gammas], leaf, [dweights[part], dgammas[part]]
        )[0]

    whole = dx_of(slice(0, 60))
    assert torch.equal(whole[17:31], dx_of(slice(17, 31)))
    assert torch.equal(whole[5:6], dx_of(slice(5, 6)))


def test_padding_behind_the_tokens_adds_nothing() -> None:
    t, real = 2 * GRAD_BLOCK + 9, GRAD_BLOCK + 77
    x, weight, bias = inputs(t, 20, 12, 2, torch.float32)
    dweights, dgammas = draw(t, 3, seed=20), draw(t, 2, seed=21)
    dweights[real:], dgammas[real:] = 0, 0

    def dw_of(count: int) -> Tensor:
        leaf = weight.clone().requires_grad_()
        out = router(x[:count], leaf, bias, top_k=3, scale=2.5)
        outputs = [out.weights, out.gammas]
        return torch.autograd.grad(outputs, leaf, [dweights[:count], dgammas[:count]])[0]

    assert torch.equal(dw_of(t), dw_of(real))


def test_weight_gradients_add_blocks_of_tokens_in_order() -> None:
    t = 3 * GRAD_BLOCK
    x, weight = torch.ones(t, 1), torch.zeros(1, 1)
    weight.requires_grad_()
    out = router(x, weight, torch.zeros(1), top_k=1, scale=1.0, return_logits=True)
    dlogits = torch.zeros(t, 1)
    big = float(2**24)
    dlogits[0], dlogits[GRAD_BLOCK], dlogits[2 * GRAD_BLOCK] = big, 1.0, 1.0
    assert out.logits is not None
    out.logits.backward(dlogits)
    assert weight.grad is not None and float(weight.grad) == big  # (big + 1) + 1
    dlogits[0], dlogits[GRAD_BLOCK + 1] = 0.0, 1.0
    dlogits[2 * GRAD_BLOCK] = big  # (0 + (1 + 1)) + big
    weight.grad = None
    out = router(x, weight, torch.zeros(1), top_k=1, scale=1.0, return_logits=True)
    assert out.logits is not None
    out.logits.backward(dlogits)
    assert weight.grad is not None and float(weight.grad) == big + 2


def test_router_gradients_of_extreme_logits_are_finite() -> None:
    x = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[300.0], [-300.0], [60.0], [0.0]], requires_grad=True)
    out = router(x, weight, torch.zeros(3), top_k=3, scale=2.0)
    (out.weights.sum() * 3 + out.gammas.sum()).backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert weight.grad is not None and weight.grad.isfinite().all()
    assert float(weight.grad[0]) == 0.0  # its log-sigmoid is flat


def test_router_passes_opcheck_and_compiles_whole() -> None:
    x, weight, bias = inputs(19, 32, 10, 2, torch.bfloat16)
    leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())
    scale = torch.tensor([2.5])
    torch.library.opcheck(
        torch.ops.tml.router.default, (*leaves, bias, scale.clone().requires_grad_(), 3)
    )
    weights, gammas, logits, ids = torch.ops.tml.router(x, weight, bias, scale, 3)
    for dlogits in (None, logits):
        torch.library.opcheck(
            torch.ops.tml.router_bwd.default,
            (x, weight, ids, logits, weights, gammas, dlogits, scale),
        )

    def route(x: Tensor, weight: Tensor) -> Routing:
        return router(x, weight, bias, top_k=3, scale=2.5)

    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    got, want = grads_of(compiled, x, weight), grads_of(route, x, weight)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_load_balance_counts_are_integers_of_any_order() -> None:
    ids = draw(257, 12, seed=3).topk(4, dim=-1).indices.int()
    counts = load_balance_counts(ids, 12)
    assert counts.dtype == torch.int64 and int(counts.sum()) == 257 * 4
    assert counts.tolist() == [int((ids == e).sum()) for e in range(12)]
    order = torch.randperm(257, generator=torch.Generator().manual_seed(4))
    assert torch.equal(load_balance_counts(ids[order], 12), counts)
    halves = load_balance_counts(ids[:100], 12) + load_balance_counts(ids[100:], 12)
    assert torch.equal(halves, counts)
    assert load_balance_counts(ids[:0], 3).tolist() == [0, 0, 0]


def test_update_router_bias_moves_by_the_sign_of_the_gap() -> None:
    bias = torch.tensor([0.5, -0.25, 0.0, 1.0])
    counts = torch.tensor([10, 0, 5, 5])  # mean 5
    new = update_router_bias(bias, counts, 0.125)
    assert new.tolist() == [0.375, -0.125, 0.0, 1.0]
    assert bias.tolist() == [0.5, -0.25, 0.0, 1.0]
    # one token apart at counts that fp32 cannot tell apart
    counts = torch.tensor([2**40 + 1, 2**40, 2**40, 2**40 - 1])
    assert update_router_bias(torch.zeros(4), counts, 1.0).tolist() == [-1.0, 0.0, 0.0, 1.0]


def test_router_bias_balances_a_skewed_router() -> None:
    x, weight, bias = inputs(512, 32, 8, 1, torch.float32)
    bias = torch.zeros(8)
    weight[:2] += 2.0 * x.mean(0) / x.mean(0).norm() ** 2  # two favourites

    def spread(bias: Tensor) -> int:
        ids = router(x, weight, bias, top_k=2, scale=1.0).expert_ids
        counts = load_balance_counts(ids, 8)
        return int(counts.max() - counts.min())

    before = spread(bias)
    for _ in range(60):
        ids = router(x, weight, bias, top_k=2, scale=1.0).expert_ids
        bias = update_router_bias(bias, load_balance_counts(ids, 8), 0.02)
    assert spread(bias) < before / 4


def test_router_training_refusals() -> None:
    x, weight, bias = torch.zeros(3, 64), torch.zeros(10, 64), torch.zeros(8)
    with pytest.raises(errors.InvalidArgument, match=r"router: weight must be \[E \+ S, H\]"):
        router(x, weight[0], bias, top_k=2, scale=1.0)
    with pytest.raises(errors.InvalidArgument, match=r"router: weight must be float32"):
        router(x, weight.bfloat16(), bias, top_k=2, scale=1.0)
    with pytest.raises(errors.InvalidArgument, match="router: bias requires grad"):
        router(x, weight, bias.clone().requires_grad_(), top_k=2, scale=1.0)
    with pytest.raises(errors.InvalidArgument, match=r"router: scale must be float32 \[1\], got"):
        router(x, weight, bias, top_k=2, scale=torch.ones(2))
    with pytest.raises(errors.InvalidArgument, match="scale must be a number with a packed weight"):
        router(x, pack_weight(weight), bias, top_k=2, scale=torch.ones(1))
    with pytest.raises(errors.InvalidArgument, match=r"router: x must be \[T, 64\]"):
        router(x[:, :63], weight, bias, top_k=2, scale=1.0)
    with pytest.raises(errors.InvalidArgument, match=r"1 to 8 wide \(top_k\), got 9"):
        router(x, weight, bias, top_k=9, scale=1.0)
    with pytest.raises(errors.InvalidArgument, match=r"load_balance_counts: .* got 0 to 7"):
        load_balance_counts(torch.tensor([0, 7]), 4)
    with pytest.raises(errors.InvalidArgument, match=r"update_router_bias: counts must be int64"):
        update_router_bias(bias, torch.zeros(8), 0.1)
    with pytest.raises(errors.InvalidArgument, match=r"update_router_bias: bias must be float32"):
        update_router_bias(bias.double(), torch.zeros(8, dtype=torch.int64), 0.1)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_scale_has_a_gradient_in_blocks_of_tokens(threads: int) -> None:
    torch.set_num_threads(threads)
    t = 2 * GRAD_BLOCK + 61
    x, weight, bias = inputs(t, 33, 12, 2, torch.float32)
    dweights, dgammas = draw(t, 3, seed=20), draw(t, 2, seed=21)

    def dscale_of(value: float, dtype: torch.dtype, count: int = t) -> Tensor:
        scale = torch.tensor([value], dtype=dtype, requires_grad=True)
        run = router if dtype == torch.float32 else router_reference
        out = run(x[:count].to(dtype), weight.to(dtype), bias.to(dtype), top_k=3, scale=scale)
        outputs = [out.weights, out.gammas]
        seeds = [dweights[:count].to(dtype), dgammas[:count].to(dtype)]
        return torch.autograd.grad(outputs, scale, seeds)[0]

    for value in (2.5, 0.0):
        # a sum of some thousand fp32 terms
        torch.testing.assert_close(
            dscale_of(value, torch.float32).double(),
            dscale_of(value, torch.float64),
            rtol=1e-5,
            atol=1e-5,
        )
    whole = dscale_of(2.5, torch.float32)
    dweights[600:], dgammas[600:] = 0, 0
    assert not torch.equal(dscale_of(2.5, torch.float32), whole)
    assert torch.equal(dscale_of(2.5, torch.float32), dscale_of(2.5, torch.float32, 600))
