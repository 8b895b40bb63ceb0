"""sconv_norm_packed: sconv_norm over whole sequences packed one after the other, for training.

Shape suffixes: T tokens of all sequences, H hidden, B sequences.
"""

from typing import Any

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.contract import CONV_TAPS
from tml_core.ops._common import num_threads
from tml_core.ops._library import register_op
from tml_core.ops.sconv_norm import sconv_norm_reference

__all__ = ["sconv_norm_packed", "sconv_norm_packed_reference"]


def sconv_norm_packed(
    x_TH: Tensor,
    residual_TH: Tensor,
    conv_weight_H4: Tensor,
    norm_weight_H: Tensor | None,
    eps: float,
    cu_tokens: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """(rms_norm of the sum or None, sum), sum = residual + round(x + conv(x)).

    x_TH, residual_TH: [T, H] fp32 or bf16, rows dense, H a multiple of 16. conv_weight_H4: fp32
    [H, 4], oldest tap first. norm_weight_H: [H] of x's dtype, or None: no norm. Sequence b owns
    tokens [cu_tokens[b], cu_tokens[b + 1]) (int32 [B + 1]) and starts from a zero state: the bits
    are those of ``sconv_norm`` in fresh slots. Differentiable in all four tensors; the gradient of
    conv_weight is fp32. Off the CPU this is ``sconv_norm_packed_reference``.
    Raises InvalidArgument on a wrong dtype, shape, layout or cu_tokens.
    """
    run = _sconv_norm_packed if x_TH.is_cpu else sconv_norm_packed_reference
    normed_TH, sum_TH = run(x_TH, residual_TH, conv_weight_H4, norm_weight_H, eps, cu_tokens)
    return (None if norm_weight_H is None else normed_TH), sum_TH


def sconv_norm_packed_reference(
    x_TH: Tensor,
    residual_TH: Tensor,
    conv_weight_H4: Tensor,
    norm_weight_H: Tensor | None,
    eps: float,
    cu_tokens: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """The same function in torch, sequence by sequence."""
    lengths = cu_tokens.diff().tolist()
    state_3H = x_TH.new_zeros(CONV_TAPS - 1, x_TH.shape[1])
    parts = [
        sconv_norm_reference(x, residual, conv_weight_H4, norm_weight_H, eps, state_3H)
        for x, residual in zip(x_TH.split(lengths), residual_TH.split(lengths), strict=True)
    ]
    sum_TH = torch.cat([residual_TH[:0], *(part[1] for part in parts)])
    if norm_weight_H is None:
        return None, sum_TH
    return torch.cat([residual_TH[:0], *(part[0] for part in parts if part[0] is not None)]), sum_TH


def _kernel(
    x_TH: Tensor,
    residual_TH: Tensor,
    conv_weight_H4: Tensor,
    norm_weight_H: Tensor | None,
    eps: float,
    cu_tokens: Tensor,
) -> tuple[Tensor, Tensor]:
    sum_TH = residual_TH.clone(memory_format=torch.contiguous_format)
    normed_TH = torch.empty(0 if norm_weight_H is None else x_TH.shape, dtype=x_TH.dtype)
    slots = torch.arange(cu_tokens.numel() - 1, dtype=torch.int32)
    conv_rows = torch.zeros(slots.numel(), 1, CONV_TAPS - 1, x_TH.shape[-1], dtype=x_TH.dtype)
    _ext.sconv_norm(
        x_TH,
        sum_TH,
        conv_weight_H4,
        norm_weight_H,
        eps,
        conv_rows,
        0,
        0,
        cu_tokens,
        slots,
        None if norm_weight_H is None else normed_TH,
        num_threads(),
    )
    return normed_TH, sum_TH


def _fake(
    x_TH: Tensor,
    residual_TH: Tensor,
    conv_weight_H4: Tensor,
    norm_weight_H: Tensor | None,
    eps: float,
    cu_tokens: Tensor,
) -> tuple[Tensor, Tensor]:
    del conv_weight_H4, eps, cu_tokens
    normed_TH = x_TH.new_empty((0,) if norm_weight_H is None else x_TH.shape)
    return normed_TH, residual_TH.new_empty(residual_TH.shape)


def _bwd_kernel(
    dnormed_TH: Tensor,
    dsum_TH: Tensor,
    x_TH: Tensor,
    sum_TH: Tensor,
    conv_weight_H4: Tensor,
    norm_weight_H: Tensor | None,
    eps: float,
    cu_tokens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx_TH, dresidual_TH, dconv_H4, dnorm_H = (
        torch.empty(like.shape, dtype=like.dtype)
        for like in (
            x_TH,
            sum_TH,
            conv_weight_H4,
            x_TH[:0, :0] if norm_weight_H is None else norm_weight_H,
        )
    )
    has_norm = norm_weight_H is not None
    _ext.sconv_norm_bwd(
        dnormed_TH if has_norm else None,
        dsum_TH,
        x_TH,
        sum_TH,
        conv_weight_H4,
        norm_weight_H,
        eps,
        cu_tokens,
        dx_TH,
        dresidual_TH,
        dconv_H4,
        dnorm_H if has_norm else None,
        num_threads(),
    )
    return dx_TH, dresidual_TH, dconv_H4, dnorm_H


def _bwd_fake(
    dnormed_TH: Tensor,
    dsum_TH: Tensor,
    x_TH: Tensor,
    sum_TH: Tensor,
    conv_weight_H4: Tensor,
    norm_weight_H: Tensor | None,
    eps: float,
    cu_tokens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del dnormed_TH, dsum_TH, eps, cu_tokens
    return (
        x_TH.new_empty(x_TH.shape),
        sum_TH.new_empty(sum_TH.shape),
        conv_weight_H4.new_empty(conv_weight_H4.shape),
        x_TH.new_empty((0, 0) if norm_weight_H is None else norm_weight_H.shape),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x_TH, _, conv_weight_H4, norm_weight_H, ctx.eps, cu_tokens = inputs
    ctx.save_for_backward(x_TH, output[1], conv_weight_H4, norm_weight_H, cu_tokens)


def _backward(ctx: Any, dnormed_TH: Tensor, dsum_TH: Tensor) -> tuple[Tensor | None, ...]:
    x_TH, sum_TH, conv_weight_H4, norm_weight_H, cu_tokens = ctx.saved_tensors
    dx_TH, dresidual_TH, dconv_H4, dnorm_H = _sconv_norm_packed_bwd(
        dnormed_TH.contiguous(),
        dsum_TH.contiguous(),
        x_TH,
        sum_TH,
        conv_weight_H4,
        norm_weight_H,
        ctx.eps,
        cu_tokens,
    )
    return dx_TH, dresidual_TH, dconv_H4, None if norm_weight_H is None else dnorm_H, None, None


_sconv_norm_packed_bwd = register_op(
    "sconv_norm_packed_bwd(Tensor dnormed, Tensor dsum, Tensor x, Tensor sum, Tensor conv_weight,"
    " Tensor? norm_weight, float eps, Tensor cu_tokens) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
_sconv_norm_packed = register_op(
    "sconv_norm_packed(Tensor x, Tensor residual, Tensor conv_weight, Tensor? norm_weight,"
    " float eps, Tensor cu_tokens) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    backward=_backward,
    setup_context=_setup,
)
