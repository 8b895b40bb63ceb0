"""linear: y = x @ w.T, one fp32 chain per output in ascending k, the same bits packed or plain.

Shape suffixes: T tokens, K in, N out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.contract import PANEL
from tml_core.errors import InvalidArgument
from tml_core.ops._common import huge_empty, num_threads, refuse_grad
from tml_core.ops._library import register_op

__all__ = [
    "PackedWeight",
    "linear",
    "linear_dgrad",
    "linear_reference",
    "linear_wgrad",
    "pack_weight",
]


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


def linear(
    x_TK: Tensor, weight: PackedWeight | Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """y[t, n] = sum_k x[t, k] w[n, k].

    x_TK: [T, K] of the weight's dtype, rows dense. weight: packed (inference: no gradient), or a
    plain [N, K] tensor, rows dense; then the result is differentiable in x and weight, and has
    the same bits. Returns [T, N] of ``out_dtype``: the weight's dtype (default; one rounding of the
    fp32 sum) or fp32. Off the CPU a plain weight is multiplied by ``linear_reference``.
    Raises InvalidArgument on another dtype, shape or layout.
    """
    if isinstance(weight, PackedWeight):
        refuse_grad("linear", x=x_TK)
        in_dim = weight.in_dim
    else:
        in_dim = weight.shape[-1] if weight.ndim == 2 else -1
        if in_dim < 0:
            raise InvalidArgument(f"linear: weight must be [N, K], got {list(weight.shape)}")
    if x_TK.ndim != 2 or x_TK.shape[1] != in_dim:
        raise InvalidArgument(f"linear: x must be [T, {in_dim}], got {list(x_TK.shape)}")
    if isinstance(weight, PackedWeight):
        y_TN = torch.empty(x_TK.shape[0], weight.out_dim, dtype=out_dtype or weight.dtype)
        _ext.linear(x_TK, weight.data, y_TN, num_threads())
        return y_TN
    if not x_TK.is_cpu:
        return linear_reference(x_TK, weight, out_dtype)
    result: Tensor = _linear(x_TK, weight, out_dtype)
    return result


def linear_dgrad(dy_TN: Tensor, weight_NK: Tensor) -> Tensor:
    """dx[t, k] = sum_n dy[t, n] w[n, k]: [T, K], one fp32 chain in ascending n, rounded once.

    Both of one dtype (fp32 or bf16), rows dense; raises InvalidArgument otherwise.
    """
    dx_TK: Tensor = _linear_dgrad(dy_TN, weight_NK)
    return dx_TK


def linear_wgrad(dy_TN: Tensor, x_TK: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """dw[n, k] = sum_t dy[t, n] x[t, k]: [N, K], fp32 chains of GRAD_BLOCK tokens, added in order.

    Both of one dtype (fp32 or bf16), rows dense. Returns ``out_dtype``: fp32 (default), or the
    inputs' dtype by one rounding. Raises InvalidArgument on another dtype, shape or layout.
    """
    dw_NK: Tensor = _linear_wgrad(dy_TN, x_TK, out_dtype or torch.float32)
    return dw_NK


def linear_reference(x_TK: Tensor, w_NK: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """The same product in fp32 torch, rounded once."""
    return (x_TK.float() @ w_NK.float().T).to(out_dtype or x_TK.dtype)


def _linear_kernel(x_TK: Tensor, weight_NK: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    y_TN = torch.empty(x_TK.shape[0], weight_NK.shape[0], dtype=out_dtype or weight_NK.dtype)
    _ext.linear_plain(x_TK, weight_NK, y_TN, num_threads())
    return y_TN


def _linear_fake(x_TK: Tensor, weight_NK: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    return x_TK.new_empty((x_TK.shape[0], weight_NK.shape[0]), dtype=out_dtype or weight_NK.dtype)


def _dgrad_kernel(dy_TN: Tensor, weight_NK: Tensor) -> Tensor:
    dx_TK = torch.empty((*dy_TN.shape[:1], *weight_NK.shape[1:]), dtype=dy_TN.dtype)
    _ext.linear_dgrad(dy_TN, weight_NK, dx_TK, num_threads())
    return dx_TK


def _dgrad_fake(dy_TN: Tensor, weight_NK: Tensor) -> Tensor:
    return dy_TN.new_empty((dy_TN.shape[0], weight_NK.shape[1]))


def _wgrad_kernel(dy_TN: Tensor, x_TK: Tensor, out_dtype: torch.dtype) -> Tensor:
    dw_NK = torch.empty((*dy_TN.shape[1:], *x_TK.shape[1:]), dtype=out_dtype)
    _ext.linear_wgrad(dy_TN, x_TK, dw_NK, num_threads())
    return dw_NK


def _wgrad_fake(dy_TN: Tensor, x_TK: Tensor, out_dtype: torch.dtype) -> Tensor:
    return dy_TN.new_empty((dy_TN.shape[1], x_TK.shape[1]), dtype=out_dtype)


def _linear_setup(ctx: Any, inputs: Any, output: Any) -> None:
    del output
    x_TK, weight_NK, _ = inputs
    ctx.dtype = weight_NK.dtype
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x_TK if needs_weight else None, weight_NK if needs_x else None)


def _linear_backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_TK, weight_NK = ctx.saved_tensors
    dy_TN = dy_TN.to(ctx.dtype).contiguous()  # of an fp32 result of bf16 weights: rounded
    dx_TK = None if weight_NK is None else _linear_dgrad(dy_TN, weight_NK)
    dw_NK = None if x_TK is None else _linear_wgrad(dy_TN, x_TK, ctx.dtype)
    return dx_TK, dw_NK, None


_linear_dgrad = register_op(
    "linear_dgrad(Tensor dy, Tensor weight) -> Tensor", _dgrad_kernel, _dgrad_fake
)
_linear_wgrad = register_op(
    "linear_wgrad(Tensor dy, Tensor x, ScalarType out_dtype) -> Tensor", _wgrad_kernel, _wgrad_fake
)
_linear = register_op(
    "linear(Tensor x, Tensor weight, ScalarType? out_dtype) -> Tensor",
    _linear_kernel,
    _linear_fake,
    backward=_linear_backward,
    setup_context=_linear_setup,
)
