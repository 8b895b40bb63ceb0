"""The device's gradients through their bindings: rows against the CPU's bits, products against
torch. On a device where there is one, and on the host, on kernels that run as fibers."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fibers_kit import fibers
from tml_core.errors import InvalidArgument
from tml_core.ops import cuda, cuda_train
from tml_core.ops._common import huge_empty
from tml_core.ops.embed import dmel_embed, embed
from tml_core.ops.moe import moe_reference
from tml_core.ops.rms_norm import rms_norm
from tml_core.ops.router import router
from tml_core.ops.sconv_norm_packed import sconv_norm_packed


@pytest.fixture(scope="module", autouse=True, params=["fibers", "device"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the kernels run."""
    if request.param == "device":
        if why := cuda.problem():
            pytest.skip(f"{why}: run `make gpu-check` on an H100 or H200")
        yield torch.device("cuda", 0)
        return
    module = fibers()
    if module is None:
        pytest.skip("needs _fibers of today's kernels: make test-cpp")
    with pytest.MonkeyPatch.context() as patch:
        for user in (cuda, cuda_train):
            patch.setattr(user, "_ext", module)
            # torch aligns host memory less than a device's.
            patch.setattr(user, "_workspace", lambda size, _: huge_empty((size,), torch.uint8))
        yield torch.device("cpu")


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def check_equal(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours.cpu(), theirs)


