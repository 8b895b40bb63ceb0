"""``tml-core eval``: suites of held-out interactions, a model beside its baselines."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from tml_core.data import SpeechBank, cache_folder
from tml_core.data.bank import SPLITS, Split
from tml_core.engine.model import load_model
from tml_core.errors import InvalidArgument
from tml_core.evals import (
    SUITES,
    CascadePlayer,
    ModelPlayer,
    Player,
    Report,
    Score,
    SilentPlayer,
    evaluate_all,
)
from tml_core.evals.plot import plot_reports
from tml_core.evals.suites import chosen_suites

__all__ = ["BASELINES", "EvalOptions", "as_split", "run_eval"]

_QUIET, _GOOD, _BAD = "grey62", "spring_green3", "red1"
_MAX_GROUPS: Final = 8  # more are only in the JSON

# Name, and who that is, given the first model.
BASELINES: Final[dict[str, Callable[[ModelPlayer], Player]]] = {
    "silent": lambda _player: SilentPlayer(),
    "cascade": lambda _player: CascadePlayer(),
    "no-clock": lambda player: player.without_clock(),
}


@dataclass(frozen=True)
class EvalOptions:
    """Which suites of which models, beside which of `BASELINES` of the first. ``out``: a folder for
    a JSON a player and the picture ``eval.png``. ``is_markdown``: print only the table, as
    Markdown."""

    suites: tuple[str, ...] = ("all",)
    models: tuple[str, ...] = ("nano",)
    num_items: int = 100
    seed: int = 0
    split: Split = "held_out"
    typed: float = 0.0
    baselines: tuple[str, ...] = ("silent",)
    num_sessions: int = 16
    dtype: str = "bfloat16"
    out: Path | None = None
    is_markdown: bool = False


def as_split(name: str) -> Split:
    """A split by name. Raises InvalidArgument for another one."""
    for split in SPLITS:
        if split == name:
            return split
    raise InvalidArgument(f"split: expected one of {list(SPLITS)}, got {name!r}")


def run_eval(options: EvalOptions, console: Console) -> list[Report]:
    """Play, show the table, write what was asked for; the model's report first.

    Raises what `load_model`, `evaluate` and `SpeechBank` raise, InvalidArgument for an unknown
    suite or baseline or a folder that cannot be made.
    """
    suites = chosen_suites(options.suites)
    for name in options.baselines:
        if name not in BASELINES:
            raise InvalidArgument(f"baselines: expected some of {list(BASELINES)}, got {name!r}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    names = _names(options.models)
    models = [_load(options, *pair) for pair in zip(options.models, names, strict=True)]
    players: list[Player] = [*models]
    players += [BASELINES[name](models[0]) for name in options.baselines]
    with SpeechBank(cache=cache_folder()) as bank, _bar(console) as watch:
        reports = evaluate_all(
            players,
            [suite.name for suite in suites],
            options.num_items,
            options.seed,
            split=options.split,
            typed=options.typed,
            bank=bank,
            watch=watch,
        )
    if options.out is not None:
        for report in reports:
            report.write(options.out / f"{report.player.replace(' ', '-')}.json")
        plot_reports(reports, options.out / "eval.png")
    if options.is_markdown:
        console.print(markdown(reports), markup=False, soft_wrap=True)
    else:
        untrained = [one.name for one in models if not one.model.is_trained]
        console.print(_view(reports, untrained), soft_wrap=True)
    return reports


def _load(options: EvalOptions, path: str, name: str) -> ModelPlayer:
    model = load_model(path, dtype=options.dtype, max_sequences=options.num_sessions)
    return ModelPlayer(model, name=name)


def _names(paths: Sequence[str]) -> list[str]:
    """As much of the ends of the paths as tells them apart."""
    if len(set(paths)) < len(paths):
        raise InvalidArgument(f"model: expected different ones, got {list(paths)}")
    parts = [Path(path).parts for path in paths]
    num = 1
    while len(set(names := ["-".join(one[-num:]).strip("/") for one in parts])) < len(paths):
        num += 1
    return names


def markdown(reports: Sequence[Report]) -> str:
    """The table as Markdown: a suite a row, a player a column."""
    names = [one.player for one in reports]
    lines = [
        "| suite | " + " | ".join(names) + " | aim |",
        "| --- |" + " ---: |" * (len(names) + 1),
    ]
    for name in reports[0].scores:
        suite = SUITES[name]
        cells = [_cell(name, one.scores[name]) for one in reports]
        lines.append(f"| {name}: {suite.title} | " + " | ".join(cells) + f" | {_aim(name)} |")
    return "\n".join([*lines, "", _footnote(reports[0])])


def _view(reports: Sequence[Report], untrained: Sequence[str]) -> RenderableType:
    table = Table("suite", header_style=_QUIET, box=None, pad_edge=False, padding=(0, 1))
    for one in reports:
        table.add_column(one.player, justify="right")
    table.add_column("aim", justify="right", style=_QUIET)
    for name, score in reports[0].scores.items():
        suite = SUITES[name]
        reached = suite.reaches(score.value)
        style = "" if reached is None else _GOOD if reached else _BAD
        cells = [_two_lines(name, score, style)]
        cells += [_two_lines(name, one.scores[name], "") for one in reports[1:]]
        title = Text.assemble(name, "\n", (suite.title, _QUIET))
        table.add_row(title, *cells, _aim(name))
    parts: list[RenderableType] = [table, Text(), _details(reports[0]), Text()]
    parts += [Text(_footnote(reports[0]), style=_QUIET)]
    parts += [
        Text(
            f"{one.player}: {one.items_per_s:.1f} items/s, {one.times_real_time:.0f} x real time",
            style=_QUIET,
        )
        for one in reports
    ]
    parts += [
        Text(f"{name} is untrained: what it says is noise.", style=_BAD) for name in untrained
    ]
    return Group(*parts)


def _two_lines(name: str, score: Score, style: str) -> Text:
    value, _, interval = _cell(name, score).partition(" [")
    return Text.assemble((value, style), ("\n[" + interval if interval else "", _QUIET))


def _details(report: Report) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=_QUIET)
    grid.add_column(style=_QUIET)
    for name, score in report.scores.items():
        suite = SUITES[name]
        # What other windows would have made right is for the JSON.
        shown = [pair for pair in score.extras.items() if not pair[0].startswith("within ")]
        told = [f"{what} {value:.2f}" for what, value in shown]
        if len(score.groups) <= _MAX_GROUPS:
            for what, (value, num) in score.groups.items():
                told.append(f"{what or 'all'} {suite.show(value)} of {num}")
        if told:
            grid.add_row(name, ", ".join(told))
    return grid


def _cell(name: str, score: Score) -> str:
    suite = SUITES[name]
    if score.value is None or score.low is None or score.high is None:
        return "none"
    low, high = (suite.show(value).split()[0].rstrip("%") for value in (score.low, score.high))
    return f"{suite.show(score.value)} [{low}, {high}]"


def _aim(name: str) -> str:
    suite = SUITES[name]
    if suite.aim is None:
        return ""
    return f"{'≤' if suite.is_lower_better else '≥'} {suite.show(suite.aim)}"


def _typed(report: Report) -> str:
    return f", {report.typed:.0%} of the requests typed" if report.typed else ""


def _footnote(report: Report) -> str:
    return (
        f"{report.num_items} items a task, split {report.split}, seed {report.seed}, "
        f"voices of {', '.join(report.engines)}{_typed(report)}; intervals of 95 %."
    )


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar a player; nothing where the console is no terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    shown: dict[str, TaskID] = {}

    def watch(name: str, done: int, total: int) -> None:
        if name not in shown:
            shown[name] = bar.add_task(name, total=total)
        bar.update(shown[name], completed=done)

    with bar:
        yield watch
