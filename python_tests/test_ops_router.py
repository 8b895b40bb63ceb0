"""router: value against the reference and transformers, ties, NaN, bits, refusals."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.inkling.modeling_inkling import InklingTopkRouter

from tml_core import _ext, errors
from tml_core.ops.linear import linear, pack_weight
from tml_core.ops.router import router, router_reference


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("t", "h", "experts", "shared", "top_k"),
    [
        (0, 8, 4, 1, 2),
        (1, 1, 1, 0, 1),
        (1, 64, 256, 2, 6),
        (19, 75, 40, 0, 32),
        (257, 33, 30, 3, 5),
        (5, 48, 500, 12, 8),
    ],
)
def test_router_matches_reference(
    dtype: torch.dtype, t: int, h: int, experts: int, shared: int, top_k: int
) -> None:
    x, w = draw(t, h, dtype=dtype), draw(experts + shared, h, seed=1) * 0.2
    bias = draw(experts, seed=2) * 0.1
    got = router(x, pack_weight(w), bias, top_k=top_k, scale=8.0, return_logits=True)
    want = router_reference(x, w, bias, top_k=top_k, scale=8.0)
    assert torch.equal(got.expert_ids, want.expert_ids)
    # fp32 sums of h terms in another order
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=2e-7 * h)
    # fp32: logit error times scale; bf16: one unit of the last place where the roundings part
    rtol = 2e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got.weights, want.weights, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(got.gammas, want.gammas, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_matches_transformers(dtype: torch.dtype) -> None:
    config = SimpleNamespace(
        n_routed_experts=64,
        n_shared_experts=2,
        hidden_size=96,
        route_scale=8.0,
        num_experts_per_tok=6,
    )
    gate = InklingTopkRouter(config)
    with torch.no_grad():
        gate.weight.copy_(draw(66, 96, seed=1) * 0.2)
        gate.global_scale.fill_(0.75)
        gate.e_score_correction_bias.copy_(draw(64, seed=2) * 0.1)
        x = draw(40, 96, dtype=dtype)
        logits, weights, ids, gammas = gate(x)
    ids, order = ids.sort(dim=1)
    got = router(
        x,
        pack_weight(gate.weight.detach().float()),
        gate.e_score_correction_bias,
        top_k=6,
        scale=8.0 * 0.75,
        return_logits=True,
    )
    assert torch.equal(got.expert_ids.long(), ids)
    # fp32 sums of 96 terms in another order
    torch.testing.assert_close(got.logits[:, :64], logits, rtol=0, atol=2e-5)
    rtol = 2e-5 if dtype == torch.float32 else 2**-7  # bf16: one unit of the last place
    torch.testing.assert_close(got.weights, weights.gather(1, order).float(), rtol=rtol, atol=1e-5)
    torch.testing.assert_close(got.gammas, gammas.float(), rtol=rtol, atol=1e-5)


def test_router_logits_are_the_fp32_chain_of_linear() -> None:
    x, packed = draw(30, 75), pack_weight(draw(40, 75, seed=1))
    got = router(x, packed, torch.zeros(38), top_k=4, scale=1.0, return_logits=True)
    assert torch.equal(got.logits, linear(x, packed))
    x_bf16 = x.bfloat16()
    got = router(x_bf16, packed, torch.zeros(38), top_k=4, scale=1.0, return_logits=True)
    assert torch.equal(got.logits, linear(x_bf16.float(), packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_bits_do_not_depend_on_batch_threads_or_isa(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    x, packed, bias = draw(67, 130, dtype=dtype), pack_weight(draw(50, 130, seed=1)), draw(47)

    def route(rows: torch.Tensor) -> torch.Tensor:
        out = router(rows, packed, bias, top_k=5, scale=2.5, return_logits=True)
        return torch.cat([out.expert_ids, out.weights, out.gammas, out.logits], dim=1)

    expected = route(x)
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(route(x), expected)
            assert torch.equal(torch.cat([route(x[:20]), route(x[20:])]), expected)
        assert torch.equal(torch.cat([route(row[None]) for row in x]), expected)


def test_router_weights_sum_to_scale_and_bias_only_chooses() -> None:
    x, packed = draw(23, 64), pack_weight(draw(34, 64, seed=1) * 0.2)
    bias = torch.zeros(32)
    plain = router(x, packed, bias, top_k=4, scale=3.0)
    # softmax of six terms, a few roundings each
    torch.testing.assert_close(
        plain.weights.sum(1) + plain.gammas.sum(1), torch.full((23,), 3.0), rtol=1e-6, atol=0
    )
    bias[7] = 5.0  # above any sigmoid
    pushed = router(x, packed, bias, top_k=4, scale=3.0)
    assert (pushed.expert_ids == 7).any(dim=1).all()
    same = (pushed.expert_ids == plain.expert_ids).all(dim=1)
    assert same.any() and torch.equal(pushed.weights[same], plain.weights[same])


def test_router_ties_go_to_the_lower_id() -> None:
    weight = torch.zeros(11, 4)  # every logit is 0
    got = router(torch.ones(3, 4), pack_weight(weight), torch.zeros(10), top_k=3, scale=1.0)
    assert got.expert_ids.tolist() == [[0, 1, 2]] * 3
    bias = torch.tensor([0.0, 0.0, 0.5, 0.0, 0.25, 0.5, 0.25, 0.0, 0.25, 0.0])
    got = router(torch.ones(1, 4), pack_weight(weight), bias, top_k=4, scale=1.0)
    assert got.expert_ids.tolist() == [[2, 4, 5, 6]]
    assert torch.equal(got.weights, torch.full((1, 4), 0.2))


def test_router_never_prefers_nan_to_a_number(each_isa: list[str]) -> None:
    weight = torch.arange(-4.0, 5.0)[:, None]  # logits -4..3 routed, 4 shared
    weight[6:8] = float("nan")
    for isa in each_isa:
        _ext.set_isa(isa)
        got = router(torch.ones(1, 1), pack_weight(weight), torch.zeros(8), top_k=3, scale=1.0)
        assert got.expert_ids.tolist() == [[3, 4, 5]]
        assert got.weights.isfinite().all() and got.gammas.isfinite().all()
        got = router(torch.ones(1, 1), pack_weight(weight), torch.zeros(8), top_k=7, scale=1.0)
        assert got.expert_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
        assert got.weights.isnan().all() and got.gammas.isnan().all()
        x = torch.tensor([[float("nan")], [1.0]])
        got = router(x, pack_weight(weight), torch.zeros(8), top_k=3, scale=1.0)
        assert got.expert_ids.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert got.weights[0].isnan().all() and got.weights[1].isfinite().all()


def test_router_takes_extreme_logits() -> None:
    weight = torch.tensor([[300.0], [-300.0], [float("inf")], [-float("inf")], [0.0]])
    got = router(torch.ones(1, 1), pack_weight(weight), torch.zeros(4), top_k=4, scale=1.0)
    # log-sigmoids 0, -300, 0, -inf and, shared, -log 2: weights 1, 0, 1, 0, 1/2 over their sum
    torch.testing.assert_close(got.weights, torch.tensor([[0.4, 0.0, 0.4, 0.0]]))
    torch.testing.assert_close(got.gammas, torch.tensor([[0.2]]))


def test_router_ignores_rows_of_a_wider_buffer() -> None:
    wide = draw(7, 100, dtype=torch.bfloat16)
    wide[:, 64:] = float("nan")
    packed, bias = pack_weight(draw(20, 64, seed=1)), draw(18)
    got = router(wide[:, :64], packed, bias, top_k=3, scale=1.0)
    want = router(wide[:, :64].contiguous(), packed, bias, top_k=3, scale=1.0)
    assert torch.equal(got.expert_ids, want.expert_ids)
    assert torch.equal(got.weights, want.weights) and torch.equal(got.gammas, want.gammas)


def test_router_refusals() -> None:
    x, packed, bias = torch.zeros(3, 64), pack_weight(torch.zeros(10, 64)), torch.zeros(8)
    with pytest.raises(errors.InvalidArgument, match=r"router: x must be \[T, 64\], got \[3, 63\]"):
        router(torch.zeros(3, 63), packed, bias, top_k=2, scale=1.0)
    with pytest.raises(errors.InvalidArgument, match="router: weight must be float32, got bfloat"):
        router(x, pack_weight(torch.zeros(10, 64).bfloat16()), bias, top_k=2, scale=1.0)
    with pytest.raises(errors.InvalidArgument, match="router: bias must have at most 10 entries"):
        router(x, packed, torch.zeros(11), top_k=2, scale=1.0)
    with pytest.raises(errors.InvalidArgument, match="router: bias must be float32"):
        router(x, packed, bias.bfloat16(), top_k=2, scale=1.0)
    with pytest.raises(errors.InvalidArgument, match="router: top_k must be at least 1, got 0"):
        router(x, packed, bias, top_k=0, scale=1.0)
    with pytest.raises(errors.InvalidArgument, match=r"1 to 8 wide \(top_k\), got 9"):
        router(x, packed, bias, top_k=9, scale=1.0)
    many = pack_weight(torch.zeros(513, 64))
    with pytest.raises(errors.InvalidArgument, match="experts \\+ shared must be at most 512, got"):
        router(x, many, torch.zeros(512), top_k=2, scale=1.0)
    with pytest.raises(errors.InvalidArgument, match="router: x requires grad"):
        router(x.requires_grad_(), packed, bias, top_k=2, scale=1.0)
