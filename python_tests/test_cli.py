"""The command line: what it prints and writes, how it refuses, and the rows of the timeline."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile
from PIL import Image
from rich.console import Console, RenderableType

from session_kit import CALL, END_CALL, END_OUT, SAY, SILENCE, WAIT_S, nano, scripted
from speaking_kit import heard, speaker
from speaking_kit import scripted as speaking
from tml_core import Chunk, Session, cli, errors, media
from tml_core.cli import live
from tml_core.cli.picture import RunPicture
from tml_core.cli.timeline import TickView, Totals, footer, header, plain_line, row


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command uses the model that is loaded already."""
    monkeypatch.setattr(live, "load_model", lambda *_, **__: nano())


def call(*args: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["tml-core", *args])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.usefixtures("loaded")
def test_run_prints_a_line_a_tick_and_writes_the_transcript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.jsonl"
    options = ["--max-ticks", "4", "--seed", "7", "--transcript", str(path)]
    assert call("run", *options, monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert "untrained" in lines[0]
    assert lines[1].startswith("0:00.0  in: sound")
    assert "2 frames" in lines[4]
    assert lines[5].startswith("4 ticks in ")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [one["type"] for one in records] == ["session", *["tick"] * 4, "summary"]
    assert records[0]["is_trained"] is False
    assert records[-1]["num_ticks"] == 4
    # The transcript has the tokens of a session with the same seed.
    with Session(nano(), seed=7) as session:
        ticks = media.micro_turns(*media.clips(), duration_s=0.8)
        expected = [session.append(one).result(WAIT_S) for one in ticks]
    assert [tuple(one["out"]["token_ids"]) for one in records[1:-1]] == [
        one.done.token_ids for one in expected
    ]
    assert [one["out"]["text"] for one in records[1:-1]] == [one.text for one in expected]


def test_run_writes_what_was_said_on_the_clock_of_what_was_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "load_model", lambda *_, **__: speaker())
    files = {name: str(tmp_path / name) for name in ("out.wav", "out.jsonl")}
    options = ["--max-ticks", "5", "--seed", "1", "--out", files["out.wav"]]
    tokens = [SILENCE, SAY, END_OUT, 104, SAY, END_OUT, SILENCE, SILENCE]
    with speaking(tokens):
        options += ["--transcript", files["out.jsonl"]]
        assert call("run", *options, monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"out: ♪[▁▂▃▄▅▆▇█]{4}  ", lines[2])
    assert re.search(r"out: h♪[▁▂▃▄▅▆▇█]{4}  ", lines[3])
    assert re.search(r"out: silence♪[▁▂▃▄▅▆▇█]  ", lines[4])
    records = [json.loads(line) for line in Path(files["out.jsonl"]).read_text().splitlines()]
    assert [one["out"]["num_samples"] for one in records[1:-1]] == [0, 3200, 3200, 800, 0]
    assert records[-1]["spoken_s"] == 0.45
    with speaking(tokens), Session(speaker(), seed=1) as session:
        ticks = media.micro_turns(*media.clips(), duration_s=1.0)
        sound = [heard(session.append(one).result(WAIT_S).events) for one in ticks]
    pcm_S, sample_rate = soundfile.read(files["out.wav"], dtype="float32")
    assert sample_rate == 16000
    quiet_S = np.zeros(6400, np.float32)  # before the end of the tick in which sound is begun
    want_S = np.concatenate([quiet_S, *sound, np.zeros(2400, np.float32)])
    assert len(pcm_S) == len(want_S)
    np.testing.assert_allclose(pcm_S, want_S, rtol=0, atol=2**-15)


