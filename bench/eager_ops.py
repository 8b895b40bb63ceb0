"""The trainer's ops in eager torch, as fast as its own kernels make them: oneDNN products, batched
attention, no promise about bits. Sequences must be of one length, which helps it.

Legend: B sequences, S positions of one, T = B * S, N query heads, K KV heads, D head dim, H hidden,
R relative extent.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tml_core.ops.hmlp import hmlp_reference
from tml_core.ops.router import Routing
from tml_core.train.op_set import OpSet

__all__ = ["EAGER"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, divisor: float = 1.0) -> Tensor:
    y = functional.rms_norm(x, weight.shape, weight, eps)
    return y if divisor == 1.0 else y / divisor


def _conv(x_TC: Tensor, taps_C4: Tensor, num_sequences: int) -> Tensor:
    """x + a causal depthwise convolution of it, sequence by sequence."""
    x_BCS = x_TC.view(num_sequences, -1, x_TC.shape[1]).transpose(1, 2).float()
    y_BCS = functional.conv1d(functional.pad(x_BCS, (3, 0)), taps_C4[:, None], groups=x_TC.shape[1])
    return (x_BCS + y_BCS).transpose(1, 2).reshape(x_TC.shape).to(x_TC.dtype)


def attn_prologue(
    qkvr: Tensor,
    num_heads: int,
    *,
    k_conv_C4: Tensor,
    v_conv_C4: Tensor,
    q_norm_D: Tensor,
    k_norm_D: Tensor,
    eps: float,
    log_floor: float,
    log_alpha: float,
    cu_tokens: Tensor,
) -> tuple[Tensor, ...]:
    head_dim, channels = len(q_norm_D), len(k_conv_C4)
    q_width = num_heads * head_dim
    widths = [q_width, channels, channels, qkvr.shape[1] - q_width - 2 * channels]
    q, k, v, r = qkvr.split(widths, dim=1)
    num_sequences = len(cu_tokens) - 1
    q = rms_norm(q.unflatten(1, (num_heads, head_dim)), q_norm_D, eps)
    k = _conv(k, k_conv_C4, num_sequences).unflatten(1, (-1, head_dim))
    v = _conv(v, v_conv_C4, num_sequences).unflatten(1, (-1, head_dim))
    r = r.unflatten(1, (num_heads, -1))
    if log_floor:
        length = len(qkvr) // num_sequences
        position = torch.arange(1, length + 1).repeat(num_sequences)
        tau = 1 + log_alpha * (position / log_floor).clamp(min=1).log()
        q, r = ((x * tau[:, None, None]).to(x.dtype) for x in (q, r))
    return q, rms_norm(k, k_norm_D, eps), v, r


def session_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    bank_CR: Tensor,
    *,
    cu_tokens: Tensor,
    visible_end_T: Tensor,
    window: int,
) -> tuple[Tensor, None]:
    del visible_end_T  # causal here
    num_sequences = len(cu_tokens) - 1
    length, num_heads, head_dim = len(q) // num_sequences, q.shape[1], q.shape[2]

    def heads_first(x: Tensor) -> Tensor:
        return x.view(num_sequences, length, *x.shape[1:]).transpose(1, 2)

    # Row q of the profile holds the bias of distances 0, 1, ...; shifted so that keys line up.
    profile = heads_first(r) @ bank_CR[:, : min(bank_CR.shape[1], length)]
    padded = functional.pad(profile.flip(-1), (length - profile.shape[-1] + 1, 0))
    bias = padded.view(num_sequences, num_heads, length + 1, length)[:, :, 1:]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    is_hidden = (distance < 0) if not window else (distance < 0) | (distance >= window)
    out = functional.scaled_dot_product_attention(
        heads_first(q),
        heads_first(k),
        heads_first(v),
        attn_mask=bias.masked_fill(is_hidden, -math.inf),
        scale=1.0 / head_dim,
        enable_gqa=True,
    )
    return out.transpose(1, 2).reshape(len(q), num_heads * head_dim), None


def sconv_norm(
    x: Tensor,
    residual: Tensor,
    taps_H4: Tensor,
    norm_H: Tensor | None,
    eps: float,
    cu_tokens: Tensor,
) -> tuple[Tensor | None, Tensor]:
    total = residual + _conv(x, taps_H4, len(cu_tokens) - 1)
    return None if norm_H is None else rms_norm(total, norm_H, eps), total


def router(x: Tensor, weight: Tensor, bias_E: Tensor, *, top_k: int, scale: Tensor) -> Routing:
    logits = functional.linear(x.float(), weight)
    num_experts = len(bias_E)
    choice = logits[:, :num_experts].sigmoid() + bias_E
    ids = choice.topk(top_k, dim=1).indices.sort(dim=1).values
    terms = torch.cat([logits.gather(1, ids), logits[:, num_experts:]], dim=1)
    shares = functional.logsigmoid(terms).softmax(dim=1) * scale
    return Routing(ids.int(), shares[:, :top_k], shares[:, top_k:], logits)


def moe(
    x: Tensor, ids: Tensor, weights: Tensor, gammas: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Tokens grouped by expert, each group two products."""

    def mlp(expert: int, x: Tensor, scale: Tensor) -> Tensor:
        gate, up = functional.linear(x, gate_up[expert]).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up * scale.to(x.dtype), down[expert])

    num_routed = len(gate_up) - gammas.shape[1]
    y = torch.zeros_like(x)
    for expert in range(num_routed):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        y = y.index_add(0, token, mlp(expert, x[token], weights[token, choice, None]))
    for shared in range(gammas.shape[1]):
        y = y + mlp(num_routed + shared, x, gammas[:, shared, None])
    return y


def linear_logp(
    h: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, with_entropy: bool
) -> tuple[Tensor, None]:
    assert not with_entropy
    logits = functional.linear(h, weight[:vocab_size]).float()
    return -functional.cross_entropy(logits, targets, reduction="none"), None


def linear_nll(
    h: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    logprobs, _ = linear_logp(h, weight, targets, vocab_size, with_entropy=False)
    return -(logprobs * weights).sum(), logprobs.detach()


def embed(ids: Tensor, table: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(functional.embedding(ids, table), weight, eps)


def _no_sound(*_args: Any) -> Tensor:
    raise NotImplementedError("eager_ops: the bench has text only")


EAGER = OpSet(
    embed=embed,
    dmel_embed=_no_sound,
    hmlp=hmlp_reference,
    rms_norm=rms_norm,
    linear=functional.linear,
    attn_prologue=attn_prologue,
    session_attn=session_attn,
    sconv_norm=sconv_norm,
    router=router,
    moe=moe,
    linear_logp=linear_logp,
    linear_nll=linear_nll,
)
