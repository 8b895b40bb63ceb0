"""Jobs: updates, ends, bounds, steering, cancels; whatever a backend does, the loop lives."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pydantic", reason="needs the background extra: pip install '.[test]'")

from background_kit import WAIT_S, Answers, Gate, Steps, Updates, background_threads
from tml_core import InvalidArgument, InvalidType, Overloaded, SessionClosed
from tml_core.background import (
    BackgroundRunner,
    Cancelled,
    ContextPackage,
    Failed,
    Final,
    JobContext,
    Partial,
    Progress,
    ToolCall,
    ToolOutput,
)
from tml_core.background.job import MAX_STEERING, MAX_UPDATES


@pytest.fixture(autouse=True)
def _nothing_left() -> Any:
    yield
    gc.collect()
    assert background_threads() == []


def test_a_job_streams_its_updates_to_every_reader() -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    async def run(job: JobContext) -> Updates:
        yield Progress("thinking")
        output = await job.call_tool("add", '{"a": 1, "b": 2}')
        yield Partial("it is ")
        yield Final(f"it is {output.content}")

    with BackgroundRunner(Steps(run), [add]) as runner:
        job = runner.submit("1 + 2")
        expected = [
            Progress("thinking"),
            ToolCall("job-1-tool-0", "add", '{"a": 1, "b": 2}'),
            ToolOutput("job-1-tool-0", "add", "3", num_bytes=1),
            Partial("it is "),
            Final("it is 3"),
        ]
        assert list(job) == expected
        assert list(job) == list(job.updates()) == expected
        assert job.result(WAIT_S) == Final("it is 3")
        assert (job.status, job.is_done, job.delivery) == ("done", True, "none")
        assert repr(job) == "Job(job-1, done, '1 + 2')"
        runner.drain(WAIT_S)
        assert runner.jobs == (job,)


async def test_async_readers_are_in_their_own_loop() -> None:
    async with BackgroundRunner(Answers()) as runner:
        job = runner.submit("tea")
        assert [one async for one in job] == [Final("about tea")]
        assert await job == Final("about tea")
        assert await job == Final("about tea")


async def test_an_async_reader_that_is_cancelled_leaves_the_job_alone() -> None:
    gate = Gate()
    async with BackgroundRunner(gate) as runner:
        job = runner.submit("x")
        reader = asyncio.ensure_future(job.__aiter__().__anext__())
        assert await reader == Progress("waiting")
        waiter = asyncio.ensure_future(job._wait())
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert job._watchers == []
        gate.open()
        assert await job == Final("through the gate")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ValueError("no such\nthing"), "ValueError: no such thing"),
        (lambda: SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt, "KeyboardInterrupt"),
        (lambda: TimeoutError("their own"), "TimeoutError: their own"),
        (lambda: ExceptionGroup("two", [OSError("gone")]), "OSError: gone"),
    ],
)
def test_what_a_backend_raises_is_failed_and_the_loop_lives(
    make: Callable[[], BaseException], reason: str
) -> None:
    async def run(job: JobContext) -> Updates:
        if job.package.request == "raise":
            raise make()
        yield Final("fine")

    with BackgroundRunner(Steps(run)) as runner:
        assert runner.submit("raise").result(WAIT_S) == Failed(reason)
        assert runner.submit("again").result(WAIT_S) == Final("fine")


def test_a_backend_that_keeps_no_promise_fails_its_job() -> None:
    async def run(job: JobContext) -> Updates:
        if job.package.request == "nothing":
            return
        yield "a string"  # type: ignore[misc]

    with BackgroundRunner(Steps(run)) as runner:
        ended = runner.submit("nothing").result(WAIT_S)
        assert ended == Failed("the backend ended without an answer")
        ended = runner.submit("string").result(WAIT_S)
        assert ended == Failed("InvalidType: backend: expected Progress, Partial or Final, got str")


def test_a_job_that_takes_too_long_fails() -> None:
    with BackgroundRunner(Gate(), deadline_s=0.05) as runner:
        ended = runner.submit("x").result(WAIT_S)
        assert ended == Failed("it did not end within 0.05 s")


def test_nothing_is_said_after_the_end() -> None:
    async def run(_job: JobContext) -> Updates:
        yield Final("first")
        yield Final("second")

    with BackgroundRunner(Steps(run)) as runner:
        assert list(runner.submit("x")) == [Final("first")]


def test_a_flood_of_updates_is_bounded_and_starves_nobody() -> None:
    num = 4 * MAX_UPDATES

    async def run(job: JobContext) -> Updates:
        if job.package.request == "flood":
            for index in range(num):
                yield Progress(str(index))
        yield Final("done")

    with BackgroundRunner(Steps(run)) as runner:
        flood, other = runner.submit("flood"), runner.submit("other")
        assert other.result(WAIT_S) == Final("done")
        assert flood.result(WAIT_S) == Final("done")
        kept = list(flood)
        assert len(kept) == MAX_UPDATES
        assert kept[-2:] == [Progress(str(num - 1)), Final("done")]


def test_cancel_ends_a_job_and_cleans_up() -> None:
    gate = Gate()
    with BackgroundRunner(gate) as runner:
        job = runner.submit("x")
        gate.reach()
        assert job.cancel()
        assert job.result(WAIT_S) == Cancelled("by its owner")
        assert job.status == "cancelled"
        assert not job.cancel()
        runner.drain(WAIT_S)
        assert (gate.num_begun, gate.num_ended) == (1, 1)


def test_a_cancel_before_the_first_step_counts() -> None:
    blocked, release = threading.Event(), threading.Event()

    def hold() -> None:
        blocked.set()
        assert release.wait(WAIT_S)

    with BackgroundRunner(Answers()) as runner:
        runner._loop.post(hold)
        assert blocked.wait(WAIT_S)
        job = runner.submit("x")
        job.cancel("too soon")
        release.set()
        assert job.result(WAIT_S) == Cancelled("too soon")


def test_closing_ends_all_jobs() -> None:
    gate = Gate()
    runner = BackgroundRunner(gate, max_jobs=3)
    jobs = [runner.submit(str(index)) for index in range(3)]
    for _ in jobs:
        gate.reach()
    runner.close()
    runner.close()
    assert [one.result(WAIT_S) for one in jobs] == [Cancelled("the runner was closed")] * 3
    assert gate.num_ended == 3
    assert runner.is_closed and runner.num_running == 0
    with pytest.raises(SessionClosed, match="submit: the runner is closed"):
        runner.submit("x")


async def test_an_async_close_ends_all_jobs() -> None:
    gate = Gate()
    async with BackgroundRunner(gate) as runner:
        job = runner.submit("x")
    assert await job == Cancelled("the runner was closed")


def test_a_runner_nobody_holds_ends() -> None:
    gate = Gate()
    runner = BackgroundRunner(gate)
    job = runner.submit("x")
    gate.reach()
    gone = weakref.ref(runner)
    del runner
    gc.collect()
    assert gone() is None
    assert job.result(WAIT_S) == Cancelled("the runner was closed")


def test_a_backend_that_closes_its_runner_does_not_wait_for_itself() -> None:
    runners: list[BackgroundRunner] = []

    async def run(_job: JobContext) -> Updates:
        runners[0].close()
        yield Final("closed")

    runners.append(BackgroundRunner(Steps(run)))
    job = runners[0].submit("x")
    assert job.result(WAIT_S) in (Final("closed"), Cancelled("the runner was closed"))
    runners[0].close()


def test_a_backend_that_swallows_its_cancel_is_cancelled_again() -> None:
    async def run(_job: JobContext) -> Updates:
        for _ in range(2):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                yield Progress("not yet")
        yield Final("at last")

    runner = BackgroundRunner(Steps(run))
    job = runner.submit("x")
    runner.close()
    assert job.is_done


def test_at_most_max_jobs_run() -> None:
    gate = Gate()
    with BackgroundRunner(gate, max_jobs=2) as runner:
        jobs = [runner.submit("x"), runner.submit("y")]
        with pytest.raises(
            Overloaded, match=r"submit: all 2 jobs \(max_jobs\) are running"
        ) as refused:
            runner.submit("z")
        assert (refused.value.reason, refused.value.retry_after_ms) == ("jobs", 1000)
        assert runner.num_running == 2
        gate.reach()
        gate.reach()
        gate.open()
        runner.drain(WAIT_S)
        assert runner.num_running == 0
        assert [one.status for one in jobs] == ["done", "done"]
        assert runner.submit("z").result(WAIT_S) == Final("through the gate")


def test_drain_and_result_can_give_up() -> None:
    gate = Gate()
    with BackgroundRunner(gate) as runner:
        job = runner.submit("x")
        with pytest.raises(TimeoutError, match=r"drain: 1 jobs did not end within 0\.01 s"):
            runner.drain(0.01)
        with pytest.raises(TimeoutError, match=r"result: job-1 did not end within 0\.01 s"):
            job.result(0.01)
        assert not job.is_done


def test_steering_reaches_the_backend_until_it_is_too_late() -> None:
    gate = Gate()
    with BackgroundRunner(gate) as runner:
        job = runner.submit("x")
        gate.reach()
        assert job.steer("in metres")
        for _ in range(MAX_STEERING - 1):
            assert job.steer("please")
        with pytest.raises(InvalidArgument, match=f"steer: {MAX_STEERING} texts wait for job-1"):
            job.steer("now")
        gate.open()
        assert job.result(WAIT_S) == Final("through the gate")
        assert gate.told == ["in metres"] + ["please"] * (MAX_STEERING - 1)
        assert not job.steer("too late")
        with pytest.raises(InvalidArgument, match="text: expected something to say, got none"):
            job.steer(" ")
        with pytest.raises(InvalidType, match="text: expected str, got int"):
            job.steer(3)  # type: ignore[arg-type]


def test_only_the_last_jobs_are_remembered() -> None:
    with BackgroundRunner(Answers(), max_jobs=80) as runner:
        for index in range(70):
            runner.submit(str(index + 1)).result(WAIT_S)
        runner.drain(WAIT_S)
        assert [one.id for one in runner.jobs] == [f"job-{index}" for index in range(7, 71)]


def test_a_package_can_be_given_instead_of_words() -> None:
    with BackgroundRunner(Answers()) as runner:
        job = runner.submit(ContextPackage("tea"))
        assert job.result(WAIT_S) == Final("about tea")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"backend": object()}, InvalidType, "backend: expected a Backend, got object"),
        ({"tools": "add"}, InvalidType, "tools: expected a list, got str"),
        ({"tools": [3]}, InvalidType, "tools: expected functions or tool sources, got int"),
        ({"max_jobs": 0}, InvalidArgument, "max_jobs: expected at least 1, got 0"),
        ({"max_jobs": True}, InvalidType, "max_jobs: expected an int, got bool"),
        ({"deadline_s": 0}, InvalidArgument, "deadline_s: expected more than 0, got 0"),
        ({"ttl_s": "1"}, InvalidType, "ttl_s: expected seconds, got str"),
        ({"deliver": "now"}, InvalidArgument, r"deliver: expected one of \['when_idle'"),
        ({"on_duplicate": "no"}, InvalidArgument, r"on_duplicate: expected one of \['reject'"),
    ],
)
def test_what_a_runner_refuses(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BackgroundRunner(kwargs.pop("backend", Answers()), **kwargs)


@pytest.mark.parametrize(
    ("request_", "kwargs", "error", "message"),
    [
        ("", {}, InvalidArgument, "request: expected what is to be done, got none"),
        (3, {}, InvalidType, "request: expected str or ContextPackage, got int"),
        ("x", {"deliver": "soon"}, InvalidArgument, "deliver: expected one of"),
        ("x", {"ttl_s": -1}, InvalidArgument, "ttl_s: expected more than 0, got -1"),
        ("x", {"session": object()}, InvalidArgument, "session: expected one with this runner"),
    ],
)
def test_what_a_job_is_refused_for(
    request_: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with BackgroundRunner(Answers()) as runner:
        with pytest.raises(error, match=message):
            runner.submit(request_, **kwargs)
        assert runner.jobs == ()
