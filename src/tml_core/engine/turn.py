"""A turn: the events of one append as they come, for threads and for asyncio; timing; cancel.

The engine thread writes, everybody else reads. Readers are independent: each sees all events from
the first one on, whenever it starts.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from tml_core.errors import InvalidArgument, InvalidType, TmlError
from tml_core.layout.events import Event, TextToken, ToolCall, TurnDone

__all__ = [
    "MAX_UNREAD",
    "READER_PATIENCE_S",
    "Ending",
    "Turn",
    "TurnClock",
    "TurnResult",
    "TurnStats",
    "end_together",
    "require_heard",
]

# The engine lets a turn rest while nobody has read this many of its events; a micro-turn has far
# fewer, so only a long chat answer without a reader gets here.
MAX_UNREAD: Final = 1024
# And when it has rested so long, it is given up.
READER_PATIENCE_S: Final = 10.0

Keep = Literal["input", "heard", "none"]


@dataclass(frozen=True)
class TurnStats:
    """Where the time of a turn went; what has not happened yet is None.

    ``arrived_s``: `time.perf_counter` at the append. ``deadline_ms``: what it was given from there,
    None for a turn without a clock (an answer of a chat checkpoint). ``queued_ms``: until the
    engine began. ``prefill_ms``: input half through the model. ``decode_ms``: from there to the
    end. ``first_token_ms``: arrival to first sampled token. ``total_ms``: arrival to end.
    ``delivered_ms``: arrival to the moment a reader had the end. ``max_batch``: most sessions
    that shared one of its steps. ``position`` and ``num_pages``: of the sequence.
    """

    arrived_s: float
    deadline_ms: float | None = None
    queued_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    first_token_ms: float | None = None
    total_ms: float | None = None
    delivered_ms: float | None = None
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    max_batch: int = 0
    position: int = 0
    num_pages: int = 0

    @property
    def slack_ms(self) -> float | None:
        """What was left until the deadline when the turn ended, negative if late."""
        if self.total_ms is None or self.deadline_ms is None:
            return None
        return self.deadline_ms - self.total_ms

    @property
    def missed(self) -> bool:
        """Whether the turn ended after its deadline."""
        slack_ms = self.slack_ms
        return slack_ms is not None and slack_ms < 0


class TurnClock:
    """What the engine notes of a turn, in seconds of `time.perf_counter`; 0.0: not yet."""

    __slots__ = (
        "arrived_s",
        "deadline_ms",
        "deadline_s",
        "delivered_s",
        "ended_s",
        "first_s",
        "input_done_s",
        "max_batch",
        "num_input_tokens",
        "num_output_tokens",
        "num_pages",
        "position",
        "started_s",
    )

    def __init__(self, deadline_ms: float | None) -> None:
        self.arrived_s = time.perf_counter()
        self.deadline_ms = deadline_ms
        self.deadline_s = math.inf if deadline_ms is None else self.arrived_s + deadline_ms / 1000
        self.started_s = self.input_done_s = self.first_s = 0.0
        self.ended_s = self.delivered_s = 0.0
        self.num_input_tokens = self.num_output_tokens = 0
        self.max_batch = self.position = self.num_pages = 0

    def stats(self) -> TurnStats:
        """All of it, in milliseconds."""
        return TurnStats(
            arrived_s=self.arrived_s,
            deadline_ms=self.deadline_ms,
            queued_ms=_ms(self.arrived_s, self.started_s),
            prefill_ms=_ms(self.started_s, self.input_done_s),
            decode_ms=_ms(self.input_done_s, self.ended_s),
            first_token_ms=_ms(self.arrived_s, self.first_s),
            total_ms=_ms(self.arrived_s, self.ended_s),
            delivered_ms=_ms(self.arrived_s, self.delivered_s),
            num_input_tokens=self.num_input_tokens,
            num_output_tokens=self.num_output_tokens,
            max_batch=self.max_batch,
            position=self.position,
            num_pages=self.num_pages,
        )


@dataclass(frozen=True)
class TurnResult:
    """A finished turn: its events (`TurnDone` last), text, tool calls and stats."""

    events: tuple[Event, ...]
    stats: TurnStats

    @property
    def text(self) -> str:
        """What the model said, without its thinking."""
        said = (one for one in self.events if isinstance(one, TextToken) and one.channel == "text")
        return "".join(one.text for one in said)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that were closed in this turn, also those with an ``error``."""
        return tuple(one for one in self.events if isinstance(one, ToolCall))

    @property
    def done(self) -> TurnDone:
        """The last event."""
        last = self.events[-1]
        if not isinstance(last, TurnDone):
            raise TmlError(f"turn: expected TurnDone as its last event, got {last!r}")
        return last


