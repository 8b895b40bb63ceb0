"""Reports as one picture: every suite with its interval and aim beside the baselines, and how far
off in time words came. Needs matplotlib: ``pip install 'tml_core[plot]'``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tml_core.errors import InvalidArgument, MissingExtra
from tml_core.evals.report import Report
from tml_core.evals.suite import Score, Suite
from tml_core.evals.suites import SUITES
from tml_core.media.micro_turns import TICK_MS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_reports"]

_INK: Final = "#22313f"
_AIM: Final = "#c1121f"
_COLORS: Final = ("#2a6f97", "#f4a259", "#7fb069", "#6a4c93", "#8ecae6")
_SILENCE: Final = "#b8c4cc"
_SPAN_TICKS: Final = 12  # of a histogram, to either side


def plot_reports(reports: Sequence[Report], path: Path) -> None:
    """Write a PNG of players side by side; all reports are of the same suites.

    Raises MissingExtra without matplotlib, InvalidArgument if the file cannot be written.
    """
    if not path.parent.is_dir():
        raise InvalidArgument(f"path: cannot write {path}: no such folder")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            "plot_reports: matplotlib is not installed; install it with: "
            "pip install 'tml_core[plot]'"
        ) from error
    suites = [SUITES[name] for name in reports[0].scores]
    shares = [one for one in suites if one.scale == 100.0 and not one.is_lower_better]
    others = [one for one in suites if one not in shares]
    timed = [one for one in suites if one.name in ("timespeak", "cuespeak", "transcribe")]
    height = max(5.0, 1.4 + 0.22 * (len(shares) * (len(reports) + 1)))
    figure = Figure(figsize=(15, height), layout="constrained", facecolor="white")
    columns = [(1.5, shares), (1.0, others), (1.0, timed)]
    widths = [width for width, wanted in columns if wanted]
    parts: Any = figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)
    places = iter(parts[0])
    if shares:
        _bars(next(places).subplots(), shares, reports)
    for wanted, draw in ((others, _one_bar), (timed, _offsets)):
        if wanted:
            rows = next(places).subplots(len(wanted), 1, squeeze=False)[:, 0]
            for axes, suite in zip(rows, wanted, strict=True):
                draw(axes, suite, reports)
    first = reports[0]
    figure.suptitle(
        f"{first.player}: {first.num_items} items a task, split {first.split}, seed {first.seed}; "
        "lines are intervals of 95 %, red is the aim",
        color=_INK,
        fontsize=11,
    )
    handles: list[Any] = [
        figure.axes[0].barh([0], [0], color=_color(reports, at), label=one.player)
        for at, one in enumerate(reports)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(reports), frameon=False)
    figure.savefig(path, dpi=110)


def _bars(axes: "Axes", suites: Sequence[Suite], reports: Sequence[Report]) -> None:
    thickness = 0.8 / len(reports)
    for row, suite in enumerate(suites):
        for at, report in enumerate(reports):
            score = report.scores[suite.name]
            place = row + (at - (len(reports) - 1) / 2) * thickness
            _bar(axes, suite, score, place, thickness, _color(reports, at))
        if suite.aim is not None:
            aim = suite.aim * suite.scale
            axes.plot([aim, aim], [row - 0.45, row + 0.45], color=_AIM, linewidth=1.6, zorder=4)
    axes.set_yticks(range(len(suites)), [one.name for one in suites])
    axes.set_ylim(len(suites) - 0.45, -0.55)
    units = {one.unit for one in suites}
    if units == {"%"} and len(suites) > 1:
        axes.set_xlim(0, 109)
    else:
        axes.set_xlim(left=0)
        axes.margins(x=0.2)
    unit = {"/min": "a minute"}.get(suites[0].unit, suites[0].unit)
    axes.set_xlabel(f"{suites[0].title} ({unit})" if len(suites) == 1 else unit)
    _quiet(axes)


def _bar(
    axes: "Axes", suite: Suite, score: Score, place: float, thickness: float, color: str
) -> None:
    if score.value is None or score.low is None or score.high is None:
        axes.text(0, place, " none", va="center", fontsize=7, color="#8a97a1")
        return
    value, low, high = (one * suite.scale for one in (score.value, score.low, score.high))
    axes.barh(place, value, 0.92 * thickness, color=color, zorder=2)
    axes.plot([low, high], [place, place], color=_INK, linewidth=1.0, zorder=3)
    shown = f" {suite.show(score.value)}"
    axes.text(high, place, shown, va="center", fontsize=7, color=_INK)


def _offsets(axes: "Axes", suite: Suite, reports: Sequence[Report]) -> None:
    """How many ticks late what was due was begun; what is beyond the ends is in the last bars."""
    edges = (np.arange(-_SPAN_TICKS, _SPAN_TICKS + 2) - 0.5) * TICK_MS / 1000
    top = 0.0
    for at, report in enumerate(reports):
        marks = [one.marks[suite.name] for one in report.records if suite.name in one.marks]
        given = [
            ticks for one in marks for ticks in one.facts.get("off", one.facts.get("late", []))
        ]
        late = [ticks for ticks in given if ticks is not None]
        if not late:
            continue
        late_s = np.clip(late, -_SPAN_TICKS, _SPAN_TICKS) * TICK_MS / 1000
        share = np.histogram(late_s, edges)[0] / max(1, len(given))
        top = max(top, float(share.max()))
        label = f"{report.player}: {len(late)} of {len(given)}"
        axes.stairs(share, edges, color=_color(reports, at), fill=at == 0, alpha=0.85, label=label)
    axes.axvline(0.0, color=_AIM, linewidth=1.2)
    axes.set_xlim(float(edges[0]), float(edges[-1]))
    axes.set_ylim(0, max(0.05, 1.3 * top))
    axes.set_title(f"{suite.name}: when the right words came", fontsize=9, color=_INK)
    axes.set_xlabel("seconds late")
    if top:
        axes.legend(frameon=False, fontsize=7, loc="upper left")
    _quiet(axes)


def _one_bar(axes: "Axes", suite: Suite, reports: Sequence[Report]) -> None:
    _bars(axes, [suite], reports)


def _color(reports: Sequence[Report], at: int) -> str:
    """One a player; silence is grey wherever it stands."""
    if reports[at].player == "silent":
        return _SILENCE
    heard = [one.player for one in reports if one.player != "silent"]
    return _COLORS[heard.index(reports[at].player) % len(_COLORS)]


def _quiet(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.xaxis.label.set_fontsize(8)
    axes.grid(axis="x", color="#e3e8ec", zorder=0)
    axes.set_axisbelow(True)
