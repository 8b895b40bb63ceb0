"""What the engine keeps of one session: the sequence, the layout's state, the open turn.

The session object that users hold is only a handle; when it is collected the seat is given up.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np

from tml_core.engine.parking import Parked
from tml_core.engine.sampler import SamplingParams
from tml_core.engine.turn import Turn
from tml_core.errors import Conflict, SessionBusy, SessionClosed, TmlError
from tml_core.layout.chunk import Chunk, ToolResult
from tml_core.layout.events import Event, Notice
from tml_core.layout.state import EncodedInput, Layout, LayoutState, OutputHalf
from tml_core.media.micro_turns import TICK_MS
from tml_core.sequence.sequence import Mark, Sequence

__all__ = [
    "MAX_PENDING",
    "MAX_TRANSCRIPT",
    "MAX_UNHEARD",
    "BeginOutput",
    "Degrade",
    "Part",
    "RecentTick",
    "Seat",
    "TickRecord",
]

Degrade = Literal["none", "emit_silence", "shrink_output", "coalesce_input"]
BeginOutput = Callable[[LayoutState, int], OutputHalf | None]

# Ticks that can be told apart by what the user has heard: ten seconds.
MAX_UNHEARD: Final = 50
# Turns that may wait behind the one that runs, where input is coalesced: two seconds.
MAX_PENDING: Final = 10
# Turns an append may be asked for again, by its number.
MAX_NUMBERED: Final = 2 * MAX_PENDING

# One hour of ticks; older records go, so that an endless session stays small.
MAX_TRANSCRIPT: Final = 18_000


@dataclass(frozen=True)
class TickRecord:
    """One turn in words, for people and log files.

    ``audio_ms``: sound that came, ``audio_rms``: its level, 0 to 1 (None without sound).
    ``sound_ms``: sound the model made. ``calls``: (name, call_id, raw) of the tool calls closed.
    ``reason``: how the output ended.
    """

    tick: int
    t_ms: int
    audio_ms: int
    audio_rms: float | None
    num_frames: int
    text_in: str
    num_items: int
    text_out: str
    is_silent: bool
    calls: tuple[tuple[str, str, str], ...]
    reason: str
    sound_ms: int = 0


@dataclass(eq=False)
class Part:
    """One append (or commit, or prefix) on its way into the sequence.

    ``begin_output`` makes the output half. ``chunk``: what came in, None for a prefix or a commit.
    With ``answer`` False the model is not asked. ``encoded``: the input half in tick ``tick``; None
    until its turn comes if others are ahead of it. ``taken``: tool results that waited, and go back
    to the session if the turn is undone; ``known``: those of them that went in with it, the others
    were dropped. ``silent``: its output half, closed without the model, and ``tail`` what is still
    heard in it. ``is_replay``: it was put in before, and nobody reads its turn. ``audio_rms``:
    level of its sound, None without.
    """

    turn: Turn
    begin_output: BeginOutput
    chunk: Chunk | None = None
    answer: bool = True
    encoded: EncodedInput | None = None
    tick: int = 0
    taken: tuple[ToolResult, ...] = ()
    known: tuple[ToolResult, ...] = ()
    silent: OutputHalf | None = None
    tail: list[Event] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    is_replay: bool = False
    audio_rms: float | None = None


class RecentTick(NamedTuple):
    """A tick that may have to be lived again without its output.

    ``chunk``: what went in, tool results included. Of a tick in which something was said also
    ``after_input``, the point where its output begins, and ``state``, the layout's state there.
    """

    tick: int
    chunk: Chunk
    after_input: Mark | None = None
    state: LayoutState | None = None


class Attachment(Protocol):
    """What a background runner is to the engine. Every call returns at once; the first two come
    with the seat's lock held."""

    def due(self, seat: "Seat", chunk: Chunk, state: LayoutState) -> tuple[ToolResult, ...]:
        """Results that enter with ``chunk``, whose input half is about to be encoded."""

    def settled(self, records: SequenceOf[TickRecord]) -> None:
        """Ticks ended, and stand."""

    def closed(self) -> None:
        """The session is gone."""


