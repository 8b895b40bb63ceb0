"""Runs as TOML: what is read, what is refused, and the learning rate of every step."""

from pathlib import Path
from typing import Any

import pytest

from tml_core import errors
from tml_core.layout import Stream
from tml_core.train import TrainConfig
from tml_core.train.config import LossConfig, OptimizerConfig

GOOD = """
[model]
path = "start"
[data]
path = "packed"
batch_tokens = 100
[run]
folder = "/tmp/somewhere"
num_steps = 10
[loss]
silence = 0
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text)
    return file


def test_a_file_is_read_with_paths_beside_it(tmp_path: Path) -> None:
    config = TrainConfig.from_toml(write(tmp_path, GOOD))
    assert config.model.path == str(tmp_path / "start")
    assert config.data.path == str(tmp_path / "packed") and config.data.batch_tokens == 100
    assert config.run.folder == "/tmp/somewhere"
    assert config.loss.silence == 0.0 and type(config.loss.silence) is float
    assert config.optimizer == OptimizerConfig()
    assert TrainConfig.from_dict(config.to_dict()) == config
    several = TrainConfig.from_toml(
        write(tmp_path, GOOD.replace('"packed"', '["a", "/b"]\nweights = [1, 0.5]\n'))
    )
    assert several.data.paths == (str(tmp_path / "a"), "/b")
    assert several.data.weights == (1.0, 0.5) and config.data.paths == (config.data.path,)
    assert TrainConfig.from_dict(several.to_dict()) == several
    watched = TrainConfig.from_toml(write(tmp_path, GOOD + '[eval]\npath = "held_out"\n'))
    assert watched.eval.path == str(tmp_path / "held_out") and config.eval.path == ""
    nano = TrainConfig.from_toml(write(tmp_path, GOOD.replace('"start"', '"nano"')))
    assert nano.model.path == "nano"


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("[loss]", "[losses]", "config: expected tables .* got 'losses'"),
        ("silence", "silenced", "loss: unknown key 'silenced'; expected one of"),
        ("num_steps = 10", "", "run.num_steps: is missing"),
        ("num_steps = 10", "num_steps = 0", "run.num_steps: expected at least 1, got 0"),
        ("num_steps = 10", 'num_steps = "ten"', "run.num_steps: expected an integer, got 'ten'"),
        ("num_steps = 10", "num_steps = true", "run.num_steps: expected an integer, got True"),
        ("silence = 0", "silence = -1", "loss.silence: expected at least 0, got -1.0"),
        ("silence = 0", "silence = inf", "loss.silence: expected a finite number, got inf"),
        ('path = "start"', 'dtype = "int8"\npath = "x"', "model.dtype: expected one of"),
        ("[loss]", "[optimizer]\nkind = 'sgd'\n[loss]", "optimizer.kind: .* got 'sgd'"),
        ("[loss]", "[optimizer]\nbeta1 = 1.0\n[loss]", "optimizer.beta1: expected 0 to below 1"),
        ('path = "start"', 'device = "tpu"\npath = "x"', "model.device: expected cpu or cuda, got"),
        ("[loss]", "[loss", "cannot be read"),
        ('"packed"', "[]", "data.path: expected at least one path, got an empty list"),
        ('"packed"', '["a", 3]', r"data.path\[1\]: expected a string, got 3"),
        ('"packed"', "3", "data.path: expected a string, got 3"),
        ('"packed"', '"a"\nweights = 2.0', "data.weights: expected a list of numbers, got 2.0"),
        ('"packed"', '"a"\nweights = [1, 2]', "data.weights: expected 1, one for each path, got 2"),
        ('"packed"', '"a"\nweights = [0]', r"data.weights: .* above 0, got \[0.0\]"),
        ('"packed"', '"a"\nbuffer = 0', "data.buffer: expected at least 1, got 0"),
        ("[loss]", "[eval]\nevery = 0\n[loss]", "eval.every: expected at least 1, got 0"),
        ("[model]\n", "model = 3\n[other]\n", "config: expected tables|model must be a table"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, match: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(errors.InvalidArgument, match=match):
        TrainConfig.from_toml(write(tmp_path, GOOD.replace(old, new)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"config: .*none.toml cannot be read"):
        TrainConfig.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize("table", ["model", "run"])
def test_a_table_is_a_table(table: str) -> None:
    raw: dict[str, Any] = {"model": {"path": "x"}, "data": {"path": "x"}}
    raw["run"] = {"folder": "x", "num_steps": 1}
    with pytest.raises(errors.InvalidArgument, match=f"config: {table} must be a table, got int"):
        TrainConfig.from_dict({**raw, table: 3})


def test_the_rate_rises_and_falls() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, min_ratio=0.25)
    rates = [config.rate_at(step, 13) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[8] == pytest.approx(0.625) and rates[12] == 0.25
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert config.rate_at(99, 13) == 0.25
    assert OptimizerConfig(learning_rate=1.0).rate_at(0, 1) == 1.0


def test_only_sampled_streams_have_a_weight() -> None:
    weights = LossConfig(call=2.0).by_stream()
    assert weights[Stream.INPUT] == weights[Stream.FORCED] == 0.0
    assert weights[Stream.TEXT] == 1.0 and weights[Stream.CALL] == 2.0
