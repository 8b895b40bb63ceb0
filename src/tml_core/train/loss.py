"""What a position's loss weighs, and losses by stream.

Legend: T positions, S streams.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tml_core.layout.state import Stream
from tml_core.ops.linear_logp import IGNORED_TARGET
from tml_core.train.packing import PackedBatch

__all__ = ["StreamLosses", "position_weights", "stream_weights", "total_weight"]


def stream_weights(by_stream: Mapping[Stream, float]) -> Tensor:
    """float32 [S], to be indexed by ``PackedBatch.streams``."""
    return torch.tensor([by_stream[stream] for stream in Stream], dtype=torch.float32)


def position_weights(batch: PackedBatch, weights_S: Tensor) -> Tensor:
    """float32 [T], 0 where there is no target."""
    weight_T = weights_S[batch.streams.long()]
    return torch.where(batch.targets == IGNORED_TARGET, 0.0, weight_T)


def total_weight(weights: Iterable[Tensor]) -> float:
    """The exactly rounded sum over all positions of batches."""
    return math.fsum(value for one in weights for value in one.tolist())


class StreamLosses:
    """Losses in nats, collected batch by batch."""

    def __init__(self) -> None:
        self._weighted: list[float] = []
        self._by_stream: dict[Stream, list[float]] = {}

    def add(self, batch: PackedBatch, logprobs_T: Tensor, weight_T: Tensor, total: float) -> None:
        """``total``: of the weights of all batches that will be added."""
        loss_T = -logprobs_T.detach()
        self._weighted += (loss_T.double() * weight_T.double() / total).tolist()
        is_target = batch.targets != IGNORED_TARGET
        for stream in Stream:
            values = loss_T[is_target & (batch.streams == int(stream))]
            if len(values):
                self._by_stream.setdefault(stream, []).extend(values.tolist())

    def mean(self) -> float:
        """The weighted mean."""
        return math.fsum(self._weighted)

    def means(self) -> dict[str, float]:
        """The plain mean of each stream that has a target."""
        return {
            stream.name.lower(): math.fsum(values) / len(values)
            for stream, values in sorted(self._by_stream.items())
        }
