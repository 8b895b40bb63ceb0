"""The ops on a Hopper GPU (H100, H200): same names and meaning, operands in device memory.

What differs from the CPU functions: products and pages are bf16 alone; packed weights, experts and
pages have the device's own layout (csrc/cuda/layout.h), so they do not move between devices as
they are; sums have the device's order, so bits are equal among devices of this kind and never to
the CPU's (docs/cuda.md). Everything runs on torch's current stream, and nothing waits for it:
values that only the device knows (ids, tables, positions) are the caller's to check.

Shape suffixes as in the CPU modules of the same ops.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.contract import PAGE_LEN
from tml_core.errors import InvalidArgument, Unsupported
from tml_core.ops._common import refuse_grad

__all__ = [
    "CudaExperts",
    "CudaHmlp",
    "CudaWeight",
    "attn_prologue",
    "copy_pages",
    "dmel_embed",
    "embed",
    "hmlp",
    "linear",
    "lm_head_logprobs",
    "lm_head_sample",
    "moe",
    "pack_experts",
    "pack_weight",
    "problem",
    "require",
    "rms_norm",
    "router",
    "sconv_norm",
    "session_attn",
]

_BLOCK = 64  # rows and k of a weight block
_UNITS = 32  # units of SwiGLU in one: gate and up rows
_PATCHES = 256  # at a time, so that a large image needs no more workspace than a small one


def problem(device: int = 0) -> str:
    """Why the kernels cannot run on a CUDA device: no such build, driver or device, or one that is
    no H100 or H200. Empty if they can."""
    return _ext.cuda_problem(device)


def require(device: int = 0) -> None:
    """Raise Unsupported with ``problem(device)`` unless that is empty."""
    if why := problem(device):
        raise Unsupported(f"device: 'cuda' asked for, but {why}")


@dataclass(frozen=True)
class CudaWeight:
    """A [out_dim, in_dim] bf16 weight in blocks of 64 x 64, zero-padded, as one flat tensor."""

    data: Tensor
    out_dim: int
    in_dim: int


@dataclass(frozen=True)
class CudaExperts:
    """SwiGLU experts in blocks; the last ``num_shared`` serve every token."""

    w13: Tensor
    w2: Tensor
    num_experts: int
    num_shared: int
    hidden: int
    width: int


@dataclass(frozen=True)
class CudaHmlp:
    """As ``tml_core.ops.hmlp.HmlpWeights``, of packed projections on the device."""

    folds: tuple[tuple[int, int], ...]
    projections: tuple[CudaWeight, ...]
    norms: tuple[Tensor, ...]
    final_norm: Tensor
    eps: float = 1e-6

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """(frames, height, width, channels) of a patch."""
        frames = side = 1
        for frame_fold, side_fold in self.folds:
            frames, side = frames * frame_fold, side * side_fold
        frame_fold, side_fold = self.folds[0]
        channels = self.projections[0].in_dim // (frame_fold * side_fold * side_fold)
        return frames, side, side, channels


def _blocks(n: int) -> int:
    return -(-n // _BLOCK)


def _elements(rows: int, cols: int) -> int:
    return _blocks(rows) * _blocks(cols) * _BLOCK * _BLOCK


def _workspace(num_bytes: int, device: torch.device) -> Tensor:
    # From torch's caching allocator: ordered with the stream, so it may be handed back at once.
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def pack_weight(w_NK: Tensor) -> CudaWeight:
    """Pack a bf16 [N, K] weight on the device, once."""
    refuse_grad("cuda_pack_weight", w=w_NK)
    if w_NK.ndim != 2:
        raise InvalidArgument(f"cuda_pack_weight: w must be [N, K], got {list(w_NK.shape)}")
    out_dim, in_dim = w_NK.shape
    data = w_NK.new_empty(_elements(out_dim, in_dim))
    _ext.cuda_pack_weight(w_NK, data)
    return CudaWeight(data, out_dim, in_dim)


def linear(x_TK: Tensor, weight: CudaWeight, out_dtype: torch.dtype | None = None) -> Tensor:
    """y[t, n] = sum_k x[t, k] w[n, k], one tensor-core chain an output; bf16 or fp32."""
    refuse_grad("cuda_linear", x=x_TK)
    if x_TK.ndim != 2 or x_TK.shape[1] != weight.in_dim:
        raise InvalidArgument(
            f"cuda_linear: x must be [T, {weight.in_dim}], got {list(x_TK.shape)}"
        )
    y_TN = x_TK.new_empty(x_TK.shape[0], weight.out_dim, dtype=out_dtype or torch.bfloat16)
    _ext.cuda_linear(x_TK, weight.data, y_TN)
    return y_TN


def rms_norm(
    x_NH: Tensor, weight_H: Tensor, eps: float, divisor: float = 1.0, use_gelu: bool = False
) -> Tensor:
    """As ``tml_core.ops.rms_norm``; fp32 or bf16."""
    y_NH = torch.empty(x_NH.shape, dtype=x_NH.dtype, device=x_NH.device)
    _ext.cuda_rms_norm(x_NH, weight_H, eps, divisor, use_gelu, y_NH)
    return y_NH


def embed(ids_T: Tensor, table_VH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """rms_norm of the rows of ids (int64, each a row of the table)."""
    y_TH = table_VH.new_empty(ids_T.shape[0], table_VH.shape[1])
    _ext.cuda_embed(ids_T, table_VH, weight_H, eps, y_TH)
    return y_TH


def dmel_embed(
    bins_FC: Tensor, table_RH: Tensor, num_levels: int, weight_H: Tensor, eps: float
) -> Tensor:
    """rms_norm of the sum of a frame's channel rows (bins int32, each below num_levels)."""
    y_FH = table_RH.new_empty(bins_FC.shape[0], table_RH.shape[1])
    _ext.cuda_dmel_embed(bins_FC, table_RH, num_levels, weight_H, eps, y_FH)
    return y_FH


