"""A session's tie to its runner: calls of the model become jobs, results become items of its ticks.

The engine asks for what is due at each append, tells what ticks ended with calls, and that the
session is closed. Nothing here waits for a job, and nothing the engine calls takes longer than a
few list operations.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np

from tml_core.background.context import ContextPackage, Frame
from tml_core.background.delivery import (
    SILENT,
    DeliveryPolicy,
    Entry,
    Floor,
    Outbox,
    floor,
    least_budget,
    sentence_end,
    split_result,
)
from tml_core.background.job import Job
from tml_core.background.updates import Cancelled, Failed, Outcome
from tml_core.engine.seat import Seat, TickRecord
from tml_core.errors import InvalidArgument
from tml_core.layout.chunk import Chunk, ToolResult
from tml_core.layout.state import LayoutState
from tml_core.media.micro_turns import TICK_MS

__all__ = ["DELEGATE", "Attachment", "Calls"]

DELEGATE: Final = "background"

# What the engine tells of a tick: (name, call_id, what the model wrote).
Calls = tuple[tuple[str, str, str], ...]

_NUM_FRAMES: Final = 4
_FRAME_EVERY_TICKS: Final = 5  # pictures one second apart
_NUM_RESULTS: Final = 64
_CONTEXT_TICKS: Final = 1500  # five minutes


class _Stream:
    """An answer that enters while it is written: ``said`` so far, ``buffer`` of it not cut yet."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.said = ""
        self.buffer = ""


