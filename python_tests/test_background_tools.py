"""Python tools: checked arguments, times, sizes, threads that do not come back."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest

pytest.importorskip("pydantic", reason="needs the background extra: pip install '.[test]'")

from background_kit import WAIT_S, Steps, Updates, background_threads
from tml_core import InvalidArgument
from tml_core.background import (
    BackgroundRunner,
    Cancelled,
    Failed,
    Final,
    JobContext,
    Progress,
    ToolFailed,
    ToolOutput,
)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert background_threads() == []


async def _call(job: JobContext) -> Updates:
    name, _, arguments = job.package.request.partition(" ")
    output = await job.call_tool(name, arguments)
    yield Final("error" if output.is_error else "fine")


def outputs(tool: Callable[..., Any], arguments: str = "{}", **options: Any) -> ToolOutput:
    """What a call of ``tool`` gives the model."""
    with BackgroundRunner(Steps(_call), [tool], **options) as runner:
        job = runner.submit(f"{tool.__name__} {arguments}")
        assert isinstance(job.result(WAIT_S), Final)
        (output,) = [one for one in job if isinstance(one, ToolOutput)]
        return output


@dataclass
class Place:
    name: str
    km: float


def test_schemas_and_checks_come_from_hints() -> None:
    def find(
        word: str, kind: Literal["town", "river"] = "town", near: list[int] | None = None
    ) -> Place:
        """Find a place."""
        return Place(f"{word} {kind} {near}", 1.5)

    with BackgroundRunner(Steps(_call), [find]) as runner:
        declared = runner.declarations[-1]
        assert (declared["name"], declared["description"]) == ("find", "Find a place.")
        assert declared["parameters"] == {
            "type": "object",
            "properties": {
                "word": {"type": "string"},
                "kind": {"type": "string", "enum": ["town", "river"], "default": "town"},
                "near": {
                    "anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}],
                    "default": None,
                },
            },
            "required": ["word"],
            "additionalProperties": False,
        }
    good = outputs(find, '{"word": "Porto", "near": [1]}')
    assert good.content == '{"name":"Porto town [1]","km":1.5}'
    bad = outputs(find, '{"word": "Porto", "kind": "hill"}')
    assert bad.is_error and "Input should be 'town' or 'river'" in bad.content


@pytest.mark.parametrize(
    ("value", "content"),
    [("word", "word"), (None, "null"), ({"a": [1]}, '{"a":[1]}'), (2.5, "2.5")],
)
def test_what_a_tool_returns_is_text_or_json(value: Any, content: str) -> None:
    def give() -> Any:
        """Give."""
        return value

    assert outputs(give).content == content


def test_what_is_no_json_is_an_error() -> None:
    def give() -> Any:
        return object()

    output = outputs(give)
    assert output.is_error and "PydanticSerializationError" in output.content


@pytest.mark.parametrize(
    ("kind", "words", "content"),
    [
        (ValueError, "no such file", "ValueError: no such file"),
        (ToolFailed, "ask for a town", "ask for a town"),
        (SystemExit, 2, "SystemExit: 2"),
        (StopIteration, "", "StopIteration: "),
        (KeyboardInterrupt, "", "KeyboardInterrupt: "),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_tool_that_raises_tells_the_model(
    kind: type[BaseException], words: Any, content: str, is_async: bool
) -> None:
    def broken() -> str:
        raise kind(words)

    async def broken_async() -> str:
        raise kind(words)

    output = outputs(broken_async if is_async else broken)
    assert output.is_error
    assert output.content == content or kind is StopIteration


@pytest.mark.parametrize(("text", "kept"), [("x" * 10_000_000, 1000), ("ä" * 900, 500)])
def test_ten_megabytes_are_cut(text: str, kept: int) -> None:
    def big() -> str:
        return text

    output = outputs(big, max_output_bytes=1000)
    assert not output.is_error
    assert output.num_bytes == len(text.encode())
    said, _, note = output.content.partition("\n")
    assert said == text[:kept]
    assert note == f"[cut: the first 1000 of {output.num_bytes} bytes]"


async def test_an_async_tool_that_hangs_times_out() -> None:
    ended = threading.Event()

    async def hang() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    output = await asyncio.to_thread(outputs, hang, tool_timeout_s=0.05)
    assert output.is_error
    assert output.content == "hang did not answer within 0.05 s"
    assert ended.is_set()


def test_a_thread_that_hangs_is_left_behind_and_counted() -> None:
    release = threading.Event()

    def hang() -> str:
        release.wait(WAIT_S)
        return "late"

    def quick() -> str:
        return "quick"

    with BackgroundRunner(
        Steps(_call), [hang, quick], tool_timeout_s=0.05, max_tool_threads=2
    ) as runner:
        for _ in range(2):
            assert runner.submit("hang {}").result(WAIT_S) == Final("error")
        # Both places are taken: a third is refused, the runner lives.
        job = runner.submit("quick {}")
        assert job.result(WAIT_S) == Final("error")
        said = next(one.content for one in job if isinstance(one, ToolOutput))
        assert said == "quick cannot run now: too many tools have not come back"
        release.set()
        for thread in threading.enumerate():
            if thread.name == "tml-tool-hang":
                thread.join(WAIT_S)
        assert runner.submit("quick {}").result(WAIT_S) == Final("fine")


def test_a_tool_that_swallows_its_cancel_is_left_behind() -> None:
    released: list[asyncio.Event] = []

    async def stubborn() -> str:
        event = asyncio.Event()
        released.append(event)
        while not event.is_set():
            try:
                await event.wait()
            except asyncio.CancelledError:
                continue
        return "at last"

    with BackgroundRunner(Steps(_call), [stubborn], tool_timeout_s=0.05) as runner:
        assert runner.submit("stubborn {}").result(WAIT_S) == Final("error")
        assert runner.num_abandoned == 1
        runner._loop.post(released[0].set)


def test_a_tool_that_cancels_itself_is_an_error() -> None:
    async def leave() -> str:
        raise asyncio.CancelledError

    output = outputs(leave)
    assert (output.is_error, output.content) == (True, "leave cancelled itself")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_cancel_during_a_tool_ends_the_job_at_once(is_async: bool) -> None:
    begun, release = threading.Event(), threading.Event()
    ended: list[str] = []

    def wait() -> str:
        begun.set()
        release.wait(WAIT_S)
        return ""

    async def wait_async() -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")
        return ""

    tool = wait_async if is_async else wait
    with BackgroundRunner(Steps(_call), [tool]) as runner:
        job = runner.submit(f"{tool.__name__} {{}}")
        assert begun.wait(WAIT_S)
        job.cancel()
        assert job.result(WAIT_S) == Cancelled("by its owner")
        assert ended == (["cleaned up"] if is_async else [])
        release.set()


def test_tools_run_side_by_side_up_to_the_cap() -> None:
    running: list[int] = []
    most: list[int] = []

    async def count() -> str:
        running.append(1)
        most.append(len(running))
        for _ in range(5):
            await asyncio.sleep(0)
        running.pop()
        return ""

    async def run(job: JobContext) -> Updates:
        await job.call_tools([(str(index), "count", "{}") for index in range(9)])
        yield Final("done")

    with BackgroundRunner(Steps(run), [count], max_parallel_tools=3) as runner:
        assert runner.submit("x").result(WAIT_S) == Final("done")
    assert max(most) == 3


def test_a_thread_sees_the_context_of_the_call() -> None:
    seen = contextvars.ContextVar("seen", default="nothing")

    def look() -> str:
        return seen.get()

    async def run(job: JobContext) -> Updates:
        seen.set("the job's")
        yield Final((await job.call_tool("look", "{}")).content)

    with BackgroundRunner(Steps(run), [look]) as runner:
        assert runner.submit("x").result(WAIT_S) == Final("the job's")


def test_own_tools_may_report_progress() -> None:
    class Slow:
        name = "slow"
        description = "Take steps."
        parameters: dict[str, Any] = {"type": "object", "properties": {}}  # noqa: RUF012

        async def __call__(self, arguments: dict[str, Any], report: Any, /) -> str:
            report(f"{arguments['steps']} steps")
            return "done"

    with BackgroundRunner(Steps(_call), [Slow()]) as runner:
        job = runner.submit('slow {"steps": 3}')
        assert Progress("3 steps") in list(job)


def test_a_source_that_fails_fails_the_start_and_the_others_end() -> None:
    log: list[str] = []

    class Good:
        async def serve(self, opened: Any, closing: asyncio.Event) -> None:
            opened.set_result([])
            await closing.wait()
            log.append("closed in order")

    class Bad:
        async def serve(self, _opened: Any, _closing: asyncio.Event) -> None:
            raise ConnectionError("nobody there")

    class Empty:
        async def serve(self, _opened: Any, _closing: asyncio.Event) -> None:
            return

    with pytest.raises(ConnectionError, match="nobody there"):
        BackgroundRunner(Steps(_call), [Good(), Bad()])
    assert log == ["closed in order"]
    with pytest.raises(TypeError, match="ended before it gave its tools"):
        BackgroundRunner(Steps(_call), [Empty()])

    class Steer:
        name = "background_steer"
        description = ""
        parameters: dict[str, Any] = {"type": "object"}  # noqa: RUF012

    class Taken:
        async def serve(self, opened: Any, closing: asyncio.Event) -> None:
            opened.set_result([Steer()])
            await closing.wait()

    with pytest.raises(InvalidArgument, match="tools: the name 'background_steer' is taken"):
        BackgroundRunner(Steps(_call), [Taken()])


def _star(*args: int) -> int:
    return sum(args)


def _bare(a) -> int:  # type: ignore[no-untyped-def]
    return int(a)


def _positional(a: int, /) -> int:
    return a


def _unknown(a: "Nowhere") -> int:  # type: ignore[name-defined]  # noqa: F821
    return int(a)


def _thread(a: threading.Lock) -> int:
    return int(a.locked())


def background(request: str) -> str:
    return request


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([_star], "_star: parameter 'args': expected one that can be given by name"),
        ([_bare], "_bare: parameter 'a': expected a type annotation, got none"),
        ([_positional], "_positional: parameter 'a': expected one that can be given by name"),
        ([_unknown], "_unknown: annotations cannot be resolved"),
        ([_thread], "_thread: no JSON Schema for its annotations"),
        ([lambda: 0], "tools: expected a named function"),
        ([background], "tools: the name 'background' is taken by the runner itself"),
        ([test_own_tools_may_report_progress] * 2, "tools: expected distinct names"),
    ],
)
def test_what_is_no_tool(tools: list[Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        BackgroundRunner(Steps(_call), tools)


def test_a_failed_job_is_no_error_of_the_tool() -> None:
    async def run(job: JobContext) -> Updates:
        await job.call_tools([("1", "nothing", "{}")])
        raise OSError("later")
        yield Final("")

    with BackgroundRunner(Steps(run)) as runner:
        assert runner.submit("x").result(WAIT_S) == Failed("OSError: later")
