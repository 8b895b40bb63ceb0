"""Gradients of the ops on a Hopper GPU, operands in device memory.

Row gradients (norms, embeddings, convolutions, the router's) have the bits of the CPU's for the
same operands; products are chains of the tensor core, cut where csrc/ops cuts them (docs/cuda.md).
Nothing here joins autograd yet: these are the kernels that will. As in ``tml_core.ops.cuda`` what
only the device knows (ids, bins, sequence bounds) is the caller's to check.

Shape suffixes: N rows, T tokens, F frames, H channels, K inputs, M outputs, V vocabulary, C mel
channels, R table rows, E experts then shared ones, I width, J = 2 I, k choices, S shared.
"""

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.errors import InvalidArgument
from tml_core.ops.cuda import CudaExperts, CudaWeight, _workspace

__all__ = [
    "dmel_embed_bwd",
    "embed_bwd",
    "linear_dgrad",
    "linear_logp",
    "linear_logp_bwd",
    "linear_plain",
    "linear_wgrad",
    "moe_bwd",
    "moe_saved",
    "rms_norm_bwd",
    "router_bwd",
    "sconv_norm_packed_bwd",
]


def rms_norm_bwd(
    dy_NH: Tensor,
    x_NH: Tensor,
    weight_H: Tensor,
    eps: float,
    divisor: float = 1.0,
    use_gelu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``cuda.rms_norm`` in x and weight."""
    dx_NH, dweight_H = torch.empty_like(x_NH), torch.empty_like(weight_H)
    size = _ext.cuda_rms_norm_bwd_workspace(x_NH.shape[0], x_NH.shape[1])
    _ext.cuda_rms_norm_bwd(
        dy_NH, x_NH, weight_H, eps, divisor, use_gelu, dx_NH, dweight_H,
        _workspace(size, x_NH.device),
    )  # fmt: skip
    return dx_NH, dweight_H


def embed_bwd(
    dy_TH: Tensor, ids_T: Tensor, table_VH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``cuda.embed`` in the table (dense) and the weight."""
    dtable_VH, dweight_H = torch.zeros_like(table_VH), torch.empty_like(weight_H)
    size = _ext.cuda_embed_bwd_workspace(ids_T.shape[0], table_VH.shape[1])
    _ext.cuda_embed_bwd(
        dy_TH, ids_T, table_VH, weight_H, eps, dtable_VH, dweight_H,
        _workspace(size, table_VH.device),
    )  # fmt: skip
    return dtable_VH, dweight_H


def dmel_embed_bwd(
    dy_FH: Tensor, bins_FC: Tensor, table_RH: Tensor, num_levels: int, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``cuda.dmel_embed`` in the table (dense) and the weight."""
    dtable_RH, dweight_H = torch.zeros_like(table_RH), torch.empty_like(weight_H)
    size = _ext.cuda_dmel_embed_bwd_workspace(bins_FC.shape[0], table_RH.shape[1])
    _ext.cuda_dmel_embed_bwd(
        dy_FH, bins_FC, table_RH, num_levels, weight_H, eps, dtable_RH, dweight_H,
        _workspace(size, table_RH.device),
    )  # fmt: skip
    return dtable_RH, dweight_H


def sconv_norm_packed_bwd(
    dnormed_TH: Tensor | None,
    dresidual_TH: Tensor,
    x_TH: Tensor,
    residual_TH: Tensor,
    conv_weight: Tensor,
    norm_weight_H: Tensor | None,
    eps: float,
    cu_tokens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of sconv_norm over packed sequences: of x, residual, conv and norm weights.

    residual_TH: after the addition; dresidual_TH: its gradient from elsewhere.
    """
    dx_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    dout_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    dconv = torch.empty_like(conv_weight)
    dnorm = None if norm_weight_H is None else torch.empty_like(norm_weight_H)
    size = _ext.cuda_sconv_norm_packed_bwd_workspace(x_TH.shape[0], x_TH.shape[1])
    _ext.cuda_sconv_norm_packed_bwd(
        dnormed_TH, dresidual_TH, x_TH, residual_TH, conv_weight, norm_weight_H, eps, cu_tokens,
        dx_TH, dout_TH, dconv, dnorm, _workspace(size, x_TH.device),
    )  # fmt: skip
    return dx_TH, dout_TH, dconv, dnorm


def _linear_workspace(num_tokens: int, in_dim: int, out_dim: int, like: Tensor) -> Tensor:
    size = _ext.cuda_linear_train_workspace(num_tokens, in_dim, out_dim)
    return _workspace(size, like.device)


def linear_plain(x_TK: Tensor, w_MK: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """``cuda.linear`` of a plain weight, the same bits; rows of x sixteen-byte aligned."""
    y_TM = x_TK.new_empty(x_TK.shape[0], w_MK.shape[0], dtype=out_dtype or torch.bfloat16)
    work = _linear_workspace(x_TK.shape[0], w_MK.shape[1], w_MK.shape[0], x_TK)
    _ext.cuda_linear_plain(x_TK, w_MK, y_TM, work)
    return y_TM


def linear_dgrad(dy_TM: Tensor, w_MK: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """dx = dy w, one tensor-core chain an output; rows of dy sixteen-byte aligned."""
    dx_TK = dy_TM.new_empty(dy_TM.shape[0], w_MK.shape[1], dtype=out_dtype or torch.bfloat16)
    work = _linear_workspace(dy_TM.shape[0], w_MK.shape[1], w_MK.shape[0], dy_TM)
    _ext.cuda_linear_dgrad(dy_TM, w_MK, dx_TK, work)
    return dx_TK


def linear_wgrad(dy_TM: Tensor, x_TK: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """dw = dy^T x, a chain every 512 tokens, added in ascending order."""
    dw_MK = x_TK.new_empty(dy_TM.shape[1], x_TK.shape[1], dtype=out_dtype or torch.bfloat16)
    work = _linear_workspace(dy_TM.shape[0], x_TK.shape[1], dy_TM.shape[1], x_TK)
    _ext.cuda_linear_wgrad(dy_TM, x_TK, dw_MK, work)
    return dw_MK


def linear_logp(
    h_TH: Tensor, weight: CudaWeight, targets_T: Tensor, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of targets, ``cuda.lm_head_logprobs``'s bits, and entropies if asked for.

    The weight may have been packed just before.
    """
    logprobs_T = torch.empty(h_TH.shape[0], device=h_TH.device)
    entropy_T = torch.empty_like(logprobs_T) if with_entropy else None
    size = _ext.cuda_linear_logp_workspace(h_TH.shape[0], h_TH.shape[1], weight.out_dim, False)
    _ext.cuda_linear_logp(
        h_TH, weight.data, weight.out_dim, targets_T, logprobs_T, entropy_T,
        _workspace(size, h_TH.device),
    )  # fmt: skip
    return logprobs_T, entropy_T


def linear_logp_bwd(
    h_TH: Tensor,
    weight: CudaWeight,
    plain_VH: Tensor,
    targets_T: Tensor,
    d_logprobs_T: Tensor,
    d_entropy_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and the gradients in h and the weight (rows past the vocabulary are 0).

    weight: the first rows of plain_VH, packed: as many as the vocabulary has.
    """
    logprobs_T = torch.empty(h_TH.shape[0], device=h_TH.device)
    dh_TH = torch.empty(h_TH.shape, dtype=h_TH.dtype, device=h_TH.device)
    dw_VH = torch.empty(plain_VH.shape, dtype=plain_VH.dtype, device=h_TH.device)
    size = _ext.cuda_linear_logp_workspace(h_TH.shape[0], h_TH.shape[1], weight.out_dim, True)
    _ext.cuda_linear_logp_bwd(
        h_TH, weight.data, plain_VH, weight.out_dim, targets_T, d_logprobs_T, d_entropy_T,
        logprobs_T, dh_TH, dw_VH, _workspace(size, h_TH.device),
    )  # fmt: skip
    return logprobs_T, dh_TH, dw_VH


def router_bwd(
    x_TH: Tensor,
    weight_EH: Tensor,
    ids_Tk: Tensor,
    logits_TE: Tensor,
    dweights_Tk: Tensor,
    dgammas_TS: Tensor,
    scale: float,
    dlogits_TE: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``cuda.router`` in x, weight and scale, of the logits it left."""
    dx_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    dw_EH, dscale = torch.empty_like(weight_EH), torch.empty(1, device=x_TH.device)
    size = _ext.cuda_router_bwd_workspace(x_TH.shape[0], weight_EH.shape[0])
    _ext.cuda_router_bwd(
        x_TH, weight_EH, ids_Tk, logits_TE, dweights_Tk, dgammas_TS, dlogits_TE, scale, dx_TH,
        dw_EH, dscale, _workspace(size, x_TH.device),
    )  # fmt: skip
    return dx_TH, dw_EH, dscale


def moe_saved(
    x_TH: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, gammas_TS: Tensor, experts: CudaExperts
) -> tuple[Tensor, Tensor]:
    """``cuda.moe``, and the gate | up that ``moe_bwd`` wants: bf16 [T, k + S, J]."""
    y_TH = torch.empty_like(x_TH)
    num_tokens, choices = x_TH.shape[0], ids_Tk.shape[1] + gammas_TS.shape[1]
    gate_up = x_TH.new_empty(num_tokens, choices, 2 * experts.width)
    size = _ext.cuda_moe_workspace(
        num_tokens, experts.hidden, experts.width, experts.num_experts, experts.num_shared,
        ids_Tk.shape[1],
    )  # fmt: skip
    _ext.cuda_moe(
        x_TH, ids_Tk, weights_Tk, gammas_TS, experts.w13, experts.w2, experts.num_experts,
        experts.width, y_TH, gate_up, _workspace(size, x_TH.device),
    )  # fmt: skip
    return y_TH, gate_up


def moe_bwd(
    dy_TH: Tensor,
    x_TH: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    gammas_TS: Tensor,
    gate_up: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``cuda.moe`` in x, weights, gammas and the plain expert matrices.

    gate_up: what ``moe_saved`` left; rows of dy sixteen-byte aligned.
    """
    if down_EHI.ndim != 3:
        raise InvalidArgument(f"cuda_moe_bwd: down must be [E, H, I], got {list(down_EHI.shape)}")
    count, hidden, width = down_EHI.shape
    dx_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    dweights, dgammas = torch.empty_like(weights_Tk), torch.empty_like(gammas_TS)
    dw13, dw2 = torch.empty_like(gate_up_EJH), torch.empty_like(down_EHI)
    num_shared = gammas_TS.shape[1]
    size = _ext.cuda_moe_bwd_workspace(
        x_TH.shape[0], hidden, width, count - num_shared, num_shared, ids_Tk.shape[1]
    )
    _ext.cuda_moe_bwd(
        dy_TH, x_TH, ids_Tk, weights_Tk, gammas_TS, gate_up, gate_up_EJH, down_EHI, dx_TH,
        dweights, dgammas, dw13, dw2, _workspace(size, x_TH.device),
    )  # fmt: skip
    return dx_TH, dweights, dgammas, dw13, dw2
