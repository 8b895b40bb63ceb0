"""linear: y = x @ w.T on packed weights, one fp32 chain per output in ascending k.

Shape suffixes: T tokens, K in, N out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.contract import PANEL
from tml_core.errors import InvalidArgument
from tml_core.ops._common import huge_empty, num_threads, refuse_grad

__all__ = ["PackedWeight", "linear", "linear_reference", "pack_weight"]


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix in the kernels' layout: panels of 32 outputs, k-steps of 32 bits.

    ``data`` is bf16 [ceil(N/32), ceil(K/2), 32, 2] or fp32 [ceil(N/32), K, 32] in huge-page
    memory; ``out_dim`` N and ``in_dim`` K are the sizes before padding.
    """

    data: Tensor
    out_dim: int
    in_dim: int

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype


def packed_shape(out_dim: int, in_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of the packed form of an [out_dim, in_dim] weight."""
    panels = -(-out_dim // PANEL)
    if dtype == torch.bfloat16:
        return (panels, -(-in_dim // 2), PANEL, 2)
    if dtype == torch.float32:
        return (panels, in_dim, PANEL)
    raise InvalidArgument(f"pack_weight: w must be float32 or bfloat16, got {dtype}")


def pack_weight(w_NK: Tensor) -> PackedWeight:
    """Pack a [N, K] weight (fp32 or bf16) once; ``linear`` then streams it front to back."""
    refuse_grad("pack_weight", w=w_NK)
    if w_NK.ndim != 2:
        raise InvalidArgument(f"pack_weight: w must be [N, K], got {list(w_NK.shape)}")
    out_dim, in_dim = w_NK.shape
    data = huge_empty(packed_shape(out_dim, in_dim, w_NK.dtype), w_NK.dtype)
    _ext.pack_weight(w_NK, data, num_threads())
    return PackedWeight(data, out_dim, in_dim)


def linear(x_TK: Tensor, weight: PackedWeight, out_dtype: torch.dtype | None = None) -> Tensor:
    """y[t, n] = sum_k x[t, k] w[n, k].

    x_TK: [T, K] of the weight's dtype, rows dense. Returns [T, N] of ``out_dtype``: the weight's
    dtype (default; one rounding of the fp32 sum) or fp32.
    Raises InvalidArgument on another dtype, shape or layout.
    """
    refuse_grad("linear", x=x_TK)
    if x_TK.ndim != 2 or x_TK.shape[1] != weight.in_dim:
        raise InvalidArgument(
            f"linear: x must be [T, {weight.in_dim}], got {list(x_TK.shape)}"
        )
    y_TN = torch.empty(x_TK.shape[0], weight.out_dim, dtype=out_dtype or weight.dtype)
    _ext.linear(x_TK, weight.data, y_TN, num_threads())
    return y_TN


def linear_reference(
    x_TK: Tensor, w_NK: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The same product in fp32 torch, rounded once."""
    return (x_TK.float() @ w_NK.float().T).to(out_dtype or x_TK.dtype)
