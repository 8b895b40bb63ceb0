"""moe in training, shape S-train (hidden 512, 16 experts of 256 top-4 + 1 shared, 4096 tokens):
forward and backward against the same layer in eager torch, experts in a loop.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from tml_core.ops.moe import moe

TOKENS, HIDDEN, WIDTH, EXPERTS, SHARED, TOP_K = 4096, 512, 256, 16, 1, 4
PRODUCT = 2 * TOKENS * (TOP_K + SHARED) * HIDDEN * WIDTH  # flops of one matrix for all pairs

Layer = Callable[..., Tensor]


def eager(
    x: Tensor, ids: Tensor, weights: Tensor, gammas: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Grouped by expert, in the model dtype."""

    def mlp(e: int, x: Tensor, gamma: Tensor | None = None) -> Tensor:
        gate, up = linear(x, gate_up[e]).chunk(2, dim=-1)
        h = silu(gate) * up
        return linear(h if gamma is None else h * gamma, down[e])

    y = torch.zeros_like(x)
    for e in range(EXPERTS):
        token, choice = (ids == e).nonzero(as_tuple=True)
        out = mlp(e, x[token]) * weights[token, choice, None].to(x.dtype)
        y = y.index_add(0, token, out)
    for s in range(SHARED):
        y = y + mlp(EXPERTS + s, x, gammas[:, s, None].to(x.dtype))
    return y


def inputs() -> list[Tensor]:
    """Leaves x, ids, weights, gammas, gate_up, down."""
    torch.manual_seed(0)
    bf16 = torch.bfloat16
    ids = torch.randn(TOKENS, EXPERTS).topk(TOP_K).indices.sort().values.int()
    leaves = [
        torch.randn(TOKENS, HIDDEN).to(bf16),
        ids,
        torch.rand(TOKENS, TOP_K),
        torch.rand(TOKENS, SHARED),
        (torch.randn(EXPERTS + SHARED, 2 * WIDTH, HIDDEN) / HIDDEN**0.5).to(bf16),
        (torch.randn(EXPERTS + SHARED, HIDDEN, WIDTH) / WIDTH**0.5).to(bf16),
    ]
    return [leaf.requires_grad_() if leaf.is_floating_point() else leaf for leaf in leaves]


def step(layer: Layer, args: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        wrt = [a for a in args if a.requires_grad]
        return torch.autograd.grad(layer(*args), wrt, dy)


def test_moe_forward_and_backward(measure: Any) -> None:
    args, dy = inputs(), torch.randn(TOKENS, HIDDEN).bfloat16()
    for ours, theirs in zip(step(moe, args, dy), step(eager, args, dy), strict=True):
        scale = theirs.float().abs().max().item()
        # eager rounds every step to bf16: 2 % of the largest entry
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.02 * scale)
    measure(
        "moe fwd + bwd S-train",
        lambda: step(moe, args, dy),
        peer=lambda: step(eager, args, dy),
        peer_name="torch eager",
        flops=9 * PRODUCT,
        rounds=5,
    )


@pytest.mark.parametrize("save", [True, False])
def test_moe_forward(measure: Any, save: bool) -> None:
    args = inputs()

    def forward(layer: Layer) -> Tensor:
        with torch.set_grad_enabled(save):
            return layer(*args)

    measure(
        f"moe fwd S-train {'to train' if save else 'no grad'}",
        lambda: forward(moe),
        peer=lambda: forward(eager),
        peer_name="torch eager",
        flops=3 * PRODUCT,
        rounds=5,
    )
