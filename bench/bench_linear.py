"""linear against torch: [M, 2048] x [2048, 8192] in bf16, weights cold."""

from itertools import cycle
from typing import Any

import pytest
import torch

from tml_core.ops._common import huge_empty
from tml_core.ops.linear import linear, pack_weight

IN_DIM, OUT_DIM = 2048, 8192
# Each call takes the next of six matrices, 201 MB together: no cache keeps one until its next turn.
NUM_WEIGHTS = 6


@pytest.fixture(scope="module")
def weights() -> list[torch.Tensor]:
    """Plain weights, in huge pages like the packed ones."""
    generator = torch.Generator().manual_seed(0)
    return [
        huge_empty((OUT_DIM, IN_DIM), torch.bfloat16).normal_(std=IN_DIM**-0.5, generator=generator)
        for _ in range(NUM_WEIGHTS)
    ]


@pytest.mark.parametrize("num_tokens", [1, 4, 16, 64, 256])
def test_linear(measure: Any, weights: list[torch.Tensor], num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, IN_DIM, generator=generator).bfloat16()
    packed = [pack_weight(w) for w in weights]
    # Sums of 2048 products of order one, rounded to bf16 by each in its own order.
    torch.testing.assert_close(
        linear(x, packed[0]), torch.nn.functional.linear(x, weights[0]), rtol=0.02, atol=0.02
    )
    ours, theirs = cycle(packed), cycle(weights)
    measure(
        f"linear m{num_tokens} k{IN_DIM} n{OUT_DIM}",
        lambda: linear(x, next(ours)),
        peer=lambda: torch.nn.functional.linear(x, next(theirs)),
        num_bytes=2.0 * (IN_DIM * OUT_DIM + num_tokens * (IN_DIM + OUT_DIM)),
        flops=2.0 * num_tokens * IN_DIM * OUT_DIM,
    )
