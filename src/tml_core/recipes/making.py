"""A recipe carried out: start, datasets, stages, and the model as it is bundled."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import torch

from tml_core.data import build
from tml_core.errors import CheckpointError, InvalidArgument
from tml_core.model.config import ModelConfig, bundled_path
from tml_core.model.weights import load_weights, save_weights
from tml_core.recipes.recipe import Dataset, Recipe, parse_recipe
from tml_core.train.stages import read_stages
from tml_core.train.trainer import finished

__all__ = ["export_model", "make"]

_SEED: Final = 7  # of the random weights a model begins with


def make(
    recipe: Recipe,
    folder: str | Path,
    train: Callable[[Path], Path],
    *,
    scale: float = 1.0,
    workers: int = 1,
    cache: str | Path | None = None,
    progress: Callable[[Dataset, float, float], None] = lambda _dataset, _share, _seconds: None,
) -> Path:
    """Everything from nothing, or what of it is missing in ``folder``; returns the exported model.

    ``train``: runs a file of stages and returns its newest checkpoint (`tml_core.cli.train`).
    ``scale``: makes all datasets so many times as large; the stages are as long as they are.
    ``workers``, ``cache``: as in `tml_core.data.build`. ``progress``: called with the dataset that
    is made, the share of it that is there, and its seconds.

    A ``recipe.toml`` that is in the folder already is used as it is: edit it to make something
    else. Raises what `build` and the trainer raise; InvalidArgument for a scale that is not
    positive; CheckpointError where training was stopped before its end.
    """
    if not scale > 0:
        raise InvalidArgument(f"scale: expected more than 0, got {scale}")
    root = Path(folder)
    start = _write_start(recipe.name, root / "start")
    file = root / "recipe.toml"
    if file.exists():
        recipe = parse_recipe(recipe.name, file.read_text("utf-8"))
    else:
        file.write_text(recipe.text, "utf-8")
    for dataset in recipe.datasets:
        build(
            root / "data" / dataset.name,
            start,
            seed=dataset.seed,
            split="train" if dataset.split == "train" else "held_out",
            num=max(1, round(dataset.num * scale)) if dataset.num else None,
            hours=dataset.hours * scale if dataset.hours else None,
            tasks=tuple(dataset.tasks) or None,
            typed=dataset.typed,
            workers=workers,
            cache=cache,
            progress=partial(progress, dataset),
        )
    checkpoint = train(file)
    if finished(read_stages(file)[-1].config) is None:
        raise CheckpointError(f"make: stopped before its end, at {checkpoint}; run it to go on")
    return export_model(checkpoint, root / recipe.name)


def export_model(checkpoint: str | Path, folder: str | Path) -> Path:
    """A checkpoint of the trainer as a model to serve: bfloat16, without the optimizer.

    Raises CheckpointError for one that is not there.
    """
    source, target = Path(checkpoint), Path(folder)
    config = ModelConfig.from_path(source)
    if not config.is_trained:
        raise CheckpointError(f"export: {source} holds no trained model")
    weights = load_weights(source, config, torch.bfloat16)
    target.mkdir(parents=True, exist_ok=True)
    save_weights(target, weights, config)
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    return target


def _write_start(name: str, folder: Path) -> Path:
    """The bundled model's shape and tokenizer, with random weights."""
    source = bundled_path(name)
    config = replace(ModelConfig.from_path(source), is_trained=False, init_seed=_SEED)
    folder.mkdir(parents=True, exist_ok=True)
    # Written only where it differs: datasets are filed by what these hold.
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    file = folder / "config.json"
    if not file.exists() or file.read_text("utf-8") != text:
        file.write_text(text, "utf-8")
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    return folder
