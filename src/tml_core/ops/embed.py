"""embed and dmel_embed: rows of a table, normalised; dMel frames sum one row per channel.

Shape suffixes: T tokens, F frames, C channels, V rows of the table, H hidden.
"""

from typing import Any

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.ops._common import num_threads, refuse_grad
from tml_core.ops._library import is_recorded, register_op
from tml_core.ops.rms_norm import rms_norm_reference

__all__ = ["dmel_embed", "dmel_embed_reference", "embed", "embed_reference"]


def embed(
    ids_T: Tensor,
    table_VH: Tensor,
    weight_H: Tensor,
    eps: float,
    *,
    out_TH: Tensor | None = None,
) -> Tensor:
    """rms_norm(table[ids]).

    ids_T: int64 [T]; table_VH: [V, H] fp32 or bf16; weight_H: [H] of the norm, same dtype.
    Returns [T, H], which is ``out_TH`` where given (CPU, not differentiable). Differentiable in
    table (a dense gradient) and weight. Off the CPU this is ``embed_reference``. Raises
    InvalidArgument, before anything is written, on an id outside [0, V), and on another dtype,
    shape or layout.
    """
    if not table_VH.is_cpu:
        return embed_reference(ids_T, table_VH, weight_H, eps)
    if out_TH is not None:
        refuse_grad("embed", table=table_VH, weight=weight_H)
        _ext.embed(ids_T, table_VH, weight_H, eps, out_TH, num_threads())
        return out_TH
    run = _embed if is_recorded(table_VH, weight_H) else _embed_kernel
    y_TH: Tensor = run(ids_T, table_VH, weight_H, eps)
    return y_TH


def dmel_embed(
    bins_FC: Tensor,
    table_VH: Tensor,
    num_levels: int,
    weight_H: Tensor,
    eps: float,
    *,
    out_FH: Tensor | None = None,
) -> Tensor:
    """rms_norm of the sum over channels c of table[c * num_levels + bins[f, c]].

    bins_FC: int32 [F, C]; table_VH: [C * num_levels, H] fp32 or bf16; weight_H: [H], same dtype.
    The sum is fp32 in ascending c, rounded once. Returns [F, H], which is ``out_FH`` where given
    (CPU, not differentiable). Differentiable in table and weight. Off the CPU this is
    ``dmel_embed_reference``. Raises InvalidArgument, before anything is written, on a bin outside
    [0, num_levels), and on another dtype, shape or layout.
    """
    if not table_VH.is_cpu:
        return dmel_embed_reference(bins_FC, table_VH, num_levels, weight_H, eps)
    if out_FH is not None:
        refuse_grad("dmel_embed", table=table_VH, weight=weight_H)
        _ext.dmel_embed(bins_FC, table_VH, num_levels, weight_H, eps, out_FH, num_threads())
        return out_FH
    run = _dmel_embed if is_recorded(table_VH, weight_H) else _dmel_embed_kernel
    y_FH: Tensor = run(bins_FC, table_VH, num_levels, weight_H, eps)
    return y_FH


