"""attn_prologue_packed: attn_prologue over whole packed sequences, for training.

Shape suffixes: T tokens of all sequences, N heads, K KV heads, D head dim, R relative dim,
C = K * D channels, B sequences.
"""

from typing import Any

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.contract import CONV_TAPS
from tml_core.errors import InvalidArgument
from tml_core.ops._common import num_threads
from tml_core.ops._library import register_op
from tml_core.ops.attn_prologue import attn_prologue_reference

__all__ = ["attn_prologue_packed", "attn_prologue_packed_reference"]


def attn_prologue_packed(
    qkvr: Tensor,
    num_heads: int,
    *,
    k_conv_C4: Tensor,
    v_conv_C4: Tensor,
    q_norm_D: Tensor,
    k_norm_D: Tensor,
    eps: float,
    log_floor: float = 0.0,
    log_alpha: float = 0.0,
    cu_tokens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q [T, N, D], k [T, K, D], v [T, K, D], r [T, N, R]) as attention reads them.

    qkvr: [T, N*D + 2*C + N*R] fp32 or bf16, rows dense. k_conv_C4, v_conv_C4: fp32 [C, 4], oldest
    tap first. q_norm_D, k_norm_D: [D] of qkvr's dtype, D a multiple of 16. log_floor > 0 scales q
    and r by 1 + log_alpha * ln(max((position + 1) / log_floor, 1)). Sequence b owns tokens
    [cu_tokens[b], cu_tokens[b + 1]) (int32 [B + 1]), from position 0 and a zero state: the bits
    are those of ``attn_prologue`` in fresh slots, k and v dense instead of in pages.
    Differentiable in qkvr and the four parameters; gradients of the convolutions are fp32. Off the
    CPU this is ``attn_prologue_packed_reference``.
    Raises InvalidArgument on a wrong dtype, shape, layout or cu_tokens.
    """
    _r_dim(qkvr, num_heads, k_conv_C4, q_norm_D)
    if not qkvr.is_cpu:
        return attn_prologue_packed_reference(
            qkvr,
            num_heads,
            k_conv_C4=k_conv_C4,
            v_conv_C4=v_conv_C4,
            q_norm_D=q_norm_D,
            k_norm_D=k_norm_D,
            eps=eps,
            log_floor=log_floor,
            log_alpha=log_alpha,
            cu_tokens=cu_tokens,
        )
    q, k, v, r = _attn_prologue_packed(
        qkvr,
        num_heads,
        k_conv_C4,
        v_conv_C4,
        q_norm_D,
        k_norm_D,
        eps,
        log_floor,
        log_alpha,
        cu_tokens,
    )
    return q, k, v, r


def attn_prologue_packed_reference(
    qkvr: Tensor, num_heads: int, *, cu_tokens: Tensor, **named: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same function in torch, sequence by sequence."""
    state_3C = qkvr.new_zeros(CONV_TAPS - 1, named["k_conv_C4"].shape[0])
    parts = [
        attn_prologue_reference(
            part, num_heads, **named, k_state_3C=state_3C, v_state_3C=state_3C, start_pos=0
        )
        for part in [qkvr[:0], *qkvr.split(cu_tokens.diff().tolist())]
    ]
    q, r, k, v = (torch.cat([part[i] for part in parts]) for i in range(4))
    return q, k, v, r


def _r_dim(qkvr: Tensor, num_heads: int, k_conv_C4: Tensor, q_norm_D: Tensor) -> int:
    if qkvr.ndim != 2 or num_heads < 1:
        raise InvalidArgument(
            "attn_prologue_packed: qkvr must be [T, width] with num_heads >= 1, "
            f"got {list(qkvr.shape)} with num_heads {num_heads}"
        )
    head_dim, channels = q_norm_D.numel(), k_conv_C4.shape[0]
    r_width = qkvr.shape[1] - num_heads * head_dim - 2 * channels
    if r_width < 0 or r_width % num_heads != 0:
        raise InvalidArgument(
            f"attn_prologue_packed: qkvr must be {num_heads} * {head_dim} + 2 * {channels} + "
            f"{num_heads} * d_rel wide, got {qkvr.shape[1]}"
        )
    return r_width // num_heads


def _fake(
    qkvr: Tensor,
    num_heads: int,
    k_conv_C4: Tensor,
    v_conv_C4: Tensor,
    q_norm_D: Tensor,
    k_norm_D: Tensor,
    eps: float,
    log_floor: float,
    log_alpha: float,
    cu_tokens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del v_conv_C4, k_norm_D, eps, log_floor, log_alpha, cu_tokens
    num_tokens, head_dim = qkvr.shape[0], q_norm_D.shape[0]
    kv_shape = (num_tokens, k_conv_C4.shape[0] // head_dim, head_dim)
    return (
        qkvr.new_empty((num_tokens, num_heads, head_dim)),
        qkvr.new_empty(kv_shape),
        qkvr.new_empty(kv_shape),
        qkvr.new_empty((num_tokens, num_heads, _r_dim(qkvr, num_heads, k_conv_C4, q_norm_D))),
    )


def _kernel(qkvr: Tensor, num_heads: int, *named: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _fake(qkvr, num_heads, *named)
    args: list[Any] = [qkvr, *named, *outputs, num_threads()]
    _ext.attn_prologue_packed(*args)
    return outputs


def _bwd_fake(
    dq: Tensor, dk: Tensor, dv: Tensor, dr: Tensor, qkvr: Tensor, *named: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del dq, dk, dv, dr
    k_conv_C4, v_conv_C4, q_norm_D, k_norm_D = named[:4]
    return (
        qkvr.new_empty(qkvr.shape),
        k_conv_C4.new_empty(k_conv_C4.shape),
        v_conv_C4.new_empty(v_conv_C4.shape),
        q_norm_D.new_empty(q_norm_D.shape),
        k_norm_D.new_empty(k_norm_D.shape),
    )


def _bwd_kernel(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _bwd_fake(*inputs)
    args: list[Any] = [*inputs, *grads, num_threads()]
    _ext.attn_prologue_packed_bwd(*args)
    return grads


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    del output
    qkvr, _, *parameters, eps, log_floor, log_alpha, cu_tokens = inputs
    ctx.settings = (eps, log_floor, log_alpha)
    ctx.save_for_backward(qkvr, *parameters, cu_tokens)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, cu_tokens = ctx.saved_tensors
    dense = [grad.contiguous() for grad in grads]
    dqkvr, *parameters = _attn_prologue_packed_bwd(*dense, *inputs, *ctx.settings, cu_tokens)
    return dqkvr, None, *parameters, None, None, None, None


_PARAMETERS = (
    "Tensor k_conv, Tensor v_conv, Tensor q_norm, Tensor k_norm, float eps, float log_floor,"
    " float log_alpha, Tensor cu_tokens"
)
_attn_prologue_packed_bwd = register_op(
    f"attn_prologue_packed_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor dr, Tensor qkvr,"
    f" {_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
_attn_prologue_packed = register_op(
    f"attn_prologue_packed(Tensor qkvr, int num_heads, {_PARAMETERS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    backward=_backward,
    setup_context=_setup,
)
