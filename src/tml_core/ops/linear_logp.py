"""linear_logp: log-probabilities of a vocabulary head, differentiable, without a [T, V] tensor.

Shape suffixes: T tokens, H hidden, V vocabulary (rows of the weight, padded or not).
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.errors import InvalidArgument
from tml_core.ops._common import num_threads
from tml_core.ops._library import register_op
from tml_core.ops.linear import pack_weight

__all__ = ["IGNORED_TARGET", "linear_logp", "linear_logp_reference"]

IGNORED_TARGET = -100


def _forward(
    h_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, vocab_size: int, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        packed = pack_weight(_rows(weight_VH)[:vocab_size])
    logprobs_T, lse_T = torch.empty(h_TH.shape[0]), torch.empty(h_TH.shape[0])
    entropy_T = torch.empty(h_TH.shape[0] if with_entropy else 0)
    _ext.linear_logp(
        _rows(h_TH),
        packed.data,
        vocab_size,
        targets_T.contiguous(),
        logprobs_T,
        lse_T,
        entropy_T if with_entropy else None,
        num_threads(),
    )
    return logprobs_T, lse_T, entropy_T


def _forward_fake(h_TH: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, with_entropy = others
    rows = h_TH.new_empty(h_TH.shape[0], dtype=torch.float32)
    entropy_T = h_TH.new_empty(h_TH.shape[0] if with_entropy else 0, dtype=torch.float32)
    return rows, torch.empty_like(rows), entropy_T


def _backward(
    h_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    vocab_size: int,
    lse_T: Tensor,
    entropy_T: Tensor,
    d_logprobs_T: Tensor,
    d_entropy_T: Tensor,
) -> tuple[Tensor, Tensor]:
    dh_TH = torch.empty(h_TH.shape, dtype=h_TH.dtype)
    dw_VH = torch.empty(weight_VH.shape, dtype=weight_VH.dtype)
    with_entropy = d_entropy_T.numel() > 0
    _ext.linear_logp_bwd(
        _rows(h_TH),
        _rows(weight_VH),
        vocab_size,
        targets_T.contiguous(),
        lse_T,
        entropy_T if with_entropy else None,
        d_logprobs_T.contiguous(),
        d_entropy_T.contiguous() if with_entropy else None,
        dh_TH,
        dw_VH,
        num_threads(),
    )
    return dh_TH, dw_VH


def _backward_fake(h_TH: Tensor, weight_VH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return h_TH.new_empty(h_TH.shape), weight_VH.new_empty(weight_VH.shape)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h_TH, weight_VH, targets_T, ctx.vocab_size, ctx.with_entropy = inputs
    _, lse_T, entropy_T = output
    ctx.mark_non_differentiable(lse_T)
    ctx.save_for_backward(h_TH, weight_VH, targets_T, lse_T, entropy_T)


def _gradients(
    ctx: Any, d_logprobs_T: Tensor, _d_lse_T: Tensor, d_entropy_T: Tensor
) -> tuple[Tensor | None, ...]:
    h_TH, weight_VH, targets_T, lse_T, entropy_T = ctx.saved_tensors
    dh_TH, dw_VH = _linear_logp_bwd(
        h_TH, weight_VH, targets_T, ctx.vocab_size, lse_T, entropy_T, d_logprobs_T, d_entropy_T
    )
    return dh_TH, dw_VH, None, None, None


_linear_logp_bwd = register_op(
    "linear_logp_bwd(Tensor h, Tensor weight, Tensor targets, int vocab_size, Tensor lse, "
    "Tensor entropy, Tensor d_logprobs, Tensor d_entropy) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_linear_logp = register_op(
    "linear_logp(Tensor h, Tensor weight, Tensor targets, int vocab_size, bool with_entropy)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_gradients,
    setup_context=_setup_context,
)


@overload
def linear_logp(
    h_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, vocab_size: int | None = ...
) -> Tensor: ...
@overload
def linear_logp(
    h_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    vocab_size: int | None = ...,
    *,
    with_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_logp(
    h_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    vocab_size: int | None = None,
    *,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(h @ weight[:vocab_size].T) at ``targets_T``: fp32 [T].

    h_TH [T, H] and weight_VH [V, H]: fp32 or bf16, the same; targets_T int64 [T] in
    [0, ``vocab_size``), or -100 for a row that is ignored: log-probability 0, no gradient.
    ``vocab_size`` defaults to V; rows past it get the gradient 0. ``with_entropy`` adds the
    entropy of each row's distribution in nats, fp32 [T], differentiable as well.
    The bits are those of ``lm_head_logprobs`` on the packed weight. The gradients recompute the
    logits by vocabulary blocks, round them to the dtype of h (d logits), accumulate in fp32 and
    round once; they do not depend on the number of threads. Workspace grows with T * V / 128.
    On another device than the CPU the reference computes it. Raises InvalidArgument on shapes,
    dtypes and targets.
    """
    if h_TH.ndim != 2 or weight_VH.ndim != 2 or h_TH.shape[1] != weight_VH.shape[1]:
        raise InvalidArgument(
            "linear_logp: h must be [T, H] and weight [V, H], got "
            f"{list(h_TH.shape)} and {list(weight_VH.shape)}"
        )
    if h_TH.dtype != weight_VH.dtype or h_TH.dtype not in (torch.float32, torch.bfloat16):
        raise InvalidArgument(
            "linear_logp: h and weight must both be float32 or bfloat16, got "
            f"{h_TH.dtype} and {weight_VH.dtype}"
        )
    if targets_T.shape != h_TH.shape[:1] or targets_T.dtype != torch.int64:
        raise InvalidArgument(
            f"linear_logp: targets must be int64 [{h_TH.shape[0]}], got "
            f"{targets_T.dtype} {list(targets_T.shape)}"
        )
    if vocab_size is None:
        vocab_size = weight_VH.shape[0]
    if not 1 <= vocab_size <= weight_VH.shape[0]:
        raise InvalidArgument(
            f"linear_logp: vocab_size must be in [1, {weight_VH.shape[0]}], got {vocab_size}"
        )
    if h_TH.device.type != "cpu":
        logprobs_T, entropy_T = linear_logp_reference(h_TH, weight_VH, targets_T, vocab_size)
    else:
        logprobs_T, _, entropy_T = _linear_logp(
            h_TH, weight_VH, targets_T, vocab_size, with_entropy
        )
    return (logprobs_T, entropy_T) if with_entropy else logprobs_T


def linear_logp_reference(
    h_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """(log-probabilities [T], entropy [T]) through the [T, V] logits, fp32 (fp64 stays fp64)."""
    exact = torch.promote_types(h_TH.dtype, torch.float32)
    logits_TV = h_TH.to(exact) @ weight_VH[:vocab_size].to(exact).T
    logp_TV = logits_TV.log_softmax(dim=1)
    is_kept_T = targets_T != IGNORED_TARGET
    logprobs_T = logp_TV.gather(1, targets_T.clamp(min=0)[:, None])[:, 0]
    entropy_T = -(logp_TV.exp() * logp_TV).sum(dim=1)
    nothing = torch.zeros_like(logprobs_T)
    return torch.where(is_kept_T, logprobs_T, nothing), torch.where(is_kept_T, entropy_T, nothing)
