"""``tml-core load``: paced sessions on a live engine, with faults, and how many of them fit."""

import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tml_core import _ext
from tml_core.engine.model import Model, load_model
from tml_core.errors import InvalidArgument, TmlError
from tml_core.layout.chunk import Chunk, as_chunk
from tml_core.load.drive import Progress as LoadProgress
from tml_core.load.drive import run_load
from tml_core.load.plan import LoadSpec
from tml_core.load.plot import plot_capacity, plot_report
from tml_core.load.report import Capacity, LoadReport, Spread, find_capacity
from tml_core.media.clips import clips
from tml_core.media.micro_turns import micro_turns
from tml_core.ops._common import num_threads
from tml_core.session import Engine

__all__ = ["LoadOptions", "run_load_command"]

_QUIET, _GOOD, _WARNED, _BAD = "grey62", "spring_green3", "gold3", "bold red1"
# A client that leaves is replaced before its seat is sure to be free.
_SPARE_SEATS: Final = 2
_BAR_WIDTH: Final = 30


@dataclass(frozen=True)
class LoadOptions:
    """What to load with what. ``max_sessions``: search for the most that fit, up to so many."""

    spec: LoadSpec = field(default_factory=LoadSpec)
    model: str = "nano"
    dtype: str = "bfloat16"
    has_video: bool = True
    max_sessions: int | None = None
    json_path: Path | None = None
    plot_path: Path | None = None


def run_load_command(options: LoadOptions, console: Console) -> LoadReport | Capacity:
    """Run, show, and write what was asked for. Nothing may be left in the engine afterwards.

    Raises what `load_model`, `run_load` and `find_capacity` raise, InvalidArgument for a file that
    cannot be written.
    """
    for name, path in (("json", options.json_path), ("plot", options.plot_path)):
        if path is not None and not path.parent.is_dir():
            raise InvalidArgument(f"{name}: cannot write {path}: no such folder")
    spec = options.spec
    most = options.max_sessions or spec.num_sessions
    model = load_model(options.model, dtype=options.dtype, max_sequences=most + _SPARE_SEATS)
    chunks = _recording(options.has_video)
    title = _title(options, model)
    console.print(Text(title, style=_QUIET), soft_wrap=True)
    found: LoadReport | Capacity
    if options.max_sessions is None:
        with _bar(console) as show:
            found = _run(model, spec, chunks, show)
        console.print(_report_view(found), soft_wrap=True)
    else:

        def level(count: int) -> LoadReport:
            with _bar(console) as show:
                report = _run(model, replace(spec, num_sessions=count), chunks, show)
            console.print(_level_line(report), soft_wrap=True)
            return report

        found = find_capacity(level, options.max_sessions, start=spec.num_sessions)
        console.print(_capacity_view(found), soft_wrap=True)
    _write(options, found, model, title)
    return found


def _run(
    model: Model, spec: LoadSpec, chunks: list[Chunk], show: Callable[[LoadProgress], None]
) -> LoadReport:
    with Engine(model) as engine:
        report = run_load(engine, spec, chunks, watch=show)
        if engine.num_sessions:
            raise TmlError(f"load: {engine.num_sessions} sessions are still open")
    held = model.store.audit()
    if held.num_sequences or held.global_pages_held or held.sliding_pages_held:
        raise TmlError(f"load: pages are still held after the run: {held}")
    return report


def _recording(has_video: bool) -> list[Chunk]:
    audio, video = clips()
    return [as_chunk(one) for one in micro_turns(audio, video if has_video else None)]


