"""Which transcripts a step takes: a function of seed, epoch and step, with no generator to restore.

Legend: N transcripts.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tml_core.errors import InvalidArgument

__all__ = ["BatchOrder", "epoch_order"]


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
    comes once an epoch. Raises InvalidArgument for no transcripts.
    """

    def __init__(
        self, lengths: Sequence[int], batch_tokens: int, seed: int, *, shuffle: bool = True
    ) -> None:
        if not lengths:
            raise InvalidArgument("data: expected at least one transcript, got none")
        self._lengths = lengths
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._shuffle = shuffle

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
        count = len(self._lengths)
        order = epoch_order(count, self._seed, epoch) if self._shuffle else range(count)
        batches: list[list[int]] = []
        room = 0
        for index in map(int, order):
            length = self._lengths[index]
            if not batches or length > room:
                batches.append([])
                room = self._batch_tokens
            batches[-1].append(index)
            room -= length
        return batches


def _mixed(values: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """splitmix64's finaliser: a bijection of 64-bit numbers that looks random."""
    mixed = np.atleast_1d(values) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
