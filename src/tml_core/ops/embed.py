"""embed and dmel_embed: rows of a table, normalised; dMel frames sum one row per channel.

Shape suffixes: T tokens, F frames, C channels, V rows of the table, H hidden.
"""

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.ops._common import num_threads, refuse_grad
from tml_core.ops.rms_norm import rms_norm_reference

__all__ = ["dmel_embed", "dmel_embed_reference", "embed", "embed_reference"]


def embed(ids_T: Tensor, table_VH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """rms_norm(table[ids]).

    ids_T: int64 [T]; table_VH: [V, H] fp32 or bf16; weight_H: [H] of the norm, same dtype.
    Returns [T, H]. Raises InvalidArgument, before anything is written, on an id outside [0, V),
    and on another dtype, shape or layout.
    """
    refuse_grad("embed", table=table_VH, weight=weight_H)
    y_TH = torch.empty((*ids_T.shape, *table_VH.shape[1:]), dtype=table_VH.dtype)
    _ext.embed(ids_T, table_VH, weight_H, eps, y_TH, num_threads())
    return y_TH


def dmel_embed(
    bins_FC: Tensor, table_VH: Tensor, num_levels: int, weight_H: Tensor, eps: float
) -> Tensor:
    """rms_norm of the sum over channels c of table[c * num_levels + bins[f, c]].

    bins_FC: int32 [F, C]; table_VH: [C * num_levels, H] fp32 or bf16; weight_H: [H], same dtype.
    The sum is fp32 in ascending c, rounded once. Returns [F, H]. Raises InvalidArgument, before
    anything is written, on a bin outside [0, num_levels), and on another dtype, shape or layout.
    """
    refuse_grad("dmel_embed", table=table_VH, weight=weight_H)
    y_FH = torch.empty((*bins_FC.shape[:1], *table_VH.shape[1:]), dtype=table_VH.dtype)
    _ext.dmel_embed(bins_FC, table_VH, num_levels, weight_H, eps, y_FH, num_threads())
    return y_FH


def embed_reference(ids_T: Tensor, table_VH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """The same function in torch."""
    return rms_norm_reference(table_VH[ids_T], weight_H, eps)


def dmel_embed_reference(
    bins_FC: Tensor, table_VH: Tensor, num_levels: int, weight_H: Tensor, eps: float
) -> Tensor:
    """The same function in torch."""
    rows_FC = bins_FC.long() + num_levels * torch.arange(bins_FC.shape[1])
    summed_FH = table_VH[rows_FC].float().sum(1).to(table_VH.dtype)
    return rms_norm_reference(summed_FH, weight_H, eps)
