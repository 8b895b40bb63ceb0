"""attn_prologue: q, k, v and r of the merged projection become what attention reads.

Shape suffixes: T tokens of the step, N heads, K KV heads, D head dim, R relative dim, C = K * D
channels, B sequences, S slots, L layers, P pages.
"""

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.contract import PAGE_LEN
from tml_core.errors import InvalidArgument
from tml_core.ops._common import num_threads, refuse_grad
from tml_core.ops.rms_norm import rms_norm_reference
from tml_core.ops.sconv_norm import short_conv_reference

__all__ = ["attn_prologue", "attn_prologue_reference", "read_page"]


def attn_prologue(
    qkvr: Tensor,
    num_heads: int,
    *,
    k_conv_C4: Tensor,
    v_conv_C4: Tensor,
    q_norm_D: Tensor,
    k_norm_D: Tensor,
    eps: float,
    log_floor: float = 0.0,
    log_alpha: float = 0.0,
    pages: Tensor,
    layer: int,
    table: Tensor,
    conv_rows: Tensor,
    conv_layer: int,
    k_channel: int,
    v_channel: int,
    cu_tokens: Tensor,
    slots: Tensor,
    start_pos: Tensor,
) -> tuple[Tensor, Tensor]:
    """Convolve k and v, normalise q and k per head, write K and V into pages; returns (q, r).

    qkvr: [T, N*D + 2*C + N*R] fp32 or bf16, rows dense: q, k, v, r of each token.
    k_conv_C4, v_conv_C4: fp32 [C, 4], oldest tap first. q_norm_D, k_norm_D: [D] of qkvr's dtype.
    log_floor > 0 scales q and r by 1 + log_alpha * ln(max((position + 1) / log_floor, 1)).
    pages: the pool [P, layers, K, 2, 128 * D], of which ``layer`` is written; table: int32
    [S, max_pages], a slot's logical pages. conv_rows: [S, L, 3, W]; of layer ``conv_layer``,
    channels [k_channel, k_channel + C) and [v_channel, v_channel + C) hold each slot's last three
    k and v, oldest first. Pages and conv_rows are updated in place.
    Sequence b of the step has tokens [cu_tokens[b], cu_tokens[b + 1]) (int32 [B + 1]), slot
    slots[b] (int32 [B]) and its first token at position start_pos[b] (int64 [B]).
    Returns q [T, N, D] and r [T, N, R]. Raises InvalidArgument, before anything is written, on a
    wrong dtype, shape, layout, batch, slot or table entry. D must be a multiple of 16.
    """
    refuse_grad(
        "attn_prologue",
        qkvr=qkvr,
        k_conv=k_conv_C4,
        v_conv=v_conv_C4,
        q_norm=q_norm_D,
        k_norm=k_norm_D,
    )
    if qkvr.ndim != 2 or num_heads < 1:
        raise InvalidArgument(
            "attn_prologue: qkvr must be [T, width] with num_heads >= 1, "
            f"got {list(qkvr.shape)} with num_heads {num_heads}"
        )
    num_tokens, width = qkvr.shape
    head_dim = q_norm_D.numel()
    r_width = width - num_heads * head_dim - 2 * k_conv_C4.shape[0]
    if r_width < 0 or r_width % num_heads != 0:
        raise InvalidArgument(
            f"attn_prologue: qkvr must be {num_heads} * {head_dim} + 2 * {k_conv_C4.shape[0]} + "
            f"{num_heads} * d_rel wide, got {width}"
        )
    q_TND = torch.empty(num_tokens, num_heads, head_dim, dtype=qkvr.dtype)
    r_TNR = torch.empty(num_tokens, num_heads, r_width // num_heads, dtype=qkvr.dtype)
    _ext.attn_prologue(
        qkvr,
        k_conv_C4,
        v_conv_C4,
        q_norm_D,
        k_norm_D,
        eps,
        log_floor,
        log_alpha,
        pages,
        layer,
        table,
        conv_rows,
        conv_layer,
        k_channel,
        v_channel,
        cu_tokens,
        slots,
        start_pos,
        q_TND,
        r_TNR,
        num_threads(),
    )
    return q_TND, r_TNR


def read_page(block: Tensor) -> tuple[Tensor, Tensor]:
    """(K [128, D], V [128, D]) of one page, layer and KV head: pages[page, layer, head]."""
    k, v = block
    head_dim = k.numel() // PAGE_LEN
    per_step = 2 if block.dtype == torch.bfloat16 else 1
    k_steps = k.view(head_dim // per_step, PAGE_LEN, per_step)
    v_steps = v.view(PAGE_LEN // per_step, head_dim, per_step)
    return (
        k_steps.permute(1, 0, 2).reshape(PAGE_LEN, head_dim),
        v_steps.permute(0, 2, 1).reshape(PAGE_LEN, head_dim),
    )


def attn_prologue_reference(
    qkvr: Tensor,
    num_heads: int,
    *,
    k_conv_C4: Tensor,
    v_conv_C4: Tensor,
    q_norm_D: Tensor,
    k_norm_D: Tensor,
    eps: float,
    log_floor: float = 0.0,
    log_alpha: float = 0.0,
    k_state_3C: Tensor,
    v_state_3C: Tensor,
    start_pos: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same function of one sequence in torch: (q, r, K, V, next k state, next v state)."""
    num_tokens, channels, head_dim = qkvr.shape[0], k_conv_C4.shape[0], q_norm_D.numel()
    q_width = num_heads * head_dim
    r_width = qkvr.shape[1] - q_width - 2 * channels
    q, k_TC, v_TC, r = qkvr.split([q_width, channels, channels, r_width], 1)
    k_TC, k_state_3C = short_conv_reference(k_TC, k_state_3C, k_conv_C4)
    v_TC, v_state_3C = short_conv_reference(v_TC, v_state_3C, v_conv_C4)
    q_TND = rms_norm_reference(q.reshape(num_tokens, num_heads, head_dim), q_norm_D, eps)
    k_TKD = rms_norm_reference(k_TC.view(num_tokens, channels // head_dim, head_dim), k_norm_D, eps)
    v_TKD = v_TC.view(num_tokens, channels // head_dim, head_dim)
    r_TNR = r.reshape(num_tokens, num_heads, r_width // num_heads)
    if log_floor > 0:
        position_T = torch.arange(start_pos, start_pos + num_tokens)
        ratio_T = (position_T + 1).float() / log_floor
        tau_T11 = (1 + log_alpha * ratio_T.clamp(min=1).log())[:, None, None]
        q_TND = (q_TND.float() * tau_T11).to(qkvr.dtype)
        r_TNR = (r_TNR.float() * tau_T11).to(qkvr.dtype)
    return q_TND, r_TNR, k_TKD, v_TKD, k_state_3C, v_state_3C
