"""What a session should be: ids in NumPy arrays, and pages counted by hand.

The oracle knows the documented rules (layout v1, pages of 128 positions, what mark, rewind, fork,
cancel and eviction do) and none of the package's code. From a turn it takes only the output half
the turn reported and how many of its tokens were drawn.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

TICK, OUT, END_OUT, SILENCE = 274, 275, 276, 277
PAGE: Final = 128
TICK_MS: Final = 200
MAX_UNHEARD: Final = 50
HOP: Final = 800

Ids = NDArray[np.int64]


def pages_for(count: int) -> int:
    return -(-count // PAGE)


class Pool:
    """References of every page that was ever taken from one pool."""

    def __init__(self) -> None:
        self._refs: NDArray[np.int64] = np.zeros(1 << 12, np.int64)
        self._num_taken = 0

    def take(self) -> int:
        if self._num_taken == len(self._refs):
            self._refs = np.concatenate((self._refs, np.zeros_like(self._refs)))
        self._refs[self._num_taken] = 1
        self._num_taken += 1
        return self._num_taken - 1

    def share(self, page: int) -> int:
        self._refs[page] += 1
        return page

    def release(self, page: int) -> None:
        self._refs[page] -= 1
        assert self._refs[page] >= 0

    def is_shared(self, page: int) -> bool:
        return bool(self._refs[page] > 1)

    @property
    def num_held(self) -> int:
        return int(np.count_nonzero(self._refs))

    @property
    def num_shared(self) -> int:
        return int(np.count_nonzero(self._refs > 1))


@dataclass
class Table:
    """The pages of one sequence in one pool: in the row are [0, keep) and [floor, end)."""

    pool: Pool
    keep: int = 0
    floor: int = 0
    end: int = 0
    pages: dict[int, int] = field(default_factory=dict)

    def grow(self, tip: int, new_tip: int) -> None:
        tail = tip // PAGE
        if tip % PAGE and self.pool.is_shared(self.pages[tail]):
            self.pool.release(self.pages[tail])
            self.pages[tail] = self.pool.take()
        while self.end < pages_for(new_tip):
            self.pages[self.end] = self.pool.take()
            self.end += 1

    def cut(self, end: int, floor: int) -> None:
        self.floor, self.end = floor, min(end, self.end)

    def sweep(self, pins: list[tuple[int, int]]) -> None:
        """Let go of what neither the row nor a pin holds."""
        for page in list(self.pages):
            is_in_row = page < min(self.keep, self.end) or self.floor <= page < self.end
            if not is_in_row and not any(low <= page < high for low, high in pins):
                self.pool.release(self.pages.pop(page))

    def twin(self, floor: int, tip: int) -> "Table":
        """Full pages shared, a partial last one copied."""
        other = Table(self.pool, self.keep, floor, pages_for(tip))
        for page in range(other.end):
            if page < min(self.keep, other.end) or page >= floor:
                is_full = page < tip // PAGE
                mine = self.pages[page]
                other.pages[page] = self.pool.share(mine) if is_full else self.pool.take()
        return other

    def fresh(self) -> "Table":
        """As after a restore: pages of its own, nothing pinned."""
        other = Table(self.pool, self.keep, self.floor, self.end)
        for page in range(self.end):
            if page < self.keep or page >= self.floor:
                other.pages[page] = self.pool.take()
        return other

    def close(self) -> None:
        for page in self.pages.values():
            self.pool.release(page)
        self.pages.clear()

    @property
    def num_in_row(self) -> int:
        return min(self.keep, self.end) + max(0, self.end - self.floor)


@dataclass(frozen=True)
class State:
    """What a mark remembers beside pages."""

    ids: Ids
    num_unsent: int = 0
    tick: int = 0
    num_samples: int = 0
    waiting: Ids = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def tip(self) -> int:
        return len(self.ids) - self.num_unsent


@dataclass(eq=False)
class MarkOracle:
    """``pin``: sliding pages it needs; None once it was left behind or given up."""

    state: State
    pin: tuple[int, int] | None
    global_floor: int
    num_boundaries: int
    state_hash: str


@dataclass(frozen=True)
class Input:
    """A turn's input: ``num_samples`` of sound, and ids of text."""

    num_samples: int = 0
    text: Ids = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class RecentOracle:
    """A tick whose output may turn out not to have been heard. Of one in which something was said
    also ``after_input``, the state there, and the sliding pages it takes to come back to it."""

    tick: int
    given: Input
    after_input: State | None = None
    pin: tuple[int, int] | None = None