def _title(options: LoadOptions, model: Model) -> str:
    spec = options.spec
    faults = [
        f"{value:g} {name} a minute"
        for name, value in (
            ("stalls", spec.stalls),
            ("disconnects", spec.disconnects),
            ("barge-ins", spec.barge_ins),
        )
        if value
    ]
    if spec.jitter_ms:
        faults.insert(0, f"jitter {spec.jitter_ms:g} ms")
    return (
        f"{Path(options.model).name} ({'' if model.is_trained else 'untrained, '}"
        f"{str(model.dtype).removeprefix('torch.')}, {num_threads()} threads, {_ext.isa()}), "
        f"{'sound and video' if options.has_video else 'sound'}, {spec.phase} phases, "
        f"{', '.join(faults) or 'no faults'}, deadline {spec.deadline_ms:g} ms"
    )


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[LoadProgress], None]]:
    """A bar with what has been missed so far; nothing where the console is no terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[seen]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task: TaskID = bar.add_task("load", total=None, seen="")

    def show(seen: LoadProgress) -> None:
        slowest = "" if seen.recent_ms is None else f", lately at most {seen.recent_ms:.0f} ms"
        words = f"{seen.num_missed} of {seen.num_ticks} ticks missed{slowest}"
        bar.update(task, total=seen.total_s, completed=seen.elapsed_s, seen=words)

    with bar:
        yield show


def _report_view(report: LoadReport) -> RenderableType:
    table = _table("ms", "p50", "p90", "p99", "p99.9", "most")
    rows = {
        "chunk in to last token out": report.latency,
        "  engine: until begun": report.phases.get("queued"),
        "  engine: input half": report.phases.get("prefill"),
        "  engine: until first token": report.phases.get("first_token"),
        "  engine: output half": report.phases.get("decode"),
        "client's time in append": report.append,
        "barge-in to end of turn": report.cancel,
        "generator late by": report.generator,
    }
    for name, spread in rows.items():
        if spread is not None:
            table.add_row(name, *_cells(spread))
    parts: list[RenderableType] = [table, _slack_view(report), _verdict(report)]
    if report.work is not None:
        work = report.work
        parts.append(
            Text(
                f"engine thread: {work.host_us_per_turn:.0f} us a turn outside kernels, "
                f"{100 * work.kernel_share:.1f} % of its work in them, "
                f"{work.tokens_per_step:.1f} positions a step"
            )
        )
    if report.is_generator_late:
        parts.append(
            Text("The generator itself was late: part of this is not the engine's.", style=_WARNED)
        )
    return Group(*parts)


def _slack_view(report: LoadReport) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style=_QUIET)
    grid.add_column()
    grid.add_column(justify="right")
    counts, edges = report.slack.counts, report.slack.edges
    used = [i for i, count in enumerate(counts) if count]
    for i in range(used[0], used[-1] + 1) if used else ():
        low, high = edges[i], edges[i + 1]
        words = "late or never" if math.isinf(low) else f"{low:.0f} to {high:.0f}"
        size = math.ceil(_BAR_WIDTH * counts[i] / max(counts))
        style = _BAD if low < 0 else _GOOD
        grid.add_row(words, Text("█" * size, style=style), str(counts[i]))
    return Group(Text("slack, ms: ticks", style=_QUIET), grid)


def _verdict(report: LoadReport) -> Text:
    kinds = report.kinds
    ended = ", ".join(f"{kinds[kind]} {kind}" for kind in kinds if kind != "served")
    words = (
        f"{report.num_ticks} ticks of {report.spec.num_sessions} sessions, {report.num_missed} "
        f"missed: {100 * report.miss_rate:.3f} % (below {100 * report.miss_rate_bound:.3f} % with "
        f"95 % confidence), {report.num_output_tokens} tokens"
    )
    lost = ""
    if report.num_lost or report.num_away:
        lost = f"; {report.num_lost} chunks lost in stalls, {report.num_away} while away"
    if report.num_degraded:
        lost += f"; {report.num_degraded} degraded ({report.spec.degrade})"
    return Text(
        words + (f"; {ended}" if ended else "") + lost, style=_GOOD if not report.num_missed else ""
    )


def _level_line(report: LoadReport) -> Text:
    cells = ["never"] * 3
    if report.latency is not None:
        cells = [_ms(one) for one in (report.latency.p50, report.latency.p99, report.latency.p99_9)]
    style = _GOOD if report.num_missed == 0 else _WARNED
    late = ", generator late" if report.is_generator_late else ""
    return Text(
        f"{report.spec.num_sessions:>4} sessions: p50 {cells[0]}, p99 {cells[1]}, "
        f"p99.9 {cells[2]} ms, {report.num_missed} of {report.num_ticks} missed{late}",
        style=style,
    )


def _capacity_view(capacity: Capacity) -> Text:
    count = capacity.num_sessions
    sign = " or more" if capacity.is_open_ended else ""
    best = [one for one in capacity.levels if one.spec.num_sessions == count]
    bound = "".join(
        f"; {one.num_ticks} ticks show, with 95 % confidence, that it is below "
        f"{100 * one.miss_rate_bound:.2f} %"
        for one in best
    )
    return Text(
        f"capacity: {count}{sign} sessions with fewer than {100 * capacity.limit:g} % of the "
        f"ticks missed{bound}",
        style="bold",
    )


def _table(*heads: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style=_QUIET)
    for head in heads:
        table.add_column(head, justify="left" if head == heads[0] else "right")
    return table


def _cells(spread: Spread) -> list[str]:
    return [_ms(one) for one in (spread.p50, spread.p90, spread.p99, spread.p99_9, spread.max)]


def _ms(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "never"


def _write(options: LoadOptions, found: LoadReport | Capacity, model: Model, title: str) -> None:
    if options.json_path is not None:
        content = {
            "machine": _machine(),
            "model": options.model,
            "fingerprint": model.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "has_video": options.has_video,
            "capacity" if isinstance(found, Capacity) else "report": found.to_dict(),
        }
        try:
            options.json_path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise InvalidArgument(
                f"json: cannot write {options.json_path}: {error.strerror}"
            ) from error
    if options.plot_path is not None:
        if isinstance(found, Capacity):
            plot_capacity(found, options.plot_path, title)
        else:
            plot_report(found, options.plot_path, title)


def _machine() -> dict[str, Any]:
    """Where and beside what a result was taken."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "num_cpus": os.cpu_count(),
        "num_threads": num_threads(),
        "isa": _ext.isa(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load_average": os.getloadavg()[0],
    }
