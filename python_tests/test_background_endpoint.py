"""The OpenAI-compatible backend: streaming, tool rounds, and every way an endpoint can fail."""

import asyncio
import base64
import gc
import io
import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openai", reason="needs the background extra: pip install '.[test]'")

from background_kit import WAIT_S, background_threads
from chat_stub import ChatStub, calls, text
from tml_core import InvalidArgument
from tml_core.background import (
    BackgroundRunner,
    Cancelled,
    ContextPackage,
    Failed,
    Final,
    Frame,
    Job,
    OpenAIBackend,
    Partial,
    TextItem,
    ToolCall,
    ToolOutput,
)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    gc.collect()
    assert background_threads() == []


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def backend(stub: ChatStub, **options: Any) -> OpenAIBackend:
    settings: dict[str, Any] = {"timeout_s": 10.0, "max_retries": 0}
    return OpenAIBackend("stub", base_url=stub.url, api_key="key", **settings | options)


def run(stub: ChatStub, request: str = "hello", tools: Any = (), **options: Any) -> list[Any]:
    """All updates of one job."""
    with BackgroundRunner(backend(stub, **options), tools) as runner:
        return list(runner.submit(request))


def test_an_answer_streams() -> None:
    with ChatStub(text("It is ", "noon.")) as stub:
        assert run(stub, options={"temperature": 0}) == [
            Partial("It is "),
            Partial("noon."),
            Final("It is noon."),
        ]
        (request,) = stub.requests
        assert request["messages"][1] == {"role": "user", "content": "hello"}
        assert request["temperature"] == 0
        assert request["stream"] is True
        assert "tools" not in request


def test_tools_are_declared_called_side_by_side_and_answered() -> None:
    meeting = asyncio.Barrier(2)

    async def meet(name: str) -> str:
        """Come back when both are there."""
        await meeting.wait()
        return f"met {name}"

    both = calls(("meet", '{"name": "Ann"}'), ("meet", '{"name": "Bo"}'))
    with ChatStub(both, calls(("add", '{"a": 1, "b": 2}')), text("3")) as stub:
        updates = run(stub, tools=[meet, add])
        assert set(updates[:2]) == {
            ToolCall("c0", "meet", '{"name": "Ann"}'),
            ToolCall("c1", "meet", '{"name": "Bo"}'),
        }
        assert updates[4:] == [
            ToolCall("c0", "add", '{"a": 1, "b": 2}'),
            ToolOutput("c0", "add", "3", num_bytes=1),
            Partial("3"),
            Final("3"),
        ]
        assert [one["function"]["name"] for one in stub.requests[0]["tools"]] == ["meet", "add"]
        last = stub.requests[-1]["messages"]
        assert last[2]["tool_calls"][1]["function"]["arguments"] == '{"name": "Bo"}'
        assert last[3:5] == [
            {"role": "tool", "tool_call_id": "c0", "content": "met Ann"},
            {"role": "tool", "tool_call_id": "c1", "content": "met Bo"},
        ]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("add", '{"a": 1, "b": ', "the arguments of add are not JSON"),
        ("add", "[1, 2]", "the arguments of add must be a JSON object, got list"),
        ("add", '{"a": 1}', "Field required"),
        ("add", '{"a": 1, "b": 2, "c": 3}', "Extra inputs are not permitted"),
        ("add", '{"a": "one", "b": 2}', "Input should be a valid integer"),
        ("subtract", "{}", "there is no tool 'subtract'; there are ['add']"),
        ("", "", "there is no tool ''"),
        ("add", "[" * 50_000, "the arguments of add are not JSON"),
    ],
)
def test_a_malformed_call_goes_back_to_the_model(name: str, arguments: str, message: str) -> None:
    with ChatStub(calls((name, arguments), cut=10_000), text("sorry")) as stub:
        updates = run(stub, tools=[add])
        output = updates[1]
        assert isinstance(output, ToolOutput) and output.is_error
        assert message in output.content
        assert updates[-1] == Final("sorry")
        assert stub.requests[1]["messages"][-1]["content"] == output.content


def test_rounds_are_bounded() -> None:
    with ChatStub(calls(("add", '{"a": 1, "b": 2}'))) as stub:
        updates = run(stub, tools=[add], max_rounds=3)
        assert updates[-1] == Failed("TmlError: no answer within 3 requests (max_rounds)")
        assert len(stub.requests) == 3


def test_tool_calls_of_a_job_are_bounded() -> None:
    many = calls(*[("add", '{"a": 1, "b": 2}')] * 5)
    with (
        ChatStub(many, text("enough")) as stub,
        BackgroundRunner(backend(stub), [add], max_tool_calls=2) as runner,
    ):
        updates = list(runner.submit("x"))
        assert sum(isinstance(one, ToolCall) for one in updates) == 2
        assert updates[-1] == Final("enough")
        outputs = [one["content"] for one in stub.requests[1]["messages"][3:]]
        assert outputs[:2] == ["3", "3"]
        assert outputs[2:] == ["this job has made its 2 tool calls; answer without"] * 3


def test_steering_goes_into_the_next_request() -> None:
    async def tell() -> str:
        """Wait to be told."""
        assert job.steer("in metres")
        return "told"

    with (
        ChatStub(calls(("tell", "{}")), text("3 m")) as stub,
        BackgroundRunner(backend(stub), [tell]) as runner,
    ):
        job = runner.submit("how far")
        assert job.result(WAIT_S) == Final("3 m")
        assert stub.requests[1]["messages"][-1] == {"role": "user", "content": "in metres"}


