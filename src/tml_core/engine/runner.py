"""The step runner: any number of sequences through the model as one ragged batch.

Legend: T new positions of one sequence, D hidden size.
"""

import time
from bisect import bisect_right
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tml_core.errors import InvalidArgument, SessionBusy
from tml_core.model.kv_store import KvStore
from tml_core.model.step_batch import StepBatch
from tml_core.sequence.sequence import Mark, Sequence
from tml_core.sequence.store import SequenceStore
from tml_core.sequence.token_log import Records, records
from tml_core.sequence.values import Carry

__all__ = ["Singles", "StepInput", "StepRunner", "Stepper"]


class Stepper(Protocol):
    """What the runner needs of a backbone."""

    def step(self, x_TD: Tensor, batch: StepBatch, kv: KvStore) -> Tensor:
        """Run all layers; x_TD [T, D] may be overwritten. Returns h [T, D]."""


class StepInput(NamedTuple):
    """What one sequence appends.

    ``x_TD``: embeddings, used up by the step. ``token_ids``: int64 [T], negative where a position
    is not text. ``blocks``: [start, end) offsets with bidirectional attention, ascending.
    ``carry``: what the sequence carries afterwards; None leaves it.
    """

    sequence: Sequence
    x_TD: Tensor
    token_ids: Tensor
    blocks: tuple[tuple[int, int], ...] = ()
    carry: Carry | None = None

    def cut(self, start: int, stop: int) -> int:
        """Where a piece from ``start`` may end: at ``stop`` or before, but not inside a block;
        after it if the block at ``start`` is longer."""
        length = self.token_ids.shape[0]
        found = _cut_before_block(self.blocks, start, min(max(stop, start + 1), length))
        if found > start:
            return found
        return self.blocks[bisect_right(self.blocks, start, key=_end)][1]

    def piece(self, start: int, stop: int) -> "StepInput":
        """The positions [start, stop); the last piece brings the carry."""
        length = self.token_ids.shape[0]
        if start == 0 and stop == length:
            return self
        first = bisect_right(self.blocks, start, key=_end)
        last = bisect_right(self.blocks, stop, key=_end)
        return StepInput(
            self.sequence,
            self.x_TD[start:stop],
            self.token_ids[start:stop],
            tuple((begin - start, end - start) for begin, end in self.blocks[first:last]),
            self.carry if stop == length else None,
        )


class Singles(NamedTuple):
    """One token each of other sequences, in a step beside inputs: whose slots, at which positions
    (room is reserved there), their embeddings [B, D]. Who gives them keeps the books."""

    slots: SequenceOf[int]
    positions: SequenceOf[int]
    x_BD: Tensor


class _Piece(NamedTuple):
    entry: int  # index of the input
    start: int
    stop: int


