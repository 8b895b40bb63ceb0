"""A run of stages: each begins with the last one's weights and has data and a schedule of its own.

    [model]
    path = "start"
    [run]
    folder = "runs/mine"

    [[stage]]
    name = "listen"
    data.path = "data/listen"
    optimizer.learning_rate = 1e-3
    run.num_steps = 4000

    [[stage]]
    name = "speak"
    ...

A stage may set any key of any table but ``model.path`` and ``run.folder``; what it does not set is
the file's, or the default. It lives in ``run.folder``/``name`` and is a run like any other: the
optimizer and the schedule begin anew in each.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tml_core.errors import InvalidArgument
from tml_core.train.checkpoint import CheckpointFolder
from tml_core.train.config import TABLES, TrainConfig, read_toml
from tml_core.train.metrics import MetricsFile, plot_losses

__all__ = ["Stage", "plot_stages", "read_stages"]


@dataclass(frozen=True)
class Stage:
    """``name``: empty for the only one of a file without stages."""

    name: str
    config: TrainConfig


def read_stages(path: str | Path) -> tuple[Stage, ...]:
    """The stages of a file in order; its datasets are `tml_core.recipes`' to make. Raises
    InvalidArgument naming what is wrong with which stage."""
    raw = read_toml(path)
    raw.pop("dataset", None)
    base = Path(path).parent
    tables = raw.pop("stage", None)
    if tables is None:
        return (Stage("", TrainConfig.from_dict(raw, base)),)
    if not isinstance(tables, list) or not tables:
        raise InvalidArgument("config: stage must be written as [[stage]], once for each")
    stages: list[Stage] = []
    for number, own in enumerate(tables):
        name = _name(number, own, {stage.name for stage in stages})
        try:
            config = TrainConfig.from_dict(_merged(raw, own), base)
        except InvalidArgument as error:
            raise InvalidArgument(f"stage {name}: {error}") from error
        config = replace(config, run=replace(config.run, folder=f"{config.run.folder}/{name}"))
        if stages:
            before = str(_last_checkpoint(stages[-1].config))
            config = replace(config, model=replace(config.model, path=before))
        stages.append(Stage(name, config))
    return tuple(stages)


def plot_stages(stages: Sequence[Stage]) -> None:
    """Draw ``loss.png`` of all stages so far, end to end, beside their folders.

    Raises MissingExtra without matplotlib.
    """
    rows: list[dict[str, Any]] = []
    begins: dict[str, int] = {}
    num_before = 0
    for stage in stages:
        begins[stage.name] = num_before
        own = MetricsFile(Path(stage.config.run.folder)).read()
        rows += [{**row, "step": num_before + row["step"]} for row in own]
        num_before += stage.config.run.num_steps
    plot_losses(rows, Path(stages[0].config.run.folder).parent / "loss.png", begins)


def _last_checkpoint(config: TrainConfig) -> Path:
    """Where the run's last one will be."""
    return CheckpointFolder(Path(config.run.folder) / "checkpoints").path(config.run.num_steps)


def _name(number: int, own: object, others: set[str]) -> str:
    name = own.get("name") if isinstance(own, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise InvalidArgument(
            f"stage[{number}].name: expected letters, digits, - and _, got {name!r}"
        )
    if name in others:
        raise InvalidArgument(f"stage[{number}].name: {name!r} is the name of another stage")
    return name


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a file under those of a stage."""
    merged = dict(common)
    for table, values in own.items():
        if table == "name":
            continue
        if table not in TABLES or not isinstance(values, dict):
            raise InvalidArgument(f"expected tables {sorted(TABLES)}, got {table!r}")
        for key in ("path",) if table == "model" else ("folder",) if table == "run" else ():
            if key in values:
                raise InvalidArgument(f"{table}.{key}: is the same for all stages of a file")
        before = common.get(table, {})
        merged[table] = {**before, **values} if isinstance(before, dict) else before
    return merged
