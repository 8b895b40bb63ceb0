"""Datasets of interactions: the same whoever makes them, and resumed where they ended."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tml_core import errors
from tml_core.cli import app
from tml_core.cli.data import show_voices
from tml_core.data import SpeechBank, build, interactions
from tml_core.data import bank as bank_module
from tml_core.data.build import BuildReport
from tml_core.data.engines import EspeakEngine
from tml_core.layout import MicroTurnLayout
from tml_core.model.config import ModelConfig, bundled_path
from tml_core.model.tokenizer import load_tokenizer
from tml_core.train import PackedBatch, ShardReader

ENGINES = ["espeak"]
TASKS = ["echo", "count"]


def make(folder: Path, num: int = 5, **changed: Any) -> BuildReport:
    options: dict[str, Any] = {"seed": 4, "num": num, "engines": ENGINES, "tasks": TASKS}
    return build(folder, **{**options, "shard_len": 2, **changed})


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_path(bundled_path("nano"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    report = make(folder)
    assert (report.num_interactions, report.num_made) == (5, 5)
    return folder


@pytest.fixture(scope="module")
def bank() -> Iterator[SpeechBank]:
    with SpeechBank(ENGINES) as bank:
        yield bank


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("shard-*")}


def test_a_dataset_holds_what_the_stream_gives(
    built: Path, bank: SpeechBank, config: ModelConfig
) -> None:
    layout = MicroTurnLayout(config, load_tokenizer(bundled_path("nano")))
    reader = ShardReader(built, config)
    assert len(reader) == 5 and len(shards(built)) == 3
    made = interactions(4, bank=bank, tasks=TASKS, num=5)
    has_pictures = 0
    for one, kept in zip(made, reader, strict=True):
        wanted = PackedBatch.pack([one.transcript(layout)], config)
        got = PackedBatch.pack([kept], config)
        for name in ("token_ids", "bins", "order", "targets", "streams", "visible_end"):
            assert torch.equal(getattr(got, name), getattr(wanted, name))
        assert got.patches.shape == wanted.patches.shape
        if len(got.patches):
            has_pictures += 1
            # A step of the byte scale is 0.015; JPEG errs by a few of them.
            assert float((got.patches - wanted.patches).abs().mean()) < 0.08
    assert has_pictures


def test_whoever_makes_a_shard_makes_the_same(built: Path, tmp_path: Path) -> None:
    shares: list[tuple[float, float]] = []
    report = make(tmp_path, workers=2, progress=lambda *told: shares.append(told))
    assert report.num_made == 5 and shards(tmp_path) == shards(built)
    assert [round(share, 3) for share, _ in shares] == [
        pytest.approx(value, abs=0.21) for value in (0.4, 0.8, 1.0)
    ]
    assert shares[-1] == (1.0, pytest.approx(report.seconds))


def test_an_interrupted_build_goes_on(built: Path, tmp_path: Path) -> None:
    whole = shards(built)

    class Enough(Exception):
        pass

    def stop(share: float, _seconds: float) -> None:
        if share > 0.7:
            raise Enough

    with pytest.raises(Enough):
        make(tmp_path, progress=stop)
    assert not (tmp_path / "dataset.json").exists() and len(shards(tmp_path)) == 2
    first = tmp_path / "shard-00000.safetensors"
    first.write_bytes(whole[first.name][:100])  # as if the disk had lost the rest
    report = make(tmp_path)
    assert (report.num_interactions, report.num_made) == (5, 3)
    assert shards(tmp_path) == whole
    assert (tmp_path / "dataset.json").read_bytes() == (built / "dataset.json").read_bytes()
    # More of the same: the short last shard is made anew, the others stay.
    assert make(tmp_path, num=6).num_made == 2


def test_a_killed_build_leaves_whole_shards_and_no_processes(built: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_data_build import make
if __name__ == "__main__":
    folder = Path({str(tmp_path / "d")!r})
    make(folder, num=99, workers=2, progress=lambda *_: print("made", flush=True))
"""
    file = tmp_path / "main.py"
    file.write_text(program)
    with subprocess.Popen(
        [sys.executable, str(file)], stdout=subprocess.PIPE, start_new_session=True
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == b"made\n"
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        # The workers hold the other end of the pipe: it closes when they have noticed.
        run.stdout.read()
    left, whole = shards(tmp_path / "d"), shards(built)
    assert any(left[name] == whole[name] for name in left.keys() & whole.keys())
    assert make(tmp_path / "d").num_interactions == 5


def test_hours_end_with_the_shard_that_fills_them(tmp_path: Path, config: ModelConfig) -> None:
    report = make(tmp_path, num=None, hours=25 / 3600, tasks=["echo"])
    entries = json.loads((tmp_path / "dataset.json").read_text())["shards"]
    seconds = [float(entry["seconds"]) for entry in entries]
    assert sum(seconds) == pytest.approx(report.seconds)
    assert sum(seconds[:-1]) < 25 <= report.seconds
    assert len(ShardReader(tmp_path, config)) == report.num_interactions == 2 * len(entries)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"seed": 5}, "built with seed 4, now it is 5"),
        ({"split": "held_out"}, "built with split 'train', now it is 'held_out'"),
        ({"tasks": ["echo"]}, r"built with tasks \['echo', 'count'\], now"),
        ({"shard_len": 3}, "built with shard_len 2, now it is 3"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    built: Path, changed: dict[str, Any], match: str
) -> None:
    before = shards(built)
    with pytest.raises(errors.InvalidArgument, match=f"folder: .* was {match}"):
        make(built, **changed)
    assert shards(built) == before


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"num": None}, "num, hours: expected exactly one of them"),
        ({"hours": 1.0}, "num, hours: expected exactly one of them"),
        ({"num": 0}, "num: expected more than 0, got 0"),
        ({"num": None, "hours": -1.0}, "hours: expected more than 0"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"tasks": ["dance"]}, r"tasks: expected some of .*'dance'"),
        ({"split": "test"}, r"split: expected one of .*'test'"),
        ({"engines": ["festival"]}, "engines: expected some of .*'festival'"),
    ],
)
def test_refusals(changed: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=match):
        make(tmp_path / "d", **changed)
    assert not (tmp_path / "d").exists()


