"""rms_norm: y = weight * x / sqrt(mean(x^2) + eps), rounded before the weight (T5 order).

Shape suffixes: N rows, H channels.
"""

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.errors import InvalidArgument
from tml_core.ops._common import num_threads, refuse_grad

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
    rounded to it. Raises InvalidArgument on another dtype, shape, layout or activation.
    """
    refuse_grad("rms_norm", x=x_NH, weight=weight_H)
    if activation not in (None, "gelu"):
        raise InvalidArgument(f'rms_norm: activation must be None or "gelu", got {activation!r}')
    y_NH = torch.empty(x_NH.shape, dtype=x_NH.dtype)
    _ext.rms_norm(x_NH, weight_H, eps, divisor, activation == "gelu", y_NH, num_threads())
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