def embed_reference(ids_T: Tensor, table_VH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """The same function in torch."""
    return rms_norm_reference(table_VH[ids_T], weight_H, eps)


def dmel_embed_reference(
    bins_FC: Tensor, table_VH: Tensor, num_levels: int, weight_H: Tensor, eps: float
) -> Tensor:
    """The same function in torch."""
    rows_FC = bins_FC.long() + num_levels * torch.arange(bins_FC.shape[1], device=bins_FC.device)
    summed_FH = table_VH[rows_FC].float().sum(1).to(table_VH.dtype)
    return rms_norm_reference(summed_FH, weight_H, eps)


def _embed_kernel(ids_T: Tensor, table_VH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    y_TH = torch.empty((*ids_T.shape, *table_VH.shape[1:]), dtype=table_VH.dtype)
    _ext.embed(ids_T, table_VH, weight_H, eps, y_TH, num_threads())
    return y_TH


def _embed_fake(ids_T: Tensor, table_VH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    del weight_H, eps
    return table_VH.new_empty((ids_T.shape[0], table_VH.shape[1]))


def _embed_bwd_kernel(
    dy_TH: Tensor, ids_T: Tensor, table_VH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dtable_VH = torch.zeros(table_VH.shape, dtype=table_VH.dtype)
    dweight_H = torch.empty(weight_H.shape, dtype=weight_H.dtype)
    _ext.embed_bwd(dy_TH, ids_T, table_VH, weight_H, eps, dtable_VH, dweight_H, num_threads())
    return dtable_VH, dweight_H


def _embed_bwd_fake(
    dy_TH: Tensor, ids_T: Tensor, table_VH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    del dy_TH, ids_T, eps
    return table_VH.new_empty(table_VH.shape), weight_H.new_empty(weight_H.shape)


def _dmel_embed_kernel(
    bins_FC: Tensor, table_VH: Tensor, num_levels: int, weight_H: Tensor, eps: float
) -> Tensor:
    y_FH = torch.empty((*bins_FC.shape[:1], *table_VH.shape[1:]), dtype=table_VH.dtype)
    _ext.dmel_embed(bins_FC, table_VH, num_levels, weight_H, eps, y_FH, num_threads())
    return y_FH


def _dmel_embed_fake(
    bins_FC: Tensor, table_VH: Tensor, num_levels: int, weight_H: Tensor, eps: float
) -> Tensor:
    del num_levels, weight_H, eps
    return table_VH.new_empty((bins_FC.shape[0], table_VH.shape[1]))


def _dmel_embed_bwd_kernel(
    dy_FH: Tensor, bins_FC: Tensor, table_VH: Tensor, num_levels: int, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dtable_VH = torch.zeros(table_VH.shape, dtype=table_VH.dtype)
    dweight_H = torch.empty(weight_H.shape, dtype=weight_H.dtype)
    _ext.dmel_embed_bwd(
        dy_FH, bins_FC, table_VH, num_levels, weight_H, eps, dtable_VH, dweight_H, num_threads()
    )
    return dtable_VH, dweight_H


def _dmel_embed_bwd_fake(
    dy_FH: Tensor, bins_FC: Tensor, table_VH: Tensor, num_levels: int, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    del dy_FH, bins_FC, num_levels, eps
    return table_VH.new_empty(table_VH.shape), weight_H.new_empty(weight_H.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    del output
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.settings = [value for value in inputs if not isinstance(value, Tensor)]


def _embed_backward(ctx: Any, dy_TH: Tensor) -> tuple[None, Tensor, Tensor, None]:
    dtable_VH, dweight_H = _embed_bwd(dy_TH.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return None, dtable_VH, dweight_H, None


def _dmel_embed_backward(ctx: Any, dy_FH: Tensor) -> tuple[None, Tensor, None, Tensor, None]:
    bins_FC, table_VH, weight_H = ctx.saved_tensors
    num_levels, eps = ctx.settings
    dtable_VH, dweight_H = _dmel_embed_bwd(
        dy_FH.contiguous(), bins_FC, table_VH, num_levels, weight_H, eps
    )
    return None, dtable_VH, None, dweight_H, None


_embed_bwd = register_op(
    "embed_bwd(Tensor dy, Tensor ids, Tensor table, Tensor weight, float eps) -> (Tensor, Tensor)",
    _embed_bwd_kernel,
    _embed_bwd_fake,
)
_embed = register_op(
    "embed(Tensor ids, Tensor table, Tensor weight, float eps) -> Tensor",
    _embed_kernel,
    _embed_fake,
    backward=_embed_backward,
    setup_context=_setup,
)
_dmel_embed_bwd = register_op(
    "dmel_embed_bwd(Tensor dy, Tensor bins, Tensor table, int num_levels, Tensor weight, float eps)"
    " -> (Tensor, Tensor)",
    _dmel_embed_bwd_kernel,
    _dmel_embed_bwd_fake,
)
_dmel_embed = register_op(
    "dmel_embed(Tensor bins, Tensor table, int num_levels, Tensor weight, float eps) -> Tensor",
    _dmel_embed_kernel,
    _dmel_embed_fake,
    backward=_dmel_embed_backward,
    setup_context=_setup,
)
