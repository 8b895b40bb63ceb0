"""A cancel at every await of a job, one after the other: whatever it waits for, nothing is left."""

import asyncio
import gc
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="needs the background extra: pip install '.[test]'")
pytest.importorskip("mcp", reason="needs the background extra: pip install '.[test]'")

from background_kit import WAIT_S, Steps, Updates, background_threads, plain
from chat_stub import ChatStub, calls, text
from session_kit import assert_nothing_left, nano
from tml_core import Session
from tml_core.background import (
    BackgroundRunner,
    Cancelled,
    Final,
    ForkBackend,
    Job,
    JobContext,
    LocalBackend,
    McpServer,
    OpenAIBackend,
)
from tml_core.background.loop import RunnerLoop

MAX_AWAITS = 400
SERVER = Path(__file__).with_name("mcp_tools_server.py")


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    gc.collect()
    assert background_threads() == []
    assert_nothing_left()
    assert plain().store.audit().num_sequences == 0


class _CancelAt:
    """Awaits ``work``, and cancels its job when it waits for the ``number``-th time."""

    def __init__(self, work: Any, job: Job, number: int) -> None:
        self._work, self._job, self._left = work, job, number

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._work.__await__()
        send: Callable[[], Any] = lambda: next(steps)  # noqa: E731
        while True:
            try:
                waited_for = send()
            except StopIteration as end:
                return end.value
            self._left -= 1
            if self._left == 0:
                self._job.cancel("here")
            try:
                value = yield waited_for
                send = lambda value=value: steps.send(value)  # type: ignore[misc] # noqa: E731
            except BaseException as error:
                send = lambda error=error: steps.throw(error)  # type: ignore[misc] # noqa: E731


def cancel_at_every_await(
    runner: BackgroundRunner,
    submit: Callable[[], Job],
    patch: pytest.MonkeyPatch,
) -> int:
    """Run a job again and again, cancelled one await later each time, until one ends by itself.

    The number of awaits at which it was cancelled.
    """
    answer = RunnerLoop._answer
    number = 0

    async def cancelled(self: RunnerLoop, job: Job) -> None:
        await _CancelAt(answer(self, job), job, number)

    patch.setattr(RunnerLoop, "_answer", cancelled)
    while number < MAX_AWAITS:
        number += 1
        outcome = submit().result(WAIT_S)
        runner.drain(WAIT_S)
        assert runner.num_running == 0
        assert runner._loop._tasks == {}
        if isinstance(outcome, Final):
            break
        assert outcome == Cancelled("here")
    # And the runner still works.
    patch.setattr(RunnerLoop, "_answer", answer)
    assert isinstance(submit().result(WAIT_S), Final)
    assert only_the_runners_own_tasks(runner)
    return number


def only_the_runners_own_tasks(runner: BackgroundRunner) -> bool:
    """Whether no task of a job is left in the loop."""

    async def count(job: JobContext) -> Updates:
        # An iterator of the client's may still be closed by a task without a name.
        coroutines = (task.get_coro() for task in asyncio.all_tasks())
        names = [getattr(one, "__qualname__", "") for one in coroutines]
        left = [one for one in names if "_timed" in one or "_contained" in one or "_job" in one]
        yield Final(str(left))
        del job

    backend, runner._loop._backend = runner._loop._backend, Steps(count)
    try:
        outcome = runner.submit("count").result(WAIT_S)
        assert outcome == Final("[]")
    finally:
        runner._loop._backend = backend
    return True


def test_an_endpoint_and_its_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    open_calls: list[int] = []

    async def slow(a: int) -> int:
        """Think."""
        open_calls.append(a)
        try:
            for _ in range(3):
                await asyncio.sleep(0)
        finally:
            open_calls.remove(a)
        return a

    two = calls(("slow", '{"a": 1}'), ("slow", '{"a": 2}'))

    def answer(request: dict[str, Any]) -> list[Any]:
        return two if len(request["messages"]) == 2 else text("It ", "is.")

    with ChatStub(answer) as stub:
        backend = OpenAIBackend("stub", base_url=stub.url, api_key="x", max_retries=0)
        with BackgroundRunner(backend, [slow]) as runner:
            number = cancel_at_every_await(runner, lambda: runner.submit("x"), monkeypatch)
            assert number > 5
    assert open_calls == []


def test_tools_of_an_mcp_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(job: JobContext) -> Updates:
        await job.call_tools([("1", "pid", "{}"), ("2", "flood", '{"count": 3}')])
        yield Final((await job.call_tool("pid", "{}")).content)

    server = McpServer([sys.executable, str(SERVER), "stdio"])
    with BackgroundRunner(Steps(run), [server]) as runner:
        before = runner.submit("x").result(WAIT_S)
        number = cancel_at_every_await(runner, lambda: runner.submit("x"), monkeypatch)
        assert number > 2
        assert runner.submit("x").result(WAIT_S) == before  # the same process


def test_a_chat_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LocalBackend(plain(), max_tokens=6, max_rounds=50)
    with BackgroundRunner(backend) as runner, Session(plain()):
        number = cancel_at_every_await(runner, lambda: runner.submit("x"), monkeypatch)
        assert number > 3


def test_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    with Session(nano()) as session, BackgroundRunner(ForkBackend(max_ticks=3)) as runner:
        session.attach(runner)

        def submit() -> Job:
            return runner.submit("x", session=session)

        before = session.token_ids().tolist()
        number = cancel_at_every_await(runner, submit, monkeypatch)
        assert number > 3
        assert session.token_ids().tolist() == before
