"""``tml-core train``: a run from a file, its picture, and stops by signal."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tml_core import cli
from tml_core.cli.train import run_train
from tml_core.train import StepMetrics, Trainer
from train_kit import make_checkpoint, make_run


def write_run(folder: Path, model: Path) -> Path:
    """The run of `make_run` as a file."""
    make_run(folder, model)
    file = folder / "run.toml"
    file.write_text(
        f'[model]\npath = "{model}"\n[data]\npath = "data"\nbatch_tokens = 60\n'
        '[run]\nfolder = "run"\nnum_steps = 4\nsave_every = 3\n'
    )
    return file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_run(tmp_path, make_checkpoint(tmp_path / "start", "text"))


def test_the_command_trains_and_draws(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tml-core", "train", str(file)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    out = "".join(capsys.readouterr().out.split())
    assert "4/4" in out and "tokens/s" in out and "step4:loss" in out
    assert "checkpoints/step-00000004" in out
    run = file.parent / "run"
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["tokens_per_s"] > 0 and row["num_tokens"] > 0 for row in rows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step(
    number: signal.Signals, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Signalled(Trainer):
        def train_step(self) -> StepMetrics:
            metrics = super().train_step()
            if metrics.step == 2:
                os.kill(os.getpid(), number)
            return metrics

    before = signal.getsignal(number)
    # The command of the same name hides the module as an attribute.
    module = sys.modules[run_train.__module__]
    monkeypatch.setattr(module, "Trainer", Signalled)
    console = Console(record=True, width=200)
    path = run_train(file, console)
    assert path.name == "step-00000002" and signal.getsignal(number) is before
    assert "stopped after step 2 of 4; run again to resume" in console.export_text()
    monkeypatch.setattr(module, "Trainer", Trainer)
    assert run_train(file, console).name == "step-00000004"
    assert "resuming after step 2" in console.export_text()


def test_a_damaged_shard_is_left_out_if_asked(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = file.parent / "data" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    monkeypatch.setattr(sys, "argv", ["tml-core", "train", str(file)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2 and shard.name in capsys.readouterr().err
    file.write_text(file.read_text().replace("[data]", "[data]\nskip_corrupt = true"))
    console = Console(record=True, width=200)
    run_train(file, console)
    assert f"left out, damaged: {shard.name}" in console.export_text()


def test_no_picture_without_matplotlib(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    console = Console(record=True, width=200)
    run_train(file, console)
    assert r"no loss.png: plot: needs matplotlib; pip install 'tml_core" in console.export_text()
    assert not (file.parent / "run" / "loss.png").exists()


def test_a_wrong_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[modell]\n")
    monkeypatch.setattr(sys, "argv", ["tml-core", "train", str(file)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tml-core: error: config: expected tables")
