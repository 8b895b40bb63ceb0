"""The ragged batch of one step: which sequences it holds, where their tokens stand, what they see.

Legend: B sequences of the step, T tokens of the step.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tml_core.errors import InvalidArgument

__all__ = ["StepBatch"]


class StepBatch:
    """The arrays every stateful op reads, kept in fixed memory and filled in place.

    ``cu_tokens`` int32 [B + 1], ``slots`` int32 [B], ``start_pos`` int64 [B] (position of each
    sequence's first new token) and ``visible_end`` int64 [T] (last key position each token sees)
    are views of the filled part, on the CPU. They are valid until the next ``clear`` or ``add``.
    """

    def __init__(self, max_seqs: int, max_tokens: int) -> None:
        if max_seqs < 1 or max_tokens < 1:
            raise InvalidArgument(
                f"StepBatch: max_seqs and max_tokens must be at least 1, got {max_seqs} "
                f"and {max_tokens}"
            )
        self.num_seqs = 0
        self.num_tokens = 0
        self._max_seqs = max_seqs
        self._cu_tokens = torch.zeros(max_seqs + 1, dtype=torch.int32)
        self._slots = torch.zeros(max_seqs, dtype=torch.int32)
        self._start_pos = torch.zeros(max_seqs, dtype=torch.int64)
        self._np_cu_tokens: NDArray[np.int32] = self._cu_tokens.numpy()
        self._np_slots: NDArray[np.int32] = self._slots.numpy()
        self._np_start_pos: NDArray[np.int64] = self._start_pos.numpy()
        self._visible_end = torch.zeros(0, dtype=torch.int64)
        self._grow_tokens(max_tokens)
        self._views: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def clear(self) -> None:
        """Empty the batch; its memory stays."""
        self.num_seqs = 0
        self.num_tokens = 0
        self._views = None

    def add(
        self, slot: int, start_pos: int, num_tokens: int, blocks: Iterable[tuple[int, int]] = ()
    ) -> NDArray[np.int64]:
        """Append ``num_tokens`` tokens at ``start_pos`` of the sequence in ``slot``.

        ``blocks``: [start, end) offsets into these tokens whose positions all see each other; the
        other tokens are causal. Returns the tokens' part of ``visible_end``, valid like it.
        Raises InvalidArgument, with the batch unchanged, for a full batch or a bad block.
        """
        if self.num_seqs == self._max_seqs:
            raise InvalidArgument(f"StepBatch.add: the batch holds {self._max_seqs} sequences")
        if num_tokens < 1:
            raise InvalidArgument(f"StepBatch.add: num_tokens must be at least 1, got {num_tokens}")
        first, last = self.num_tokens, self.num_tokens + num_tokens
        if last > len(self._np_visible_end):
            self._grow_tokens(last)
        visible_end_T = self._np_visible_end[first:last]
        visible_end_T[:] = self._np_ramp[:num_tokens]
        visible_end_T += start_pos
        for start, end in blocks:
            if not 0 <= start < end <= num_tokens:
                raise InvalidArgument(
                    f"StepBatch.add: block must be inside [0, {num_tokens}), got [{start}, {end})"
                )
            visible_end_T[start:end] = start_pos + end - 1
        self._np_slots[self.num_seqs] = slot
        self._np_start_pos[self.num_seqs] = start_pos
        self.num_seqs += 1
        self.num_tokens = last
        self._np_cu_tokens[self.num_seqs] = last
        self._views = None
        return visible_end_T

    def fill_single(self, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Replace the batch by one token of each sequence in ``slots``, at ``positions``.

        Raises InvalidArgument for more sequences than the batch holds.
        """
        count = len(slots)
        if count > self._max_seqs:
            raise InvalidArgument(
                f"StepBatch.fill_single: the batch holds {self._max_seqs} sequences, got {count}"
            )
        self._np_slots[:count] = slots
        self._np_start_pos[:count] = positions
        self._np_visible_end[:count] = self._np_start_pos[:count]
        if self.num_seqs != count or self.num_tokens != count:
            self._np_cu_tokens[: count + 1] = np.arange(count + 1)
            self.num_seqs = self.num_tokens = count
            self._views = None

    @property
    def cu_tokens(self) -> Tensor:
        """int32 [B + 1]: sequence b owns tokens [cu_tokens[b], cu_tokens[b + 1])."""
        return self._filled()[0]

    @property
    def slots(self) -> Tensor:
        """int32 [B]."""
        return self._filled()[1]

    @property
    def start_pos(self) -> Tensor:
        """int64 [B]."""
        return self._filled()[2]

    @property
    def visible_end(self) -> Tensor:
        """int64 [T]."""
        return self._filled()[3]

    def _filled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # One set of views a step: the ops of every layer are handed the same objects.
        if self._views is None:
            self._views = (
                self._cu_tokens[: self.num_seqs + 1],
                self._slots[: self.num_seqs],
                self._start_pos[: self.num_seqs],
                self._visible_end[: self.num_tokens],
            )
        return self._views

    def _grow_tokens(self, max_tokens: int) -> None:
        # Beyond the usual size only for a block that is longer than a step.
        visible_end = torch.zeros(max_tokens, dtype=torch.int64)
        visible_end[: self.num_tokens] = (
            self._visible_end[: self.num_tokens] if self.num_tokens else 0
        )
        self._visible_end = visible_end
        self._np_visible_end: NDArray[np.int64] = visible_end.numpy()
        self._np_ramp: NDArray[np.int64] = np.arange(max_tokens, dtype=np.int64)