def sconv_norm(
    x_TH: Tensor,
    residual_TH: Tensor,
    conv_weight: Tensor,
    norm_weight_H: Tensor | None,
    eps: float,
    *,
    conv_rows: Tensor,
    conv_layer: int,
    channel: int,
    cu_tokens: Tensor,
    slots: Tensor,
) -> Tensor | None:
    """As ``tml_core.ops.sconv_norm``: updates residual and conv_rows, returns the normed rows."""
    normed = None if norm_weight_H is None else torch.empty_like(x_TH)
    _ext.cuda_sconv_norm(
        x_TH, residual_TH, conv_weight, norm_weight_H, eps, conv_rows, conv_layer, channel,
        cu_tokens, slots, normed,
    )  # fmt: skip
    return normed


def attn_prologue(
    qkvr_TW: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    q_norm_D: Tensor,
    k_norm_D: Tensor,
    eps: float,
    *,
    num_heads: int,
    num_kv_heads: int,
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
    log_floor: float = 0.0,
    log_alpha: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As ``tml_core.ops.attn_prologue``: writes K and V pages and conv rows; returns q and r."""
    head_dim = q_norm_D.shape[0]
    rest = qkvr_TW.shape[1] - (num_heads + 2 * num_kv_heads) * head_dim
    if num_heads < 1 or rest <= 0 or rest % num_heads:
        raise InvalidArgument(
            f"cuda_attn_prologue: qkvr must be [T, (heads + 2 KV heads) {head_dim} + heads C], "
            f"got {list(qkvr_TW.shape)}"
        )
    q_TND = qkvr_TW.new_empty(qkvr_TW.shape[0], num_heads, head_dim)
    r_TNC = qkvr_TW.new_empty(qkvr_TW.shape[0], num_heads, rest // num_heads)
    _ext.cuda_attn_prologue(
        qkvr_TW, k_conv, v_conv, q_norm_D, k_norm_D, eps, log_floor, log_alpha, pages, layer, table,
        conv_rows, conv_layer, k_channel, v_channel, cu_tokens, slots, start_pos, q_TND, r_TNC,
    )  # fmt: skip
    return q_TND, r_TNC


def session_attn(
    q_TND: Tensor,
    r_TNC: Tensor,
    rel_bank: Tensor,
    rel_len: int,
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
    """As ``tml_core.ops.session_attn``; head_dim 64 or 128. rel_bank: ``pack_rel_bank(...).data``
    on the device."""
    num_tokens, heads, head_dim = q_TND.shape
    out = q_TND.new_empty(num_tokens, heads * head_dim)
    size = _ext.cuda_session_attn_workspace(
        q_TND, slots.shape[0], pages.shape[2], table.shape[1], window
    )
    workspace = _workspace(size, q_TND.device)
    _ext.cuda_session_attn(
        q_TND, r_TNC, rel_bank, pages, layer, table, cu_tokens, slots, start_pos, visible_end_T,
        window, 1.0 / head_dim if scale is None else scale, rel_len, out, lse_TN, workspace,
    )  # fmt: skip
    return out


def router(
    x_TH: Tensor, weight_NH: Tensor, bias_E: Tensor, top_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``tml_core.ops.router``, of a plain fp32 weight: ids int32, weights and gammas fp32."""
    num_tokens, outputs, experts = x_TH.shape[0], weight_NH.shape[0], bias_E.shape[0]
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=x_TH.device)
    weights = torch.empty(num_tokens, top_k, device=x_TH.device)
    gammas = torch.empty(num_tokens, max(outputs - experts, 0), device=x_TH.device)
    logits = torch.empty(num_tokens, outputs, device=x_TH.device)
    _ext.cuda_router(x_TH, weight_NH, bias_E, ids, weights, gammas, logits, scale)
    return ids, weights, gammas