class Turn:
    """One append under way. Iterate it (``for`` or ``async for``), `result` it or ``await`` it.

    An error of the turn is raised wherever it is read; the session then stands where it stood
    before the append. A turn whose readers have left `MAX_UNREAD` events for `READER_PATIENCE_S`
    ends with `Overloaded`.
    """

    def __init__(
        self,
        wake: Callable[[], None],
        epoch: Callable[[], None],
        deadline_ms: float | None = None,
    ) -> None:
        self._wake = wake
        self._raise_epoch = epoch
        # Two of one lock: who waits for the end alone is not woken by every event.
        lock = threading.RLock()
        self._changed, self._ended = threading.Condition(lock), threading.Condition(lock)
        self._events: list[Event] = []
        self._first_valid = 0  # events before were withdrawn by a cancel
        self._num_read = 0
        self._wants_all = False
        self._is_done = False
        self._error: BaseException | None = None
        self._watchers: list[Callable[[], None]] = []
        self._end_watchers: list[Callable[[], None]] = []
        self._cancel: Keep | None = None
        self.heard_ms: float | None = None
        self.clock: Final = TurnClock(deadline_ms)
        # What must stay alive while the turn runs: the session, whose end would cancel it.
        self.owner: object | None = None

    @classmethod
    def cancelled_one(cls) -> "Turn":
        """A turn that nobody reads and whose output is not wanted."""
        turn = cls(_nothing, _nothing)
        turn._cancel = "input"
        return turn

    # For readers.

    @property
    def is_done(self) -> bool:
        """Whether the turn is over, by its end, a cancel or an error."""
        return self._is_done

    @property
    def stats(self) -> TurnStats:
        """Times and counts so far."""
        return self.clock.stats()

    def __iter__(self) -> Iterator[Event]:
        """The events as they come; ends after `TurnDone`, raises the turn's error."""
        index = 0
        while True:
            with self._changed:
                while not self._has_more(index):
                    self._changed.wait()
                event, index = self._next(index)
            if event is None:
                return
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The same events for asyncio; leaving early lets the turn go on."""
        index = 0
        while True:
            await self._until(lambda at=index: self._has_more(at), self._watchers)  # type: ignore[misc]
            with self._changed:
                event, index = self._next(index)
            if event is None:
                return
            yield event

    def result(self, timeout_s: float | None = None) -> TurnResult:
        """Wait for the end. Raises the turn's error, or TimeoutError (the turn then goes on)."""
        self._read_all()
        with self._changed:
            if not self._ended.wait_for(lambda: self._is_done, timeout_s):
                raise TimeoutError(f"result: the turn did not end within {timeout_s} s")
            return self._result()

    def __await__(self) -> Generator[Any, None, TurnResult]:
        """``await turn`` is `result` for asyncio."""
        return self._wait().__await__()

    def cancel(
        self, keep: Keep = "input", *, heard_ms: float | None = None, wait: bool = True
    ) -> bool:
        """Stop the turn; returns False if it was already over, and then changes nothing.

        ``keep="input"``: the input half stays in context (it is still run through the model if it
        was not yet), the output of this turn is dropped and its half closed empty.
        ``keep="heard"``: so does the input of this and all earlier turns, but what the user has not
        heard at ``heard_ms`` of media time is dropped, of earlier turns too (see
        `Session.truncate`); what was delivered of this turn stays if its tick began before then.
        ``keep="none"``: the session stands where it stood before the append.
        Events not yet read are withdrawn, and what readers already have belongs to an old epoch;
        the turn ends with ``TurnDone(reason="cancelled")``. With ``wait`` (at most about one model
        step, or 10 ms of short ones, or what is ahead of a turn that waits in a queue, or the
        input that is put in again) it is over on return.
        """
        if keep not in ("input", "heard", "none"):
            raise InvalidArgument(f"keep: expected 'input', 'heard' or 'none', got {keep!r}")
        require_heard(keep, heard_ms)
        with self._changed:
            if self._is_done:
                return False
            if self._cancel is None:
                self._cancel = keep
                self.heard_ms = heard_ms
                self._first_valid = len(self._events)
                self._raise_epoch()
        self._wake()
        if wait:
            with self._changed:
                self._ended.wait_for(lambda: self._is_done)
        return True

    # For the engine.

    @property
    def cancelled(self) -> Keep | None:
        """What a cancel asked to keep; None without one."""
        return self._cancel

    @property
    def is_full(self) -> bool:
        """Whether readers are too far behind for the turn to go on."""
        return not self._wants_all and len(self._events) - self._num_read >= MAX_UNREAD

    def deliver(self, events: Sequence[Event]) -> bool:
        """Hand events to the readers; False, with nothing done, if a cancel came in between."""
        with self._changed:
            if self._cancel is not None:
                return False
            self._events.extend(events)
            self._notify()
            return True

    def withdraw(self) -> None:
        """Take back what was delivered: it comes again, another way."""
        with self._changed:
            self._first_valid = len(self._events)

    def _can_end(self, events: Sequence[Event], error: BaseException | None) -> bool:
        last = events[-1] if events else None
        is_cancelled = isinstance(last, TurnDone) and last.reason == "cancelled"
        return self._cancel is None or is_cancelled or error is not None

    def _end(self, events: Sequence[Event], error: BaseException | None) -> None:
        self._events.extend(events)
        self._error = error
        self._is_done = True
        self.owner = None
        self._ended.notify_all()
        self._watchers += self._end_watchers
        self._end_watchers.clear()
        self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._watchers:
            watchers = self._watchers.copy()
            self._watchers.clear()
            for watcher in watchers:
                watcher()

    def _has_more(self, index: int) -> bool:
        return self._is_done or max(index, self._first_valid) < len(self._events)

    def _next(self, index: int) -> tuple[Event | None, int]:
        """The event at ``index`` (None at the end) and the next index; `_has_more` held."""
        index = max(index, self._first_valid)
        if index == len(self._events):
            self._note_delivery()
            if self._error is not None:
                raise self._error
            return None, index
        was_full = self.is_full
        self._num_read = max(self._num_read, index + 1)
        if was_full and not self.is_full:
            self._wake()
        if self._is_done and self._num_read == len(self._events):
            self._note_delivery()
        return self._events[index], index + 1

    def _read_all(self) -> None:
        with self._changed:
            was_full = self.is_full
            self._wants_all = True
        if was_full:
            self._wake()

    def _result(self) -> TurnResult:
        self._note_delivery()
        if self._error is not None:
            raise self._error
        return TurnResult(tuple(self._events[self._first_valid :]), self.stats)

    def _note_delivery(self) -> None:
        if not self.clock.delivered_s:
            self.clock.delivered_s = time.perf_counter()

    async def _wait(self) -> TurnResult:
        self._read_all()
        await self._until(lambda: self._is_done, self._end_watchers)
        with self._changed:
            return self._result()

    async def _until(
        self, is_reached: Callable[[], bool], watchers: list[Callable[[], None]]
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if is_reached():
                    return
                changed = asyncio.Event()
                watcher = _watcher(loop, changed)
                watchers.append(watcher)
            try:
                await changed.wait()
            except asyncio.CancelledError:
                with self._changed:
                    if watcher in watchers:
                        watchers.remove(watcher)
                raise


class Ending(NamedTuple):
    """How one turn ends: its last events, or its error."""

    turn: Turn
    events: Sequence[Event]
    error: BaseException | None = None


def end_together(endings: Sequence[Ending], settle: Callable[[], None]) -> bool:
    """End turns, all or none.

    ``settle`` makes the result the session's, before any reader can see an end. False, with nothing
    done, if a cancel came in between that the events do not answer.
    """
    with contextlib.ExitStack() if len(endings) > 1 else endings[0].turn._changed as stack:
        if isinstance(stack, contextlib.ExitStack):
            for one in endings:
                stack.enter_context(one.turn._changed)
        if not all(one.turn._can_end(one.events, one.error) for one in endings):
            return False
        now_s = time.perf_counter()
        for one in endings:
            one.turn.clock.ended_s = now_s
        settle()
        for one in endings:
            one.turn._end(one.events, one.error)
        return True


def require_heard(keep: Keep, heard_ms: object) -> None:
    """Raise unless ``heard_ms`` is there exactly when it is needed."""
    if (keep == "heard") != (heard_ms is not None):
        what = "a time" if keep == "heard" else "None"
        raise InvalidArgument(f"heard_ms: expected {what} with keep={keep!r}, got {heard_ms!r}")
    if heard_ms is None:
        return
    if isinstance(heard_ms, bool) or not isinstance(heard_ms, (int, float)):
        raise InvalidType(f"heard_ms: expected a number, got {type(heard_ms).__name__}")
    if not heard_ms >= 0:
        raise InvalidArgument(f"heard_ms: expected at least 0, got {heard_ms}")


def _nothing() -> None:
    """Where there is nobody to tell."""


def _ms(start_s: float, stop_s: float) -> float | None:
    return 1000 * (stop_s - start_s) if start_s and stop_s else None


def _watcher(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> Callable[[], None]:
    def wake() -> None:
        # A loop that was closed has no reader any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(changed.set)

    return wake
