"""When and in what pieces results enter a session. Pure bookkeeping: no threads, no clock but the
session's ticks; `tml_core.background.attachment` drives it.

A result waits in the `Outbox` until the floor is free for its kind, and then enters in pieces of at
most ``budget_tokens`` ids, one a tick and only when nothing that came before still waits in the
layout: so no tick holds more background ids than that, and what the user types is never behind more
than one piece.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from tml_core.background.context import SPEECH_RMS
from tml_core.background.job import Deliver, Delivery, Job
from tml_core.engine.seat import TickRecord
from tml_core.errors import InvalidArgument
from tml_core.layout.chunk import ToolResult
from tml_core.media.micro_turns import TICK_MS

__all__ = [
    "MAX_WAITING",
    "OVERTAKEN",
    "SILENT",
    "DeliveryPolicy",
    "Entry",
    "Floor",
    "Outbox",
    "floor",
    "least_budget",
    "sentence_end",
    "split_result",
]

# Deliveries that are over are remembered for rewinds that undo them.
_NUM_REMEMBERED: Final = 64
MAX_WAITING: Final = 256
_MIN_TEXT_TOKENS: Final = 16
_SENTENCE_END: Final = re.compile(r"[.!?:;]\s+|\n")
_MIN_SENTENCE: Final = 24
# Flags of a piece: newer items came since the job's author looked; not to be spoken of.
OVERTAKEN: Final = "overtaken"
SILENT: Final = "silent"


@dataclass(frozen=True)
class DeliveryPolicy:
    """``budget_tokens``: most ids a tick takes from results. ``quiet_ms``: how long nobody may have
    spoken for "when_idle". ``speech_rms``: the microphone level, 0 to 1, that counts as speech.
    ``heeds_model``: whether the model's own speech is waited for, too. ``patience_s``: a
    "when_idle" result that has waited so long for a pause enters without one. ``max_chars``: what
    is longer is cut there, and says so.

    All times are media time of the session. Raises InvalidArgument naming the field.
    """

    budget_tokens: int = 192
    quiet_ms: int = 600
    speech_rms: float = SPEECH_RMS
    heeds_model: bool = True
    patience_s: float = 30.0
    max_chars: int = 4000

    def __post_init__(self) -> None:
        if self.budget_tokens < 1:
            raise InvalidArgument(f"budget_tokens: expected at least 1, got {self.budget_tokens}")
        if self.quiet_ms < 0:
            raise InvalidArgument(f"quiet_ms: expected at least 0, got {self.quiet_ms}")
        if not 0 < self.speech_rms <= 1:
            raise InvalidArgument(f"speech_rms: expected more than 0 to 1, got {self.speech_rms}")
        if self.max_chars < 1:
            raise InvalidArgument(f"max_chars: expected at least 1, got {self.max_chars}")
        if self.patience_s < 0:
            raise InvalidArgument(f"patience_s: expected at least 0, got {self.patience_s}")

    @property
    def quiet_ticks(self) -> int:
        """`quiet_ms` in whole ticks."""
        return -(-self.quiet_ms // TICK_MS)


class Floor(NamedTuple):
    """Who has spoken within the policy's ``quiet_ms``."""

    user: bool
    model: bool

    @property
    def is_free(self) -> bool:
        """Whether nobody has."""
        return not self.user and not self.model


def floor(
    policy: DeliveryPolicy,
    newest_first: Iterable[TickRecord],
    audio_rms: float | None,
    *,
    has_text: bool,
    is_in_call: bool,
) -> Floor:
    """Who has the floor at an append that brings sound of ``audio_rms``, or typed text.

    Looks at as many of the last ticks as the policy needs, not further. The model speaks while its
    last ticks have text or sound of its own, and while it writes a call.
    """
    user = has_text or (audio_rms is not None and audio_rms >= policy.speech_rms)
    model = policy.heeds_model and is_in_call
    for _, one in zip(range(policy.quiet_ticks), newest_first, strict=False):
        user = user or bool(one.text_in)
        user = user or (one.audio_rms is not None and one.audio_rms >= policy.speech_rms)
        model = model or (policy.heeds_model and bool(one.text_out or one.sound_ms))
    return Floor(user, model)


