"""What the engine keeps of one session: the sequence, the layout's state, the open turn.

The session object that users hold is only a handle; when it is collected the seat is given up.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Protocol

from tml_core.engine.sampler import SamplingParams
from tml_core.engine.turn import Turn
from tml_core.errors import Conflict, SessionBusy, SessionClosed, TmlError
from tml_core.layout.chunk import Chunk, ToolResult
from tml_core.layout.events import Event
from tml_core.layout.state import EncodedInput, Layout, LayoutState, OutputHalf
from tml_core.sequence.sequence import Sequence

__all__ = [
    "MAX_PENDING",
    "MAX_TRANSCRIPT",
    "BeginOutput",
    "Degrade",
    "Part",
    "Seat",
    "TickRecord",
]

Degrade = Literal["none", "emit_silence", "shrink_output", "coalesce_input"]
BeginOutput = Callable[[LayoutState, int], OutputHalf | None]

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
    ``calls``: (name, call_id, raw) of the tool calls closed. ``reason``: how the output ended.
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


@dataclass(eq=False)
class Part:
    """One append (or commit, or prefix) on its way into the sequence.

    ``begin_output`` makes the output half. ``chunk``: what came in, None for a prefix or a commit.
    With ``answer`` False the model is not asked. ``encoded``: the input half in tick ``tick``; None
    until its turn comes if others are ahead of it. ``taken``: the tool results that went in with
    it, or were dropped (``num_dropped``); they go back to the session if the turn is undone.
    ``silent``: its output half, closed without the model.
    """

    turn: Turn
    begin_output: BeginOutput
    chunk: Chunk | None = None
    answer: bool = True
    encoded: EncodedInput | None = None
    tick: int = 0
    taken: tuple[ToolResult, ...] = ()
    num_dropped: int = 0
    silent: OutputHalf | None = None
    notices: list[Event] = field(default_factory=list)


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
    waiting_items: tuple[ToolResult, ...] = ()
    transcript: deque[TickRecord] = field(default_factory=lambda: deque(maxlen=MAX_TRANSCRIPT))
    is_closed: bool = False
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
        if self.attachment is not None:
            self.waiting_items += self.attachment.due(self, chunk, state)
        waiting = self.waiting_items
        known = tuple(one for one in waiting if one.name or state.knows(one.call_id))
        if known:
            chunk = replace(chunk, items=(*known, *chunk.items), is_idle=False)
        part.encoded = self.layout.encode_input(chunk, state)
        part.tick = state.tick
        part.taken, part.num_dropped = waiting, len(waiting) - len(known)
        self.waiting_items = ()
        return part.encoded

    def take_back(self, part: Part) -> None:
        """Undo `encode`."""
        if part.chunk is not None:
            part.encoded = None
        self.waiting_items = part.taken + self.waiting_items
        part.taken = ()

    def raise_epoch(self) -> None:
        """What was delivered before belongs to the past."""
        with self.lock:
            self.epoch += 1

    def settle(
        self,
        parts: SequenceOf[Part],
        state: LayoutState | None = None,
        records: Iterable[TickRecord] = (),
    ) -> None:
        """Close the turns of ``parts``: with a new state, or undone, with the state as it was."""
        with self.lock:
            self.output = None
            for part in parts:
                self.turns.remove(part.turn)
            if state is None:
                for part in reversed(parts):
                    self.take_back(part)
            else:
                self.state = state
                ended = tuple(records)
                self.transcript.extend(ended)
                if self.attachment is not None:
                    self.attachment.settled(ended)
            if not self.sequence.is_closed:
                self.position = self.sequence.tip + len(self.state.unsent)
