"""Tools of real MCP servers, over stdio and streamable HTTP, and what is left when they die."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp", reason="needs the background extra: pip install '.[test]'")

from background_kit import WAIT_S, Steps, Updates, background_threads
from tml_core import InvalidArgument, InvalidType, TmlError
from tml_core.background import (
    BackgroundRunner,
    Cancelled,
    Final,
    JobContext,
    McpServer,
    Progress,
    ToolOutput,
)
from tml_core.background.job import MAX_UPDATES

SERVER = Path(__file__).with_name("mcp_tools_server.py")
COMMAND = [sys.executable, str(SERVER), "stdio"]


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert background_threads() == []
    assert children() == set()


def children() -> set[int]:
    """Processes of the test server that are alive and ours."""
    found = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if str(SERVER).encode() in words and b"stdio" in words and parent == os.getpid():
            found.add(int(folder.name))
    return found


async def _call(job: JobContext) -> Updates:
    name, _, arguments = job.package.request.partition(" ")
    output = await job.call_tool(name, arguments or "{}")
    yield Final(output.content)


def stdio(**options: Any) -> McpServer:
    return McpServer(COMMAND, **options)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, str(SERVER), "http"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    port = int(process.stderr.readline())
    for line in process.stderr:
        if "Uvicorn running" in line:
            break
    yield f"http://127.0.0.1:{port}/mcp"
    process.terminate()
    process.communicate(timeout=WAIT_S)


@pytest.fixture(params=["stdio", "http"])
def server(request: pytest.FixtureRequest) -> McpServer:
    return stdio() if request.param == "stdio" else McpServer(url=request.getfixturevalue("url"))


def ask(runner: BackgroundRunner, request: str) -> ToolOutput:
    """One tool call by the backend."""
    job = runner.submit(request)
    assert isinstance(job.result(WAIT_S), Final)
    return next(one for one in job if isinstance(one, ToolOutput))


def test_tools_are_listed_and_called(server: McpServer, tmp_path: Path) -> None:
    (tmp_path / "trip.txt").write_text("The train to Porto leaves at 9:40.\nBring tea.\n")
    with BackgroundRunner(Steps(_call), [server]) as runner:
        names = [one["name"] for one in runner.declarations]
        assert "search_files" in names
        declared = next(one for one in runner.declarations if one["name"] == "search_files")
        assert declared["description"].startswith("Find lines of text files")
        assert declared["parameters"]["required"] == ["query", "folder"]
        found = ask(runner, f'search_files {{"query": "porto train", "folder": "{tmp_path}"}}')
        assert found.content == "trip.txt: The train to Porto leaves at 9:40."
        assert not found.is_error


def test_what_a_tool_does_wrong_stays_in_its_output(server: McpServer) -> None:
    with BackgroundRunner(Steps(_call), [server], max_output_bytes=1000) as runner:
        failed = ask(runner, 'fail {"reason": "no"}')
        assert failed.is_error and "fail" in failed.content
        wrong = ask(runner, 'big {"num_bytes": "many"}')
        assert wrong.is_error
        big = ask(runner, 'big {"num_bytes": 10000000}')
        assert not big.is_error
        assert big.num_bytes == 10_000_000
        assert big.content.endswith("[cut: the first 1000 of 10000000 bytes]")


def test_a_tool_that_hangs_times_out_and_the_server_goes_on(server: McpServer) -> None:
    with BackgroundRunner(Steps(_call), [server], tool_timeout_s=2.0) as runner:
        hung = ask(runner, "hang")
        assert hung.is_error and hung.content == "hang did not answer within 2 s"
        assert not ask(runner, "pid").is_error


def test_a_flood_of_progress_is_bounded(server: McpServer) -> None:
    count = MAX_UPDATES + 200
    with BackgroundRunner(Steps(_call), [server]) as runner:
        job = runner.submit(f'flood {{"count": {count}}}')
        assert job.result(60.0) == Final("over")
        updates = job.updates()
        assert len(updates) <= MAX_UPDATES
        assert any(isinstance(one, Progress) for one in updates)


def test_cancel_during_a_call(server: McpServer) -> None:
    with BackgroundRunner(Steps(_call), [server]) as runner:
        job = runner.submit("hang")
        assert next(iter(job)) is not None
        job.cancel()
        assert job.result(WAIT_S) == Cancelled("by its owner")
        assert not ask(runner, "pid").is_error


def test_the_process_lives_as_long_as_the_runner() -> None:
    with BackgroundRunner(Steps(_call), [stdio()]) as runner:
        (pid,) = children()
        assert ask(runner, "pid").content == str(pid)
    assert children() == set()


def test_closing_with_a_call_under_way_leaves_no_process() -> None:
    runner = BackgroundRunner(Steps(_call), [stdio()])
    job = runner.submit("hang")
    assert next(iter(job)) is not None
    runner.close()
    assert job.result(WAIT_S) == Cancelled("the runner was closed")
    assert children() == set()


@pytest.mark.parametrize("how", ["by itself", "killed"])
def test_a_server_that_dies_is_started_again_for_the_next_call(how: str) -> None:
    with BackgroundRunner(Steps(_call), [stdio()]) as runner:
        first = ask(runner, "pid").content
        if how == "killed":
            job = runner.submit("hang")
            assert next(iter(job)) is not None
            os.kill(int(first), signal.SIGKILL)
            assert isinstance(job.result(WAIT_S), Final)
            died = next(one for one in job if isinstance(one, ToolOutput))
        else:
            died = ask(runner, "die")
        assert died.is_error and "broke" in died.content
        second = ask(runner, "pid")
        assert not second.is_error and second.content != first
        assert children() == {int(second.content)}


def test_environment_and_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TML_TEST_SECRET", "secret")
    server = stdio(env={"TML_TEST_GIVEN": "given"}, prefix="files_")
    with BackgroundRunner(Steps(_call), [server]) as runner:
        names = [one["name"] for one in runner.declarations]
        assert "files_search_files" in names and "search_files" not in names
        said = ask(runner, 'files_environment {"name": "TML_TEST_GIVEN"}')
        assert said.content == "given"
        assert ask(runner, 'files_environment {"name": "TML_TEST_SECRET"}').content == "unset"


def test_a_server_that_does_not_start_is_an_error_of_the_runner() -> None:
    broken = McpServer([sys.executable, "-c", "import sys; sys.exit('no disk')"])
    with pytest.raises(TmlError, match=r"no connection: .*; its stderr ends with: no disk"):
        BackgroundRunner(Steps(_call), [broken])
    deaf = McpServer([sys.executable, "-c", "input()"], connect_timeout_s=0.5)
    with pytest.raises(TmlError, match="no connection"):
        BackgroundRunner(Steps(_call), [deaf])
    with pytest.raises(TmlError, match="no connection"):
        BackgroundRunner(Steps(_call), [McpServer(["/no/such/program"])])
    nobody = McpServer(url="http://127.0.0.1:9/mcp", connect_timeout_s=5.0)
    with pytest.raises(TmlError, match="no connection"):
        BackgroundRunner(Steps(_call), [nobody])


def test_one_server_that_does_not_start_stops_the_others() -> None:
    with pytest.raises(TmlError, match="no connection"):
        BackgroundRunner(Steps(_call), [stdio(), McpServer(["/no/such/program"])])


def test_what_it_refuses() -> None:
    with pytest.raises(InvalidArgument, match="McpServer: expected either command or url"):
        McpServer()
    with pytest.raises(InvalidArgument, match="McpServer: expected either command or url"):
        McpServer(["x"], url="http://x")
    with pytest.raises(InvalidType, match="command: expected a list of program and arguments"):
        McpServer("python server.py")
