"""What a position's loss weighs, and losses by stream.

Legend: T positions, S streams, A blocks of own sound.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tml_core.layout.state import Stream
from tml_core.ops.linear_logp import IGNORED_TARGET
from tml_core.train.module import ModelOutput
from tml_core.train.packing import PackedBatch

__all__ = [
    "StreamLosses",
    "batch_loss",
    "position_losses",
    "position_weights",
    "stream_weights",
    "total_weight",
]


def stream_weights(by_stream: Mapping[Stream, float]) -> Tensor:
    """float32 [S], to be indexed by ``PackedBatch.streams``."""
    return torch.tensor([by_stream[stream] for stream in Stream], dtype=torch.float32)


def position_weights(batch: PackedBatch, weights_S: Tensor) -> Tensor:
    """float32 [T], 0 where neither a token nor a block of sound is to be learned."""
    weight_T = weights_S[batch.streams.long()]
    return torch.where(_has_loss(batch), weight_T, 0.0)


def position_losses(batch: PackedBatch, out: ModelOutput) -> Tensor:
    """float32 [T]: nats of the target, or the flow's loss of the block of sound that is to follow,
    where ``out`` has them; 0 where nothing is to be learned."""
    loss_T = -out.logprobs
    if out.flow_losses is None or not batch.num_blocks:
        return loss_T
    is_learned_A = _is_sound(batch)[batch.own_after]
    return loss_T.index_copy(0, batch.own_after[is_learned_A], out.flow_losses[is_learned_A])


def batch_loss(batch: PackedBatch, out: ModelOutput, weight_T: Tensor) -> Tensor:
    """The sum of ``weight_T`` * `position_losses`, to differentiate; ``out`` was given the same
    weights."""
    assert out.loss is not None
    if out.flow_losses is None or not batch.num_blocks:
        return out.loss
    is_learned_A = _is_sound(batch)[batch.own_after]
    weight_A = weight_T[batch.own_after[is_learned_A]]
    return out.loss + (weight_A * out.flow_losses[is_learned_A]).sum()


def total_weight(weights: Iterable[Tensor]) -> float:
    """The exactly rounded sum over all positions of batches."""
    return math.fsum(value for one in weights for value in one.tolist())


class StreamLosses:
    """Losses of `position_losses`, collected batch by batch."""

    def __init__(self) -> None:
        self._weighted: list[float] = []
        self._by_stream: dict[Stream, list[float]] = {}

    def add(self, batch: PackedBatch, loss_T: Tensor, weight_T: Tensor, total: float) -> None:
        """``total``: of the weights of all batches that will be added."""
        loss_T = loss_T.detach()
        self._weighted += (loss_T.double() * weight_T.double() / total).tolist()
        # Sound that weighs nothing was not looked at.
        has_loss_T = _has_loss(batch) & ((weight_T > 0) | (batch.streams != int(Stream.AUDIO)))
        for stream in Stream:
            values = loss_T[has_loss_T & (batch.streams == int(stream))]
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


def _is_sound(batch: PackedBatch) -> Tensor:
    """bool [T]: whether a block of sound follows that is to be learned."""
    is_before_block_T = torch.zeros_like(batch.targets, dtype=torch.bool)
    is_before_block_T[batch.own_after] = True
    return is_before_block_T & (batch.streams == int(Stream.AUDIO))


def _has_loss(batch: PackedBatch) -> Tensor:
    """bool [T]: whether a token or a block of sound is to be learned."""
    return (batch.targets != IGNORED_TARGET) | _is_sound(batch)
