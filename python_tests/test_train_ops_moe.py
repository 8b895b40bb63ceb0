"""moe in training: forward bits, gradients against float64 autograd, determinism, refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tml_core import _ext, errors
from tml_core.contract import GRAD_BLOCK
from tml_core.ops.moe import moe, moe_reference, pack_experts

E, S, K = 5, 2, 3
NAMES = ("x", "weights", "gammas", "gate_up", "down")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def layer(
    t: int, h: int, i: int, dtype: torch.dtype, e: int = E, s: int = S, k: int = K
) -> tuple[Tensor, ...]:
    """x, ids, weights, gammas, gate_up, down."""
    ids = draw(t, e, seed=3).topk(k, dim=-1).indices.sort(dim=-1).values.int()
    return (
        draw(t, h, dtype=dtype),
        ids,
        draw(t, k, seed=4).abs(),
        draw(t, s, seed=5).abs(),
        draw(e + s, 2 * i, h, dtype=dtype, seed=8) / h**0.5,
        draw(e + s, h, i, dtype=dtype, seed=9) / i**0.5,
    )


def grads_of(op: Callable[..., Tensor], args: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    """Gradients of NAMES in ``(op(*args) * dy).sum()``."""
    leaves = [a if i == 1 else a.detach().requires_grad_() for i, a in enumerate(args)]
    wrt = [leaf for i, leaf in enumerate(leaves) if i != 1]
    return torch.autograd.grad(op(*leaves), wrt, dy)


def bits(args: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    return list(grads_of(moe, args, dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("t", "h", "i"), [(0, 32, 16), (1, 32, 16), (19, 70, 40), (257, 48, 24)])
def test_training_forward_has_the_bits_of_serving(
    dtype: torch.dtype, t: int, h: int, i: int
) -> None:
    x, ids, weights, gammas, gate_up, down = args = layer(t, h, i, dtype)
    served = moe(x, ids, weights, gammas, pack_experts(gate_up, down, S))
    assert torch.equal(moe(*args), served)
    trained = moe(x.clone().requires_grad_(), ids, weights, gammas, gate_up, down)
    assert trained.requires_grad and torch.equal(trained, served)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("t", "h", "i"),
    [(0, 32, 16), (1, 33, 7), (19, 70, 40), (257, 48, 24), (1100, 17, 9)],
)
def test_moe_gradients_match_float64(dtype: torch.dtype, t: int, h: int, i: int) -> None:
    args, dy = layer(t, h, i, dtype), draw(t, h, dtype=dtype, seed=11)
    got = grads_of(moe, args, dy)
    exact = tuple(a if a.dtype == torch.int32 else a.double() for a in args)
    want = grads_of(moe_reference, exact, dy.double())
    # fp32: sums of up to t terms in another order. bf16: gate, up and their gradients are rounded
    # (2^-9 each), errors that average out in sums and stay near 1 % of the largest entries.
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for name, g, w in zip(NAMES, got, want, strict=True):
        source = args[0] if name == "x" else args[2 + NAMES.index(name) - 1]
        assert g.dtype == source.dtype and g.shape == source.shape, name
        scale = w.abs().max().item() if w.numel() else 0.0
        torch.testing.assert_close(
            g.double(), w, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_moe_gradients_of_extreme_gates_are_finite() -> None:
    x, ids, weights, gammas, gate_up, down = layer(30, 16, 16, torch.float32)
    args = (x * 300, ids, weights, gammas, gate_up, down)
    dy = draw(30, 16, seed=11)
    exact = tuple(a if a.dtype == torch.int32 else a.double() for a in args)
    for g, w in zip(
        grads_of(moe, args, dy), grads_of(moe_reference, exact, dy.double()), strict=True
    ):
        scale = w.abs().max().item()
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe_gradient_bits_do_not_depend_on_threads_isa_or_time(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    t = 2 * GRAD_BLOCK + 77  # shared experts: three blocks in two runs
    args, dy = layer(t, 44, 20, dtype), draw(t, 44, dtype=dtype, seed=11)
    expected = bits(args, dy)
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name, g, w in zip(NAMES, bits(args, dy), expected, strict=True):
                assert torch.equal(g, w), f"{name} on {isa} with {threads} threads"


def test_moe_gradients_repeat() -> None:
    args = layer(300, 64, 48, torch.bfloat16)
    dy = draw(300, 64, dtype=torch.bfloat16, seed=11)
    expected = bits(args, dy)
    for _ in range(50):
        assert all(torch.equal(g, w) for g, w in zip(bits(args, dy), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_gradients_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    t, part = 700, slice(333, 420)
    x, ids, weights, gammas, gate_up, down = args = layer(t, 40, 24, dtype)
    dy = draw(t, 40, dtype=dtype, seed=11)
    whole = bits(args, dy)
    alone = bits((x[part], ids[part], weights[part], gammas[part], gate_up, down), dy[part])
    for name, w, a in zip(NAMES[:3], whole, alone, strict=False):
        assert torch.equal(w[part], a), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_behind_the_tokens_adds_nothing(dtype: torch.dtype) -> None:
    t, real = 2 * GRAD_BLOCK + 9, GRAD_BLOCK + 77
    x, ids, weights, gammas, gate_up, down = args = layer(t, 20, 12, dtype)
    dy = draw(t, 20, dtype=dtype, seed=11)
    dy[real:] = 0
    padded = bits(args, dy)
    alone = bits((x[:real], ids[:real], weights[:real], gammas[:real], gate_up, down), dy[:real])
    for name, p, a in zip(NAMES, padded, alone, strict=True):
        assert torch.equal(p[:real] if name in NAMES[:3] else p, a), name


def test_tokens_of_other_experts_leave_an_expert_alone() -> None:
    x, _, weights, _, gate_up, down = layer(1300, 32, 16, torch.float32, s=0, k=1)
    dy = draw(1300, 32, seed=11)
    own = draw(1300, 1, seed=12)[:, 0] > 0
    ids = own.int()[:, None]
    gammas = torch.zeros(1300, 0)
    mixed = bits((x, ids, weights, gammas, gate_up, down), dy)
    alone = bits((x[own], ids[own], weights[own], gammas[own], gate_up, down), dy[own])
    assert torch.equal(mixed[3][1], alone[3][1]) and torch.equal(mixed[4][1], alone[4][1])
    assert mixed[3][0].any() and not alone[3][0].any() and not alone[3][2:].any()


def test_weight_gradients_add_blocks_of_tokens_in_order() -> None:
    """big + 1 + 1, block after block: fp32 keeps big."""
    t = 3 * GRAD_BLOCK
    x, dy = torch.zeros(t, 1), torch.zeros(t, 1)
    big = float(2**24)
    for block, value in enumerate((big, 1.0, 1.0)):
        x[block * GRAD_BLOCK] = 1.0
        dy[block * GRAD_BLOCK] = value
    ids, ones, none = torch.zeros(t, 1, dtype=torch.int32), torch.ones(t, 1), torch.zeros(t, 0)
    gate_up, down = torch.tensor([[[100.0], [0.01]]]), torch.ones(1, 1, 1)
    ddown = bits((x, ids, ones, none, gate_up, down), dy)[4]
    a = torch.nn.functional.silu(torch.tensor(100.0)) * 0.01
    assert float(a) == 1.0
    assert float(ddown) == big


def test_dense_mlp_is_one_expert() -> None:
    x, _, _, _, gate_up, down = layer(130, 48, 40, torch.float32, e=1, s=0, k=1)
    ids, scale = torch.zeros(130, 1, dtype=torch.int32), torch.full((130, 1), 0.5)
    dy = draw(130, 48, seed=11)
    got = bits((x, ids, scale, torch.zeros(130, 0), gate_up, down), dy)

    def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (x @ gate_up[0].T).chunk(2, dim=-1)
        return 0.5 * (torch.nn.functional.silu(gate) * up) @ down[0].T

    leaves = [a.double().requires_grad_() for a in (x, gate_up, down)]
    want = torch.autograd.grad(mlp(*leaves), leaves, dy.double())
    for g, w in zip((got[0], got[3], got[4]), want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4 * w.abs().max().item())


def test_only_what_is_asked_for_is_computed() -> None:
    args, dy = layer(40, 32, 16, torch.bfloat16), draw(40, 32, dtype=torch.bfloat16, seed=11)
    everything = bits(args, dy)
    x, ids, weights, gammas, gate_up, down = args
    leaf = x.clone().requires_grad_()
    moe(leaf, ids, weights, gammas, gate_up, down).backward(dy)
    assert leaf.grad is not None and torch.equal(leaf.grad, everything[0])
    matrices = gate_up.clone().requires_grad_()
    moe(x, ids, weights, gammas, matrices, down).backward(dy)
    assert matrices.grad is not None and torch.equal(matrices.grad, everything[3])
    share = weights.clone().requires_grad_()
    moe(x, ids, share, gammas, gate_up, down).backward(dy)
    assert share.grad is not None and torch.equal(share.grad, everything[1])


def test_rows_of_wider_buffers() -> None:
    x, ids, weights, gammas, gate_up, down = layer(21, 32, 16, torch.bfloat16)
    dy = draw(21, 32, dtype=torch.bfloat16, seed=11)
    expected = bits((x, ids, weights, gammas, gate_up, down), dy)
    wide, wide_dy = (torch.full((21, 50), float("nan"), dtype=x.dtype) for _ in range(2))
    wide[:, :32], wide_dy[:, :32] = x, dy
    got = bits((wide[:, :32], ids, weights, gammas, gate_up, down), wide_dy[:, :32])
    assert all(torch.equal(g, w) for g, w in zip(got, expected, strict=True))
    across = bits((x.T.contiguous().T, ids, weights, gammas, gate_up, down), dy)
    assert all(torch.equal(g, w) for g, w in zip(across, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe_passes_opcheck(dtype: torch.dtype) -> None:
    args = [a if a.dtype == torch.int32 else a.requires_grad_() for a in layer(19, 32, 16, dtype)]
    torch.library.opcheck(torch.ops.tml.moe.default, (*args, True))
    args = [a.detach() for a in args]
    torch.library.opcheck(torch.ops.tml.moe.default, (*args, False))
    saved = torch.ops.tml.moe(*args, True)[1]
    dy = draw(19, 32, dtype=dtype, seed=11)
    x, ids, weights, gammas, gate_up, down = args
    torch.library.opcheck(
        torch.ops.tml.moe_bwd.default,
        (dy, x, ids, weights, gammas, saved, gate_up, down, True, True),
    )


def test_moe_compiles_whole() -> None:
    args, dy = layer(24, 32, 16, torch.bfloat16), draw(24, 32, dtype=torch.bfloat16, seed=11)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    got = grads_of(compiled, args, dy)
    assert all(torch.equal(g, w) for g, w in zip(got, bits(args, dy), strict=True))


def test_in_place_updates_of_the_experts_are_seen() -> None:
    """Also those that no version counter records."""
    x, ids, weights, gammas, gate_up, down = layer(9, 32, 16, torch.float32)
    before = moe(x, ids, weights, gammas, gate_up, down)
    down.data.mul_(2.0)
    after = moe(x, ids, weights, gammas, gate_up, down)
    assert torch.equal(after, moe_doubled(before))


def moe_doubled(y: Tensor) -> Tensor:
    return y * 2.0  # a power of two scales every term exactly


def test_training_keeps_less_than_eager() -> None:
    """Kept between the passes: inputs, and gate and up of every pair in the model dtype."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    args = layer(200, 64, 32, torch.bfloat16)
    leaves = [a if i == 1 else a.requires_grad_() for i, a in enumerate(args)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        moe(*leaves)
    inputs = sum(a.untyped_storage().nbytes() for a in args)
    assert sum(kept.values()) == inputs + 200 * (K + S) * 2 * 32 * 2


def test_moe_training_refusals() -> None:
    x, ids, weights, gammas, gate_up, down = layer(4, 32, 16, torch.float32)
    with pytest.raises(errors.InvalidArgument, match="moe: down must be given with unpacked"):
        moe(x, ids, weights, gammas, gate_up)
    with pytest.raises(errors.InvalidArgument, match="moe: down must be None with packed"):
        moe(x, ids, weights, gammas, pack_experts(gate_up, down, S), down)
    with pytest.raises(errors.InvalidArgument, match=r"moe: gate_up must be \[E, 2I, H\]"):
        moe(x, ids, weights, gammas, gate_up[:, :31], down)
    with pytest.raises(errors.InvalidArgument, match=r"moe: down must be torch.float32 \[7, 32, 1"):
        moe(x, ids, weights, gammas, gate_up, down[:, :, :8])
    with pytest.raises(errors.InvalidArgument, match=r"moe: x must be torch.float32 \[T, 32\]"):
        moe(x[:, :31], ids, weights, gammas, gate_up, down)
    with pytest.raises(errors.InvalidArgument, match=r"moe: x must be torch\.float32"):
        moe(x.bfloat16(), ids, weights, gammas, gate_up, down)
    with pytest.raises(errors.InvalidArgument, match="moe: weights must be shaped like expert_ids"):
        moe(x, ids, weights[:, :2], gammas, gate_up, down)
    with pytest.raises(errors.InvalidArgument, match=r"moe: gammas must be \[T, at most 7\]"):
        moe(x, ids, weights, gammas[0], gate_up, down)
    with pytest.raises(errors.InvalidArgument, match=r"moe: expert_ids must be in \[0, 5\), got 5"):
        moe(x, torch.full_like(ids, 5), weights, gammas, gate_up, down)
    with pytest.raises(errors.InvalidArgument, match="ascending and distinct in each row"):
        moe(x, ids.flip(-1), weights, gammas, gate_up, down)
    with pytest.raises(errors.InvalidArgument, match="moe: weights must be float32"):
        moe(x, ids, weights.bfloat16(), gammas, gate_up, down)
    saved = torch.ops.tml.moe(x, ids, weights, gammas, gate_up, down, True)[1]
    with pytest.raises(errors.InvalidArgument, match="moe_bwd: gate_up must be"):
        torch.ops.tml.moe_bwd(x, x, ids, weights, gammas, saved[:3], gate_up, down, True, True)
