"""A load report as a picture. Needs matplotlib: ``pip install tml_core[plot]``."""

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tml_core.errors import InvalidArgument, MissingExtra
from tml_core.load.report import Capacity, LoadReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_capacity", "plot_report"]

_INK: Final = "#22313f"
_SERVED: Final = "#2a6f97"
_LATE: Final = "#c1121f"
_DROPPED: Final = "#f4a259"
_CURVES: Final = (("p50", "#8ecae6"), ("p99", "#2a6f97"), ("p99_9", "#6a4c93"))
_TITLE_WIDTH: Final = 130
_MANY: Final = 4000  # points a scatter can show without becoming a band


def plot_report(report: LoadReport, path: Path, title: str) -> None:
    """Write a PNG of one run: every tick over time, the slack left, the tail of the latencies.

    Raises MissingExtra without matplotlib, InvalidArgument if the file cannot be written.
    """
    figure = _figure(title)
    over_time, slack, tail = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    _plot_ticks(over_time, report)
    _plot_slack(slack, report)
    _plot_tail(tail, report)
    _save(figure, path)


def plot_capacity(capacity: Capacity, path: Path, title: str) -> None:
    """Write a PNG of a capacity search: latency and misses over the number of sessions, and the
    slack of the best level. Raises as `plot_report`."""
    figure = _figure(title)
    latency, misses, slack = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    _plot_levels(latency, capacity)
    _plot_misses(misses, capacity)
    levels = {one.spec.num_sessions: one for one in capacity.levels}
    shown = levels.get(capacity.num_sessions, capacity.levels[0])
    _plot_slack(slack, shown)
    slack.set_title(f"slack at {shown.spec.num_sessions} sessions")
    _save(figure, path)


def _plot_ticks(axes: "Axes", report: LoadReport) -> None:
    deadline_ms = report.spec.deadline_ms
    wanted = [one for one in report.outcomes if one.kind not in ("barged", "left")]
    step = max(1, len(wanted) // _MANY)
    groups = {
        f"in time ({report.num_ticks - report.num_missed})": (
            _SERVED,
            [one for one in wanted if one.latency_ms <= deadline_ms][::step],
        ),
        "late": (_LATE, [one for one in wanted if deadline_ms < one.latency_ms < np.inf]),
        "never answered": (_DROPPED, [one for one in wanted if one.latency_ms == np.inf]),
    }
    finite = [one.latency_ms for one in wanted if one.latency_ms < np.inf]
    top = max([1.15 * deadline_ms, *(1.05 * one for one in finite)])
    for name, (color, group) in groups.items():
        if group:
            label = name if "(" in name else f"{name} ({len(group)})"
            times = [one.at_s for one in group]
            values = [min(one.latency_ms, 0.98 * top) for one in group]
            axes.scatter(times, values, s=5, color=color, alpha=0.6, linewidths=0, label=label)
    _mark_deadline(axes, deadline_ms)
    axes.set(xlabel="time of the run (s)", ylabel="chunk in to last token out (ms)", ylim=(0, top))
    axes.set_title(f"{report.spec.num_sessions} sessions, each tick")
    if wanted:
        axes.legend(
            loc="upper left", bbox_to_anchor=(0, -0.16), ncols=3, frameon=False, markerscale=2
        )


def _plot_slack(axes: "Axes", report: LoadReport) -> None:
    inner = np.array(report.slack.edges[1:-1])
    width = inner[1] - inner[0]
    left = np.concatenate(([inner[0] - width], inner))
    counts = np.array(report.slack.counts)
    used = counts.nonzero()[0]
    low, high = (left[used[0]], left[used[-1]] + width) if len(used) else (0, width)
    colors = [_LATE if one < 0 else _SERVED for one in left]
    axes.bar(left, counts, width=0.9 * width, align="edge", color=colors)
    axes.axvline(0, color=_INK, linewidth=1, linestyle="--")
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel="slack (ms, 20 ms bins)", ylabel="ticks")
    axes.set_ylim(bottom=0)
    axes.set_xlim(min(low, -width), max(high, width))
    axes.set_title("slack left")


def _plot_tail(axes: "Axes", report: LoadReport) -> None:
    values = np.sort([one.latency_ms for one in report.outcomes if one.kind == "served"])
    if len(values):
        # Share of all ticks that took longer; unanswered ones took longer than anything.
        above = 1 - np.arange(1, len(values) + 1) / max(report.num_ticks, len(values))
        axes.step(values, np.maximum(above, 0.5 / report.num_ticks), where="post", color=_SERVED)
    _mark_deadline(axes, report.spec.deadline_ms, is_vertical=True)
    axes.set_yscale("log")
    axes.set(xlabel="latency (ms)", ylabel="share of ticks above")
    axes.set_xlim(left=0)
    axes.set_title(f"tail: {100 * report.miss_rate:.2f} % missed")


def _plot_levels(axes: "Axes", capacity: Capacity) -> None:
    deadline_ms = capacity.levels[0].spec.deadline_ms
    for name, color in _CURVES:
        points = [
            (one.spec.num_sessions, getattr(one.latency, name))
            for one in capacity.levels
            if one.latency is not None and np.isfinite(getattr(one.latency, name))
        ]
        if points:
            counts, values = zip(*points, strict=True)
            label = name.replace("_", ".")
            axes.plot(counts, values, marker="o", markersize=4, color=color, label=label)
    _mark_deadline(axes, deadline_ms)
    axes.set(xlabel="sessions", ylabel="chunk in to last token out (ms)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=3, frameon=False)
    _count_sessions(axes)
    axes.set_title(f"capacity: {capacity.num_sessions}" + ("+" * capacity.is_open_ended))


def _plot_misses(axes: "Axes", capacity: Capacity) -> None:
    counts = [one.spec.num_sessions for one in capacity.levels]
    rates = [one.miss_rate for one in capacity.levels]
    floor = capacity.limit / 10
    colors = [_SERVED if rate < capacity.limit else _LATE for rate in rates]
    shown = [max(rate, floor) for rate in rates]
    axes.vlines(counts, floor, shown, color=colors)
    axes.scatter(counts, shown, color=colors, s=24, zorder=3)
    axes.axhline(capacity.limit, color=_INK, linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(floor / 1.3, 1.3)
    axes.set(xlabel="sessions", ylabel="share of ticks missed (lowest line: none)")
    _count_sessions(axes)
    axes.set_title(f"limit {100 * capacity.limit:g} %")


def _count_sessions(axes: "Axes") -> None:
    axes.locator_params(axis="x", integer=True)


def _mark_deadline(axes: "Axes", deadline_ms: float, *, is_vertical: bool = False) -> None:
    draw = axes.axvline if is_vertical else axes.axhline
    draw(deadline_ms, color=_INK, linewidth=1, linestyle="--")


def _figure(title: str) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            "plot: matplotlib is not installed; pip install 'tml_core[plot]'"
        ) from error
    figure = Figure(figsize=(13, 4.2), dpi=130, layout="constrained")
    figure.suptitle(fill(title, _TITLE_WIDTH), fontsize=11, color=_INK)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    for axes in figure.axes:
        style: Any = axes.spines
        style[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e9ec", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.title.set_fontsize(10)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise InvalidArgument(f"plot: cannot write {path}: {error.strerror}") from error
