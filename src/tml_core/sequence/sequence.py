"""One persistent sequence: append in transactions, mark and rewind, fork, evict, snapshot.

Legend: T new positions, H hidden, V vocabulary.

Everything a result depends on lives here or in the slot: the KV pages, the last convolution
inputs, the audio carry, a frame waiting for its pair, the counters, the clock. Mark, rewind, fork
and snapshot move all of it together.
"""

import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tml_core.contract import PAGE_LEN
from tml_core.errors import InvalidArgument, PoolExhausted, SessionBusy, SessionClosed
from tml_core.media.segments import Block, Segment
from tml_core.sequence.page_table import Pin, pages_for
from tml_core.sequence.snapshot import open_snapshot, write_snapshot
from tml_core.sequence.store import SequenceStore, Slot
from tml_core.sequence.token_log import Records, TokenLog
from tml_core.sequence.values import Carry, Evicted, Retention

__all__ = ["Extender", "Mark", "Sequence"]


class Extender(Protocol):
    """Who turns segments into appended positions and logits: the model."""

    def extend(
        self, sequence: "Sequence", segments: SequenceOf[Segment | Block], flush_audio: bool
    ) -> Tensor:
        """Append ``segments``; returns float32 [T, V]."""


class Mark:
    """A point of a sequence to come back to; taken by `Sequence.mark`.

    It keeps the pages of sliding layers it needs until it is released, dropped by the caller, left
    behind by a rewind to an earlier mark, or the sequence closes.
    """

    def __init__(self, sequence: "Sequence", pin: Pin, conv: Tensor, chain: bytes) -> None:
        self.tip: Final = sequence.tip
        self.sequence: Final = sequence
        self.pin: Final = pin
        self.global_floor: Final = sequence.slot.global_.floor
        self.carry: Final = sequence.carry
        self.num_boundaries: Final = sequence.num_boundaries
        self.chain: Final = chain
        self.conv: Tensor | None = conv

    def __del__(self) -> None:
        # Any thread may collect it: the sequence's own takes the note.
        if self.conv is not None:
            self.sequence.note_dropped(self)

    @property
    def is_live(self) -> bool:
        """Whether the sequence can still rewind to it (eviction aside)."""
        return not self.sequence.is_closed and self.sequence.slot.sliding.has_pin(self.pin.serial)

    def release(self) -> None:
        """Give up the mark and what it keeps; a second time does nothing."""
        conv, self.conv = self.conv, None
        if conv is None:
            return
        if not self.sequence.is_closed:
            self.sequence.slot.sliding.unpin(self.pin.serial)
        self.sequence.store.spare_conv(conv)


