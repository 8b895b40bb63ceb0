"""linear_logp: log-probabilities of a vocabulary head, differentiable, without a [T, V] tensor.

`linear_nll` is the loss of a training step, whose weights are known beforehand: its gradients are
made while the logits are there, so the backward pass computes none.

Shape suffixes: T tokens, R of them with a target, H hidden, V vocabulary (rows of the weight,
padded or not).
"""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.errors import InvalidArgument
from tml_core.ops._common import num_threads
from tml_core.ops._library import register_op
from tml_core.ops.linear import pack_weight

__all__ = [
    "IGNORED_TARGET",
    "linear_logp",
    "linear_logp_reference",
    "linear_nll",
    "linear_nll_reference",
]

IGNORED_TARGET = -100


def _forward(
    h_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, vocab_size: int, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    kept_R = _kept(targets_T)
    logprobs_R = torch.empty(len(kept_R))
    entropy_R = torch.empty(len(kept_R) if with_entropy else 0)
    _ext.linear_logp(
        _taken(_rows(h_TH), kept_R),
        _packed(weight_VH, vocab_size),
        vocab_size,
        _taken(targets_T.contiguous(), kept_R),
        logprobs_R,
        entropy_R if with_entropy else None,
        num_threads(),
    )
    num_rows = h_TH.shape[0]
    entropy_T = _spread(entropy_R, kept_R, num_rows) if with_entropy else entropy_R
    return _spread(logprobs_R, kept_R, num_rows), entropy_T


def _forward_fake(h_TH: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, with_entropy = others
    rows = h_TH.new_empty(h_TH.shape[0], dtype=torch.float32)
    return rows, h_TH.new_empty(h_TH.shape[0] if with_entropy else 0, dtype=torch.float32)


def _backward(
    h_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    vocab_size: int,
    d_logprobs_T: Tensor,
    d_entropy_T: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    kept_R = _kept(targets_T)
    logprobs_R = torch.empty(len(kept_R))
    dh_RH = torch.empty((len(kept_R), h_TH.shape[1]), dtype=h_TH.dtype)
    dw_VH = torch.empty(weight_VH.shape, dtype=weight_VH.dtype)
    with_entropy = d_entropy_T.numel() > 0
    _ext.linear_logp_bwd(
        _taken(_rows(h_TH), kept_R),
        _packed(weight_VH, vocab_size),
        _rows(weight_VH),
        vocab_size,
        _taken(targets_T.contiguous(), kept_R),
        _taken(d_logprobs_T.contiguous(), kept_R),
        _taken(d_entropy_T.contiguous(), kept_R) if with_entropy else None,
        logprobs_R,
        dh_RH,
        dw_VH,
        num_threads(),
    )
    num_rows = h_TH.shape[0]
    return _spread(logprobs_R, kept_R, num_rows), _spread(dh_RH, kept_R, num_rows), dw_VH


def _backward_fake(h_TH: Tensor, weight_VH: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    logprobs_T = h_TH.new_empty(h_TH.shape[0], dtype=torch.float32)
    return logprobs_T, h_TH.new_empty(h_TH.shape), weight_VH.new_empty(weight_VH.shape)


def _packed(weight_VH: Tensor, vocab_size: int) -> Tensor:
    with torch.no_grad():
        return pack_weight(_rows(weight_VH)[:vocab_size]).data


def _kept(targets_T: Tensor) -> Tensor:
    """The rows with a target: the kernels see no others."""
    return (targets_T != IGNORED_TARGET).nonzero()[:, 0]


def _taken(x: Tensor, kept_R: Tensor) -> Tensor:
    return x if len(kept_R) == len(x) else x.index_select(0, kept_R)


def _spread(x: Tensor, kept_R: Tensor, num_rows: int) -> Tensor:
    """Rows of ``x`` where they came from, zeros elsewhere."""
    if len(kept_R) == num_rows:
        return x
    return x.new_zeros((num_rows, *x.shape[1:])).index_copy_(0, kept_R, x)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    h_TH, weight_VH, targets_T, ctx.vocab_size, _ = inputs
    ctx.save_for_backward(h_TH, weight_VH, targets_T)


def _gradients(ctx: Any, d_logprobs_T: Tensor, d_entropy_T: Tensor) -> tuple[Tensor | None, ...]:
    h_TH, weight_VH, targets_T = ctx.saved_tensors
    _, dh_TH, dw_VH = _linear_logp_bwd(
        h_TH, weight_VH, targets_T, ctx.vocab_size, d_logprobs_T, d_entropy_T
    )
    return dh_TH, dw_VH, None, None, None


_linear_logp_bwd = register_op(
    "linear_logp_bwd(Tensor h, Tensor weight, Tensor targets, int vocab_size, "
    "Tensor d_logprobs, Tensor d_entropy) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_linear_logp = register_op(
    "linear_logp(Tensor h, Tensor weight, Tensor targets, int vocab_size, bool with_entropy)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_gradients,
    setup_context=_setup_context,
)


def _nll_forward(
    h_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, weights_T: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs_T, dh_TH, dw_VH = _backward(
        h_TH, weight_VH, targets_T, vocab_size, -weights_T, torch.empty(0)
    )
    return _weighted_sum(logprobs_T, weights_T), logprobs_T, dh_TH, dw_VH


def _weighted_sum(logprobs_T: Tensor, weights_T: Tensor) -> Tensor:
    """Exactly rounded: it does not matter how a sum is split."""
    return torch.tensor(math.fsum((logprobs_T.double() * -weights_T.double()).tolist()))


def _nll_fake(h_TH: Tensor, weight_VH: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs_T, dh_TH, dw_VH = _backward_fake(h_TH, weight_VH)
    return h_TH.new_empty((), dtype=torch.float32), logprobs_T, dh_TH, dw_VH


def _nll_setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(*others[1:])


def _nll_gradients(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dh_TH, dw_VH = ctx.saved_tensors
    return dh_TH * d_loss, dw_VH * d_loss, None, None, None


_linear_nll = register_op(
    "linear_nll(Tensor h, Tensor weight, Tensor targets, Tensor weights, int vocab_size)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _nll_forward,
    _nll_fake,
    backward=_nll_gradients,
    setup_context=_nll_setup_context,
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
    round once; they do not depend on the number of threads, nor on rows that are ignored, which
    cost nothing. Workspace: up to 16 M logits, and what grows with T * V / 128.
    On another device than the CPU the reference computes it. Raises InvalidArgument on shapes,
    dtypes and targets.
    """
    vocab_size = _checked("linear_logp", h_TH, weight_VH, targets_T, vocab_size)
    if h_TH.device.type != "cpu":
        logprobs_T, entropy_T = linear_logp_reference(h_TH, weight_VH, targets_T, vocab_size)
    else:
        logprobs_T, entropy_T = _linear_logp(h_TH, weight_VH, targets_T, vocab_size, with_entropy)
    return (logprobs_T, entropy_T) if with_entropy else logprobs_T


def linear_nll(
    h_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of -``weights_T`` * `linear_logp` over the rows with a target, their log-probabilities).

    weights_T: fp32 [T], without a gradient; the rest as `linear_logp` takes it. The loss is an fp32
    scalar, the exactly rounded sum, differentiable in h and weight: the gradients have the bits of
    those through `linear_logp`, and cost a product less. The log-probabilities are fp32 [T] and
    have none. Raises InvalidArgument as `linear_logp` does, and on the weights.
    """
    vocab_size = _checked("linear_nll", h_TH, weight_VH, targets_T, vocab_size)
    if weights_T.shape != targets_T.shape or weights_T.dtype != torch.float32:
        raise InvalidArgument(
            f"linear_nll: weights must be float32 {list(targets_T.shape)}, got "
            f"{weights_T.dtype} {list(weights_T.shape)}"
        )
    if weights_T.requires_grad:
        raise InvalidArgument("linear_nll: weights must not require a gradient")
    if h_TH.device.type != "cpu":
        return linear_nll_reference(h_TH, weight_VH, targets_T, weights_T, vocab_size)
    if not torch.is_grad_enabled() or not (h_TH.requires_grad or weight_VH.requires_grad):
        logprobs_T = linear_logp(h_TH, weight_VH, targets_T, vocab_size)
        return _weighted_sum(logprobs_T, weights_T), logprobs_T
    loss, logprobs_T, _, _ = _linear_nll(h_TH, weight_VH, targets_T, weights_T, vocab_size)
    return loss, logprobs_T


def linear_nll_reference(
    h_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, weights_T: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The same through the [T, V] logits, fp32 (fp64 stays fp64)."""
    logprobs_T, _ = linear_logp_reference(h_TH, weight_VH, targets_T, vocab_size)
    return -(logprobs_T * weights_T).sum(), logprobs_T.detach()


def _checked(
    op: str, h_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, vocab_size: int | None
) -> int:
    """The vocabulary's size."""
    if h_TH.ndim != 2 or weight_VH.ndim != 2 or h_TH.shape[1] != weight_VH.shape[1]:
        raise InvalidArgument(
            f"{op}: h must be [T, H] and weight [V, H], got "
            f"{list(h_TH.shape)} and {list(weight_VH.shape)}"
        )
    if h_TH.dtype != weight_VH.dtype or h_TH.dtype not in (torch.float32, torch.bfloat16):
        raise InvalidArgument(
            f"{op}: h and weight must both be float32 or bfloat16, got "
            f"{h_TH.dtype} and {weight_VH.dtype}"
        )
    if targets_T.shape != h_TH.shape[:1] or targets_T.dtype != torch.int64:
        raise InvalidArgument(
            f"{op}: targets must be int64 [{h_TH.shape[0]}], got "
            f"{targets_T.dtype} {list(targets_T.shape)}"
        )
    if vocab_size is None:
        vocab_size = weight_VH.shape[0]
    if not 1 <= vocab_size <= weight_VH.shape[0]:
        raise InvalidArgument(
            f"{op}: vocab_size must be in [1, {weight_VH.shape[0]}], got {vocab_size}"
        )
    return vocab_size


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
