"""moe: value, bits for any batch, thread count and ISA, refusals."""

import pytest
import torch

from tml_core import _ext, errors
from tml_core.ops.moe import moe, moe_reference, pack_experts

E, S, K = 7, 2, 3


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def routing(t: int, experts: int = E, k: int = K, seed: int = 3) -> tuple[torch.Tensor, ...]:
    scores = draw(t, experts, seed=seed)
    ids = scores.topk(k, dim=-1).indices.sort(dim=-1).values.int()
    return ids, draw(t, k, seed=seed + 1).abs(), draw(t, S, seed=seed + 2).abs()


def weights(h: int, i: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = draw(E + S, 2 * i, h, dtype=dtype, seed=8) / h**0.5
    return gate_up, draw(E + S, h, i, dtype=dtype, seed=9) / i**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("t", "h", "i"), [(0, 32, 16), (1, 32, 16), (19, 70, 40), (257, 48, 24)])
def test_moe_matches_reference(dtype: torch.dtype, t: int, h: int, i: int) -> None:
    gate_up, down = weights(h, i, dtype)
    x, (ids, w, gammas) = draw(t, h, dtype=dtype), routing(t)
    y = moe(x, ids, w, gammas, pack_experts(gate_up, down, S))
    expected = moe_reference(x, ids, w, gammas, gate_up, down)
    # fp32: other summation order; bf16: h may round the other way, 2^-9 of values about 5
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe_bits_do_not_depend_on_batch_threads_or_isa(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    gate_up, down = weights(64, 48, dtype)
    packed = pack_experts(gate_up, down, S)
    x, (ids, w, gammas) = draw(45, 64, dtype=dtype), routing(45)
    expected = moe(x, ids, w, gammas, packed)
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(moe(x, ids, w, gammas, packed), expected)
            for part in (slice(0, 1), slice(1, 14), slice(14, 45)):
                y = moe(x[part], ids[part], w[part], gammas[part], packed)
                assert torch.equal(y, expected[part])


def test_moe_chunks_of_tokens_keep_the_bits() -> None:
    gate_up, down = weights(32, 16, torch.bfloat16)
    packed = pack_experts(gate_up, down, S)
    x, (ids, w, gammas) = draw(1500, 32, dtype=torch.bfloat16), routing(1500)
    whole = moe(x, ids, w, gammas, packed)
    tail = moe(x[1000:], ids[1000:], w[1000:], gammas[1000:], packed)
    assert torch.equal(whole[1000:], tail)


def test_moe_with_every_token_on_one_expert_is_a_dense_mlp() -> None:
    gate_up, down = weights(32, 40, torch.float32)
    packed = pack_experts(gate_up[:1], down[:1])
    x = draw(30, 32)
    ids, scale = torch.zeros(30, 1, dtype=torch.int32), torch.full((30, 1), 0.5)
    y = moe(x, ids, scale, torch.zeros(30, 0), packed)
    gate, up = (x @ gate_up[0].T).chunk(2, dim=-1)
    expected = 0.5 * (torch.nn.functional.silu(gate) * up) @ down[0].T
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # other summation order


def test_moe_refusals() -> None:
    gate_up, down = weights(32, 16, torch.float32)
    packed = pack_experts(gate_up, down, S)
    x, (ids, w, gammas) = draw(4, 32), routing(4)
    with pytest.raises(errors.InvalidArgument, match=r"moe: x must be \[T, 32\], got \[4, 31\]"):
        moe(x[:, :31], ids, w, gammas, packed)
    with pytest.raises(errors.InvalidArgument, match=r"moe: expert_ids must be in \[0, 7\), got 7"):
        moe(x, torch.full_like(ids, 7), w, gammas, packed)
    with pytest.raises(errors.InvalidArgument, match="ascending and distinct in each row"):
        moe(x, ids.flip(-1).contiguous(), w, gammas, packed)
    with pytest.raises(errors.InvalidArgument, match="moe: expert_ids must be int32, got int64"):
        moe(x, ids.long(), w, gammas, packed)
    with pytest.raises(errors.InvalidArgument, match=r"moe: gammas must be \[T, 2\]"):
        moe(x, ids, w, gammas[:, :1], packed)
    with pytest.raises(errors.InvalidArgument, match="moe: weights requires grad"):
        moe(x, ids, w.requires_grad_(), gammas, packed)
    with pytest.raises(errors.InvalidArgument, match="pack_experts: down must be"):
        pack_experts(gate_up, down[:, :, :8])