class StepRunner:
    """Appends to sequences of one store, together and all or nothing.

    What is longer than ``max_step_tokens`` goes in several steps, cut anywhere but inside a block;
    a longer block is a step of its own. Results do not depend on it. ``kernel_s``: time in the
    model so far.
    """

    def __init__(
        self, backbone: Stepper, store: SequenceStore, *, max_step_tokens: int = 512
    ) -> None:
        if max_step_tokens < 1:
            raise InvalidArgument(
                f"StepRunner: max_step_tokens must be at least 1, got {max_step_tokens}"
            )
        self.store = store
        self.max_step_tokens = max_step_tokens
        self.kernel_s = 0.0
        self._backbone = backbone
        self._batch = StepBatch(store.kv.num_slots, max_step_tokens)

    def run(self, inputs: SequenceOf[StepInput]) -> list[Tensor]:
        """Append all inputs; returns h [T, D] of each.

        Raises PoolExhausted without room for one of them, and whatever the model raises; every
        sequence is then where it was.
        """
        with self.stage(inputs) as hidden:
            return hidden

    def run_beside(
        self, inputs: SequenceOf[StepInput], singles: Singles
    ) -> tuple[list[Tensor], Tensor]:
        """`run` with single tokens of other sequences in its last step; returns h [T, D] of each
        input and h [B, D] of the tokens. When it raises, the inputs' sequences are where they
        were, but the tokens may have been written or not."""
        with self.stage(inputs, singles) as hidden:
            return hidden[:-1], hidden[-1]

    @contextmanager
    def stage(
        self, inputs: SequenceOf[StepInput], singles: Singles | None = None
    ) -> Iterator[list[Tensor]]:
        """`run` as a context: the sequences advance when the body ends, and do not if it raises.
        With ``singles`` their h is the last of the list."""
        self._check(inputs)
        steps = self._cut(inputs)
        parts: list[list[Tensor]] = [[] for _ in inputs]
        marks: list[Mark] = []
        pending: list[Records] = []
        beside: list[Tensor] = []
        try:
            if len(steps) > 1:
                # All steps but the last are committed before the outcome is known.
                marks.extend(one.sequence.mark() for one in inputs)
            for number, step in enumerate(steps):
                if number:
                    self._commit(inputs, steps[number - 1], pending)
                is_last = number == len(steps) - 1
                pending, h_BD = self._step(inputs, step, parts, singles if is_last else None)
                if is_last and singles is not None:
                    beside.append(h_BD)
            joined = [_joined(part, one.x_TD) for part, one in zip(parts, inputs, strict=True)]
            yield joined + beside
            if steps:
                self._commit(inputs, steps[-1], pending)
            for one in inputs:
                if one.carry is not None:
                    one.sequence.carry = one.carry
        except BaseException:
            for one in inputs:
                if not one.sequence.is_closed:
                    one.sequence.abort()
            for mark in marks:
                if mark.is_live:
                    mark.sequence.rewind(mark)
            raise
        finally:
            for mark in marks:
                mark.release()

    def _step(
        self,
        inputs: SequenceOf[StepInput],
        step: list[_Piece],
        parts: list[list[Tensor]],
        singles: Singles | None,
    ) -> tuple[list[Records], Tensor]:
        batch, pending, rows = self._batch, [], []
        batch.clear()
        for index, start, stop in step:
            sequence, x_TD, token_ids, blocks, _ = inputs[index]
            tip = sequence.tip
            sequence.reserve(stop - start)
            ids_T = token_ids.numpy()
            if stop - start < len(ids_T):
                ids_T, x_TD = ids_T[start:stop], x_TD[start:stop]
            slot_index, reach_T = sequence.slot.index, None
            if blocks:
                first = bisect_right(blocks, start, key=_end)
                last = bisect_right(blocks, stop, key=_end)
                own = [(begin - start, end - start) for begin, end in blocks[first:last]]
                visible_end_T = batch.add(slot_index, tip, stop - start, own)
                reach_T = visible_end_T - np.arange(tip, tip + stop - start)
            else:
                batch.add(slot_index, tip, stop - start)
            # Before the step, which uses the embeddings up.
            pending.append(records(ids_T, reach_T, x_TD))
            rows.append(x_TD)
        if singles is not None:
            for slot, position in zip(singles.slots, singles.positions, strict=True):
                batch.add(slot, position, 1)
            rows.append(singles.x_BD)
        x_TD = rows[0] if len(rows) == 1 else torch.cat(rows)
        begin_s = time.perf_counter()
        h_TD = self._backbone.step(x_TD, batch, self.store.kv)
        self.kernel_s += time.perf_counter() - begin_s
        if len(rows) == 1:
            if step:
                parts[step[0].entry].append(h_TD)
            return pending, h_TD
        offset = 0
        for index, start, stop in step:
            parts[index].append(h_TD[offset : offset + stop - start])
            offset += stop - start
        return pending, h_TD[offset:]

    def _commit(
        self, inputs: SequenceOf[StepInput], step: list[_Piece], pending: list[Records]
    ) -> None:
        for piece, new in zip(step, pending, strict=True):
            inputs[piece.entry].sequence.commit(new)

    def _cut(self, inputs: SequenceOf[StepInput]) -> list[list[_Piece]]:
        """Steps of at most ``max_step_tokens``, each filled from the inputs in order."""
        lengths = [one.token_ids.shape[0] for one in inputs]
        done = [0] * len(inputs)
        steps: list[list[_Piece]] = []
        while done != lengths:
            step: list[_Piece] = []
            budget = self.max_step_tokens
            for index, one in enumerate(inputs):
                start, length = done[index], lengths[index]
                if start == length or not budget:
                    continue
                stop = _cut_before_block(one.blocks, start, min(length, start + budget))
                if stop == start and not step:
                    # A block that no step of the usual size holds.
                    stop = one.cut(start, start + budget)
                    budget = stop - start
                if stop > start:
                    step.append(_Piece(index, start, stop))
                    done[index] = stop
                    budget -= stop - start
            steps.append(step)
        return steps

    def _check(self, inputs: SequenceOf[StepInput]) -> None:
        seen: set[int] = set()
        for i, (sequence, x_TD, token_ids, blocks, _) in enumerate(inputs):
            if sequence.store is not self.store:
                raise InvalidArgument(f"inputs[{i}]: the sequence belongs to another store")
            if sequence.slot.index in seen:
                raise InvalidArgument(f"inputs[{i}]: the sequence is in the batch twice")
            seen.add(sequence.slot.index)
            if sequence.slot.is_growing:
                raise SessionBusy(f"inputs[{i}]: a step of this sequence is in flight")
            length = token_ids.shape[0]
            if x_TD.shape[0] != length:
                raise InvalidArgument(
                    f"inputs[{i}]: x must be [{length}, D] as token_ids, got {list(x_TD.shape)}"
                )
            before = 0
            for start, end in blocks:
                if not before <= start < end <= length:
                    raise InvalidArgument(
                        f"inputs[{i}]: blocks must be ascending in [0, {length}), got "
                        f"[{start}, {end}) after {before}"
                    )
                before = end


def _end(block: tuple[int, int]) -> int:
    return block[1]


def _cut_before_block(blocks: tuple[tuple[int, int], ...], start: int, stop: int) -> int:
    """The last cut in [start, stop] that is not inside a block."""
    index = bisect_right(blocks, stop, key=_end)
    if index < len(blocks) and blocks[index][0] < stop:
        return max(start, blocks[index][0])
    return stop


def _joined(parts: list[Tensor], x_TD: Tensor) -> Tensor:
    if not parts:
        return torch.empty_like(x_TD)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