def pack_experts(gate_up_EJH: Tensor, down_EHI: Tensor, num_shared: int = 0) -> CudaExperts:
    """Pack bf16 [E, 2I, H] gate-then-up and [E, H, I] down weights on the device, shared last."""
    if gate_up_EJH.ndim != 3 or down_EHI.ndim != 3:
        raise InvalidArgument("cuda_pack_experts: gate_up and down must be 3-dimensional")
    count, hidden, width = down_EHI.shape
    if not 0 <= num_shared < count:
        raise InvalidArgument(
            f"cuda_pack_experts: num_shared must be in [0, {count}), got {num_shared}"
        )
    w13 = gate_up_EJH.new_empty(count * -(-width // _UNITS) * _blocks(hidden) * _BLOCK * _BLOCK)
    w2 = down_EHI.new_empty(count * _elements(hidden, width))
    _ext.cuda_pack_experts(gate_up_EJH, down_EHI, w13, w2)
    return CudaExperts(w13, w2, count - num_shared, num_shared, hidden, width)


def moe(
    x_TH: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, gammas_TS: Tensor, experts: CudaExperts
) -> Tensor:
    """As ``tml_core.ops.moe`` of packed experts."""
    refuse_grad("cuda_moe", x=x_TH, weights=weights_Tk, gammas=gammas_TS)
    y_TH = torch.empty_like(x_TH)
    size = _ext.cuda_moe_workspace(
        x_TH.shape[0], experts.hidden, experts.width, experts.num_experts, experts.num_shared,
        ids_Tk.shape[1],
    )  # fmt: skip
    _ext.cuda_moe(
        x_TH, ids_Tk, weights_Tk, gammas_TS, experts.w13, experts.w2, experts.num_experts,
        experts.width, y_TH, None, _workspace(size, x_TH.device),
    )  # fmt: skip
    return y_TH


def hmlp(patches_PTSSC: Tensor, weights: CudaHmlp) -> Tensor:
    """As ``tml_core.ops.hmlp`` of packed projections: patches fp32 or bf16 -> bf16 [P, H]."""
    if tuple(patches_PTSSC.shape[1:]) != weights.patch_shape:
        want = ", ".join(map(str, weights.patch_shape))
        raise InvalidArgument(
            f"cuda_hmlp: patches must be [P, {want}], got {list(patches_PTSSC.shape)}"
        )
    parts = [_encoded(part, weights) for part in patches_PTSSC.split(_PATCHES)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _encoded(x_PTSSC: Tensor, weights: CudaHmlp) -> Tensor:
    num_patches, frames, side = x_PTSSC.shape[:3]
    x_PTSSC = x_PTSSC.contiguous()
    device = x_PTSSC.device
    for index, (fold, projection) in enumerate(
        zip(weights.folds, weights.projections, strict=True)
    ):
        frames, side = frames // fold[0], side // fold[1]
        num_rows, in_dim = num_patches * frames * side * side, projection.in_dim
        rows_NK = torch.empty(num_rows, -(-in_dim // 8) * 8, dtype=torch.bfloat16, device=device)
        _ext.cuda_hmlp_fold(x_PTSSC, *fold, rows_NK)
        y_NC = linear(rows_NK[:, :in_dim], projection)
        if index < len(weights.norms):
            y_NC = rms_norm(y_NC, weights.norms[index], weights.eps, use_gelu=True)
        x_PTSSC = y_NC.view(num_patches, frames, side, side, projection.out_dim)
    return rms_norm(x_PTSSC.flatten(1), weights.final_norm, weights.eps)


def copy_pages(
    source: Tensor,
    target: Tensor,
    *,
    source_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    last_len: int = PAGE_LEN,
) -> None:
    """Copy pages [N, layers, heads, 2, 128 D] into ``target``: all in order, or those that the
    int32 ids on the device name. No page of ``target`` may be one that is read. What stands after
    the first ``last_len`` positions of the last becomes zero."""
    _ext.cuda_copy_pages(source, target, source_ids, target_ids, last_len)


def lm_head_logprobs(h_TH: Tensor, weight: CudaWeight, targets_T: Tensor) -> Tensor:
    """As ``tml_core.ops.lm_head_logprobs``; every row of the weight is in the vocabulary."""
    out_T = torch.empty(h_TH.shape[0], device=h_TH.device)
    size = _ext.cuda_lm_head_workspace(h_TH.shape[0], weight.out_dim)
    _ext.cuda_lm_head_logprobs(
        h_TH, weight.data, weight.out_dim, targets_T, out_T, _workspace(size, h_TH.device)
    )
    return out_T


def lm_head_sample(
    h_TH: Tensor,
    weight: CudaWeight,
    temperature_T: Tensor,
    seed_T: Tensor,
    position_T: Tensor,
    *,
    top_k_T: Tensor | None = None,
    top_p_T: Tensor | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``tml_core.ops.lm_head_sample``: tokens int64, logprobs fp32."""
    tokens_T = torch.empty(h_TH.shape[0], dtype=torch.int64, device=h_TH.device)
    logprobs_T = torch.empty(h_TH.shape[0], device=h_TH.device)
    size = _ext.cuda_lm_head_workspace(h_TH.shape[0], weight.out_dim)
    _ext.cuda_lm_head_sample(
        h_TH, weight.data, weight.out_dim, temperature_T, top_k_T, top_p_T, seed_T, position_T,
        allowed, tokens_T, logprobs_T, _workspace(size, h_TH.device),
    )  # fmt: skip
    return tokens_T, logprobs_T
