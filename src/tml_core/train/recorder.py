"""A backbone that remembers what it drew.

Legend: B rows of a draw, D hidden size.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tml_core.model.backbone import Backbone
from tml_core.model.config import ModelConfig
from tml_core.model.kv_store import KvStore
from tml_core.model.token_loop import TokenLoop, TokensDrawn, TokenTable
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
        seeds = rows.seed_B.tolist()
        for one in zip(seeds, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            self._note(*one)
        return tokens_B, logprobs_B

    def token_loop(self, kv: KvStore, max_rows: int, max_run: int) -> TokenLoop:
        return _RecordingLoop(self._note, *self._loop_parts(), kv, max_rows, max_run)

    def _note(self, seed: int, token_id: int, logprob: float) -> None:
        self._drawn[seed].append((token_id, logprob))

    def take(self, seed: int) -> list[tuple[int, float]]:
        """What was drawn with ``seed`` since it was last taken."""
        return self._drawn.pop(seed, [])


class _RecordingLoop(TokenLoop):
    """Tells ``note`` of every seed, token and log-probability, those of a row in order."""

    def __init__(self, note: Callable[[int, int, float], None], *parts: Any) -> None:
        super().__init__(*parts)
        self._note = note

    def run(self, num_rows: int, table: TokenTable, limit_s: float) -> TokensDrawn:
        drawn = super().run(num_rows, table, limit_s)
        seeds = self.rows["seed"][:num_rows].tolist()
        for seed, (token_ids, logprobs) in zip(seeds, drawn.rows, strict=True):
            for token_id, logprob in zip(token_ids, logprobs, strict=True):
                self._note(seed, token_id, logprob)
        return drawn
