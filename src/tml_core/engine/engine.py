"""The engine: one thread that runs the turns of many sessions as one ragged step after another.

All sequences belong to the engine thread. Other threads post what they want into its inbox and
wait; between two steps it is done in order. A step takes every turn that has work: some bring the
input half of a tick, others one token; then all rows that need a token are sampled together.

A turn is a transaction. It ends by its end (input and output stand in the sequence), by a cancel
(see `Turn.cancel`) or by an error (the sequence stands where it stood before the append).
"""

import contextlib
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Final, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tml_core.engine import turn as turn_module
from tml_core.engine.cost_model import CostModel
from tml_core.engine.job import Ahead, Job
from tml_core.engine.parking import ParkingLot
from tml_core.engine.runner import Singles, StepInput
from tml_core.engine.sampler import RowBuffers
from tml_core.engine.scheduler import compose
from tml_core.engine.seat import Part, Seat
from tml_core.engine.stats import EngineCounters, EngineStats
from tml_core.engine.turn import Ending, end_together
from tml_core.errors import Overloaded, PoolExhausted, SessionBusy, SessionClosed, TmlError
from tml_core.media.micro_turns import TICK_MS
from tml_core.media.segments import Block, Segment
from tml_core.model.kv_store import KvStore
from tml_core.model.step_batch import StepBatch
from tml_core.ops.lm_head import SampleRows
from tml_core.sequence.sequence import Sequence
from tml_core.sequence.store import SequenceStore

__all__ = ["Admission", "EngineLoop", "StepModel"]

Admission = Literal["none", "capacity"]

# When a session that was refused may ask again.
_RETRY_MS: Final = 1000
_LEARN_EVERY: Final = 4
# A thread cannot wait for longer than some limit of the platform.
_LONGEST_WAIT_S: Final = 3600.0

T = TypeVar("T")
_Inbox = queue.SimpleQueue[Callable[[], None] | None]


class _Backbone(Protocol):
    def embed_ids(self, ids_T: Tensor) -> Tensor: ...

    def step(self, x_TD: Tensor, batch: StepBatch, kv: KvStore) -> Tensor: ...

    def sample(self, h_BD: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]: ...


class _Runner(Protocol):
    @property
    def max_step_tokens(self) -> int: ...

    @property
    def kernel_s(self) -> float: ...

    def run(self, inputs: SequenceOf[StepInput]) -> list[Tensor]: ...

    def run_beside(
        self, inputs: SequenceOf[StepInput], singles: Singles
    ) -> tuple[list[Tensor], Tensor]: ...


