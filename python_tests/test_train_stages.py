"""Runs of stages: what a file says, and that they go on from wherever they were stopped."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tml_core import errors
from tml_core.cli.train import run_train
from tml_core.model.config import ModelConfig
from tml_core.train import StepMetrics, Trainer, finished, read_stages, write_shards
from train_kit import make_checkpoint, random_transcripts

RUN = """
[model]
path = "start"
[data]
path = "a"
batch_tokens = 60
[run]
folder = "run"
num_steps = 3
save_every = 2
[[stage]]
name = "listen"
[[stage]]
name = "speak"
data.path = ["a", "b"]
data.weights = [0.5, 2]
optimizer.learning_rate = 1e-2
loss.silence = 0
run.num_steps = 4
[[stage]]
name = "interact"
data = {path = "b", seed = 7}
run = {num_steps = 2}
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("text"), "text")


def write_run(folder: Path, start: Path, text: str = RUN) -> Path:
    config = ModelConfig.from_path(start)
    for name, seed in (("a", 0), ("b", 1)):
        if not (folder / name).exists():
            write_shards(random_transcripts(config, 6, seed=seed), folder / name, config)
    file = folder / "run.toml"
    file.write_text(text.replace('"start"', f'"{start}"'))
    return file


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_file_says_what_each_stage_does(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    listen, speak, interact = read_stages(tmp_path / "run.toml")
    assert [one.name for one in (listen, speak, interact)] == ["listen", "speak", "interact"]
    assert listen.config.model.path == str(tmp_path / "start")
    assert listen.config.data.path == str(tmp_path / "a") and listen.config.run.num_steps == 3
    assert speak.config.data.weights == (0.5, 2.0) and speak.config.data.batch_tokens == 60
    assert speak.config.loss.silence == 0 and listen.config.loss.silence == 1
    assert speak.config.run.save_every == 2 and speak.config.run.num_steps == 4
    run = tmp_path / "run"
    assert speak.config.run.folder == str(run / "speak")
    assert speak.config.model.path == str(run / "listen" / "checkpoints" / "step-00000003")
    assert interact.config.model.path == str(run / "speak" / "checkpoints" / "step-00000004")
    (tmp_path / "plain.toml").write_text(RUN[: RUN.index("[[stage]]")])
    (plain,) = read_stages(tmp_path / "plain.toml")
    assert plain.name == "" and plain.config.run.folder == str(run)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('name = "speak"', "", r"stage\[1\].name: expected letters.*, got None"),
        ('name = "speak"', 'name = "a/b"', r"stage\[1\].name: expected letters.*, got 'a/b'"),
        ('name = "speak"', 'name = "listen"', r"stage\[1\].name: 'listen' is the name of another"),
        ("loss.silence", "loss.silenced", "stage speak: loss: unknown key 'silenced'"),
        ("loss.silence", "losses.silence", "stage speak: expected tables .*, got 'losses'"),
        ("loss.silence", "loss", "stage speak: expected tables .*, got 'loss'"),
        ("loss.silence = 0", 'model.path = "x"', "stage speak: model.path: is the same for all"),
        ("loss.silence = 0", 'run.folder = "x"', "stage speak: run.folder: is the same for all"),
        ("run.num_steps = 4", "run.num_steps = 0", "stage speak: run.num_steps: expected at least"),
        ("[[stage]]", "[stagecraft]", "config: expected tables .* got 'stagecraft'|cannot be read"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, match: str, tmp_path: Path) -> None:
    assert old in RUN
    (tmp_path / "run.toml").write_text(RUN.replace(old, new))
    with pytest.raises(errors.InvalidArgument, match=match):
        read_stages(tmp_path / "run.toml")


def test_stages_are_a_list(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[stage]\nname = "x"\n')
    with pytest.raises(errors.InvalidArgument, match=r"stage must be written as \[\[stage\]\]"):
        read_stages(tmp_path / "run.toml")


def test_stages_follow_each_other_and_resume_anywhere(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=200)
    whole = run_train(write_run(tmp_path / "whole", start), console)
    text = console.export_text()
    assert text.index("listen, 1 of 3") < text.index("speak, 2 of 3") < text.index("interact, 3 of")
    assert whole == tmp_path / "whole" / "run" / "interact" / "checkpoints" / "step-00000002"
    assert (tmp_path / "whole" / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    for name, num_steps in (("listen", 3), ("speak", 4), ("interact", 2)):
        rows = (tmp_path / "whole" / "run" / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [*range(1, num_steps + 1)]

    # Stopped after every single step, by a signal as a user sends it.
    class Stopped(Trainer):
        def train_step(self) -> StepMetrics:
            metrics = super().train_step()
            os.kill(os.getpid(), signal.SIGINT)
            return metrics

    # The command of the same name hides the module as an attribute.
    monkeypatch.setattr(sys.modules[run_train.__module__], "Trainer", Stopped)
    file = write_run(tmp_path / "broken", start)
    seen = []
    for _ in range(9):
        checkpoint = run_train(file, console)
        seen.append(f"{checkpoint.parent.parent.name} {checkpoint.name[-1]}")
    stages = {"listen": 3, "speak": 4, "interact": 2}
    assert seen == [f"{name} {step + 1}" for name, count in stages.items() for step in range(count)]
    assert_same(checkpoint, whole)
    for name in ("listen", "speak"):
        assert_same(*sorted(tmp_path.glob(f"*/run/{name}/checkpoints/step-0000000{stages[name]}")))


def test_a_stage_that_is_over_is_not_begun_again(start: Path, tmp_path: Path) -> None:
    file = write_run(tmp_path, start)
    console = Console(record=True, width=200)
    path = run_train(file, console)
    listen, speak, _ = read_stages(file)
    over = finished(speak.config)
    assert over is not None and over.parent.parent.name == "speak"
    assert finished(listen.config) == Path(speak.config.model.path)
    for shard in tmp_path.glob("[ab]/*"):
        shard.unlink()  # nothing of it is read again
    assert run_train(file, console) == path
    # But it must have been this one.
    file.write_text(file.read_text().replace("loss.silence = 0", "loss.silence = 0.5"))
    with pytest.raises(errors.CheckpointError, match=r"loss.silence = 0.0, this run has 0.5"):
        run_train(file, console)
    file.write_text(file.read_text().replace("run.num_steps = 4", "run.num_steps = 5"))
    assert finished(read_stages(file)[1].config) is None
