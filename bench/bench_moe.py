"""A mixture-of-experts layer of shape S, after its router, against transformers' two ways.

Calls go round three layers of 208 MB and inputs of their own, so that weights are cold. Bytes are
those of the experts the inputs really hit.
"""

from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from shape_s import NUM_EXPERTS, TEXT_CONFIG, TOP_K
from tml_core.ops._common import huge_empty
from tml_core.ops.moe import moe, pack_experts

HIDDEN, WIDTH, NUM_SHARED = 1024, 512, 2
NUM_LAYERS = 3
NUM_INPUTS = 12

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def layers() -> list[tuple[Tensor, Tensor]]:
    """Plain [E + S, 2I, H] and [E + S, H, I] weights, shared experts last, in huge pages."""
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, cols: int) -> Tensor:
        value = huge_empty((NUM_EXPERTS + NUM_SHARED, rows, cols), torch.bfloat16)
        return value.normal_(std=cols**-0.5, generator=generator)

    return [(weight(2 * WIDTH, HIDDEN), weight(HIDDEN, WIDTH)) for _ in range(NUM_LAYERS)]


def inputs(num_tokens: int, seed: int) -> Inputs:
    """x, ascending distinct expert ids, their weights, the shared experts' factors."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    ids = scores.topk(TOP_K).indices.sort().values.int()
    weights = torch.rand(num_tokens, TOP_K + NUM_SHARED, generator=generator).softmax(dim=1)
    return x, ids, weights[:, :TOP_K].contiguous(), weights[:, TOP_K:].contiguous()


@pytest.mark.parametrize("peer_name", ["grouped_mm", "eager"])
@pytest.mark.parametrize("num_tokens", [1, 4, 12, 64, 256])
def test_moe(
    measure: Any, layers: list[tuple[Tensor, Tensor]], num_tokens: int, peer_name: str
) -> None:
    many = [inputs(num_tokens, seed) for seed in range(NUM_INPUTS)]
    packed = [pack_experts(gate_up, down, num_shared=NUM_SHARED) for gate_up, down in layers]
    ours = cycle([(one, packed[i % NUM_LAYERS]) for i, one in enumerate(many)])

    def run() -> Tensor:
        (x, ids, weights, gammas), experts = next(ours)
        return moe(x, ids, weights, gammas, experts)

    modules = [_transformers_layer(gate_up, down, peer_name) for gate_up, down in layers]
    # What their router hands over: int64 ids, weights in bf16.
    typed = [(x, ids.long(), w.bfloat16(), g.bfloat16()) for x, ids, w, g in many]
    theirs = cycle([(one, modules[i % NUM_LAYERS]) for i, one in enumerate(typed)])

    def run_peer() -> Tensor:
        (x, ids, weights, gammas), (routed, shared) = next(theirs)
        return routed(x, ids, weights) + shared(x, gammas)

    # They round every expert's output and its weight to bf16, we the sum.
    torch.testing.assert_close(run(), run_peer(), rtol=0.05, atol=0.05)
    hit = sum(ids.unique().numel() for _, ids, _, _ in many) / NUM_INPUTS
    expert = 3 * HIDDEN * WIDTH
    measure(
        f"moe t{num_tokens}",
        run,
        peer=run_peer,
        peer_name=f"transformers {peer_name}",
        num_bytes=2.0 * ((hit + NUM_SHARED) * expert + 2 * num_tokens * HIDDEN),
        flops=2.0 * num_tokens * (TOP_K + NUM_SHARED) * expert,
    )


def _transformers_layer(gate_up: Tensor, down: Tensor, implementation: str) -> tuple[Any, Any]:
    """Routed and shared experts on the same memory."""
    inkling = pytest.importorskip(
        "transformers.models.inkling.modeling_inkling",
        reason="the peer needs transformers (extra: test)",
    )
    config = inkling.InklingTextConfig(**TEXT_CONFIG)
    config._experts_implementation = implementation
    with torch.device("meta"):
        routed, shared = inkling.InklingExperts(config), inkling.InklingSharedExperts(config)
    tensors = {"gate_up_proj": gate_up[:NUM_EXPERTS], "down_proj": down[:NUM_EXPERTS]}
    routed.load_state_dict(tensors, assign=True)
    gate, up = gate_up[NUM_EXPERTS:].chunk(2, dim=1)
    tensors = {"gate_proj": gate, "up_proj": up, "down_proj": down[NUM_EXPERTS:]}
    shared.load_state_dict(tensors, assign=True)
    return routed.eval(), shared.eval()
