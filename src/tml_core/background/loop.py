"""The runner's event loop, in a thread of its own: jobs, tool sources and their orderly end."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, Final, TypeVar

from tml_core.background.backend import Backend, JobContext
from tml_core.background.job import Job
from tml_core.background.tools import Tool, Toolbox
from tml_core.background.updates import Cancelled, Failed, Partial, Progress
from tml_core.background.updates import Final as FinalUpdate
from tml_core.errors import InvalidType

__all__ = ["RunnerLoop"]

T = TypeVar("T")

CLOSED: Final = "the runner was closed"
_END_S: Final = 10.0  # what jobs and tool servers get to end when the runner closes


class RunnerLoop:
    """Starts its thread at once; returns when all ``toolbox`` sources are connected.

    Raises what connecting raised. ``on_outcome`` is called in the loop when a job has
    ended, ``on_partial`` with each piece of an answer.
    """

    def __init__(
        self,
        backend: Backend,
        toolbox: Toolbox,
        max_tool_calls: int,
        on_outcome: Callable[[Job], None],
        on_partial: Callable[[Job, str], None],
    ) -> None:
        self._backend = backend
        self._toolbox = toolbox
        self._max_tool_calls = max_tool_calls
        self._on_outcome = on_outcome
        self._on_partial = on_partial
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._others: set[asyncio.Task[Any]] = set()
        self._gate = threading.Lock()
        self._is_closed = False
        self._closing = asyncio.Event()
        self._ready: Future[None] = Future()
        self._main_task: asyncio.Task[None]
        self._thread = threading.Thread(target=self._run, name="tml-background", daemon=True)
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:
            self.close()
            raise

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is a job or a tool."""
        return threading.current_thread() is self._thread

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def post(self, act: Callable[[], object]) -> bool:
        """Have ``act`` called in the loop soon; returns at once. False if the loop has ended."""
        with self._gate:
            if self._is_closed:
                return False
            self._loop.call_soon_threadsafe(act)
            return True

    def start_job(self, job: Job) -> bool:
        """Run a job on the backend; False if the loop has ended."""
        return self.start_work(job, lambda: self._answer(job))

    def start_work(self, job: Job, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Run a job that is something else than a backend's answer."""
        return self.post(lambda: self._spawn(job, self._guarded(job, work)))

    def start_other(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something small; called in the loop."""
        task = self._loop.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)

    def stop_job(self, job: Job) -> None:
        """Cancel a job's task, if it has one."""
        self.post(lambda: self._stop(job))

    def close(self) -> None:
        """Cancel all jobs, disconnect all sources, end the thread; a second time only waits.

        Raises TimeoutError if something of the backend's does not end when it is cancelled.
        """
        with self._gate:
            if not self._is_closed:
                self._is_closed = True
                self._loop.call_soon_threadsafe(self._stop_main)
        if self.is_own_thread:
            return
        self._thread.join(2 * _END_S)
        if self._thread.is_alive():
            raise TimeoutError(f"close: the runner's jobs did not end within {2 * _END_S:g} s")

    # In the thread.

    def _run(self) -> None:
        self._main_task = self._loop.create_task(self._main())
        try:
            self._loop.run_until_complete(self._main_task)
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
        finally:
            with self._gate:
                self._is_closed = True
            for job in list(self._tasks):  # those that would not end
                del self._tasks[job]
                job.put(Cancelled(CLOSED))
                self._on_outcome(job)
            with contextlib.suppress(Exception):
                self._loop.run_until_complete(self._loop.shutdown_asyncgens())
                self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _stop_main(self) -> None:
        self._closing.set()
        if not self._ready.done():
            self._main_task.cancel()

    async def _main(self) -> None:
        sources: list[asyncio.Task[None]] = []
        leave = asyncio.Event()
        try:
            for source in self._toolbox.sources:
                opened: asyncio.Future[Sequence[Tool]] = self._loop.create_future()
                task = self._loop.create_task(source.serve(opened, leave))
                sources.append(task)
                both: set[asyncio.Future[Any]] = {task, opened}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not opened.done():
                    task.result()
                    raise InvalidType(f"tools: {source!r} ended before it gave its tools")
                self._toolbox.add(opened.result())
            self._ready.set_result(None)
            await self._closing.wait()
        finally:
            jobs = list(self._tasks.values())
            await _end([*jobs, *self._others])
            # Not cancelled at first: a server is asked to end before it is made to.
            leave.set()
            if sources:
                await asyncio.wait(sources, timeout=_END_S)
            await _end(sources)

    def _spawn(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work, name=job.id)
        self._tasks[job] = task
        task.add_done_callback(lambda task: self._ended(job, task))
        if job.cancel_reason is not None:
            task.cancel()

    def _stop(self, job: Job) -> None:
        task = self._tasks.get(job)
        if task is not None:
            task.cancel()

    def _ended(self, job: Job, task: "asyncio.Task[None]") -> None:
        if self._tasks.pop(job, None) is None:
            return  # it was left behind
        if not task.cancelled() and task.exception() is not None:
            job.put(Failed(_reason(task.exception())))
        # Cancelled before its first step, or by something it had not asked for.
        job.put(Cancelled(job.cancel_reason or CLOSED))
        self._on_outcome(job)

    async def _guarded(self, job: Job, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Whatever happens in a job becomes its last update."""
        timer = asyncio.timeout(job.deadline_s)
        try:
            async with timer:
                await work()
        except asyncio.CancelledError:
            job.put(Cancelled(job.cancel_reason or CLOSED))
        except BaseException as error:  # SystemExit of a backend must not end the loop
            if isinstance(error, TimeoutError) and timer.expired():
                job.put(Failed(f"it did not end within {job.deadline_s:g} s"))
            else:
                job.put(Failed(_reason(error)))

    async def _answer(self, job: Job) -> None:
        context = JobContext(job, self._toolbox, self._max_tool_calls)
        async with aclosing(self._backend.run(context)) as updates:
            async for update in updates:
                if not isinstance(update, Progress | Partial | FinalUpdate):
                    raise InvalidType(
                        f"backend: expected Progress, Partial or Final, got {type(update).__name__}"
                    )
                job.put(update)
                if isinstance(update, FinalUpdate):
                    return
                if isinstance(update, Partial):
                    self._on_partial(job, update.text)
                # A backend that never waits must not starve the others.
                await asyncio.sleep(0)
        job.put(Failed("the backend ended without an answer"))


async def _end(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    """Cancel ``tasks`` and wait; those that swallow it are cancelled again, then left behind."""
    waiting = {task for task in tasks if not task.done()}
    for _ in range(5):
        if not waiting:
            return
        for task in waiting:
            task.cancel()
        _, waiting = await asyncio.wait(waiting, timeout=_END_S / 5)


def _reason(error: BaseException | None) -> str:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