@pytest.mark.parametrize("name", ["no/such/dir/reply.wav", "reply.nothing"])
def test_a_reply_that_cannot_be_written_is_refused(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(live, "load_model", lambda *_, **__: speaker())
    path = str(tmp_path / name)
    assert call("run", "--out", path, "--max-ticks", "1", monkeypatch=monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tml-core: error: out: cannot write {path}: ")


@pytest.mark.usefixtures("loaded")
def test_realtime_feeds_at_the_pace_of_the_clock(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(live.time, "sleep", sleep)
    monkeypatch.setattr(live.time, "perf_counter", lambda: now[0])
    assert call("run", "--max-ticks", "3", "--realtime", monkeypatch=monkeypatch) == 0
    # Nothing but the feed takes time on this clock.
    assert waits == pytest.approx([0.2] * 3)
    assert "at the pace of the recording" in capsys.readouterr().out


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--audio", "nowhere.wav"], "audio: cannot read 'nowhere.wav': no such file"),
        (["--video", "nowhere.mp4"], "video: cannot read 'nowhere.mp4': no such file"),
        (["--temperature", "-1"], "temperature: expected 0 or at least 1e-06, got -1.0"),
        (["--top-p", "2"], "top_p: expected more than 0 and at most 1, got 2.0"),
        (["--seed", "-1"], "seed: expected an unsigned 64-bit integer, got -1"),
        (["--transcript", "no/such/dir"], "transcript: cannot write no/such/dir"),
        (["--type", "hello"], "type: expected SECONDS:TEXT, got 'hello'"),
        (["--type", "nan:hello"], "type: expected SECONDS:TEXT, got 'nan:hello'"),
        (["--type", "-1:hello"], "type: expected SECONDS:TEXT, got '-1:hello'"),
        (["--out", "reply.wav"], "out: this model has no audio-out head, it does not speak"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("run", *args, "--max-ticks", "1", monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"tml-core: error: {message}")


def test_info_shows_build_model_and_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("info", monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    for fact in ("contract 1", "not built", "untrained", "12.8M parameters", "a minute"):
        assert fact in out
    assert call("info", "--model", "nowhere", monkeypatch=monkeypatch) == 2
    assert "model: expected 'nano' or a checkpoint directory" in capsys.readouterr().err
    assert call("info", "--dtype", "int8", monkeypatch=monkeypatch) == 2
    assert "dtype: expected one of" in capsys.readouterr().err


def printed(shown: list[RenderableType], color: Literal["truecolor"] | None) -> str:
    file = io.StringIO()
    console = Console(width=100, file=file, color_system=color, force_terminal=color is not None)
    for one in shown:
        console.print(one)
    return file.getvalue()


def test_the_timeline_shows_what_came_in_and_out() -> None:
    loud = np.full(3200, 0.5, np.float32)
    loud[:1600] = 0
    red = np.zeros((40, 60, 3), np.uint8)
    red[:, :, 0] = 255
    body = list(b'{"name":"f","args":{"x":1}}')
    totals = Totals(media_ms=1000)
    views = []
    with Session(nano()) as session, scripted([SILENCE, 104, 7, 276, CALL, *body, END_CALL]):
        for i in range(6):
            chunk = Chunk(audio=loud, frames=[red]) if i == 0 else Chunk(is_idle=True)
            view = TickView(i, chunk, session.append(chunk).result(WAIT_S))
            info = session.info()
            totals.add(view, info.position, info.kv_bytes, wall_s=0.5)
            views.append(view)
    shown = [*map(row, views), footer(totals), header("nano", False, "machine", "feed")]
    text, colored = (printed(shown, color) for color in (None, "truecolor"))
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["0:00.0", "▁▁▇▇"]
    assert "silence" in lines[0]
    assert "\x1b[38;2;255;0;0;48;2;255;0;0m▀" in colored
    assert "h␇" in lines[1]
    assert "writes a call" in lines[2]
    assert "calls f(x=1)" in lines[5]
    assert "ticks 6, silent 1" in text
    assert "0 late" in text
    assert "untrained" in text
    assert plain_line(views[0]).startswith("0:00.0  in: sound -9 dB, 1 frames  out: silence  ")
    assert "in: nothing" in plain_line(views[1])


def test_it_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tml_core.cli import main; main()", "run", "--max-ticks", "2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.usefixtures("loaded")
def test_a_run_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A minute and a half in rows, with typed text, calls and letters no font has."""
    pytest.importorskip("matplotlib", reason="pip install 'tml_core[plot]'")
    picture = RunPicture(tmp_path / "run.png", "a title")
    script = [SILENCE, 104, 7, 250, END_OUT, CALL, *b'{"arguments":{},"name":"look"}', END_CALL]
    script += [SILENCE] * 130
    frame = np.full((24, 32, 3), 90, np.uint8)
    with Session(nano()) as session, scripted(script):
        for index in range(130):
            chunk = Chunk(
                audio=np.full(3200, 0.1, np.float32),
                frames=(frame,),
                text="hm" if index == 3 else None,
            )
            picture.add(TickView(index, chunk, session.append(chunk).result()))
    picture.close()
    with Image.open(tmp_path / "run.png") as drawn:
        size = drawn.size
    assert size[0] == 1800 and size[1] > 500
    with pytest.raises(errors.InvalidArgument, match=r"plot: cannot write .*: no such folder"):
        RunPicture(tmp_path / "nowhere" / "run.png", "a title")
    assert (
        call("run", "--max-ticks", "3", "--plot", str(tmp_path / "r.png"), monkeypatch=monkeypatch)
        == 0
    )
    assert (tmp_path / "r.png").stat().st_size > 5000


@pytest.mark.usefixtures("loaded")
def test_what_is_typed_comes_in_its_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.jsonl"
    words = ["run", "--max-ticks", "4", "--transcript", str(path), "--type", "0.45:two: three"]
    assert call(*words, "--type", "0.2:one", "--type", "0.5:four", monkeypatch=monkeypatch) == 0
    ticks = [one for one in map(json.loads, path.read_text().splitlines()) if one["type"] == "tick"]
    assert [one["in"]["text"] for one in ticks] == [None, "one", "two: three four", None]
    capsys.readouterr()
    assert call("run", "--max-ticks", "2", "--type", "9:late", monkeypatch=monkeypatch) == 2
    assert (
        "type: the recording ended after 0.4 s, before 'late' was typed" in capsys.readouterr().err
    )
