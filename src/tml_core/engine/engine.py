"""The engine: one thread that runs the turns of many sessions as one ragged step after another.

All sequences belong to the engine thread. Other threads post what they want into its inbox and
wait; between two steps it is done in order. `Stepper` makes the steps, `SeatMemory` keeps the seats
within the memory there is.
"""

import contextlib
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar, cast

from tml_core.engine import turn as turn_module
from tml_core.engine.admission import Admission, admit, capacity_of
from tml_core.engine.cost_model import CostModel
from tml_core.engine.job import Job
from tml_core.engine.seat import Part, Seat
from tml_core.engine.seat_memory import SeatMemory
from tml_core.engine.stats import EngineCounters, EngineStats
from tml_core.engine.stepper import StepModel, Stepper, guarded
from tml_core.engine.turn import Ending, end_together
from tml_core.errors import Overloaded, SessionClosed, TmlError

__all__ = ["EngineLoop"]

_LEARN_EVERY: Final = 4
_MAX_SIZES: Final = 64
# A thread cannot wait for longer than some limit of the platform.
_LONGEST_WAIT_S: Final = 3600.0

T = TypeVar("T")
_Inbox = queue.SimpleQueue[Callable[[], None] | None]


class EngineLoop:
    """The engine thread and its inbox.

    ``max_sessions`` bounds the seats, ``admission`` by what steps were measured to take. Seats idle
    for ``park_after_s`` are parked below ``park_dir``, and earlier if memory runs short. With
    ``stops_when_empty`` the thread ends with the last one. ``warm_up`` is run in the thread before
    all else; its errors are of no consequence.
    """

    def __init__(
        self,
        model: StepModel,
        max_sessions: int,
        *,
        admission: Admission = "none",
        park_after_s: float | None = None,
        park_dir: str | Path | None = None,
        stops_when_empty: bool = False,
        warm_up: Callable[[], None] | None = None,
    ) -> None:
        self._model = model
        self.max_sessions = max_sessions
        self._admission = admission
        self._stops_when_empty = stops_when_empty
        # Its put may be called from a finalizer, whatever the thread was doing at that moment.
        # None in it ends the thread.
        self._inbox: _Inbox = queue.SimpleQueue()
        self._jobs: list[Job] = []
        self._seats: set[Seat] = set()
        self._is_stopping = False
        self._gate = threading.Lock()
        self._is_shut = False
        self.counters = EngineCounters()
        self.costs = CostModel()
        self._num_learnable = 0
        self._learnt_at: dict[tuple[int, int], int] = {}  # by positions and rows of a step
        self.memory = SeatMemory(
            self._seats,
            model.restore_sequence,
            self.counters,
            park_after_s=park_after_s,
            park_dir=park_dir,
        )
        self._stepper = Stepper(model, self.counters, self.memory.make_room)
        if warm_up is not None:
            self._inbox.put(_harmless(warm_up))
        self._thread = threading.Thread(target=self._loop, name="tml-engine", daemon=True)
        self._thread.start()
        # At exit the interpreter must not pull the floor from under a running kernel.
        weakref.finalize(self, _end_thread, self._inbox, self._thread)

    @property
    def is_shut(self) -> bool:
        """Whether it takes no more work."""
        return self._is_shut

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the engine thread between two steps; returns or raises its outcome.

        Raises SessionClosed once the engine is shut.
        """
        if threading.current_thread() is self._thread:
            return function()
        # Emptied by whoever waits: an error that stayed in reach of the frames its traceback holds
        # would keep itself, and all that was passed in, until the collector comes by.
        answer: queue.SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put((function(), None))
            except BaseException as error:
                answer.put((None, error))

        self._post(run)
        value, error = answer.get()
        if error is None:
            return cast(T, value)
        try:
            raise error
        finally:
            del error

    def submit(self, job: Job) -> None:
        """Queue a turn behind those that are there."""

        def add() -> None:
            if job.seat in self._seats:
                job.parts.counters = self.counters
                self._jobs.append(job)
            else:
                job.fail(SessionClosed("turn: the session was closed"))

        self._post(add)

    def begin_waiting(self, seat: Seat) -> None:
        """Begin what waits on a seat that has no turn under way."""

        def begin() -> None:
            if seat in self._seats:
                self._jobs.append(self._next_job(seat))

        self._post(begin)

    def retract(self, job: Job) -> None:
        """Undo `submit`, however far it came: its caller was interrupted and reads no turn."""
        self._inbox.put(lambda: job.fail(TmlError("turn: its append was interrupted")))

    def wake(self) -> None:
        """Make the engine look at its turns again."""
        self._inbox.put(_nothing)

    def add_seat(self, make: Callable[[], Seat]) -> Seat:
        """Open a seat made by ``make`` in the engine thread; raises PoolExhausted without room."""

        added: list[Seat] = []

        def add() -> Seat:
            if self._is_stopping:
                raise SessionClosed("engine: it is closed")
            capacity = None
            if self._admission == "capacity":
                capacity = capacity_of(self.costs, self.counters)
            admit(self._seats, self.max_sessions, capacity, self.counters)
            seat = self.memory.with_room(make)
            self._seats.add(seat)
            added.append(seat)
            return seat

        def undo() -> None:
            for seat in added:
                self._close_seat(seat)

        try:
            return self.call(add)
        except BaseException:
            # A Ctrl-C while waiting: the seat may still be made, and nobody would own it.
            self._inbox.put(undo)
            raise

    def close_seat(self, seat: Seat) -> None:
        """Cancel the seat's turn and free what it holds; a second time does nothing."""
        with contextlib.suppress(SessionClosed):
            self.call(lambda: self._close_seat(seat))
        if self._is_stopping:
            self._join()

    def abandon_seat(self, seat: Seat) -> None:
        """`close_seat` for a finalizer: returns at once, from any thread, with any lock held."""
        self._inbox.put(lambda: self._close_seat(seat))

    @property
    def num_sessions(self) -> int:
        """Open seats."""
        return 0 if self._is_shut else self.call(lambda: len(self._seats))

    def stats(self) -> EngineStats:
        """Gauges and counters; does not wait for the step that is running."""
        seats, counters = list(self._seats), self.counters
        store = self._model.store
        pools = store.global_pool, store.sliding_pool
        global_free, sliding_free = (pool.free_pages for pool in pools)
        return EngineStats(
            num_sessions=len(seats),
            num_parked=sum(seat.parked is not None for seat in seats),
            num_turns=sum(len(seat.turns) for seat in seats),
            global_pages_free=global_free,
            global_pages_held=pools[0].num_pages - global_free,
            sliding_pages_free=sliding_free,
            sliding_pages_held=pools[1].num_pages - sliding_free,
            turns=dict(counters.turns),
            misses=counters.misses,
            degraded=dict(counters.degraded),
            refused=counters.refused,
            parked=counters.parked,
            resumed=counters.resumed,
            steps=counters.steps,
            step_tokens=counters.step_tokens,
            kernel_s=counters.kernel_s,
            host_s=counters.host_s,
            capacity=capacity_of(self.costs, self.counters),
        )

    def shutdown(self, *, wait: bool = True) -> None:
        """Close all seats and end the thread; a second time does nothing."""
        self._inbox.put(None)
        if wait:
            self._join()

    # In the engine thread.

    def _loop(self) -> None:
        error: BaseException = SessionClosed("engine: it is closed")
        try:
            while not self._is_stopping:
                self._receive()
                self._step()
        except BaseException as fault:
            error = fault
            raise
        finally:
            with self._gate:
                self._is_shut = True
            for seat in list(self._seats):
                self._close_seat(seat, error)
            self.memory.close()
            self._drain()

    def _receive(self) -> None:
        """Do what was posted; without work, wait for it."""
        if all(job.is_resting for job in self._jobs):
            try:
                self._do(self._inbox.get(timeout=self._next_alarm_s()))
            except queue.Empty:
                self.memory.park_idle(lambda: not self._inbox.empty())
        self._drain()

    def _next_alarm_s(self) -> float | None:
        """Seconds until something is to be done that nobody will post; None if nothing is."""
        rested = [one.rested_since() for one in self._jobs]
        alarms = [
            since_s + turn_module.READER_PATIENCE_S for since_s in rested if since_s is not None
        ]
        first = min([*alarms, self.memory.next_due_s()])
        if first == math.inf:
            return None
        return min(max(0.0, first - time.perf_counter()), _LONGEST_WAIT_S)

    def _give_up_unread(self) -> None:
        """End the turns whose readers stay away."""
        for job in self._jobs:
            since_s = job.rested_since()
            if since_s is None:
                continue
            if time.perf_counter() - since_s >= turn_module.READER_PATIENCE_S:
                job.fail(
                    Overloaded(
                        f"turn: {turn_module.MAX_UNREAD} events were not read; it was given up",
                        reason="reader",
                        retry_after_ms=0,
                    )
                )

    def _drain(self) -> None:
        # Nobody else takes from it.
        while not self._inbox.empty():
            self._do(self._inbox.get_nowait())

    def _do(self, message: Callable[[], None] | None) -> None:
        if message is None:
            self._is_stopping = True
        else:
            message()

    def _step(self) -> None:
        """One ragged step of the turns that have work, and one sampling call."""
        # Some have ended since the last step: their session was closed, or nobody read them.
        self._follow_up()
        begin_s = time.perf_counter()
        kernel_s = self._stepper.kernel_s
        ready = [job for job in self._jobs if not job.is_resting]
        if len(ready) < len(self._jobs):
            self._give_up_unread()
        bringing = [job for job in ready if guarded(job, self._begin, job)]
        done = None
        if bringing:
            done = self._stepper.advance(bringing, self.costs, begin_s)
        if ready:
            self._follow_up()
            busy_s = time.perf_counter() - begin_s
            kernel_s = self._stepper.kernel_s - kernel_s
            self.counters.kernel_s += kernel_s
            self.counters.host_s += busy_s - kernel_s
            if done is not None and done.num_steps:
                self._learn((done.num_tokens, done.num_rows), busy_s / done.num_steps)

    def _learn(self, size: tuple[int, int], seconds: float) -> None:
        # The same step over and over teaches little, and is not free.
        self._num_learnable += 1
        before = self._learnt_at.get(size)
        if before is None or self._num_learnable - before >= _LEARN_EVERY:
            if len(self._learnt_at) == _MAX_SIZES:
                self._learnt_at.clear()
            self._learnt_at[size] = self._num_learnable
            self.costs.learn(*size, seconds)

    def _begin(self, job: Job) -> bool:
        if job.seat.parked is not None:
            self.memory.awake(job.seat)
        return job.begin_step()

    def _follow_up(self) -> None:
        """Where turns have ended, begin those that wait behind them."""
        done = [job for job in self._jobs if job.is_done]
        if done:
            self._jobs = [job for job in self._jobs if not job.is_done]
            self._jobs += [self._next_job(job.seat) for job in done if job.seat.parts]

    def _next_job(self, seat: Seat) -> Job:
        """What waits on a seat: all of it at once, but tick by tick where a tick may evict: then
        there is no way back over several."""
        with seat.lock:
            takes_all = seat.sequence.is_closed or seat.sequence.retention is None
            parts = [seat.parts.popleft() for _ in range(len(seat.parts) if takes_all else 1)]
            is_followed = any(part.turn.cancelled != "none" for part in seat.parts)
            job = Job(seat, parts, is_last_silent=is_followed)
        job.parts.counters = self.counters
        return job

    def _close_seat(self, seat: Seat, error: BaseException | None = None) -> None:
        if seat not in self._seats:
            return
        self._seats.remove(seat)
        seat.is_closed = True
        error = error or SessionClosed("turn: the session was closed")
        for job in self._jobs:
            if job.seat is seat:
                job.fail(error)
        waiting: list[Part] = []
        if seat.turns:  # else who holds the lock may be waiting for this thread
            with seat.lock:
                waiting = list(seat.parts)
                seat.parts.clear()
        if waiting:
            endings = [Ending(part.turn, (), error) for part in waiting]
            end_together(endings, lambda: seat.settle(waiting))
        if seat.attachment is not None:
            seat.attachment.closed()
        self.memory.free(seat)
        if self._stops_when_empty and not self._seats:
            self._is_stopping = True

    # From any thread.

    def _post(self, message: Callable[[], None]) -> None:
        with self._gate:
            if self._is_shut:
                raise SessionClosed("engine: it is closed")
            self._inbox.put(message)

    def _join(self) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _harmless(act: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with contextlib.suppress(Exception):
            act()

    return run


def _nothing() -> None:
    """A message that only wakes."""


def _end_thread(inbox: _Inbox, thread: threading.Thread) -> None:
    inbox.put(None)
    if threading.current_thread() is not thread:
        thread.join()