class SessionOracle:
    """One session; see the module. ``retention``: (window, pinned prefix) positions."""

    def __init__(
        self,
        global_pool: Pool,
        sliding_pool: Pool,
        *,
        window: int,
        injected: int,
        retention: tuple[int, int] | None,
    ) -> None:
        keep = 0 if retention is None else pages_for(retention[1])
        self.window, self.injected, self.retention = window, injected, retention
        self.global_ = Table(global_pool, keep, keep)
        self.sliding = Table(sliding_pool)
        self.state = State(np.zeros(0, np.int64))
        self.tip = 0  # positions run through the model, within a turn too
        self.epoch = 0
        self.marks: list[MarkOracle] = []
        self.recent: list[RecentOracle] = []
        self.boundaries: list[int] = []
        self.num_trimmed = 0

    # Turns.

    def turn(self, given: Input, output: Ids, num_drawn: int, *, has_said: bool = False) -> None:
        """A turn that stands: ``output`` is its half, of which ``num_drawn`` ids were sampled and
        all but the last of those run through the model. ``has_said``: there was text in it."""
        self._note_boundary()
        before = self.state
        frames = (before.num_samples % HOP + given.num_samples) // HOP
        queue = np.concatenate((before.waiting, given.text))
        half = [[TICK], [-1] * frames, queue[: self.injected], [OUT]]
        entered = np.concatenate((before.ids, *(np.array(one, np.int64) for one in half)))
        self._advance(len(entered))
        num_samples = before.num_samples + given.num_samples
        rest = queue[self.injected :]
        if has_said:
            after_input = State(entered, 0, before.tick, num_samples, rest)
            pin = (self.sliding.floor, self.sliding.end)
            self.recent.append(RecentOracle(before.tick, given, after_input, pin))
        elif self.recent:
            self.recent.append(RecentOracle(before.tick, given))
        num_fed = max(0, num_drawn - 1)
        for i in range(num_fed):
            self._advance(len(entered) + i + 1)
        self.state = State(
            ids=np.concatenate((entered, output)),
            num_unsent=len(output) - num_fed,
            tick=before.tick + 1,
            num_samples=num_samples,
            waiting=rest,
        )
        while len(self.recent) > MAX_UNHEARD or (self.recent and self.recent[0].pin is None):
            del self.recent[0]
        self._sweep()

    def cancelled_turn(self, given: Input) -> None:
        """A turn that was cancelled and keeps its input, wherever the cancel found it."""
        self.turn(given, np.array([END_OUT], np.int64), 0)
        self.epoch += 1

    def undone_turn(self, given: Input, *, has_begun: bool) -> None:
        """A turn that was cancelled and keeps nothing. One that had begun leaves its traces in
        memory: what retention dropped at its start, and a shared last page that was copied."""
        self.epoch += 1
        if not has_begun:
            return
        self._note_boundary()
        tip = self.state.tip
        frames = (self.state.num_samples % HOP + given.num_samples) // HOP
        num_injected = min(self.injected, len(self.state.waiting) + len(given.text))
        new_tip = len(self.state.ids) + 2 + frames + num_injected
        for table in (self.global_, self.sliding):
            table.grow(tip, new_tip)
            table.cut(pages_for(tip), table.floor)
        self._sweep()

    def _advance(self, new_tip: int) -> None:
        tip = self.tip
        self.global_.grow(tip, new_tip)
        self.sliding.grow(tip, new_tip)
        self.tip = new_tip
        first_seen = max(0, new_tip - self.window + 1)
        self.sliding.floor = max(self.sliding.floor, min(first_seen // PAGE, self.sliding.end))
        self._sweep()

    def _note_boundary(self) -> None:
        tip = self.tip
        if self.retention is None:
            return
        if not self.boundaries or self.boundaries[-1] < tip:
            self.boundaries.append(tip)
        index = bisect_right(self.boundaries, tip - self.retention[0])
        if index == 0:
            return
        page = min(self.boundaries[index - 1] // PAGE, self.global_.end)
        if page <= self.global_.floor:
            return
        self.global_.floor = page
        num_stale = bisect_right(self.boundaries, page * PAGE - 1)
        del self.boundaries[:num_stale]
        self.num_trimmed += num_stale
        self._sweep()

    def truncate(self, heard_ms: float) -> int | None:
        """Close the first output that was not heard, silence all later ones; the tick it was in.
        For sessions without retention."""
        unheard = (one for one in self.recent if one.pin and one.tick * TICK_MS >= heard_ms)
        first = next(unheard, None)
        if first is None:
            return None
        assert first.after_input is not None and first.pin is not None
        later = [one.given for one in self.recent if one.tick > first.tick]
        self.recent = [one for one in self.recent if one.tick < first.tick]
        state = first.after_input
        self.tip = state.tip
        self.global_.cut(pages_for(self.tip), self.global_.floor)
        self.sliding.floor, self.sliding.end = first.pin
        # Marks made since lie on a path that was left.
        for mark in self.marks:
            if mark.state.tick > first.tick:
                mark.pin = None
        self.marks = [one for one in self.marks if one.pin is not None]
        ids = np.concatenate((state.ids, np.array([END_OUT], np.int64)))
        self.state = State(ids, 1, first.tick + 1, state.num_samples, state.waiting)
        self.epoch += 1
        if self.recent:
            self.recent.append(RecentOracle(first.tick, first.given))
        self._sweep()
        for given in later:
            self.turn(given, np.array([SILENCE], np.int64), 0)
        return first.tick

    def forget_recent(self) -> None:
        """All that was said counts as heard."""
        self.recent = []
        self._sweep()

    # Moving.

    def mark(self, state_hash: str) -> MarkOracle:
        sliding = self.sliding
        mark = MarkOracle(
            self.state,
            (sliding.floor, sliding.end),
            self.global_.floor,
            self.num_trimmed + len(self.boundaries),
            state_hash,
        )
        self.marks.append(mark)
        return mark

    def drop_mark(self, mark: MarkOracle) -> None:
        mark.pin = None
        self.marks = [one for one in self.marks if one is not mark]
        self._sweep()

    def is_evicted(self, mark: MarkOracle) -> bool:
        """Whether retention has dropped what the mark needs."""
        return mark.global_floor < min(self.global_.floor, pages_for(mark.state.tip))

    def rewind(self, mark: MarkOracle) -> None:
        assert mark.pin is not None and not self.is_evicted(mark)
        index = self.marks.index(mark)
        for later in self.marks[index + 1 :]:
            later.pin = None
        del self.marks[index + 1 :]
        self.state = mark.state
        self.tip = mark.state.tip
        self.recent = [one for one in self.recent if one.tick < mark.state.tick]
        self.global_.cut(pages_for(self.tip), mark.global_floor)
        self.sliding.floor = mark.pin[0]
        self.sliding.end = mark.pin[1]
        del self.boundaries[max(0, mark.num_boundaries - self.num_trimmed) :]
        self.num_trimmed = mark.num_boundaries - len(self.boundaries)
        self.epoch += 1
        self._sweep()

    def fork(self, at: MarkOracle | None = None) -> "SessionOracle":
        child = self._like()
        child.state = self.state if at is None else at.state
        child.tip = child.state.tip
        global_floor = self.global_.floor if at is None else at.global_floor
        pin = (self.sliding.floor, self.sliding.end) if at is None else at.pin
        assert pin is not None
        child.global_ = self.global_.twin(global_floor, child.tip)
        child.sliding = self.sliding.twin(pin[0], child.tip)
        count = self.num_trimmed + len(self.boundaries) if at is None else at.num_boundaries
        num_kept = max(0, count - self.num_trimmed)
        child.boundaries = self.boundaries[:num_kept]
        child.num_trimmed = count - num_kept
        return child

    def restored(self) -> "SessionOracle":
        """Written to a file, closed, and read back."""
        other = self._like()
        other.state, other.tip = self.state, self.tip
        other.boundaries = list(self.boundaries)
        self.close()
        other.global_, other.sliding = self.global_.fresh(), self.sliding.fresh()
        return other

    def close(self) -> None:
        self.global_.close()
        self.sliding.close()
        for mark in self.marks:
            mark.pin = None
        self.marks, self.recent = [], []

    def _like(self) -> "SessionOracle":
        other = SessionOracle(
            self.global_.pool,
            self.sliding.pool,
            window=self.window,
            injected=self.injected,
            retention=self.retention,
        )
        other.epoch = self.epoch
        return other

    def _sweep(self) -> None:
        self.global_.sweep([])
        points = (*self.marks, *self.recent)
        self.sliding.sweep([one.pin for one in points if one.pin is not None])

    # Looking.

    @property
    def num_pages(self) -> int:
        return self.global_.num_in_row + self.sliding.num_in_row

    @property
    def num_marks(self) -> int:
        """Points to come back to, the user's and those of what was said of late."""
        return len(self.marks) + sum(one.pin is not None for one in self.recent)

    @property
    def evicted(self) -> tuple[int, int] | None:
        keep, floor = self.global_.keep, self.global_.floor
        return None if floor == keep else (keep * PAGE, floor * PAGE)
