"""Gradients of attention and of the vocabulary head, against eager torch."""

from typing import Any

import pytest
import torch

from tml_core.ops.linear_logp import linear_logp
from tml_core.ops.session_attn_train import session_attn_train

HEADS, KV_HEADS, DIM, REL = 8, 2, 128, 16


def eager_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    r: torch.Tensor,
    bank: torch.Tensor,
    window: int,
) -> torch.Tensor:
    """One causal sequence with the bias materialised, as eager torch does it."""
    length, rel_len = q.shape[0], bank.shape[1]
    positions = torch.arange(length)
    distance = positions[:, None] - positions
    visible = (distance >= 0) & ((distance < window) if window else True)
    index = distance.clamp(0, rel_len - 1)[:, None].expand(-1, HEADS, -1)
    bias = (r @ bank).gather(2, index) * (distance < rel_len)[:, None]
    bias = bias.masked_fill(~visible[:, None], -torch.inf).transpose(0, 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        attn_mask=bias[None],
        scale=1 / DIM,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).reshape(length, HEADS * DIM)


@pytest.mark.parametrize(("length", "window"), [(512, 0), (1024, 0), (1024, 512)])
def test_session_attn_train(measure: Any, length: int, window: int) -> None:
    """Forward and backward of one causal sequence, bf16, 8 query heads on 2 KV heads of 128."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().requires_grad_()

    q, k, v = (draw(length, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
    r, bank = draw(length, HEADS, REL), draw(REL, window or 1024)
    d_out = torch.randn(length, HEADS * DIM, generator=generator).bfloat16()
    cu, visible_end = torch.tensor([0, length], dtype=torch.int32), torch.arange(length)

    @torch.enable_grad()
    def ours() -> tuple[torch.Tensor, ...]:
        out, _ = session_attn_train(
            q, k, v, r, bank, cu_tokens=cu, visible_end_T=visible_end, window=window
        )
        return torch.autograd.grad(out, (q, k, v, r, bank), d_out)

    @torch.enable_grad()
    def theirs() -> tuple[torch.Tensor, ...]:
        out = eager_attention(q, k, v, r, bank, window)
        return torch.autograd.grad(out, (q, k, v, r, bank), d_out)

    for grad, expected in zip(ours(), theirs(), strict=True):
        assert (grad.float() - expected.float()).norm() < 0.05 * expected.float().norm()
    seen = sum(min(i + 1, window or length) for i in range(length))
    measure(
        f"attention fwd+bwd L{length} w{window}",
        ours,
        peer=theirs,
        flops=7 * 2 * seen * HEADS * DIM,
        rounds=5,
    )


def test_linear_logp(measure: Any) -> None:
    """Forward and backward of a [32768, 1024] head on 512 tokens, bf16."""
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, vocab = 512, 1024, 32768
    h = torch.randn(tokens, hidden, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, hidden, generator=generator) / 32).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)

    @torch.enable_grad()
    def ours() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(-linear_logp(h, weight, targets).mean(), (h, weight))

    @torch.enable_grad()
    def theirs() -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(h, weight).float()
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return torch.autograd.grad(loss, (h, weight))

    for grad, expected in zip(ours(), theirs(), strict=True):
        assert (grad.float() - expected.float()).norm() < 0.05 * expected.float().norm()
    measure(
        "linear_logp fwd+bwd T512 H1024 V32768",
        ours,
        peer=theirs,
        flops=4 * 2 * tokens * hidden * vocab,
        rounds=5,
    )
