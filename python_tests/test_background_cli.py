"""``tml-core run --background``: jobs on the timeline, in plain lines and in rows."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("openai", reason="needs the background extra: pip install '.[test]'")

from background_kit import WAIT_S, Gate
from chat_stub import ChatStub, calls, text
from session_kit import nano
from tml_core import InvalidArgument, cli
from tml_core.background import BackgroundRunner
from tml_core.cli import live
from tml_core.cli.jobs import JobLines, background_runner
from tml_core.cli.live import RunOptions, run_live
from tml_core.cli.timeline import job_line


@pytest.fixture(autouse=True)
def _loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "load_model", lambda *_, **__: nano())
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def test_a_job_is_shown_from_its_request_to_its_delivery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.jsonl"
    with ChatStub(text("Read ", "a book.")) as stub:
        words = ["run", "--background", stub.url, "--background-model", "stub"]
        words += ["--delegate", "What now?", "--max-ticks", "6", "--transcript", str(path)]
        monkeypatch.setattr(sys, "argv", ["tml-core", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
        assert stub.requests[0]["model"] == "stub"
        assert stub.requests[0]["messages"][1]["content"].endswith("What now?")
    lines = [one.strip() for one in capsys.readouterr().out.splitlines()]
    jobs = [one for one in lines if one.startswith("job-1  ")]
    assert jobs[0] == "job-1  asked: What now?"
    assert jobs[1] == "job-1  answer: Read a book."
    assert jobs[-1] == "job-1  delivered"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [one["text"] for one in records if one["type"] == "job"] == jobs


def test_a_terminal_shows_jobs_between_rows() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with ChatStub(text("Read a book.")) as stub:
        options = RunOptions(background=stub.url, delegate="What now?", max_ticks=3)
        totals = run_live(options, console)
    assert totals.num_calls >= 0
    assert "answer: Read a book." in screen.getvalue()
    assert "delivered" in screen.getvalue()


def test_an_untrained_model_delegates_by_our_hand_and_a_failure_is_shown() -> None:
    screen = io.StringIO()
    with ChatStub([400]) as stub:
        run_live(RunOptions(background=stub.url, max_ticks=2), Console(file=screen, width=200))
    said = screen.getvalue()
    assert "asked: Name one good thing" in said
    assert "failed: BadRequestError" in said


def test_lines_tell_each_thing_once() -> None:
    with (
        ChatStub(calls(("add", '{"a": 1}')), text("3")) as stub,
        background_runner(stub.url, None, heeds_model=True) as runner,
    ):
        lines = JobLines(runner)
        assert lines.new() == []
        runner.submit("1 + 2").result(WAIT_S)
        assert lines.new() == [
            "job-1  asked: 1 + 2",
            'job-1  calls add({"a": 1})',
            "job-1  error: there is no tool 'add'; there are []",
            "job-1  answer: 3",
        ]
        assert lines.new() == []


def test_a_cancelled_job_says_so() -> None:
    gate = Gate()
    with BackgroundRunner(gate) as runner:
        lines = JobLines(runner)
        job = runner.submit("x")
        gate.reach()
        assert lines.new() == ["job-1  asked: x"]
        job.cancel()
        job.result(WAIT_S)
        assert lines.new() == ["job-1  cancelled: by its owner"]


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert job_line("job-1  answer: a\x1b[2J").plain.endswith("a␛[2J")


def test_where_must_be_local_or_a_url() -> None:
    with (
        pytest.raises(InvalidArgument, match="background: expected 'local' or a URL, got 'cloud'"),
        background_runner("cloud", None, heeds_model=True),
    ):
        pass
