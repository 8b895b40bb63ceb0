"""What the engine keeps of one session: the sequence, the layout's state, the open turn.

The session object that users hold is only a handle; when it is collected the seat is given up.
"""

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from tml_core.engine.sampler import SamplingParams
from tml_core.engine.turn import Turn
from tml_core.errors import SessionBusy, SessionClosed
from tml_core.layout.chunk import ToolResult
from tml_core.layout.state import Layout, LayoutState, OutputHalf
from tml_core.sequence.sequence import Sequence

__all__ = ["MAX_TRANSCRIPT", "Seat", "TickRecord"]

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
class Seat:
    """One session's part of the engine. ``lock`` guards all fields below it."""

    sequence: Sequence
    layout: Layout
    sampling: SamplingParams
    lock: threading.Lock = field(default_factory=threading.Lock)
    state: LayoutState = field(default_factory=LayoutState)
    epoch: int = 0
    turn: Turn | None = None
    output: OutputHalf | None = None  # of the open turn
    waiting_items: tuple[ToolResult, ...] = ()
    transcript: deque[TickRecord] = field(default_factory=lambda: deque(maxlen=MAX_TRANSCRIPT))
    is_closed: bool = False

    def require_idle(self, what: str) -> None:
        """Raise SessionClosed or SessionBusy unless nothing is under way."""
        if self.is_closed:
            raise SessionClosed(f"{what}: the session is closed")
        if self.turn is not None:
            raise SessionBusy(f"{what}: a turn is still open; read it to its end or cancel it")

    def raise_epoch(self) -> None:
        """What was delivered before belongs to the past."""
        with self.lock:
            self.epoch += 1

    def settle(
        self,
        state: LayoutState | None,
        items: tuple[ToolResult, ...] = (),
        record: TickRecord | None = None,
    ) -> None:
        """Close the open turn: with a new state, or with the old one and ``items`` put back."""
        with self.lock:
            self.turn = self.output = None
            if state is None:
                self.waiting_items = items + self.waiting_items
                return
            self.state = state
            if record is not None:
                self.transcript.append(record)
