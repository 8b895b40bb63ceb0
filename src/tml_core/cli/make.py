"""``tml-core make``: a bundled model from nothing: its data, its training, its weights."""

from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tml_core.cli.data import show_voices
from tml_core.cli.train import run_train
from tml_core.recipes import Dataset, make, read_recipe

__all__ = ["run_make"]


def run_make(
    name: str, folder: Path, scale: float, workers: int, cache: Path | None, console: Console
) -> Path:
    """Carry out the recipe of ``name`` in ``folder``, or go on with it; returns the model.

    Raises what `tml_core.recipes.make` raises.
    """
    recipe = read_recipe(name)
    show_voices(console, None)
    bar = Progress(
        TextColumn("data"),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[hours]:.2f} h"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def show(dataset: Dataset, share: float, seconds: float) -> None:
        if dataset.name not in tasks:
            bar.start()
            tasks[dataset.name] = bar.add_task(dataset.name, total=1.0, hours=0.0)
        bar.update(tasks[dataset.name], completed=share, hours=seconds / 3600.0)

    def train(stages: Path) -> Path:
        bar.stop()
        return run_train(stages, console)

    try:
        made = make(recipe, folder, train, scale=scale, workers=workers, cache=cache, progress=show)
    finally:
        bar.stop()
    console.print(f"model: {made}", soft_wrap=True)
    return made
