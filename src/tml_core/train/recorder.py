"""A backbone that remembers what it drew.

Legend: B rows of a draw, D hidden size, F frames of a block of sound, M mel channels.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tml_core.layout.sound import SOUND, RunItem
from tml_core.model.backbone import Backbone
from tml_core.model.config import ModelConfig
from tml_core.model.flow import FlowHead
from tml_core.model.kv_store import KvStore
from tml_core.model.token_loop import TokenLoop, TokensDrawn, TokenTable
from tml_core.ops.lm_head import SampleRows

__all__ = ["Drawn", "RecordingBackbone"]


class Drawn(NamedTuple):
    """A token and its log-probability, or a block of sound, float32 [F, M], which has none."""

    item: RunItem
    logprob: float | None

    @property
    def token_id(self) -> int:
        """As it stands in an output half."""
        return self.item if isinstance(self.item, int) else SOUND


class RecordingBackbone(Backbone):
    """For each session seed what was drawn, in order."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(config, weights, dtype)
        self._drawn: defaultdict[int, list[Drawn]] = defaultdict(list)
        if self.flow is not None:
            self.flow = _RecordingHead(self._note, self.flow)

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

    def _note(self, seed: int, item: RunItem, logprob: float | None) -> None:
        self._drawn[seed].append(Drawn(item, logprob))

    def take(self, seed: int) -> list[Drawn]:
        """What was drawn with ``seed`` since it was last taken."""
        return self._drawn.pop(seed, [])


class _RecordingHead(FlowHead):
    """Tells ``note`` of every seed and block."""

    def __init__(self, note: Callable[[int, RunItem, None], None], head: FlowHead) -> None:
        vars(self).update(vars(head))  # the weights are packed already
        self._note = note

    def draw(
        self, h_BD: Tensor, before_BM: Tensor, seeds: Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        mel_BFM = super().draw(h_BD, before_BM, seeds, positions)
        for seed, mel_FM in zip(seeds, mel_BFM.numpy(), strict=True):
            self._note(seed, mel_FM, None)
        return mel_BFM


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