def test_what_comes_during_the_last_answer_makes_one_more_round() -> None:
    jobs: queue.Queue[Job] = queue.Queue()

    def answer(request: dict[str, Any]) -> list[Any]:
        if len(request["messages"]) > 2:
            return text("1 m")
        assert jobs.get(timeout=WAIT_S).steer("in metres")
        return text("3 feet")

    with ChatStub(answer) as stub, BackgroundRunner(backend(stub)) as runner:
        job = runner.submit("how far")
        jobs.put(job)
        assert job.result(WAIT_S) == Final("1 m")
        assert [one["content"] for one in stub.requests[1]["messages"][-2:]] == [
            "3 feet",
            "in metres",
        ]


def test_first_tools_are_called_with_the_request() -> None:
    def search(query: str) -> str:
        """Search."""
        return f"found {query}"

    with ChatStub(text("ok")) as stub:
        updates = run(stub, "tea", tools=[search], first_tools={"search": "query"})
        assert updates[:2] == [
            ToolCall("job-1-tool-0", "search", '{"query": "tea"}'),
            ToolOutput("job-1-tool-0", "search", "found tea", num_bytes=9),
        ]
        assert stub.requests[0]["messages"][1]["content"] == ("search: found tea\n\nRequest: tea")


def test_conversation_and_frames_go_along() -> None:
    av = pytest.importorskip("av")
    rgb = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    package = ContextPackage("what is it", (TextItem("user", "look", 0, 200),), (Frame(rgb, 0),))
    with (
        ChatStub(text("noise")) as stub,
        BackgroundRunner(backend(stub, sends_frames=True)) as runner,
    ):
        runner.submit(package).result(WAIT_S)
        said, picture = stub.requests[0]["messages"][1]["content"]
        assert said["text"] == (
            "The conversation so far:\n[0.0 s] user typed: look\n\nRequest: what is it"
        )
        data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
        with av.open(io.BytesIO(data)) as container:
            (frame,) = container.decode(video=0)
        assert (frame.to_ndarray(format="rgb24") == rgb).all()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (text("It is ", finish=None), "ConnectionError: the endpoint ended its stream after 6 "),
        ([*text("It", finish=None), "cut"], "ConnectionError: the endpoint ended its stream"),
        ([500], "InternalServerError: "),
        ([401], "AuthenticationError: "),
        ([], "ConnectionError: the endpoint ended its stream after 0 characters"),
    ],
)
def test_a_broken_answer_fails_the_job(answer: list[Any], reason: str) -> None:
    with ChatStub(answer) as stub:
        last = run(stub)[-1]
        assert isinstance(last, Failed)
        assert last.reason.startswith(reason)


def test_a_request_that_fails_is_tried_again() -> None:
    with ChatStub([503], text("there")) as stub:
        assert run(stub, max_retries=1)[-1] == Final("there")
        assert len(stub.requests) == 2


def test_an_endpoint_that_hangs_times_out() -> None:
    with ChatStub([*text("It", finish=None), "hang"]) as stub:
        updates = run(stub, timeout_s=0.2)
        assert updates[0] == Partial("It")
        assert isinstance(updates[1], Failed) and "APITimeoutError" in updates[1].reason


def test_an_endpoint_that_is_not_there_fails_the_job() -> None:
    with ChatStub(text("x")) as stub:
        gone = backend(stub)
    with BackgroundRunner(gone) as runner:
        ended = runner.submit("x").result(WAIT_S)
        assert ended == Failed("APIConnectionError: Connection error.")


def test_an_endless_answer_is_cut_off() -> None:
    with ChatStub([*text("x" * 60_000, "y" * 60_000, finish=None), "hang"]) as stub:
        last = run(stub)[-1]
        assert last == Failed("TmlError: the answer is longer than 100000 characters")


def test_a_cancel_in_the_middle_of_a_stream_closes_it() -> None:
    with (
        ChatStub([*text("It", finish=None), "hang"]) as stub,
        BackgroundRunner(backend(stub)) as runner,
    ):
        job = runner.submit("x")
        assert next(iter(job)) == Partial("It")
        job.cancel()
        assert job.result(WAIT_S) == Cancelled("by its owner")


@pytest.mark.parametrize("num_steps", [*range(0, 40, 4), 60, 90, 130, 200, 400, 1000])
def test_a_cancel_at_any_step_ends_cleanly(num_steps: int) -> None:
    """The job is cancelled after so many passes of the loop, wherever it then waits."""

    async def slow(a: int) -> int:
        """Think."""
        for _ in range(3):
            await asyncio.sleep(0)
        return a

    async def cancel_after() -> None:
        for _ in range(num_steps):
            await asyncio.sleep(0)
        job.cancel("now")

    two = calls(("slow", '{"a": 1}'), ("slow", '{"a": 2}'))
    with (
        ChatStub(two, text("It ", "is.")) as stub,
        BackgroundRunner(backend(stub), [slow]) as runner,
    ):
        job = runner.submit("x")
        runner._loop.post(lambda: runner._loop.start_other(cancel_after()))
        assert job.result(WAIT_S) in (Cancelled("now"), Final("It is."))
        runner.drain(WAIT_S)
        assert runner.num_running == 0 and runner._loop._tasks == {}


def test_rounds_must_be_some() -> None:
    with pytest.raises(InvalidArgument, match="max_rounds: expected at least 1, got 0"):
        OpenAIBackend("m", max_rounds=0)
