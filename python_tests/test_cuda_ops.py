"""The device ops on a device: against the references, and against themselves alone and in a batch.

Needs an H100 or H200 and a module built with TML_CUDA=ON: `make gpu-check` builds and runs this.
"""

import pytest
import torch
from torch import Tensor

from tml_core.contract import PAGE_LEN
from tml_core.ops import cuda
from tml_core.ops.linear import linear_reference
from tml_core.ops.moe import moe_reference
from tml_core.ops.rms_norm import rms_norm_reference
from tml_core.ops.session_attn import pack_rel_bank

pytestmark = pytest.mark.skipif(
    bool(cuda.problem()), reason=f"{cuda.problem()}: run `make gpu-check` on an H100 or H200"
)

TOKENS = [1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 300, 1000]


def randn(
    *shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def poison(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize(("depth", "rows"), [(64, 64), (2048, 5120), (1000, 200), (72, 65)])
def test_linear_is_the_reference(depth: int, rows: int) -> None:
    x, w = randn(300, depth, seed=1), randn(rows, depth, seed=2)
    y = cuda.linear(x, cuda.pack_weight(w), torch.float32)
    expected = linear_reference(x, w, torch.float32)
    # Cut to 25 bits below the largest term, at most depth / 16 + 1 times.
    bound = (x.float().abs() @ w.float().abs().T) * (depth / 16 + 2) * 2.0**-23
    assert bool(((y - expected).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_linear_rows_do_not_see_their_batch(out_dtype: torch.dtype) -> None:
    x, weight = randn(1000, 2048, seed=1), cuda.pack_weight(randn(1100, 2048, seed=2))
    whole = cuda.linear(x, weight, out_dtype)
    for count in TOKENS:
        assert torch.equal(cuda.linear(x[:count], weight, out_dtype), whole[:count]), count
    x[1::2] = float("nan")
    assert torch.equal(cuda.linear(x, weight, out_dtype)[::2], whole[::2])


def test_linear_repeats_its_bits() -> None:
    x, weight = randn(33, 4096, seed=1), cuda.pack_weight(randn(4096, 4096, seed=2))
    first = cuda.linear(x, weight)
    for _ in range(50):
        assert torch.equal(cuda.linear(x, weight), first)


def test_linear_in_a_graph_has_the_same_bits() -> None:
    x, weight = randn(16, 2048, seed=1), cuda.pack_weight(randn(2048, 2048, seed=2))
    expected = cuda.linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda.linear(x, weight)
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dim", [1, 19, 256, 2048, 4096])
def test_rms_norm_is_the_reference(dim: int) -> None:
    x, weight = randn(5, dim, seed=1), randn(dim, seed=2)
    torch.testing.assert_close(
        cuda.rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), rtol=2**-6, atol=1e-6
    )


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 300])
def test_moe_is_the_reference(tokens: int) -> None:
    experts, shared, top_k, hidden, width = 16, 2, 4, 256, 192
    gate_up = randn(experts + shared, 2 * width, hidden, seed=1, scale=0.1)
    down = randn(experts + shared, hidden, width, seed=2, scale=0.1)
    x = randn(tokens, hidden, seed=3)
    scores = randn(tokens, experts, seed=4, dtype=torch.float32)
    ids = scores.topk(top_k).indices.sort().values.int()
    weights, gammas = scores.gather(1, ids.long()), randn(tokens, shared, seed=5).float()
    packed = cuda.pack_experts(gate_up, down, shared)
    y = cuda.moe(x, ids, weights, gammas, packed)
    expected = moe_reference(x, ids, weights, gammas, gate_up, down)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.05)
    alone = [
        cuda.moe(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], gammas[t : t + 1], packed)
        for t in range(min(tokens, 20))
    ]
    assert torch.equal(torch.cat(alone), y[: len(alone)])