@dataclass(eq=False)
class Entry:
    """A result on its way in. ``pieces``: what enters, in order; ``handed``: (tick, piece) of those
    that have. ``ready_tick``: since when it waits. ``seen_tick``: up to where its author knew the
    conversation. ``is_held``: somebody is looking at it again. ``is_open``: more pieces come."""

    job: Job
    pieces: list[ToolResult]
    deliver: Deliver
    priority: int
    ready_tick: int
    expires_tick: int
    seen_tick: int
    number: int = 0
    num_rechecks: int = 0
    is_held: bool = False
    is_checked: bool = False
    is_open: bool = False
    handed: list[tuple[int, ToolResult]] = field(default_factory=list)

    @property
    def has_next(self) -> bool:
        """Whether there is a piece that has not entered."""
        return len(self.handed) < len(self.pieces)

    @property
    def next_piece(self) -> ToolResult:
        """The piece that enters next."""
        return self.pieces[len(self.handed)]

    @property
    def is_through(self) -> bool:
        """Whether all of it has entered."""
        return not self.has_next and not self.is_open


class Outbox:
    """The results of one session that wait, and the one that is entering.

    ``recheck``: called with an entry that newer items have overtaken before it began to enter;
    True if it is to be held until `release`, `replace` or `drop`.
    """

    def __init__(self, policy: DeliveryPolicy, recheck: Callable[[Entry], bool]) -> None:
        self.policy = policy
        self._recheck = recheck
        self._entries: list[Entry] = []
        self._through: list[Entry] = []
        self._count = 0
        # When typed text and results entered the conversation, newest last.
        self._item_ticks: deque[int] = deque(maxlen=_NUM_REMEMBERED)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Let a result wait for its moment; with `MAX_WAITING` before it, it is dropped."""
        if len(self._entries) >= MAX_WAITING:
            entry.job.delivery = "dropped"
            return
        entry.number = self._count
        self._count += 1
        self._entries.append(entry)
        entry.job.delivery = "waiting"

    def extend(self, entry: Entry, pieces: Sequence[ToolResult], *, is_last: bool) -> None:
        """Further pieces of an open entry; after the last it is closed."""
        entry.pieces.extend(pieces)
        entry.is_open = not is_last

    def note_item(self, tick: int) -> None:
        """Typed text, or a result that does not come from here, enters in this tick."""
        self._item_ticks.append(tick)

    def undo(self, tick: int, still_waiting: Sequence[ToolResult]) -> None:
        """Tick ``tick`` comes next: what was handed in it or later was undone and enters again, but
        for pieces the session has put back itself."""
        for entry in (*self._through, *self._entries):
            kept = list(entry.handed)
            while kept and kept[-1][0] >= tick and not _is_in(kept[-1][1], still_waiting):
                kept.pop()
            if len(kept) == len(entry.handed):
                continue
            entry.handed = kept
            entry.job.delivery = "entering" if kept else "waiting"
            if entry in self._through:
                self._through.remove(entry)
                self._entries.append(entry)
        while self._item_ticks and self._item_ticks[-1] >= tick:
            self._item_ticks.pop()

    def drop_undone(self, is_known: Callable[[str], bool]) -> list[Job]:
        """Forget results of calls that are no longer in the conversation; their jobs."""
        gone = [
            one
            for one in (*self._entries, *self._through)
            if one.job.call_id is not None and not is_known(one.job.call_id)
        ]
        for entry in gone:
            if entry in self._entries:
                self._close(entry, "dropped")
            else:
                self._through.remove(entry)
        return [one.job for one in gone]

    def take(self, tick: int, floor: Floor) -> ToolResult | None:
        """The piece that enters in this tick, if any may."""
        for late in [one for one in self._entries if not one.handed and tick > one.expires_tick]:
            self._close(late, "expired")
        entry = self._next(tick, floor)
        if entry is None:
            return None
        newest = self._item_ticks[-1] if self._item_ticks else -1
        if not entry.handed and entry.seen_tick < newest and not entry.is_checked:
            if self._recheck(entry):
                entry.is_held = True
                return None
            entry.is_checked = True
            entry.pieces[0] = _flagged(entry.pieces[0], OVERTAKEN)
        piece = entry.next_piece
        entry.handed.append((tick, piece))
        entry.job.delivery = "entering"
        self.note_item(tick)  # for the others
        if entry.is_through:
            self._close(entry, "delivered")
            self._through.append(entry)
            del self._through[:-_NUM_REMEMBERED]
        return piece

    def release(self, entry: Entry, tick: int) -> None:
        """Somebody has looked at the entry; it goes on as it is, seen up to ``tick``."""
        entry.is_held = False
        entry.seen_tick = max(entry.seen_tick, tick)

    def drop(self, entry: Entry) -> None:
        """The entry is not to enter after all."""
        if entry in self._entries:
            self._close(entry, "dropped")

    def clear(self) -> None:
        """Nothing enters any more."""
        for entry in list(self._entries):
            self._close(entry, "dropped")

    def _next(self, tick: int, floor: Floor) -> Entry | None:
        """The entry that is in the middle, else the most urgent that may begin; ties by age.

        In the middle of a result a user who begins to speak is waited for again."""
        ready = [one for one in self._entries if one.has_next and not one.is_held]
        may = [one for one in ready if self._may(one, tick, floor)]
        if not may:
            return None
        return min(may, key=lambda one: (not one.handed, -one.priority, one.number))

    def _may(self, entry: Entry, tick: int, floor: Floor) -> bool:
        if entry.deliver != "when_idle" or floor.is_free:
            return True
        if entry.handed and not floor.user:
            return True  # the model may already be speaking about its first pieces
        return (tick - entry.ready_tick) * TICK_MS >= self.policy.patience_s * 1000

    def _close(self, entry: Entry, delivery: Delivery) -> None:
        self._entries.remove(entry)
        entry.job.delivery = delivery


def split_result(
    call_id: str,
    name: str | None,
    text: str,
    count: Callable[[ToolResult], int],
    budget_tokens: int,
    *,
    is_error: bool = False,
    flags: Sequence[str] = (),
    is_last: bool = True,
) -> list[ToolResult]:
    """A result as pieces of at most ``budget_tokens`` ids each, as ``count`` gives them.

    One piece is the text itself; of several, and with flags, each is ``{"text": ..., flag: true}``
    with the flag "more" in all but the last, and in the last too without ``is_last``. Raises
    InvalidArgument if a piece has no room for text.
    """

    def piece(text: str, *, more: bool) -> ToolResult:
        marks = (*flags, "more") if more else tuple(flags)
        content = {"text": text, **dict.fromkeys(marks, True)} if marks else text
        return ToolResult(call_id, content, is_error, name)

    def fits(one: ToolResult) -> bool:
        # The first piece may get one more flag when its turn comes.
        return count(one if pieces else _flagged(one, OVERTAKEN)) <= budget_tokens

    pieces: list[ToolResult] = []
    rest = text
    while True:
        last = piece(rest, more=not is_last)
        if fits(last):
            return [*pieces, last]
        length = _fitting(rest, lambda head: fits(piece(head, more=True)))
        if not length:
            needed = count(piece("", more=True)) + _MIN_TEXT_TOKENS
            raise InvalidArgument(
                f"budget_tokens: expected at least {needed} for this model's tokenizer, "
                f"got {budget_tokens}"
            )
        pieces.append(piece(rest[:length], more=True))
        rest = rest[length:]


def sentence_end(text: str) -> int:
    """Where the last whole sentence of ``text`` ends; 0 if there is none of some length."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return ends[-1] if ends and ends[-1] >= _MIN_SENTENCE else 0


def least_budget(count: Callable[[ToolResult], int], name: str) -> int:
    """The least budget with room for text beside what frames it."""
    marks = dict.fromkeys((OVERTAKEN, SILENT, "more"), True)
    return count(ToolResult("call-100000", {"text": "", **marks}, True, name)) + _MIN_TEXT_TOKENS


def _fitting(text: str, fits: Callable[[str], bool]) -> int:
    """The length of the longest beginning that fits, at a word's end where there is one."""
    low, high = 0, 16
    while high < len(text) and fits(text[:high]):
        low, high = high, 2 * high
    high = min(high, len(text))
    while low < high:
        middle = (low + high + 1) // 2
        if fits(text[:middle]):
            low = middle
        else:
            high = middle - 1
    at_word = text.rfind(" ", 1, low) + 1
    return at_word if at_word > low // 2 else low


def _flagged(piece: ToolResult, flag: str) -> ToolResult:
    content: Any = piece.content
    content = {"text": content} if isinstance(content, str) else dict(content)
    return ToolResult(piece.call_id, {**content, flag: True}, piece.is_error, piece.name)


def _is_in(piece: ToolResult, items: Sequence[ToolResult]) -> bool:
    return any(one is piece for one in items)
