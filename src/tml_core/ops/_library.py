"""Ops of ``torch.ops.tml``: schema, CPU kernel, shapes for tracing and gradient, in one call.

A kernel may neither change nor return its inputs. The gradient formula calls ops of its own
(``<op>_bwd``), registered without a formula: they are differentiable once, and compile like the
rest. Kernels exist for the CPU; on another device the public function of an op calls its
reference, which torch differentiates.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from tml_core.errors import Unsupported

__all__ = ["is_recorded", "register_op"]

_LIBRARY: Final = torch.library.Library("tml", "FRAGMENT")


def register_op(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register ``tml::<op>`` and return it, ready to call.

    schema: ``"op(Tensor x, float eps) -> Tensor"``. kernel(*args) computes on CPU tensors;
    fake(*args) returns empty tensors of the results' shapes and dtypes, without reading data.
    backward(ctx, *grads) returns one gradient (or None) per argument, in the schema's order;
    setup_context(ctx, inputs, output) saves what it needs. Without a formula, differentiating the
    op raises Unsupported.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"tml::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"tml::{name}", backward or _no_formula(name), setup_context=setup_context, lib=_LIBRARY
    )
    op: Callable[..., Any] = getattr(torch.ops.tml, name).default
    return op


def _no_formula(name: str) -> Callable[..., Any]:
    def refuse(_ctx: Any, *_grads: Any) -> Any:
        raise Unsupported(f"{name}: has no gradient formula (ops are differentiable once)")

    return refuse


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether a call on these must go through its registered op: a gradient or a trace wants it.

    Otherwise a public function may call its kernel directly, which saves the dispatch.
    """
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
