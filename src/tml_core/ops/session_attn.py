"""session_attn: new tokens against the paged K and V of their sequences, with a relative bias.

Shape suffixes: T tokens of the step, N query heads, K KV heads, D head dim, C relative dim,
R relative extent, S keys of a sequence, B sequences.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.errors import InvalidArgument
from tml_core.ops._common import huge_empty, num_threads, refuse_grad

__all__ = ["RelBank", "pack_rel_bank", "session_attn", "session_attn_reference"]

_PAD = 128  # zero k-steps on both sides of the distances: a unit of keys reads past either end


@dataclass(frozen=True)
class RelBank:
    """Bias-against-distance profiles in the kernel's layout, distances descending.

    ``data`` is bf16 [ceil(C/2), 128 + R + 128, 2] or fp32 [C, 128 + R + 128]; ``rel_dim`` C and
    ``rel_len`` R are the sizes before padding.
    """

    data: Tensor
    rel_dim: int
    rel_len: int

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype


def pack_rel_bank(bank_CR: Tensor) -> RelBank:
    """Pack the [C, R] profiles (fp32 or bf16) of one layer once."""
    refuse_grad("pack_rel_bank", bank=bank_CR)
    if bank_CR.ndim != 2 or 0 in bank_CR.shape:
        raise InvalidArgument(f"pack_rel_bank: bank must be [C, R], got {list(bank_CR.shape)}")
    if bank_CR.dtype not in (torch.float32, torch.bfloat16):
        raise InvalidArgument(
            f"pack_rel_bank: bank must be float32 or bfloat16, got {bank_CR.dtype}"
        )
    rel_dim, rel_len = bank_CR.shape
    group = 2 if bank_CR.dtype == torch.bfloat16 else 1
    steps, width = -(-rel_dim // group), rel_len + 2 * _PAD
    rows = torch.zeros(steps * group, width, dtype=bank_CR.dtype)
    rows[:rel_dim, _PAD : _PAD + rel_len] = bank_CR.flip(1)
    shape = (steps, width, 2) if group == 2 else (steps, width)
    data = huge_empty(shape, bank_CR.dtype)
    data.copy_(rows.view(steps, group, width).transpose(1, 2).reshape(shape))
    return RelBank(data, rel_dim, rel_len)


def session_attn(
    q_TND: Tensor,
    r_TNC: Tensor,
    bank: RelBank,
    *,
    pages: Tensor,
    layer: int,
    table: Tensor,
    cu_tokens: Tensor,
    slots: Tensor,
    start_pos: Tensor,
    visible_end_T: Tensor,
    window: int = 0,
    scale: float | None = None,
    lse_TN: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the step's tokens over everything they see; returns o [T, N * D].

    Key k is visible to the token at position p iff k <= visible_end (its own entry), p - k < window
    (window 0: no limit) and its page is present. Score: scale * q.k + r.bank[p - k], the bias being
    0 outside 0 <= p - k < R. Query head n reads KV head n // (N / K).

    q_TND [T, N, D] and r_TNC [T, N, C]: normalised, log-scaled, fp32 or bf16, of the pages' dtype;
    D a multiple of 16 up to 128. ``pages`` [P, layers, K, 2, 128 * D] of which ``layer`` is read
    holds the step's own K and V already; ``table`` int32 [num_slots, max_pages], -1 = no page.
    ``cu_tokens`` int32 [B + 1], ``slots`` int32 [B], ``start_pos`` int64 [B], ``visible_end_T``
    int64 [T] as in the other step ops. ``scale`` defaults to 1 / D. ``lse_TN`` fp32 [T, N], if
    given, receives the natural log-sum-exp of the scores.
    A token's result depends only on its sequence up to visible_end, never on the batch, the cut of
    the step or the number of threads. Raises InvalidArgument on another dtype, shape, batch or
    page id.
    """
    refuse_grad("session_attn", q=q_TND, r=r_TNC, pages=pages)
    if q_TND.ndim != 3:
        raise InvalidArgument(f"session_attn: q must be [T, N, D], got {list(q_TND.shape)}")
    if r_TNC.ndim != 3 or r_TNC.shape[2] != bank.rel_dim:
        raise InvalidArgument(
            f"session_attn: r must be [T, N, {bank.rel_dim}], got {list(r_TNC.shape)}"
        )
    num_tokens, num_heads, head_dim = q_TND.shape
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=q_TND.dtype)
    _ext.session_attn(
        q_TND,
        r_TNC,
        bank.data,
        pages,
        layer,
        table,
        cu_tokens,
        slots,
        start_pos,
        visible_end_T,
        window,
        1.0 / head_dim if scale is None else scale,
        bank.rel_len,
        out,
        lse_TN,
        num_threads(),
    )
    return out


def session_attn_reference(
    q_TND: Tensor,
    r_TNC: Tensor,
    bank_CR: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    positions_T: Tensor,
    visible_end_T: Tensor,
    *,
    window: int = 0,
    scale: float | None = None,
    present_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence, dense, in the inputs' precision: (o [T, N * D], lse [T, N]).

    Row s of k and v is the key at position s; ``present_S`` bool [S] masks dropped pages.
    """
    num_tokens, num_heads, head_dim = q_TND.shape
    group = num_heads // k_SKD.shape[1]
    rel_len = bank_CR.shape[1]
    keys = torch.arange(k_SKD.shape[0])
    distance_TS = positions_T[:, None] - keys
    visible_TS = keys <= visible_end_T[:, None]
    if window > 0:
        visible_TS = visible_TS & (distance_TS < window)
    if present_S is not None:
        visible_TS = visible_TS & present_S
    k_SND, v_SND = (x.repeat_interleave(group, dim=1) for x in (k_SKD, v_SKD))
    profile_TNR = r_TNC @ bank_CR
    index_TNS = distance_TS.clamp(0, rel_len - 1)[:, None].expand(-1, num_heads, -1)
    in_range_TS = (distance_TS >= 0) & (distance_TS < rel_len)
    bias_TNS = profile_TNR.gather(2, index_TNS) * in_range_TS[:, None]
    factor = 1.0 / head_dim if scale is None else scale
    s_TNS = torch.einsum("tnd,snd->tns", q_TND, k_SND) * factor + bias_TNS
    s_TNS = s_TNS.masked_fill(~visible_TS[:, None], -math.inf)
    lse_TN = torch.logsumexp(s_TNS, dim=2)
    p_TNS = torch.exp(s_TNS - lse_TN[..., None]).nan_to_num(0.0)
    o_TND = torch.einsum("tns,snd->tnd", p_TNS, v_SND)
    return o_TND.reshape(num_tokens, num_heads * head_dim), lse_TN
