"""What a recipe file says: datasets for `tml_core.data.build`, and stages for the trainer."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

from tml_core.data import SPLITS, TASKS
from tml_core.data.bank import Split
from tml_core.errors import InvalidArgument

__all__ = ["Dataset", "Recipe", "read_recipe", "recipe_names"]

_KEYS: Final = frozenset({"name", "tasks", "split", "seed", "hours", "num"})


@dataclass(frozen=True)
class Dataset:
    """One dataset. ``hours`` or ``num``: how much of it; the other is None."""

    name: str
    split: Split
    seed: int
    tasks: tuple[str, ...] | None
    hours: float | None
    num: int | None


@dataclass(frozen=True)
class Recipe:
    """``name``: of the bundled model. ``datasets``: in order. ``stages``: the rest of the file, as
    `tml_core.train.stages.read_stages` reads it."""

    name: str
    datasets: tuple[Dataset, ...]
    stages: str


def recipe_names() -> tuple[str, ...]:
    """The recipes of this package."""
    found = (file.name for file in files(__package__).iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml")))


def read_recipe(name: str) -> Recipe:
    """A recipe by its name. Raises InvalidArgument for one that is not there."""
    if name not in recipe_names():
        raise InvalidArgument(f"recipe: expected one of {list(recipe_names())}, got {name!r}")
    return parse_recipe(name, files(__package__).joinpath(f"{name}.toml").read_text("utf-8"))


def parse_recipe(name: str, text: str) -> Recipe:
    """A recipe from its text. Raises InvalidArgument naming what is wrong with which dataset."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"recipe: {name} is not TOML: {error}") from error
    tables = raw.get("dataset")
    if not isinstance(tables, list) or not tables:
        raise InvalidArgument("recipe: datasets must be written as [[dataset]], once for each")
    datasets = tuple(_dataset(index, table) for index, table in enumerate(tables))
    if len({one.name for one in datasets}) != len(datasets):
        raise InvalidArgument("recipe: expected datasets of different names")
    # The trainer refuses tables it does not know, so the datasets stay behind.
    _, mark, stages = text.partition("[model]")
    if not mark or "[[dataset]]" in stages:
        raise InvalidArgument("recipe: expected the datasets before [model]")
    return Recipe(name, datasets, mark + stages)


def _dataset(index: int, raw: dict[str, Any]) -> Dataset:
    where = f"dataset[{index}]"
    if unknown := raw.keys() - _KEYS:
        raise InvalidArgument(f"{where}: expected keys {sorted(_KEYS)}, got {sorted(unknown)}")
    name, tasks = raw.get("name"), raw.get("tasks")
    if not isinstance(name, str) or not name.isidentifier():
        raise InvalidArgument(f"{where}.name: expected a word, got {name!r}")
    split = raw.get("split", "train")
    if split not in SPLITS:
        raise InvalidArgument(f"{where}.split: expected one of {list(SPLITS)}, got {split!r}")
    if tasks is not None and not set(tasks) <= set(TASKS):
        raise InvalidArgument(f"{where}.tasks: expected some of {list(TASKS)}, got {tasks!r}")
    if ("hours" in raw) == ("num" in raw):
        raise InvalidArgument(f"{where}: expected one of hours and num")
    return Dataset(
        name,
        split,
        raw.get("seed", 0),
        None if tasks is None else tuple(tasks),
        raw.get("hours"),
        raw.get("num"),
    )