def check_near(ours: Tensor, theirs: Tensor, scale: float) -> None:
    """bf16 operands of a sum rounded once or twice; scale: of a typical result."""
    error = (ours.cpu().float() - theirs.float()).abs()
    assert bool((error <= 2.0**-6 * theirs.float().abs() + 2.0**-7 * scale).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_have_the_cpu_gradients(device: torch.device, dtype: torch.dtype) -> None:
    eps = 1e-6
    x, weight = leaf(randn(7, 40, seed=1, dtype=dtype)), leaf(randn(40, seed=2, dtype=dtype))
    dy = randn(7, 40, seed=3, dtype=dtype)
    rms_norm(x, weight, eps, 2.0, "gelu").backward(dy)
    operands = (tensor.detach().to(device) for tensor in (dy, x, weight))
    dx, dweight = cuda_train.rms_norm_bwd(*operands, eps, 2.0, True)
    check_equal(dx, x.grad)
    check_equal(dweight, weight.grad)

    ids, table = torch.tensor([3, 0, 3, 3, 5, 0, 3]), leaf(randn(9, 40, seed=4, dtype=dtype))
    weight = leaf(weight.detach())
    embed(ids, table, weight, eps).backward(dy)
    operands = (tensor.detach().to(device) for tensor in (dy, ids, table, weight))
    dtable, dweight = cuda_train.embed_bwd(*operands, eps)
    check_equal(dtable, table.grad)
    check_equal(dweight, weight.grad)

    bins = torch.randint(0, 4, (7, 3), generator=torch.Generator().manual_seed(5)).int()
    levels, weight = leaf(randn(12, 40, seed=6, dtype=dtype)), leaf(weight.detach())
    dmel_embed(bins, levels, 4, weight, eps).backward(dy)
    dlevels, dweight = cuda_train.dmel_embed_bwd(
        dy.to(device), bins.to(device), levels.detach().to(device), 4,
        weight.detach().to(device), eps,
    )  # fmt: skip
    check_equal(dlevels, levels.grad)
    check_equal(dweight, weight.grad)


@pytest.mark.parametrize("has_norm", [True, False])
def test_convolutions_have_the_cpu_gradients(device: torch.device, has_norm: bool) -> None:
    x, residual = leaf(randn(11, 48, seed=1)), leaf(randn(11, 48, seed=2))
    taps = leaf(randn(48, 4, seed=3, dtype=torch.float32))
    weight = leaf(randn(48, seed=4)) if has_norm else None
    cu_tokens = torch.tensor([0, 5, 5, 6, 11], dtype=torch.int32)
    normed, total = sconv_norm_packed(x, residual, taps, weight, 1e-6, cu_tokens)
    dnormed, dtotal = randn(11, 48, seed=5), randn(11, 48, seed=6)
    loss = (total * dtotal).sum() if normed is None else (total * dtotal + normed * dnormed).sum()
    loss.backward()
    ours = cuda_train.sconv_norm_packed_bwd(
        dnormed.to(device) if has_norm else None, dtotal.to(device), x.detach().to(device),
        total.detach().to(device), taps.detach().to(device),
        None if weight is None else weight.detach().to(device), 1e-6, cu_tokens.to(device),
    )  # fmt: skip
    for found, leaf_ in zip(ours, (x, residual, taps, weight), strict=True):
        if leaf_ is not None:
            check_equal(found, leaf_.grad)


def test_router_has_the_cpu_gradients(device: torch.device) -> None:
    x, weight = leaf(randn(13, 40, seed=1)), leaf(randn(8, 40, seed=2, dtype=torch.float32))
    scale, bias = torch.full((1,), 2.5, requires_grad=True), torch.zeros(6)
    out = router(x, weight, bias, top_k=2, scale=scale, return_logits=True)
    dweights = randn(13, 2, seed=3, dtype=torch.float32)
    dgammas = randn(13, 2, seed=4, dtype=torch.float32)
    ((out.weights * dweights).sum() + (out.gammas * dgammas).sum()).backward()
    assert out.logits is not None
    operands = (x, weight, out.expert_ids, out.logits, dweights, dgammas)
    ours = cuda_train.router_bwd(*(tensor.detach().to(device) for tensor in operands), 2.5)
    for found, leaf_ in zip(ours, (x, weight, scale), strict=True):
        check_equal(found, leaf_.grad)


def test_products_are_torchs(device: torch.device) -> None:
    x, w, dy = randn(70, 40, seed=1), randn(24, 40, seed=2), randn(70, 24, seed=3)
    on = (x.to(device), w.to(device), dy.to(device))
    assert torch.equal(
        cuda_train.linear_plain(on[0], on[1]), cuda.linear(on[0], cuda.pack_weight(on[1]))
    )
    check_near(cuda_train.linear_dgrad(on[2], on[1]), dy.float() @ w.float(), 24**0.5)
    check_near(cuda_train.linear_wgrad(on[2], on[0]), dy.float().T @ x.float(), 70**0.5)


def test_log_probabilities_have_torchs_gradients(device: torch.device) -> None:
    h, w = leaf(randn(20, 32, seed=1, dtype=torch.float32) / 4), leaf(randn(50, 32, seed=2))
    h = leaf(h.detach().bfloat16())
    targets = torch.randint(0, 48, (20,), generator=torch.Generator().manual_seed(3))
    g = randn(20, seed=4, dtype=torch.float32)
    ge = randn(20, seed=5, dtype=torch.float32)
    logp = (h.float() @ w.float()[:48].T).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    ((chosen * g).sum() + (entropy * ge).sum()).backward()
    plain = w.detach().to(device)
    packed = cuda.pack_weight(plain[:48])
    logprobs, entropies = cuda_train.linear_logp(h.detach().to(device), packed, targets.to(device),
                                                 True)  # fmt: skip
    assert torch.allclose(logprobs.cpu(), chosen, atol=1e-4)
    assert entropies is not None
    assert torch.allclose(entropies.cpu(), entropy, atol=1e-4)
    again, dh, dw = cuda_train.linear_logp_bwd(
        h.detach().to(device), packed, plain, targets.to(device), g.to(device), ge.to(device)
    )
    assert torch.equal(again, logprobs)
    assert h.grad is not None
    assert w.grad is not None
    check_near(dh, h.grad, 2.0)
    check_near(dw, w.grad, 2.0)
    assert not bool(dw[48:].any())


def test_experts_have_torchs_gradients(device: torch.device) -> None:
    tokens, hidden, width, experts, shared, top_k = 30, 40, 24, 4, 1, 2
    x = leaf(randn(tokens, hidden, seed=1))
    ids = torch.stack([torch.randperm(experts)[:top_k].sort().values for _ in range(tokens)]).int()
    weights = leaf(randn(tokens, top_k, seed=2, dtype=torch.float32))
    gammas = leaf(randn(tokens, shared, seed=3, dtype=torch.float32))
    gate_up = leaf(randn(experts + shared, 2 * width, hidden, seed=4) / 8)
    down = leaf(randn(experts + shared, hidden, width, seed=5) / 8)
    dy = randn(tokens, hidden, seed=6)
    leaves = (x, weights, gammas, gate_up, down)
    wide = [leaf(tensor.detach().float()) for tensor in leaves]
    moe_reference(wide[0], ids, wide[1], wide[2], wide[3], wide[4]).backward(dy.float())
    on = [tensor.detach().to(device) for tensor in leaves]
    packed = cuda.pack_experts(on[3], on[4], shared)
    y, saved = cuda_train.moe_saved(on[0], ids.to(device), on[1], on[2], packed)
    assert torch.equal(y, cuda.moe(on[0], ids.to(device), on[1], on[2], packed))
    ours = cuda_train.moe_bwd(
        dy.to(device), on[0], ids.to(device), on[1], on[2], saved, on[3], on[4]
    )
    for found, theirs in zip(ours, wide, strict=True):
        assert theirs.grad is not None
        check_near(found, theirs.grad, 4.0 * float(theirs.grad.std()))


def test_what_is_wrong_is_named(device: torch.device) -> None:
    x = randn(3, 16, seed=1).to(device)
    with pytest.raises(InvalidArgument, match=r"cuda_linear_dgrad: w must be"):
        cuda_train.linear_dgrad(x, x[:, :8])
    with pytest.raises(InvalidArgument, match=r"cuda_rms_norm_bwd: weight must be"):
        cuda_train.rms_norm_bwd(x, x, x[0, :8], 1e-6)
    with pytest.raises(InvalidArgument, match=r"cuda_moe_bwd: down must be"):
        cuda_train.moe_bwd(x, x, x, x, x, x, x, x)
    with pytest.raises(InvalidArgument, match=r"cuda_sconv_norm_packed_bwd: dnormed, norm_weight"):
        cuda_train.sconv_norm_packed_bwd(
            x, x, x, x, torch.zeros(16, 4).to(device), None, 1e-6, torch.tensor([0, 3]).int()
        )