class Sequence:
    """An append-only sequence in one slot of a store. One thread at a time may use it.

    ``seed`` (unsigned 64 bits) keys its random draws. ``extender`` is what `extend` calls.
    Raises PoolExhausted when the store has no free slot. It is a context manager that closes.
    """

    def __init__(
        self,
        store: SequenceStore,
        *,
        seed: int = 0,
        retention: Retention | None = None,
        carry: Carry | None = None,
        extender: Extender | None = None,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise InvalidArgument(f"seed: expected an unsigned 64-bit integer, got {seed}")
        self.store: Final = store
        self.seed: Final = seed
        self.retention: Final = retention
        self.log = TokenLog()
        self._carry = Carry() if carry is None else carry
        self._extender = extender
        self._boundaries: list[int] = []  # micro-turn starts that may still matter
        self._num_trimmed = 0
        self._num_reserved = 0
        self._last_serial = 0
        self._dropped_marks: deque[int] = deque()
        kept_pages = 0 if retention is None else pages_for(retention.pinned_prefix)
        self._slot: Slot | None = store.open_slot(kept_pages)
        self._finalizer = weakref.finalize(self, store.orphans.append, self._slot.index)
        self._finalizer.atexit = False

    # What it is.

    @property
    def is_closed(self) -> bool:
        return self._slot is None

    @property
    def slot(self) -> Slot:
        """The slot; raises SessionClosed after `close`."""
        if self._slot is None:
            raise SessionClosed("sequence: it is closed")
        return self._slot

    @property
    def tip(self) -> int:
        """Positions committed so far; the next one appended has this number."""
        return self.slot.tip

    @property
    def carry(self) -> Carry:
        """State beside KV; assign a new one to change it (not while a step is in flight)."""
        return self._carry

    @carry.setter
    def carry(self, carry: Carry) -> None:
        _ = self._idle_slot("carry")
        self._carry = carry

    @property
    def evicted(self) -> Evicted | None:
        """All positions that retention has dropped so far, if any."""
        table = self.slot.global_
        if table.floor == table.keep:
            return None
        return Evicted(table.keep * PAGE_LEN, table.floor * PAGE_LEN)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Micro-turn starts that eviction may still stop at."""
        return tuple(self._boundaries)

    @property
    def num_boundaries(self) -> int:
        """Micro-turn starts noted so far."""
        return self._num_trimmed + len(self._boundaries)

    @property
    def num_pages(self) -> int:
        """Pages held in both pools, without those that only marks keep."""
        return self.slot.global_.num_pages + self.slot.sliding.num_pages

    @property
    def num_marks(self) -> int:
        """Marks that it can still be rewound to, and that are held by somebody."""
        return len(self._idle_slot("num_marks").sliding.pins)

    @property
    def state_hash(self) -> str:
        """Hex hash of all that was appended: ids, media embeddings and blocks at their positions.

        The same for the same prefix, however its appends were cut.
        """
        _ = self.slot
        return self.log.digest()

    def token_ids(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Ids at the positions [start, stop): int64, -1 for audio and -2 for image positions."""
        end = self.tip if stop is None else stop
        if not 0 <= start <= end <= self.tip:
            raise InvalidArgument(
                f"token_ids: expected 0 <= start <= stop <= {self.tip}, got [{start}, {end})"
            )
        return self.log.read(start, end)["token_id"].astype(np.int64)

    # Appending.

    def extend(self, segments: SequenceOf[Segment | Block], *, flush_audio: bool = False) -> Tensor:
        """Append segments, whole or not at all; returns the new positions' logits, float32 [T, V].

        Raw PCM joins what earlier calls left over: only whole hops become positions, the rest
        waits. ``flush_audio`` fills the rest up with zeros, right after the last raw audio (or at
        the end). Raises PoolExhausted without room, SessionClosed after `close`.
        """
        _ = self._idle_slot("extend")
        if self._extender is None:
            raise InvalidArgument("extend: this sequence was opened without a model")
        return self._extender.extend(self, segments, flush_audio)

    def reserve(self, count: int) -> None:
        """Make ``count`` positions after the tip writable by a step; `commit` or `abort` follows.

        Raises PoolExhausted, with nothing changed, without the pages or beyond the last position.
        """
        slot = self._idle_slot("reserve")
        if count < 1:
            raise InvalidArgument(f"reserve: count must be at least 1, got {count}")
        new_tip = slot.tip + count
        if new_tip > self.store.kv.max_positions:
            raise PoolExhausted(
                f"reserve: {count} positions after {slot.tip} pass the sequence's limit of "
                f"{self.store.kv.max_positions}"
            )
        self.store.require_pages(
            slot.global_.missing(slot.tip, new_tip),
            slot.sliding.missing(slot.tip, new_tip),
            f"appending {count} positions at {slot.tip}",
        )
        self.log.reserve(count)
        slot.conv_before.copy_(slot.conv)
        slot.is_growing = True
        self._num_reserved = count
        slot.global_.grow(slot.tip, new_tip)
        slot.sliding.grow(slot.tip, new_tip)

    def commit(self, records: Records) -> None:
        """Make the reserved positions part of the sequence, with these log records. Pages of
        sliding layers that no later position can see are dropped. Fewer records than were reserved
        give the rest back."""
        slot = self.slot
        if not slot.is_growing or not 1 <= len(records) <= self._num_reserved:
            raise InvalidArgument(
                f"commit: expected {self._num_reserved} reserved positions, got {len(records)}"
            )
        self.log.append(records)
        slot.global_.accept_growth()
        slot.sliding.accept_growth()
        slot.tip += len(records)
        if len(records) < self._num_reserved:
            slot.global_.trim(pages_for(slot.tip))
            slot.sliding.trim(pages_for(slot.tip))
        slot.is_growing = False
        self._num_reserved = 0
        first_seen = slot.tip - self.store.kv.config.window + 1
        slot.sliding.drop_before(max(0, first_seen) // PAGE_LEN)

    def abort(self) -> None:
        """Undo `reserve` and whatever a step has written since; nothing happens without one."""
        slot = self.slot
        if slot.is_growing:
            slot.global_.undo_growth()
            slot.sliding.undo_growth()
            slot.conv.copy_(slot.conv_before)
            slot.is_growing = False
            self._num_reserved = 0

    # Coming back.

    def mark(self) -> Mark:
        """Remember this point; costs a copy of the convolution rows, whatever the length."""
        slot = self._idle_slot("mark")
        self._last_serial += 1
        pin = slot.sliding.pin(self._last_serial)
        return Mark(self, pin, self.store.copy_conv(slot.conv), self.log.chain())

    def note_dropped(self, mark: Mark) -> None:
        """Release a mark that nobody holds any more, before anything else is done."""
        self._dropped_marks.append(mark.pin.serial)

    def rewind(self, mark: Mark) -> None:
        """Go back to a mark, which stays usable; marks taken after it are left behind.

        Raises InvalidArgument for a mark of another sequence, a released one or one left behind,
        and for one whose positions retention has evicted since.
        """
        slot = self._idle_slot("rewind")
        conv = self._reachable("rewind", mark)
        slot.global_.cut(mark.global_floor, pages_for(mark.tip))
        slot.sliding.rewind(mark.pin)
        slot.conv.copy_(conv)
        slot.tip = mark.tip
        self.log.truncate(mark.tip, mark.chain)
        self._carry = mark.carry
        del self._boundaries[max(0, mark.num_boundaries - self._num_trimmed) :]
        self._num_trimmed = mark.num_boundaries - len(self._boundaries)

    def fork(self, at: Mark | None = None, *, seed: int | None = None) -> "Sequence":
        """A sequence that goes on from here, or from a mark, on its own.

        Full pages are shared, the partial last page of each pool is copied. It draws with the same
        seed unless ``seed`` is given. Raises PoolExhausted without a slot or the two pages, and
        like `rewind` for the mark.
        """
        slot = self._idle_slot("fork")
        conv = slot.conv if at is None else self._reachable("fork", at)
        tip = slot.tip if at is None else at.tip
        num_copied = int(tip % PAGE_LEN != 0)
        self.store.require_pages(num_copied, num_copied, f"a fork at position {tip}")
        child = Sequence(
            self.store,
            seed=self.seed if seed is None else seed,
            retention=self.retention,
            carry=self._carry if at is None else at.carry,
            extender=self._extender,
        )
        global_floor = slot.global_.floor if at is None else at.global_floor
        slot.global_.share_with(child.slot.global_, global_floor, tip)
        sliding_floor = slot.sliding.floor if at is None else at.pin.floor
        slot.sliding.share_with(child.slot.sliding, sliding_floor, tip)
        child.slot.conv.copy_(conv)
        child.slot.tip = tip
        child.log = self.log.twin(tip, self.log.chain() if at is None else at.chain)
        num_boundaries = self.num_boundaries if at is None else at.num_boundaries
        num_kept = max(0, num_boundaries - self._num_trimmed)
        child._boundaries = self._boundaries[:num_kept]
        child._num_trimmed = num_boundaries - num_kept
        return child

    def note_boundary(self) -> Evicted | None:
        """Say that a micro-turn starts at the tip; retention drops pages here and nowhere else,
        so what a position sees does not depend on how its append was cut.

        Returns the positions dropped now, or None.
        """
        slot = self._idle_slot("note_boundary")
        if self.retention is None:
            return None
        if not self._boundaries or self._boundaries[-1] < slot.tip:
            self._boundaries.append(slot.tip)
        index = bisect_right(self._boundaries, slot.tip - self.retention.window_positions)
        if index == 0:
            return None
        before = slot.global_.floor
        slot.global_.drop_before(self._boundaries[index - 1] // PAGE_LEN)
        after = slot.global_.floor
        if after == before:
            return None
        num_stale = bisect_right(self._boundaries, after * PAGE_LEN - 1)
        del self._boundaries[:num_stale]
        self._num_trimmed += num_stale
        return Evicted(before * PAGE_LEN, after * PAGE_LEN)

    # Keeping and leaving.

    def snapshot(self, path: str | Path, *, note: bytes = b"", durable: bool = True) -> None:
        """Write all of it, and ``note``, to one file, which is replaced only once it is complete.

        With ``durable`` only once it is on disk. Marks are not kept. The file is a function of the
        state alone; its format is described in `tml_core.sequence.snapshot`, whose `read_note`
        gives the note back. Raises OSError when the file cannot be written.
        """
        slot = self._idle_slot("snapshot")
        write_snapshot(
            Path(path),
            self.store,
            slot,
            self.log,
            seed=self.seed,
            carry=self._carry,
            retention=self.retention,
            boundaries=self._boundaries,
            note=note,
            durable=durable,
        )

    @classmethod
    def restore(
        cls, store: SequenceStore, path: str | Path, *, extender: Extender | None = None
    ) -> Self:
        """Open the sequence that `snapshot` wrote.

        Raises SnapshotError naming what differs when the file is damaged or of another model,
        dtype or contract, PoolExhausted without room; nothing is held then.
        """
        with open_snapshot(Path(path), store) as saved:
            sequence = cls(
                store,
                seed=saved.seed,
                retention=saved.retention,
                carry=saved.carry,
                extender=extender,
            )
            try:
                sequence.log = saved.fill(sequence.slot)
            except BaseException:
                sequence.close()
                raise
            sequence._boundaries = saved.boundaries
        return sequence

    def close(self) -> None:
        """Release pages and slot, also in the middle of a step; a second time does nothing."""
        if self._slot is not None:
            slot, self._slot = self._slot, None
            self._finalizer.detach()
            self.store.close_slot(slot.index)
            self.log = TokenLog()
            self._carry = Carry()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _idle_slot(self, what: str) -> Slot:
        slot = self.slot
        if slot.is_growing:
            raise SessionBusy(f"{what}: a step of this sequence is in flight")
        # The collector drops marks at any time; their pages go back here.
        while self._dropped_marks:
            slot.sliding.unpin(self._dropped_marks.popleft())
        return slot

    def _reachable(self, what: str, mark: Mark) -> Tensor:
        if mark.sequence is not self:
            raise InvalidArgument(f"{what}: the mark was taken on another sequence")
        if mark.conv is None:
            raise InvalidArgument(f"{what}: the mark at position {mark.tip} was released")
        if not mark.is_live:
            raise InvalidArgument(
                f"{what}: the mark at position {mark.tip} is no longer on the sequence's path "
                "(a rewind went to an earlier one)"
            )
        floor = self.slot.global_.floor
        if mark.global_floor < min(floor, pages_for(mark.tip)):
            raise InvalidArgument(
                f"{what}: positions [{mark.global_floor * PAGE_LEN}, {floor * PAGE_LEN}) that the "
                f"mark at {mark.tip} sees were evicted"
            )
        return mark.conv