class Attachment:
    """Made by `BackgroundRunner.bind`. ``names``: of all tools whose results may enter.

    ``on_calls`` and ``on_closed`` are called in whatever thread the engine is in and must return at
    once. ``recheck`` as for `Outbox`.
    """

    def __init__(
        self,
        session: Any,
        seat: Seat,
        policy: DeliveryPolicy,
        names: Sequence[str],
        *,
        on_calls: Callable[["Attachment", Calls], None],
        on_closed: Callable[["Attachment"], None],
        on_undone: Callable[[list[Job]], None],
        recheck: Callable[["Attachment", Entry], bool],
    ) -> None:
        layout: Any = seat.layout
        longest = max(names, key=len)
        self._count: Callable[[ToolResult], int] = lambda item: len(
            layout.encode_result(item, item.name or longest)
        )
        needed = least_budget(self._count, longest)
        if policy.budget_tokens < needed:
            raise InvalidArgument(
                f"budget_tokens: expected at least {needed} for this model's tokenizer, "
                f"got {policy.budget_tokens}"
            )
        self._session = weakref.ref(session)
        self._policy = policy
        self._max_chars = policy.max_chars
        self._on_calls = on_calls
        self._on_closed = on_closed
        self._on_undone = on_undone
        self._lock = threading.Lock()  # inside the seat's lock, never around it
        self._outbox = Outbox(policy, lambda entry: recheck(self, entry))
        self._streams: dict[Job, _Stream] = {}  # of jobs that run; the runner's loop's own
        self._calls: dict[str, Job] = {}  # of jobs that run, by the call they answer
        self._tick = 0
        self._frames: deque[Frame] = deque(maxlen=_NUM_FRAMES)
        self._results: deque[tuple[int, ToolResult]] = deque(maxlen=_NUM_RESULTS)
        self.is_closed = False

    # For the engine.

    def due(self, seat: Seat, chunk: Chunk, state: LayoutState) -> tuple[ToolResult, ...]:
        """What enters with this append, at most one item; called with the seat's lock held."""
        with self._lock:
            if self.is_closed:
                return ()
            tick = self._tick = state.tick
            undone = self._outbox.drop_undone(state.knows)
            undone += [one for call_id, one in self._calls.items() if not state.knows(call_id)]
            self._outbox.undo(tick, seat.waiting_items)
            while self._results and self._results[-1][0] >= tick:
                self._results.pop()
            if chunk.text or chunk.items or seat.waiting_items:
                self._outbox.note_item(tick)
            self._results.extend((tick, one) for one in (*seat.waiting_items, *chunk.items))
            if chunk.frames:
                self._keep_frame(chunk, tick)
            item = None
            if len(self._outbox) and not seat.waiting_items and not state.num_waiting:
                item = self._outbox.take(tick, self._floor(seat, chunk, state))
            if item is not None:
                self._results.append((tick, item))
        if undone:
            self._on_undone(undone)
        return () if item is None else (item,)

    def settled(self, records: Iterable[TickRecord]) -> None:
        """Ticks ended and stand; called with the seat's lock held."""
        calls = tuple(call for one in records for call in one.calls)
        if calls and not self.is_closed:
            self._on_calls(self, calls)

    def closed(self) -> None:
        """The session is gone; its results have nowhere to go."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            self._outbox.clear()
        self._on_closed(self)

    # For the runner.

    @property
    def session(self) -> Any:
        """The session, None once it is collected."""
        return self._session()

    @property
    def num_waiting(self) -> int:
        """Results that have not entered yet, or not whole."""
        with self._lock:
            return len(self._outbox)

    def package(self, request: str) -> ContextPackage:
        """The last five minutes of the conversation, for a job. Not for the engine's thread."""
        session = self.session
        records: Sequence[TickRecord] = ()
        if session is not None:
            records = session.recent(_CONTEXT_TICKS)
        with self._lock:
            results, frames = tuple(self._results), tuple(self._frames)
        first = records[0].tick if records else 0
        seen = [one for one in results if one[0] >= first]
        return ContextPackage.from_records(request, records, seen, frames, session)

    def begin(self, job: Job) -> None:
        """A job that answers a call runs; if the call is undone it is cancelled."""
        if job.call_id is not None:
            with self._lock:
                self._calls[job.call_id] = job

    def deliver(self, job: Job, outcome: Outcome, seen_tick: int, name: str | None) -> None:
        """Let the outcome of a job wait for its moment. ``name``: of the tool, for a job the model
        did not ask for. What was cancelled is not delivered."""
        stream = self._streams.pop(job, None)
        with self._lock:
            if job.call_id is not None and self._calls.get(job.call_id) is job:
                del self._calls[job.call_id]
        if isinstance(outcome, Cancelled):
            if stream is not None:
                self.drop(stream.entry)
            return
        is_error = isinstance(outcome, Failed)
        text = outcome.reason if isinstance(outcome, Failed) else outcome.text
        if stream is None:
            pieces = self._pieces(job, text, name, is_error=is_error)
            self._add(self._entry(job, pieces, seen_tick))
            return
        if not is_error and text.startswith(stream.said):
            # What has been streamed need not be said again.
            text = stream.buffer + self._capped(text)[min(len(stream.said), self._max_chars) :]
        pieces = self._pieces(job, text, name, is_error=is_error)
        with self._lock:
            self._outbox.extend(stream.entry, pieces, is_last=True)

    def stream(self, job: Job, text: str, seen_tick: int, name: str | None) -> None:
        """A further piece of an answer that is still being written: it waits for its moment as
        whole sentences."""
        stream = self._streams.get(job)
        if stream is None:
            entry = self._entry(job, [], seen_tick)
            entry.is_open = True
            if not self._add(entry):
                return
            stream = self._streams[job] = _Stream(entry)
        stream.buffer += text[: max(0, self._max_chars - len(stream.said))]
        stream.said += text
        end = sentence_end(stream.buffer)
        if end:
            pieces = self._pieces(job, stream.buffer[:end], name, is_last=False)
            stream.buffer = stream.buffer[end:]
            with self._lock:
                self._outbox.extend(stream.entry, pieces, is_last=False)

    def replace(self, entry: Entry, text: str, name: str | None) -> None:
        """Somebody has looked at a result again and would rather say ``text``."""
        with self._lock:
            if entry.job.delivery != "waiting":
                return
            stream = self._streams.get(entry.job)
            if stream is not None:
                # Its author is still writing: what it has said so far is not said.
                stream.said, stream.buffer = "", ""
                entry.pieces = self._pieces(entry.job, text, name, is_last=False)
            else:
                entry.pieces = self._pieces(entry.job, text, name)
            self._outbox.release(entry, self._tick)

    def release(self, entry: Entry, *, is_seen: bool) -> None:
        """Somebody has looked at a result again, or was to, and lets it go on as it is."""
        with self._lock:
            self._outbox.release(entry, self._tick if is_seen else -1)

    def drop(self, entry: Entry) -> None:
        """Somebody has looked at a result again and would rather not say it."""
        with self._lock:
            self._outbox.drop(entry)

    @property
    def tick(self) -> int:
        """The last tick that was appended."""
        return self._tick

    def _entry(self, job: Job, pieces: list[ToolResult], seen_tick: int) -> Entry:
        ticks = int(job.ttl_s * 1000) // TICK_MS
        return Entry(
            job=job,
            pieces=pieces,
            deliver=job.deliver,
            priority=job.priority,
            ready_tick=self._tick,
            expires_tick=self._tick + ticks,
            seen_tick=seen_tick,
        )

    def _add(self, entry: Entry) -> bool:
        with self._lock:
            if not self.is_closed:
                self._outbox.add(entry)
            return not self.is_closed

    def _pieces(
        self,
        job: Job,
        text: str,
        name: str | None,
        *,
        is_error: bool = False,
        is_last: bool = True,
    ) -> list[ToolResult]:
        return split_result(
            job.call_id or job.id,
            name,
            self._capped(text),
            self._count,
            self._policy.budget_tokens,
            is_error=is_error,
            flags=(SILENT,) if job.deliver == "silent" else (),
            is_last=is_last,
        )

    def _capped(self, text: str) -> str:
        # Half a surrogate pair, which JSON can bring, is no text for a tokenizer.
        text = text.encode("utf-8", "replace").decode()
        if len(text) <= self._max_chars:
            return text
        return f"{text[: self._max_chars]} [cut: {self._max_chars} of {len(text)} characters]"

    def _floor(self, seat: Seat, chunk: Chunk, state: LayoutState) -> Floor:
        rms = None
        if chunk.audio is not None:
            rms = float(np.sqrt(np.square(chunk.audio, dtype=np.float64).mean()))
        return floor(
            self._policy,
            reversed(seat.transcript),
            rms,
            has_text=bool(chunk.text),
            is_in_call=state.is_in_call,
        )

    def _keep_frame(self, chunk: Chunk, tick: int) -> None:
        start_ms = tick * TICK_MS
        while self._frames and self._frames[-1].start_ms >= start_ms:
            self._frames.pop()
        newest_ms = self._frames[-1].start_ms if self._frames else None
        if newest_ms is None or start_ms - newest_ms >= _FRAME_EVERY_TICKS * TICK_MS:
            # A copy: the caller may use the buffer again.
            self._frames.append(Frame(np.array(chunk.frames[-1]), start_ms))