@dataclass(eq=False)
class Seat:
    """One session's part of the engine. ``lock`` guards all fields below it.

    ``turns``: the open ones, oldest first; ``parts``: those of them that wait behind the one that
    runs. ``position``: of the sequence and what is unsent, when no turn is open. ``last_seq`` and
    ``numbered``: the number of the last append that had one, and the turns of the last few.
    ``recent``: the last ticks from the first on in which something was said. ``parked``: where
    the sequence, closed then, has gone. ``idle_since_s``: `time.perf_counter` of the last use.
    """

    sequence: Sequence
    layout: Layout
    sampling: SamplingParams
    degrade: Degrade = "none"
    lock: threading.Lock = field(default_factory=threading.Lock)
    state: LayoutState = field(default_factory=LayoutState)
    epoch: int = 0
    turns: list[Turn] = field(default_factory=list)
    parts: deque[Part] = field(default_factory=deque)
    output: OutputHalf | None = None  # of the turn that runs
    position: int = 0
    last_seq: int | None = None
    numbered: deque[tuple[int, Turn]] = field(default_factory=lambda: deque(maxlen=MAX_NUMBERED))
    recent: deque[RecentTick] = field(default_factory=deque)
    waiting_items: tuple[ToolResult, ...] = ()
    transcript: deque[TickRecord] = field(default_factory=lambda: deque(maxlen=MAX_TRANSCRIPT))
    is_closed: bool = False
    parked: Parked | None = None
    idle_since_s: float = field(default_factory=time.perf_counter)
    attachment: Attachment | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a turn is open."""
        return bool(self.turns)

    def require_open(self, what: str) -> None:
        """Raise SessionClosed if it was closed."""
        if self.is_closed:
            raise SessionClosed(f"{what}: the session is closed")

    def require_idle(self, what: str) -> None:
        """Raise SessionClosed or SessionBusy unless nothing is under way."""
        self.require_open(what)
        if self.turns:
            raise SessionBusy(f"{what}: a turn is still open; read it to its end or cancel it")

    def require_tip(self, expected: int) -> None:
        """Raise Conflict unless the sequence stands at ``expected`` and nothing is under way."""
        if self.turns:
            raise Conflict(f"expect_tip: expected {expected}, but a turn is open")
        if self.position != expected:
            raise Conflict(f"expect_tip: expected {expected}, the session is at {self.position}")

    def known_turn(self, seq: int) -> Turn | None:
        """The turn that append ``seq`` got, None if it is the next one; Conflict otherwise."""
        for known, turn in self.numbered:
            if known == seq:
                return turn
        if self.last_seq is not None and seq != self.last_seq + 1:
            raise Conflict(f"seq: expected {self.last_seq + 1}, got {seq}")
        return None

    def encode(self, part: Part, state: LayoutState) -> EncodedInput:
        """The input half of an append, with the tool results that wait.

        Raises what the layout raises for a chunk it cannot take; nothing has changed then.
        """
        chunk = part.chunk
        if chunk is None:
            raise TmlError("turn: it brings nothing to encode")
        part.tick = state.tick
        audio_S = chunk.audio
        if audio_S is not None:
            part.audio_rms = math.sqrt(float(np.dot(audio_S, audio_S)) / len(audio_S))
        if part.is_replay:
            items = tuple(one for one in chunk.items if one.name or state.knows(one.call_id))
            if len(items) < len(chunk.items):
                chunk = _with_items(chunk, items)
            part.encoded = self.layout.encode_input(chunk, state)
            return part.encoded
        if self.attachment is not None:
            self.waiting_items += self.attachment.due(self, chunk, state)
        waiting = self.waiting_items
        known = tuple(one for one in waiting if one.name or state.knows(one.call_id))
        if known:
            chunk = _with_items(chunk, (*known, *chunk.items))
        part.encoded = self.layout.encode_input(chunk, state)
        part.taken, part.known = waiting, known
        self.waiting_items = ()
        return part.encoded

    def take_back(self, part: Part) -> None:
        """Undo `encode`."""
        if part.chunk is not None:
            part.encoded = None
        self.waiting_items = part.taken + self.waiting_items
        part.taken = part.known = ()

    def raise_epoch(self) -> None:
        """What was delivered before belongs to the past."""
        with self.lock:
            self.epoch += 1

    def settle(
        self,
        parts: SequenceOf[Part],
        state: LayoutState | None = None,
        records: Iterable[TickRecord] = (),
        after_input: Mark | None = None,
    ) -> None:
        """Close the turns of ``parts``: with a new state, or undone, with the state as it was.

        ``after_input``: where the output of the last one begins, if something was said in it.
        """
        with self.lock:
            self.output = None
            self.idle_since_s = time.perf_counter()
            for part in parts:
                self.turns.remove(part.turn)
            if state is None:
                for part in reversed(parts):
                    self.take_back(part)
            else:
                self.state = state
                ended = tuple(records)
                self.transcript.extend(ended)
                self._note_recent(parts, after_input)
                if self.attachment is not None:
                    self.attachment.settled(ended)
            if not self.sequence.is_closed:
                self.position = self.sequence.tip + len(self.state.unsent)

    # What was heard.

    def first_unheard(self, heard_ms: float) -> RecentTick | None:
        """The first tick said in the last `MAX_UNHEARD` ones whose output was not yet played at
        ``heard_ms`` of media time; text is played when its tick begins."""
        for one in self.recent:
            if one.after_input is not None and one.tick * TICK_MS >= heard_ms:
                return one
        return None

    def forget_output(self, first: RecentTick) -> list[Part]:
        """Go back to where the output of a recent tick begins, and close it empty.

        Returns the input of the ticks after it, which is to be put in again without answers. Raises
        InvalidArgument, with nothing changed, if retention has dropped what lies between. Called in
        the engine thread with the lock held and no step under way.
        """
        assert first.after_input is not None and first.state is not None  # something was said
        self.sequence.rewind(first.after_input)
        half = self.layout.begin_output(first.state, self.epoch)
        assert half is not None  # it had one
        half.cut()
        self.state = half.state
        self.position = self.sequence.tip + len(self.state.unsent)
        replayed = []
        while self.recent and self.recent[-1].tick >= first.tick:
            last = self.recent.pop()
            if last.after_input is not None:
                last.after_input.release()
            if last is not first:
                replayed.append(last.chunk)
        if self.recent:
            self.recent.append(RecentTick(first.tick, first.chunk))
        undone: TickRecord | None = None
        while self.transcript and self.transcript[-1].tick >= first.tick:
            undone = self.transcript.pop()
        if undone is not None:
            record = replace(
                undone, text_out="", sound_ms=0, is_silent=False, calls=(), reason="cancelled"
            )
            self.transcript.append(record)
        begin = self.layout.begin_output
        return [
            Part(Turn.cancelled_one(), begin, chunk, answer=False, is_replay=True)
            for chunk in reversed(replayed)
        ]

    @property
    def num_marks(self) -> int:
        """Points of the sequence that are kept for output that was not heard."""
        marks = (one.after_input for one in self.recent)
        return sum(mark is not None and mark.is_live for mark in marks)

    def forget_recent(self, tick: int = 0) -> None:
        """What was said from ``tick`` on counts as heard, and holds no memory any more."""
        while self.recent and self.recent[-1].tick >= tick:
            last = self.recent.pop()
            if last.after_input is not None:
                last.after_input.release()

    def _note_recent(self, parts: SequenceOf[Part], after_input: Mark | None) -> None:
        for part in parts:
            if part.chunk is None:
                continue
            mark = after_input if part is parts[-1] else None
            if mark is None and not self.recent:
                continue  # nothing before it that could be unheard
            chunk = part.chunk
            if part.known:
                chunk = _with_items(chunk, (*part.known, *chunk.items))
            state = None if mark is None or part.encoded is None else part.encoded.state
            self.recent.append(RecentTick(part.tick, chunk, mark, state))
        while len(self.recent) > MAX_UNHEARD or (
            self.recent and self.recent[0].after_input is None
        ):
            mark = self.recent.popleft().after_input
            if mark is not None:
                mark.release()


def _with_items(chunk: Chunk, items: tuple[ToolResult, ...]) -> Chunk:
    """The chunk with these tool results instead of its own."""
    is_empty = chunk.audio is None and not chunk.frames and not chunk.text and not items
    return replace(chunk, items=items, is_idle=is_empty)
