"""A backbone that remembers what it drew.

Legend: B rows of a draw, D hidden size.
"""

from collections import defaultdict

import torch
from torch import Tensor

from tml_core.model.backbone import Backbone
from tml_core.model.config import ModelConfig
from tml_core.ops.lm_head import SampleRows

__all__ = ["RecordingBackbone"]


class RecordingBackbone(Backbone):
    """For each session seed (token, log-probability) of every draw, in order."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(config, weights, dtype)
        self._drawn: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)

    def sample(
        self, h_BD: Tensor, rows: SampleRows, *, out_B: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        tokens_B, logprobs_B = super().sample(h_BD, rows, out_B=out_B)
        drawn = zip(tokens_B.tolist(), logprobs_B.tolist(), strict=True)
        for seed, one in zip(rows.seed_B.tolist(), drawn, strict=True):
            self._drawn[seed].append(one)
        return tokens_B, logprobs_B

    def take(self, seed: int) -> list[tuple[int, float]]:
        """What was drawn with ``seed`` since it was last taken."""
        return self._drawn.pop(seed, [])
