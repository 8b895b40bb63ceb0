"""What a recipe file says: datasets for `tml_core.data.build`, and stages for the trainer."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files

from tml_core.data import SPLITS, TASKS
from tml_core.errors import InvalidArgument
from tml_core.train.config import Paths, read_table

__all__ = ["Dataset", "Recipe", "parse_recipe", "read_recipe", "recipe_names"]


@dataclass(frozen=True)
class Dataset:
    """One dataset, as `tml_core.data.build` makes it in ``data/NAME``. ``tasks``: none stands for
    all. ``typed``: the share of requests that are typed. One of ``hours`` and ``num``
    (interactions) says how much of it."""

    name: str
    split: str = "train"
    seed: int = 0
    tasks: Paths = ()
    typed: float = 0.0
    hours: float = 0.0
    num: int = 0

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise InvalidArgument(f"dataset.name: expected a word, got {self.name!r}")
        where = f"dataset {self.name}"
        if self.split not in SPLITS:
            raise InvalidArgument(
                f"{where}: split: expected one of {list(SPLITS)}, got {self.split!r}"
            )
        if not set(self.tasks) <= set(TASKS):
            raise InvalidArgument(
                f"{where}: tasks: expected a list of {list(TASKS)}, got {self.tasks!r}"
            )
        if min(self.hours, self.num) != 0 or max(self.hours, self.num) <= 0:
            raise InvalidArgument(f"{where}: expected one of hours and num, above 0")


@dataclass(frozen=True)
class Recipe:
    """``name``: of the bundled model. ``datasets``: in order. ``text``: the whole file, of which
    `tml_core.train.stages.read_stages` reads the stages."""

    name: str
    datasets: tuple[Dataset, ...]
    text: str


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
    datasets = tuple(
        read_table(Dataset, f"dataset[{index}]", table) for index, table in enumerate(tables)
    )
    if len({one.name for one in datasets}) != len(datasets):
        raise InvalidArgument("recipe: expected datasets of different names")
    return Recipe(name, datasets, text)
