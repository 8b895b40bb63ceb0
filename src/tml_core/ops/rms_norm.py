"""rms_norm: y = weight * x / sqrt(mean(x^2) + eps), rounded before the weight (T5 order).

Shape suffixes: N rows, H channels.
"""

from typing import Any

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.errors import InvalidArgument
from tml_core.ops._common import num_threads
from tml_core.ops._library import is_recorded, register_op

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm(
    x_NH: Tensor,
    weight_H: Tensor,
    eps: float,
    divisor: float = 1.0,
    activation: str | None = None,
) -> Tensor:
    """Normalise each row; then divide by ``divisor``; then apply ``activation``.

    x_NH: [N, H] fp32 or bf16, rows dense (they may be strided); weight_H: [H] of the same dtype;
    activation: None or "gelu" (exact, by erf). Returns [N, H] of the same dtype; every stage is
    rounded to it. Differentiable in x and weight. Off the CPU this is ``rms_norm_reference``.
    Raises InvalidArgument on another dtype, shape, layout or activation.
    """
    if activation not in (None, "gelu"):
        raise InvalidArgument(f'rms_norm: activation must be None or "gelu", got {activation!r}')
    if not x_NH.is_cpu:
        return rms_norm_reference(x_NH, weight_H, eps, divisor, activation)
    run = _rms_norm if is_recorded(x_NH, weight_H) else _kernel
    y_NH: Tensor = run(x_NH, weight_H, eps, divisor, activation == "gelu")
    return y_NH


def rms_norm_reference(
    x_NH: Tensor,
    weight_H: Tensor,
    eps: float,
    divisor: float = 1.0,
    activation: str | None = None,
) -> Tensor:
    """The same function in torch; leading dimensions are free."""
    x_fp32 = x_NH.float()
    rstd = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    y_NH = weight_H * (x_fp32 * rstd).to(x_NH.dtype)
    if divisor != 1.0:
        y_NH = y_NH / divisor
    if activation == "gelu":
        y_NH = torch.nn.functional.gelu(y_NH)
    return y_NH


def _kernel(x_NH: Tensor, weight_H: Tensor, eps: float, divisor: float, use_gelu: bool) -> Tensor:
    y_NH = torch.empty(x_NH.shape, dtype=x_NH.dtype)
    _ext.rms_norm(x_NH, weight_H, eps, divisor, use_gelu, y_NH, num_threads())
    return y_NH


def _fake(x_NH: Tensor, weight_H: Tensor, eps: float, divisor: float, use_gelu: bool) -> Tensor:
    del weight_H, eps, divisor, use_gelu
    return x_NH.new_empty(x_NH.shape)


def _bwd_kernel(
    dy_NH: Tensor, x_NH: Tensor, weight_H: Tensor, eps: float, divisor: float, use_gelu: bool
) -> tuple[Tensor, Tensor]:
    dx_NH = torch.empty(x_NH.shape, dtype=x_NH.dtype)
    dweight_H = torch.empty(weight_H.shape, dtype=weight_H.dtype)
    _ext.rms_norm_bwd(
        dy_NH, x_NH, weight_H, eps, divisor, use_gelu, dx_NH, dweight_H, num_threads()
    )
    return dx_NH, dweight_H


def _bwd_fake(
    dy_NH: Tensor, x_NH: Tensor, weight_H: Tensor, eps: float, divisor: float, use_gelu: bool
) -> tuple[Tensor, Tensor]:
    del dy_NH, eps, divisor, use_gelu
    return x_NH.new_empty(x_NH.shape), weight_H.new_empty(weight_H.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    del output
    x_NH, weight_H, *ctx.settings = inputs
    ctx.save_for_backward(x_NH, weight_H)


def _backward(ctx: Any, dy_NH: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    dx_NH, dweight_H = _rms_norm_bwd(dy_NH.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return dx_NH, dweight_H, None, None, None


_rms_norm_bwd = register_op(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, float eps, float divisor, bool use_gelu)"
    " -> (Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
_rms_norm = register_op(
    "rms_norm(Tensor x, Tensor weight, float eps, float divisor, bool use_gelu) -> Tensor",
    _kernel,
    _fake,
    backward=_backward,
    setup_context=_setup,
)