class StepModel(Protocol):
    """What the engine needs of a model."""

    @property
    def backbone(self) -> _Backbone:
        """Samples one token a row: ids int64 [B], log-probabilities fp32 [B]."""

    @property
    def runner(self) -> _Runner:
        """Appends all inputs or none; returns the hidden states [T, D] of each."""

    @property
    def vocab_size(self) -> int:
        """Tokens there are."""

    @property
    def encoder_s(self) -> float:
        """Time in the encoders so far."""

    @property
    def store(self) -> SequenceStore:
        """The memory of its sequences."""

    def restore_sequence(self, path: Path) -> Sequence:
        """The sequence that a snapshot holds."""

    def prepare(self, sequence: Sequence, segments: SequenceOf[Segment | Block]) -> StepInput:
        """Embed what a sequence is about to append."""


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
        self._park_after_s = park_after_s
        self._lot = ParkingLot(model.restore_sequence, park_dir)
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
        self._last_size = (0, 0)
        self._other_kernel_s = 0.0  # beside what the model and its runner note themselves
        # Rows of a step of single tokens, in fixed memory.
        num_slots = model.store.kv.num_slots
        self._rows = StepBatch(num_slots, num_slots)
        self._ids_B = torch.zeros(num_slots, dtype=torch.int64)
        self._token_ids: NDArray[np.int64] = self._ids_B.numpy()
        self._samples = RowBuffers(num_slots, -(-model.vocab_size // 32))
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
                job.counters = self.counters
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
            self._admit()
            seat = self._with_room(make)
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
            capacity=self._capacity(),
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
            self._lot.close()
            self._drain()

    def _receive(self) -> None:
        """Do what was posted; without work, wait for it."""
        if all(job.is_resting for job in self._jobs):
            try:
                self._do(self._inbox.get(timeout=self._next_alarm_s()))
            except queue.Empty:
                self._park_idle()
        self._drain()

    def _next_alarm_s(self) -> float | None:
        """Seconds until something is to be done that nobody will post; None if nothing is."""
        rested = [one.rested_since() for one in self._jobs]
        alarms = [
            since_s + turn_module.READER_PATIENCE_S for since_s in rested if since_s is not None
        ]
        if self._park_after_s is not None:
            idle = (seat.idle_since_s for seat in self._seats if _can_park(seat))
            alarms += [since_s + self._park_after_s for since_s in idle]
        first = min(alarms, default=math.inf)
        if first == math.inf:
            return None
        return min(max(0.0, first - time.perf_counter()), _LONGEST_WAIT_S)

    # Memory.

    def awake(self, seat: Seat) -> Sequence:
        """The seat's sequence, brought back if it was parked; call it in the engine thread.

        Raises PoolExhausted without room for it.
        """
        parked = seat.parked
        if parked is not None:
            seat.sequence = self._with_room(lambda: self._lot.resume(parked), seat)
            seat.parked = None
            seat.idle_since_s = time.perf_counter()
            self.counters.resumed += 1
        return seat.sequence

    def park(self, seat: Seat) -> None:
        """Park an idle seat; call it in the engine thread, with the seat's lock held.

        Raises SessionBusy if marks are held, OSError if the file cannot be written.
        """
        if seat.parked is None:
            seat.forget_recent()
            seat.parked = self._lot.park(seat.sequence)
            self.counters.parked += 1

    def _park_idle(self) -> None:
        """Park the seats that have been idle for long enough, but do not keep others waiting."""
        if self._park_after_s is None:
            return
        now_s = time.perf_counter()
        for seat in list(self._seats):
            is_due = _can_park(seat) and now_s - seat.idle_since_s >= self._park_after_s
            if is_due and not self._try_park(seat):
                seat.idle_since_s = now_s  # try again after as long
            if not self._inbox.empty():
                return

    def _try_park(self, seat: Seat) -> bool:
        # Who holds the lock may be waiting for this thread.
        if not seat.lock.acquire(blocking=False):
            return False
        try:
            if not _can_park(seat):
                return False
            self.park(seat)
        except (SessionBusy, OSError):
            return False
        finally:
            seat.lock.release()
        return True

    def _with_room(self, act: Callable[[], T], seat: Seat | None = None) -> T:
        """``act``, again and again while it finds no room and something can still be put away."""
        while True:
            try:
                return act()
            except PoolExhausted:
                if not self._make_room(seat):
                    raise

    def _make_room(self, but: Seat | None) -> bool:
        """Give up memory that can be done without; False if there is none."""
        for seat in self._seats:
            # Points to go back to for output that was not heard.
            if seat.recent and seat is not but and seat.lock.acquire(blocking=False):
                try:
                    seat.forget_recent()
                finally:
                    seat.lock.release()
                return True
        if self._park_after_s is None:
            return False
        idle = sorted(self._seats, key=lambda seat: seat.idle_since_s)
        return any(self._try_park(seat) for seat in idle if seat is not but and _can_park(seat))

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
        with contextlib.suppress(queue.Empty):
            while True:
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
        kernel_s = self._kernel_s()
        ready = [job for job in self._jobs if not job.is_resting]
        if len(ready) < len(self._jobs):
            self._give_up_unread()
        bringing = [job for job in ready if self._guarded(job, lambda job=job: self._begin(job))]  # type: ignore[misc]
        size = (0, 0)
        if bringing:
            size = self._advance(bringing, begin_s)
        if ready:
            self._follow_up()
            busy_s = time.perf_counter() - begin_s
            kernel_s = self._kernel_s() - kernel_s
            self.counters.kernel_s += kernel_s
            self.counters.host_s += busy_s - kernel_s
            if size != (0, 0):
                self._learn(size, busy_s)

    def _kernel_s(self) -> float:
        return self._model.encoder_s + self._model.runner.kernel_s + self._other_kernel_s

    def _learn(self, size: tuple[int, int], seconds: float) -> None:
        # The same step over and over teaches little, and is not free.
        if size != self._last_size or self.counters.steps % _LEARN_EVERY == 0:
            self._last_size = size
            self.costs.learn(*size, seconds)

    def _begin(self, job: Job) -> bool:
        if job.seat.parked is not None:
            self.awake(job.seat)
        return job.begin_step()

    def _advance(self, jobs: list[Job], begin_s: float) -> tuple[int, int]:
        """One step of these turns; returns how many positions of how many sequences went in.

        Those that bring the one token drawn last go in together, in fixed memory; inputs beside
        them. If that fails, all is brought as inputs, which can be told apart.
        """
        others = [job for job in jobs if not job.is_decoding]
        talking = [job for job in jobs if job.is_decoding] if others else jobs
        try:
            for job in talking:
                job.make_room()
        except Exception:
            return self._bring(jobs, begin_s)
        ahead = self._feed(talking)
        if not ahead:
            return self._bring(others, begin_s) if others else (0, 0)
        pieces = self._pieces([*talking, *others], begin_s) if others else []
        done: list[tuple[Job, Tensor]] = []
        try:
            slots, positions, token_ids = zip(*ahead, strict=True)
            inputs = [job.piece(count) for job, count in pieces]
            self._token_ids[: len(ahead)] = token_ids
            if not inputs:
                self._rows.fill_single(slots, positions)
                begin_kernel_s = time.perf_counter()
                x_BD = self._model.backbone.embed_ids(self._ids_B[: len(ahead)])
                h_BD = self._model.backbone.step(x_BD, self._rows, self._model.store.kv)
                self._other_kernel_s += time.perf_counter() - begin_kernel_s
            else:
                x_BD = self._model.backbone.embed_ids(self._ids_B[: len(ahead)])
                singles = Singles(slots, positions, x_BD)
                hidden, h_BD = self._model.runner.run_beside(inputs, singles)
                done = list(zip((job for job, _ in pieces), hidden, strict=True))
        except Exception:
            # Nobody knows how far it got, or because of whom.
            for job, _ in pieces:
                job.prepare(None)
            behind = [job for job in talking if self._guarded(job, job.catch_up)]
            return self._bring([*behind, *(job for job in others if not job.is_done)], begin_s)
        return self._end_step(done, talking, h_BD)

    def _bring(self, jobs: list[Job], begin_s: float) -> tuple[int, int]:
        """`_advance` with everything as inputs."""
        step = self._pieces(jobs, begin_s)
        return self._end_step(self._append(step) if step else [], [], None)

    def _feed(self, talking: list[Job]) -> list[Ahead]:
        """The tokens drawn last; a turn that fails to give its own leaves the list."""
        ahead = []
        for job in list(talking):
            try:
                ahead.append(job.feed_one())
            except Exception as error:
                job.fail(error)
                talking.remove(job)
        return ahead

    def _pieces(self, jobs: list[Job], begin_s: float) -> list[tuple[Job, int]]:
        """What of the inputs goes into this step, beside the tokens that are fed already."""
        entries = []
        for job in jobs:
            if job.is_fed or self._guarded(job, lambda job=job: self._prepare(job)):  # type: ignore[misc]
                entries.append(job)
        step = compose(entries, self._model.runner.max_step_tokens, self.costs, begin_s)
        return [(job, count) for job, count in step if not job.is_fed]

    def _end_step(
        self, done: list[tuple[Job, Tensor]], talking: list[Job], h_BD: Tensor | None
    ) -> tuple[int, int]:
        """Go on with what a step gave: ``done`` inputs, and the fed tokens of ``talking``."""
        num_rows = len(done) + len(talking)
        if not num_rows:
            return 0, 0
        num_tokens = sum(len(h_TD) for _, h_TD in done) + len(talking)
        self.counters.steps += 1
        self.counters.step_tokens += num_tokens
        costs = self.costs
        wanting, rows = [], []
        for job, h_TD in done:
            if self._guarded(job, lambda job=job, h_TD=h_TD: job.end_step(h_TD, costs, num_rows)):  # type: ignore[misc]
                wanting.append(job)
                rows.append(job.hidden)
        kept = []
        for row, job in enumerate(talking):
            if self._guarded(job, lambda job=job: job.end_token(num_rows)):  # type: ignore[misc]
                wanting.append(job)
                kept.append(row)
        if wanting:
            if h_BD is not None and len(kept) < len(talking):
                h_BD = h_BD[kept]
            parts = [torch.stack(rows)] if rows else []
            if h_BD is not None and kept:
                parts.append(h_BD)
            self._draw(wanting, parts[0] if len(parts) == 1 else torch.cat(parts), num_rows)
        return num_tokens, num_rows

    def _prepare(self, job: Job) -> bool:
        job.bring_tokens()
        if not job.is_prepared:
            job.prepare(self._model.prepare(job.seat.sequence, job.segments))
        return True

    def _append(self, step: SequenceOf[tuple[Job, int]]) -> list[tuple[Job, Tensor]]:
        """Append what the turns bring. If they cannot go together, each goes alone, so that an
        error ends only the turn it belongs to."""
        try:
            pieces = [job.piece(count) for job, count in step]
            hidden = self._model.runner.run(pieces)
            return list(zip((job for job, _ in step), hidden, strict=True))
        except PoolExhausted as error:
            if not self._make_room(None) and len(step) == 1:
                step[0][0].fail(error)
                return []
        except Exception as error:
            if len(step) == 1:
                step[0][0].fail(error)
                return []
        found = []
        for job, count in step:
            job.prepare(None)
            if self._guarded(job, lambda job=job: self._prepare(job)):  # type: ignore[misc]
                found += self._append([(job, count)])
        return found

    def _draw(self, jobs: list[Job], h_BD: Tensor, batch_size: int) -> None:
        """Draw a token for each of the turns, from its row of hidden states."""
        try:
            rows = self._samples.fill([job.request for job in jobs])
            begin_s = time.perf_counter()
            tokens, logprobs = self._model.backbone.sample(h_BD, rows)
            self._other_kernel_s += time.perf_counter() - begin_s
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].fail(error)
                return
            for row, job in enumerate(jobs):
                self._draw([job], h_BD[row : row + 1], batch_size)
            return
        costs = self.costs
        for job, token_id, logprob in zip(jobs, tokens.tolist(), logprobs.tolist(), strict=True):
            try:
                job.accept(token_id, logprob, costs, batch_size)
            except Exception as error:
                job.fail(error)

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
        job.counters = self.counters
        return job

    def _guarded(self, job: Job, act: Callable[[], bool | None]) -> bool:
        """Run one turn's own part; its error ends that turn alone."""
        try:
            return bool(act())
        except Exception as error:
            job.fail(error)
            return False

    def _admit(self) -> None:
        """Raise PoolExhausted or Overloaded unless there is room for one more session."""
        if len(self._seats) >= self.max_sessions:
            self.counters.refused += 1
            raise PoolExhausted(
                f"engine: all {self.max_sessions} sessions are open; close one first"
            )
        capacity = self._capacity() if self._admission == "capacity" else None
        num_awake = sum(seat.parked is None for seat in self._seats)
        if capacity is not None and num_awake >= max(1, capacity):
            self.counters.refused += 1
            raise Overloaded(
                f"engine: {num_awake} sessions are open, and with one more a tick in a "
                f"hundred would take longer than {TICK_MS} ms",
                reason="capacity",
                retry_after_ms=_RETRY_MS,
            )

    def _capacity(self) -> int | None:
        """Sessions whose ticks all at once are over within one tick, with the tail of late."""
        costs, counters = self.costs, self.counters
        if not costs.is_learnt or not counters.tick_input:
            return None
        num_input, num_output = counters.tick_input, counters.tick_output
        fixed_s, token_s, row_s = costs.weights
        # One step of inputs, then one for each token; the tail is of a step, and holds for a tick
        # all the more.
        budget_s = TICK_MS / 1000 / costs.tail - (1 + num_output) * fixed_s
        session_s = (num_input + num_output) * token_s + (1 + num_output) * row_s
        return max(0, int(budget_s / max(session_s, 1e-9)))

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
        if seat.parked is not None:
            self._lot.drop(seat.parked)
        seat.sequence.close()
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


def _can_park(seat: Seat) -> bool:
    return seat.parked is None and not seat.turns and not seat.is_closed


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
