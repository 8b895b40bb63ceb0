"""A background job as its owner sees it: updates as they come, for threads and for asyncio."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, Final, Literal

from tml_core.background.context import ContextPackage
from tml_core.background.updates import Cancelled, Failed, Outcome, Update
from tml_core.background.updates import Final as FinalUpdate
from tml_core.errors import InvalidArgument, InvalidType

__all__ = ["MAX_UPDATES", "Deliver", "Delivery", "Job", "JobStatus"]

# A reader that is further behind than this misses the oldest updates, never the last one.
MAX_UPDATES: Final = 1024
MAX_STEERING: Final = 16

Deliver = Literal["when_idle", "interrupt", "silent"]
JobStatus = Literal["running", "done", "failed", "cancelled"]
# "none": there is no session it goes to, or there is nothing to deliver yet.
Delivery = Literal["none", "waiting", "entering", "delivered", "expired", "dropped"]


class Job:
    """One delegated request. Iterate it (``for`` or ``async for``), `result` it or ``await`` it.

    Readers are independent; each sees the updates from the first one on. ``id``: unique in its
    runner. ``context``: what the backend is told. Made by `BackgroundRunner.submit` or by a call of
    the interaction model.
    """

    def __init__(
        self,
        job_id: str,
        context: ContextPackage,
        *,
        deliver: Deliver,
        priority: int,
        ttl_s: float,
        deadline_s: float,
        stop: Callable[["Job"], None],
        call_id: str | None = None,
    ) -> None:
        self.id = job_id
        self.context = context
        self.deliver: Deliver = deliver
        self.priority = priority
        self.ttl_s = ttl_s
        self.deadline_s = deadline_s
        self.call_id = call_id
        self.delivery: Delivery = "none"
        self._stop = stop
        self._started_s = time.monotonic()
        self._seconds: float | None = None
        self._changed = threading.Condition()
        self._updates: deque[Update] = deque(maxlen=MAX_UPDATES)
        self._num_updates = 0
        self._outcome: Outcome | None = None
        self._cancel_reason: str | None = None
        self._steering: list[str] = []
        self._takes_steering = True
        self._watchers: list[Callable[[], None]] = []

    @property
    def request(self) -> str:
        """What was asked."""
        return self.context.request

    @property
    def status(self) -> JobStatus:
        """Where the job stands."""
        outcome = self._outcome
        if outcome is None:
            return "running"
        if isinstance(outcome, FinalUpdate):
            return "done"
        return "failed" if isinstance(outcome, Failed) else "cancelled"

    @property
    def is_done(self) -> bool:
        """Whether the job is over."""
        return self._outcome is not None

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self._started_s if self._seconds is None else self._seconds

    def updates(self) -> tuple[Update, ...]:
        """The last `MAX_UPDATES` updates so far, oldest first."""
        with self._changed:
            return tuple(self._updates)

    def __iter__(self) -> Iterator[Update]:
        """The updates as they come; the last is `Final`, `Failed` or `Cancelled`."""
        index = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda at=index: self._has_more(at))  # type: ignore[misc]
                update, index = self._next(index)
            if update is None:
                return
            yield update

    async def __aiter__(self) -> AsyncIterator[Update]:
        """The same updates for asyncio, in any loop; leaving early lets the job go on."""
        index = 0
        while True:
            await self._until(lambda at=index: self._has_more(at))  # type: ignore[misc]
            with self._changed:
                update, index = self._next(index)
            if update is None:
                return
            yield update

    def result(self, timeout_s: float | None = None) -> Outcome:
        """Wait for the last update. Raises TimeoutError, and then the job goes on."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_done, timeout_s):
                raise TimeoutError(f"result: {self.id} did not end within {timeout_s} s")
        return self._ended()

    def __await__(self) -> Generator[Any, None, Outcome]:
        """``await job`` is `result` for asyncio."""
        return self._wait().__await__()

    def steer(self, text: str) -> bool:
        """Tell the job something more; the backend reads it before it asks its model again.

        False, with nothing done, if the job's answer is already on its way. Raises InvalidArgument
        for no text and when `MAX_STEERING` texts wait already.
        """
        if not isinstance(text, str):
            raise InvalidType(f"text: expected str, got {type(text).__name__}")
        if not text.strip():
            raise InvalidArgument("text: expected something to say, got none")
        with self._changed:
            if self.is_done or not self._takes_steering:
                return False
            if len(self._steering) >= MAX_STEERING:
                raise InvalidArgument(
                    f"steer: {MAX_STEERING} texts wait for {self.id} already; wait for its answer"
                )
            self._steering.append(text)
            return True

    def cancel(self, reason: str = "by its owner") -> bool:
        """Ask the job to stop, and return; `result` waits for its end. False if it is over."""
        with self._changed:
            if self.is_done:
                return False
            if self._cancel_reason is None:
                self._cancel_reason = reason
        self._stop(self)
        return True

    def __repr__(self) -> str:
        return f"Job({self.id}, {self.status}, {self.request[:40]!r})"

    # For the runner.

    @property
    def cancel_reason(self) -> str | None:
        """Why it is to stop; None if nobody asked."""
        return self._cancel_reason

    def put(self, update: Update) -> bool:
        """Add an update; False, with nothing done, once the job is over."""
        with self._changed:
            if self._outcome is not None:
                return False
            if isinstance(update, FinalUpdate | Failed | Cancelled):
                self._outcome = update
                self._takes_steering = False
                self._seconds = time.monotonic() - self._started_s
            self._updates.append(update)
            self._num_updates += 1
            self._changed.notify_all()
            watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            watcher()
        return True

    def take_steering(self, *, is_last: bool) -> tuple[str, ...]:
        """What `steer` left. With ``is_last`` and nothing left, no more is taken from now on."""
        with self._changed:
            texts, self._steering = tuple(self._steering), []
            if is_last and not texts:
                self._takes_steering = False
            return texts

    def _has_more(self, index: int) -> bool:
        return index < self._num_updates or self.is_done

    def _next(self, index: int) -> tuple[Update | None, int]:
        index = max(index, self._num_updates - len(self._updates))
        if index == self._num_updates:
            return None, index
        return self._updates[index - self._num_updates], index + 1

    def _ended(self) -> Outcome:
        assert self._outcome is not None  # its waiters have seen to that
        return self._outcome

    async def _wait(self) -> Outcome:
        await self._until(lambda: self.is_done)
        return self._ended()

    async def _until(self, is_reached: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            changed = asyncio.Event()

            def wake(changed: asyncio.Event = changed) -> None:
                # A loop that was closed has no reader any more.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(changed.set)

            with self._changed:
                if is_reached():
                    return
                self._watchers.append(wake)
            try:
                await changed.wait()
            finally:
                with self._changed, contextlib.suppress(ValueError):
                    self._watchers.remove(wake)
