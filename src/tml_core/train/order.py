"""Which transcripts a step takes: a function of seed, epoch and step, with no generator to restore.

Legend: N transcripts.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tml_core.errors import InvalidArgument

__all__ = ["BatchOrder", "cut", "epoch_order"]

Item = TypeVar("Item")


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of [0, count): indices sorted by a hash of (seed, epoch, index)."""
    with np.errstate(over="ignore"):
        key = _mixed(np.uint64(seed % 2**64) + _mixed(np.uint64(epoch)))
        keys = _mixed(np.arange(count, dtype=np.uint64) + key)
    return np.argsort(keys, kind="stable").astype(np.int64)


class BatchOrder:
    """The batches of an endless run over transcripts of known lengths.

    Each epoch's order is cut into batches of at most ``batch_tokens`` positions; a longer
    transcript has a batch of its own. The last batch of an epoch may be small: every transcript
    comes once an epoch. ``passes``: (count, weight) of the sources whose transcripts follow each
    other in ``lengths``; each comes ``weight`` times an epoch instead, on the average exactly.
    Raises InvalidArgument for no transcripts.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_tokens: int,
        seed: int,
        *,
        shuffle: bool = True,
        passes: Sequence[tuple[int, float]] = (),
    ) -> None:
        if not lengths:
            raise InvalidArgument("data: expected at least one transcript, got none")
        self._lengths = lengths
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._shuffle = shuffle
        self._passes = passes or [(len(lengths), 1.0)]

    def batches(self, start: int = 0) -> Iterator[tuple[int, list[int]]]:
        """(epoch, transcripts) of every batch from number ``start`` on, without end."""
        epoch, skipped = 0, 0
        while True:
            plan = self.epoch(epoch)
            for batch in plan[max(0, start - skipped) :]:
                yield epoch, batch
            skipped += len(plan)
            epoch += 1

    def epoch(self, epoch: int) -> list[list[int]]:
        """The batches of one epoch."""
        taken = self._taken(epoch)
        if self._shuffle:
            taken = np.sort(taken)[epoch_order(len(taken), self._seed, epoch)]
        return cut(taken.tolist(), [self._lengths[i] for i in taken], self._batch_tokens)

    def _taken(self, epoch: int) -> NDArray[np.int64]:
        """The transcripts of an epoch: of each source the next ones of its own endless order."""
        taken, first = [np.empty(0, np.int64)], 0
        for count, weight in self._passes:
            begin, end = (round(one * weight * count) for one in (epoch, epoch + 1))
            places = np.arange(begin, end)
            for turn in range(begin // count, -(-end // count)):
                own = epoch_order(count, self._seed, turn) if self._shuffle else np.arange(count)
                taken.append(first + own[places[places // count == turn] % count])
            first += count
        return np.concatenate(taken)


def cut(items: Sequence[Item], lengths: Sequence[int], batch_tokens: int) -> list[list[Item]]:
    """Items in order, in batches of at most ``batch_tokens``; a longer one is alone."""
    batches: list[list[Item]] = []
    room = 0
    for item, length in zip(items, lengths, strict=True):
        if not batches or length > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(item)
        room -= length
    return batches


def _mixed(values: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """splitmix64's finaliser: a bijection of 64-bit numbers that looks random."""
    mixed = np.atleast_1d(values) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
