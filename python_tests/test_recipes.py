"""Recipes: what is in the files, and that a folder goes on where it was interrupted."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from byte_model import BYTE_MODEL
from tml_core import errors
from tml_core.cli import make as cli_make
from tml_core.data import TASKS
from tml_core.model.config import ModelConfig
from tml_core.model.weights import expected_shapes, load_weights
from tml_core.recipes import Recipe, export_model, make, making, read_recipe, recipe_names
from tml_core.recipes.recipe import parse_recipe
from tml_core.train.stages import read_stages

TINY = """
[[dataset]]
name = "few"
tasks = ["echo"]
seed = 4
num = 3

[model]
path = "start"
[data]
path = "data/few"
batch_tokens = 256
[run]
folder = "run"
[[stage]]
name = "one"
run.num_steps = 2
[[stage]]
name = "two"
run.num_steps = 1
"""

MORE = """
[[dataset]]
name = "more"
tasks = ["sum"]
num = 1

"""


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_names_data_that_can_be_made_and_stages_that_can_run(
    name: str, tmp_path: Path
) -> None:
    recipe = read_recipe(name)
    made = {f"data/{one.name}" for one in recipe.datasets}
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.text)
    stages = read_stages(file)
    assert [stage.name for stage in stages] == ["listen", "act", "interact"]
    for stage in stages:
        paths = {*stage.config.data.paths, str(stage.config.eval.path)}
        assert {str(Path(path).relative_to(tmp_path)) for path in paths} <= made
    for one in recipe.datasets:
        assert set(one.tasks or TASKS) <= set(TASKS)
    learned = {one.seed for one in recipe.datasets if one.split == "train"}
    assert {one.split for one in recipe.datasets} == {"train", "held_out"} and len(learned) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seed = 4", "sed = 4"), r"dataset\[0\]: unknown key 'sed'"),
        (("seed = 4", 'seed = "x"'), r"dataset\[0\].seed: expected an integer, got 'x'"),
        (('"few"\ntasks', '"a few"\ntasks'), r"dataset.name: expected a word, got 'a few'"),
        (("num = 3", 'num = 3\nsplit = "test"'), r"dataset few: split: .*'test'"),
        (('"echo"', '"sing"'), r"dataset few: tasks: expected a list of .*'sing'"),
        (("num = 3", ""), r"dataset few: expected one of hours and num"),
        (("num = 3", "num = -3"), r"dataset few: expected one of hours and num"),
        (("num = 3", "num = 3\nhours = 1.0"), r"dataset few: expected one of hours and num"),
        (("[[dataset]]", "[dataset]"), r"datasets must be written as \[\[dataset\]\]"),
        (("[data]", "[data"), r"recipe: tiny is not TOML"),
    ],
)
def test_a_wrong_recipe_is_refused(change: tuple[str, str], message: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=message):
        parse_recipe("tiny", TINY.replace(*change))
    with pytest.raises(errors.InvalidArgument, match=r"recipe: expected one of .*'nano'.*'mega'"):
        read_recipe("mega")


def test_from_data_to_weights_and_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "bundled_path", lambda _name: BYTE_MODEL)
    recipe = parse_recipe("tiny", TINY)
    monkeypatch.setattr(cli_make, "read_recipe", lambda _name: recipe)
    out, console = tmp_path / "out", Console(record=True, width=120)

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> Path:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(cli_make, "run_train", interrupt)
        with pytest.raises(Interrupted):
            cli_make.run_make("tiny", out, 1.0, 1, tmp_path / "speech", console)
    with monkeypatch.context() as patch:
        patch.setattr(cli_make, "run_train", lambda *_: out / "start")
        with pytest.raises(errors.CheckpointError, match="make: stopped before its end, at"):
            cli_make.run_make("tiny", out, 1.0, 1, tmp_path / "speech", console)
    assert not (out / "tiny").exists()
    shard = out / "data" / "few" / "shard-00000.safetensors"
    before = shard.stat().st_mtime_ns

    made = cli_make.run_make("tiny", out, 1.0, 1, tmp_path / "speech", console)
    assert shard.stat().st_mtime_ns == before
    config = ModelConfig.from_path(made)
    assert config.is_trained and config.init_seed is None
    weights = load_weights(made, config, torch.bfloat16)
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        name: tuple(shape) for name, shape in expected_shapes(config).items()
    }
    last = out / "run" / "two" / "checkpoints" / "step-00000001"
    trained = load_weights(last, config, torch.bfloat16)
    assert all(torch.equal(weights[name], trained[name]) for name in weights)
    start = load_weights(out / "start", ModelConfig.from_path(out / "start"), torch.bfloat16)
    assert any(not torch.equal(weights[name], start[name]) for name in weights)
    shown = console.export_text()
    assert f"model: {made}" in shown and "voices of espeak" in shown
    assert not (made / "optimizer.safetensors").exists()

    # Nothing is made again, and a recipe that was edited is what counts.
    edited = TINY.replace('"two"', '"three"').replace("[model]", MORE + "[model]")
    (out / "recipe.toml").write_text(edited)
    again = cli_make.run_make("tiny", out, 1.0, 1, tmp_path / "speech", console)
    assert again == made and (out / "run" / "three" / "checkpoints").is_dir()
    assert (out / "data" / "more" / "dataset.json").is_file()


def test_what_cannot_be_made_or_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"scale: expected more than 0, got 0"):
        make(Recipe("nano", (), ""), tmp_path, lambda path: path, scale=0.0)
    config = json.loads((BYTE_MODEL / "config.json").read_text())
    assert config["trained"] is False
    with pytest.raises(errors.CheckpointError, match=r"export: .* holds no trained model"):
        export_model(BYTE_MODEL, tmp_path / "out")
