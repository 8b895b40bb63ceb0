"""sconv_norm: short convolution of a sub-layer's output, residual addition, next norm.

Shape suffixes: T tokens of the step, H hidden, B sequences, S slots, L layers.
"""

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.contract import CONV_TAPS
from tml_core.ops._common import num_threads, refuse_grad
from tml_core.ops.rms_norm import rms_norm_reference

__all__ = ["sconv_norm", "sconv_norm_reference", "short_conv_reference"]


def sconv_norm(
    x_TH: Tensor,
    residual_TH: Tensor,
    conv_weight_H4: Tensor,
    norm_weight_H: Tensor | None,
    eps: float,
    *,
    conv_rows: Tensor,
    conv_layer: int,
    channel: int,
    cu_tokens: Tensor,
    slots: Tensor,
) -> Tensor | None:
    """residual += x + conv(x); returns the rms_norm of residual, or None without a norm weight.

    x_TH, residual_TH: [T, H] fp32 or bf16, H a multiple of 16; residual is updated in place.
    conv_weight_H4: fp32 [H, 4], oldest tap first. norm_weight_H: [H] of x's dtype.
    conv_rows: [S, L, 3, W] of x's dtype; channels [channel, channel + H) of layer ``conv_layer``
    hold the last three inputs of each slot, oldest first, and are updated in place.
    Sequence b of the step has tokens [cu_tokens[b], cu_tokens[b + 1]) (int32 [B + 1]) and slot
    slots[b] (int32 [B]). Raises InvalidArgument, before anything is written, on a wrong dtype,
    shape, layout, batch or slot.
    """
    refuse_grad(
        "sconv_norm",
        x=x_TH,
        residual=residual_TH,
        conv_weight=conv_weight_H4,
        norm_weight=norm_weight_H,
    )
    normed_TH = None if norm_weight_H is None else torch.empty(x_TH.shape, dtype=x_TH.dtype)
    _ext.sconv_norm(
        x_TH,
        residual_TH,
        conv_weight_H4,
        norm_weight_H,
        eps,
        conv_rows,
        conv_layer,
        channel,
        cu_tokens,
        slots,
        normed_TH,
        num_threads(),
    )
    return normed_TH


def short_conv_reference(
    x_TC: Tensor, state_3C: Tensor, weight_C4: Tensor
) -> tuple[Tensor, Tensor]:
    """round(x + causal depthwise convolution of x) of one sequence, and its next state.

    state_3C holds the three inputs before x, oldest first.
    """
    inputs = torch.cat([state_3C, x_TC])
    y_TC = x_TC.float()
    for tap in range(CONV_TAPS):
        y_TC = y_TC + weight_C4[:, tap] * inputs[tap : tap + x_TC.shape[0]].float()
    return y_TC.to(x_TC.dtype), inputs[-3:]


def sconv_norm_reference(
    x_TH: Tensor,
    residual_TH: Tensor,
    conv_weight_H4: Tensor,
    norm_weight_H: Tensor | None,
    eps: float,
    state_3H: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The same function of one sequence in torch: (normed, residual, next state)."""
    y_TH, state_3H = short_conv_reference(x_TH, state_3H, conv_weight_H4)
    residual_TH = residual_TH + y_TH
    if norm_weight_H is None:
        return None, residual_TH, state_3H
    return rms_norm_reference(residual_TH, norm_weight_H, eps), residual_TH, state_3H