def test_folders_that_no_build_made_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(errors.InvalidArgument, match="holds a dataset that no build made"):
        make(tmp_path)
    (tmp_path / "build.json").write_text("[")
    with pytest.raises(errors.CheckpointError, match=r"build.json is no build's"):
        make(tmp_path)


def test_the_command_line_says_whose_voices_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> object:
        raise errors.MissingExtra("flite: install it")

    engines = {"espeak": EspeakEngine, "flite": missing}
    monkeypatch.setattr(bank_module, "ENGINES", engines)
    console = Console(record=True, width=200)
    show_voices(console, None)
    shown = console.export_text()
    assert "voices of espeak" in shown and "left out: flite: install it" in shown


def test_the_command_line_builds_and_goes_on(tmp_path: Path, config: ModelConfig) -> None:
    words = ["data", "build", str(tmp_path / "d"), "--engines", "espeak", "--tasks", "echo"]
    words += ["--workers", "1", "--seed", "3", "--num"]
    done = CliRunner().invoke(app, [*words, "2"])
    assert done.exit_code == 0 and "2 interactions" in done.output and "2 made now" in done.output
    again = CliRunner().invoke(app, [*words, "2"])
    assert "0 made now" in again.output
    assert len(ShardReader(tmp_path / "d", config)) == 2
    wrong = CliRunner().invoke(app, [*words, "2", "--split", "all"])
    assert isinstance(wrong.exception, errors.InvalidArgument)
    assert "expected one of ['train', 'held_out'], got 'all'" in str(wrong.exception)