def attend(chunks: list[int], other: int, window: int, head_dim: int) -> Tensor:
    """One sequence fed in chunks beside another one: o of the first, [T, heads * D]."""
    heads, kv_heads, total, rel_len = 8, 2, sum(chunks), 300
    width = (heads + 2 * kv_heads) * head_dim + heads * 16
    rows, others = randn(total, width, seed=1), randn(total, width, seed=other)
    max_pages = total // PAGE_LEN + 1
    pages = poison(2 * max_pages, 1, kv_heads, 2, PAGE_LEN * head_dim)
    table = torch.arange(2 * max_pages, dtype=torch.int32).flip(0).view(2, max_pages).cuda()
    channels = kv_heads * head_dim
    conv_rows = torch.zeros(2, 1, 3, 2 * channels, dtype=torch.bfloat16, device="cuda")
    taps = randn(2, channels, 4, seed=7, scale=0.3, dtype=torch.float32)
    norms = randn(2, head_dim, seed=8)
    bank = pack_rel_bank(randn(16, rel_len, seed=9, scale=0.3).cpu()).data.cuda()
    out, done = [], 0
    for count in chunks:
        beside = count // 2
        start = torch.tensor([done // 2, done])
        # The other sequence's tokens come first, so that ours begin anywhere in a tile.
        qkvr = torch.cat([others[:beside], rows[done : done + count]])
        ends = torch.cat([torch.arange(beside) + start[0], torch.arange(count) + done])
        batch = {
            "cu_tokens": torch.tensor([0, beside, beside + count], dtype=torch.int32).cuda(),
            "slots": torch.tensor([1, 0], dtype=torch.int32).cuda(),
            "start_pos": start.cuda(),
        }
        q, r = cuda.attn_prologue(
            qkvr, taps[0], taps[1], norms[0], norms[1], 1e-6, num_heads=heads,
            num_kv_heads=kv_heads, pages=pages, layer=0, table=table, conv_rows=conv_rows,
            conv_layer=0, k_channel=0, v_channel=channels, log_floor=100.0, log_alpha=0.1, **batch,
        )  # fmt: skip
        o = cuda.session_attn(
            q, r, bank, rel_len, pages=pages, layer=0, table=table, visible_end_T=ends.cuda(),
            window=window, **batch,
        )  # fmt: skip
        out.append(o[beside:])
        done += count
    return torch.cat(out)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [0, 512])
def test_attention_has_one_set_of_bits(head_dim: int, window: int) -> None:
    whole = attend([2300], 2, window, head_dim)
    assert bool(torch.isfinite(whole).all())
    for chunks in ([2200, 100], [1, 2, 3, 1000, 1294], [16] * 20 + [1980]):
        assert torch.equal(attend(chunks, 3, window, head_dim), whole), chunks


def test_head_has_the_same_numbers_everywhere() -> None:
    h, weight = randn(65, 256, seed=1), cuda.pack_weight(randn(1000, 256, seed=2, scale=0.2))
    zeros = torch.zeros(65, device="cuda")
    seeds = torch.arange(65, device="cuda")
    tokens, logprobs = cuda.lm_head_sample(h, weight, zeros, seeds, seeds)
    assert torch.equal(cuda.lm_head_logprobs(h, weight, tokens), logprobs)
    logits = cuda.linear(h, weight, torch.float32)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1), rtol=0, atol=1e-4)
    warm = cuda.lm_head_sample(h, weight, zeros + 1, seeds, seeds)
    alone = cuda.lm_head_sample(h[9:10], weight, zeros[:1] + 1, seeds[9:10], seeds[9:10])
    assert torch.equal(warm[0][9:10], alone[0])
    assert torch.equal(warm[1][9:10], alone[1])


def test_filters_keep_what_they_say() -> None:
    rows, vocab = 40, 3000
    h, weight = randn(rows, 128, seed=1), cuda.pack_weight(randn(vocab, 128, seed=2, scale=0.1))
    logits = cuda.linear(h, weight, torch.float32)
    hot = torch.full((rows,), 3.0, device="cuda")
    seeds = torch.arange(rows, device="cuda")
    top_k = torch.full((rows,), 7, dtype=torch.int32, device="cuda")
    tokens, _ = cuda.lm_head_sample(h, weight, hot, seeds, seeds, top_k_T=top_k)
    assert bool((logits.topk(7).indices == tokens[:, None]).any(1).all())
    top_p = torch.full((rows,), 0.3, device="cuda")
    tokens, _ = cuda.lm_head_sample(h, weight, hot, seeds, seeds, top_p_T=top_p)
    mass, order = (logits / 3.0).softmax(-1).sort(-1, descending=True)
    rank = (order == tokens[:, None]).int().argmax(1, keepdim=True)
    before = (mass.cumsum(1) - mass).gather(1, rank)
    assert bool((before < 0.3 + 1e-4).all())
