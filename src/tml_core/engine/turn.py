"""A turn: the events of one append as they come, for threads and for asyncio; timing; cancel.

The engine thread writes, everybody else reads. Readers are independent: each sees all events from
the first one on, whenever it starts.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from tml_core.errors import InvalidArgument, TmlError
from tml_core.layout.events import Event, TextToken, ToolCall, TurnDone
from tml_core.media.micro_turns import TICK_MS

__all__ = ["MAX_UNREAD", "Turn", "TurnResult", "TurnStats"]

# The engine lets a turn rest while nobody has read this many of its events; a micro-turn has far
# fewer, so only a long chat answer without a reader gets here.
MAX_UNREAD: Final = 1024

Keep = Literal["input", "none"]


@dataclass(frozen=True)
class TurnStats:
    """Where the time of a turn went; what has not happened yet is None.

    ``arrived_s``: `time.perf_counter` at the append. ``queued_ms``: until the engine began.
    ``prefill_ms``: input half through the model. ``decode_ms``: from there to the end.
    ``first_token_ms``: arrival to first sampled token. ``total_ms``: arrival to end. ``slack_ms``:
    what was left of the 200 ms, negative if late. ``position`` and ``num_pages``: of the sequence.
    """

    arrived_s: float
    queued_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    first_token_ms: float | None = None
    total_ms: float | None = None
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    position: int = 0
    num_pages: int = 0

    @property
    def slack_ms(self) -> float | None:
        """What was left of the 200 ms of a tick when the turn ended."""
        return None if self.total_ms is None else TICK_MS - self.total_ms


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
    before the append.
    """

    def __init__(self, wake: Callable[[], None], epoch: Callable[[], None]) -> None:
        self._wake = wake
        self._raise_epoch = epoch
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._first_valid = 0  # events before were withdrawn by a cancel
        self._num_read = 0
        self._wants_all = False
        self._is_done = False
        self._error: BaseException | None = None
        self._watchers: list[Callable[[], None]] = []
        self._cancel: Keep | None = None
        self._stats = TurnStats(arrived_s=time.perf_counter())
        # What must stay alive while the turn runs: the session, whose end would cancel it.
        self.owner: object | None = None

    # For readers.

    @property
    def is_done(self) -> bool:
        """Whether the turn is over, by its end, a cancel or an error."""
        return self._is_done

    @property
    def stats(self) -> TurnStats:
        """Times and counts so far."""
        return self._stats

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
            await self._until(lambda at=index: self._has_more(at))  # type: ignore[misc]
            with self._changed:
                event, index = self._next(index)
            if event is None:
                return
            yield event

    def result(self, timeout_s: float | None = None) -> TurnResult:
        """Wait for the end. Raises the turn's error, or TimeoutError (the turn then goes on)."""
        self._read_all()
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_done, timeout_s):
                raise TimeoutError(f"result: the turn did not end within {timeout_s} s")
        return self._result()

    def __await__(self) -> Generator[Any, None, TurnResult]:
        """``await turn`` is `result` for asyncio."""
        return self._wait().__await__()

    def cancel(self, keep: Keep = "input", *, wait: bool = True) -> bool:
        """Stop the turn; returns False if it was already over, and then changes nothing.

        ``keep="input"``: the input half stays in context (it is still run through the model if it
        was not yet), the output of this turn is dropped and its half closed empty.
        ``keep="none"``: the session stands where it stood before the append.
        Events not yet read are withdrawn, and what readers already have belongs to an old epoch;
        the turn ends with ``TurnDone(reason="cancelled")``. With ``wait`` (at most about one model
        step) the session is free again on return.
        """
        if keep not in ("input", "none"):
            raise InvalidArgument(f"keep: expected 'input' or 'none', got {keep!r}")
        with self._changed:
            if self._is_done:
                return False
            if self._cancel is None:
                self._cancel = keep
                self._first_valid = len(self._events)
                self._raise_epoch()
        self._wake()
        if wait:
            with self._changed:
                self._changed.wait_for(lambda: self._is_done)
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

    def deliver(self, events: Sequence[Event], stats: TurnStats) -> bool:
        """Hand events to the readers; False, with nothing done, if a cancel came in between."""
        with self._changed:
            if self._cancel is not None:
                return False
            self._events.extend(events)
            self._stats = stats
            self._notify()
            return True

    def end(
        self,
        events: Sequence[Event],
        stats: TurnStats,
        settle: Callable[[], None],
        error: BaseException | None = None,
    ) -> bool:
        """Hand over the last events, or the error, and end the turn.

        ``settle`` makes the result the session's, before any reader can see the end. False, with
        nothing done, if a cancel came in between and these events are not its answer.
        """
        with self._changed:
            last = events[-1] if events else None
            is_cancelled = isinstance(last, TurnDone) and last.reason == "cancelled"
            if self._cancel is not None and not is_cancelled and error is None:
                return False
            settle()
            self._events.extend(events)
            self._stats = stats
            self._error = error
            self._finish()
            self._notify()
            return True

    def _finish(self) -> None:
        self._is_done = True
        self.owner = None

    def _notify(self) -> None:
        self._changed.notify_all()
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            watcher()

    def _has_more(self, index: int) -> bool:
        return self._is_done or max(index, self._first_valid) < len(self._events)

    def _next(self, index: int) -> tuple[Event | None, int]:
        """The event at ``index`` (None at the end) and the next index; `_has_more` held."""
        index = max(index, self._first_valid)
        if index == len(self._events):
            if self._error is not None:
                raise self._error
            return None, index
        was_full = self.is_full
        self._num_read = max(self._num_read, index + 1)
        if was_full and not self.is_full:
            self._wake()
        return self._events[index], index + 1

    def _read_all(self) -> None:
        with self._changed:
            was_full = self.is_full
            self._wants_all = True
        if was_full:
            self._wake()

    def _result(self) -> TurnResult:
        if self._error is not None:
            raise self._error
        return TurnResult(tuple(self._events[self._first_valid :]), self._stats)

    async def _wait(self) -> TurnResult:
        self._read_all()
        await self._until(lambda: self._is_done)
        return self._result()

    async def _until(self, is_reached: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if is_reached():
                    return
                changed = asyncio.Event()
                watcher = _watcher(loop, changed)
                self._watchers.append(watcher)
            try:
                await changed.wait()
            except asyncio.CancelledError:
                with self._changed:
                    if watcher in self._watchers:
                        self._watchers.remove(watcher)
                raise


def _watcher(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> Callable[[], None]:
    def wake() -> None:
        # A loop that was closed has no reader any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(changed.set)

    return wake
