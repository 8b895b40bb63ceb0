"""``tml-core train``: a run from a TOML file, with a bar of its progress."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tml_core.errors import MissingExtra
from tml_core.train.metrics import HeldOut, StepMetrics
from tml_core.train.stages import Stage, plot_stages, read_stages
from tml_core.train.trainer import Trainer, finished

__all__ = ["run_train"]


def run_train(path: Path, console: Console) -> Path:
    """Begin or resume the run of ``path``, stage by stage, and show it; returns its newest
    checkpoint.

    The first SIGINT or SIGTERM ends it after the step with a checkpoint. Raises what `Trainer` and
    `read_stages` raise.
    """
    stages = read_stages(path)
    checkpoint: Path | None = None
    with _stop_requests() as requests:
        for number, stage in enumerate(stages, start=1):
            if len(stages) > 1:
                console.rule(f"{stage.name}, {number} of {len(stages)}", align="left")
            checkpoint = finished(stage.config)
            if checkpoint is None:
                checkpoint = _run_stage(stage, console, lambda: bool(requests))
            console.print(f"checkpoint: {checkpoint}", soft_wrap=True)
            if len(stages) > 1:
                _draw(lambda: plot_stages(stages), console)
            if requests:
                break
    assert checkpoint is not None  # there is a stage
    return checkpoint


def _run_stage(stage: Stage, console: Console, should_stop: Callable[[], bool]) -> Path:
    with Trainer(stage.config) as trainer:
        num_steps = trainer.config.run.num_steps
        if trainer.skipped_shards:
            console.print(f"left out, damaged: {', '.join(trainer.skipped_shards)}")
        if trainer.step:
            console.print(f"resuming after step {trainer.step}")
        last: list[StepMetrics] = []
        held_out: list[HeldOut] = []
        with _bar(console) as bar:
            task = bar.add_task(
                "train", total=num_steps, completed=trainer.step, loss=0.0, speed=0.0, held_out=""
            )

            def report(metrics: StepMetrics) -> None:
                last[:] = [metrics]
                speed = metrics.tokens_per_s
                bar.update(task, completed=metrics.step, loss=metrics.loss, speed=speed)
                if metrics.held_out is not None:
                    held_out[:] = [metrics.held_out]
                    bar.update(task, held_out=f"held out {metrics.held_out.loss:.4f}")

            checkpoint = trainer.run(report, should_stop)
        if last:
            shown = _shown(last[0].loss, last[0].loss_by_stream)
            console.print(f"step {last[0].step}: loss {shown}")
        if held_out:
            console.print(f"held out: loss {_shown(held_out[0].loss, held_out[0].loss_by_stream)}")
        if trainer.step < num_steps:
            console.print(f"stopped after step {trainer.step} of {num_steps}; run again to resume")
        _draw(trainer.plot, console)
    return checkpoint


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[held_out]}"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _shown(loss: float, by_stream: dict[str, float]) -> str:
    streams = ", ".join(f"{name} {value:.4f}" for name, value in by_stream.items())
    return f"{loss:.4f} ({streams})"


def _draw(draw: Callable[[], None], console: Console) -> None:
    try:
        draw()
    except MissingExtra as error:
        console.print(f"no loss.png: {error}", soft_wrap=True)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Signals that came so far; a second one of a kind does what it did before."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.getsignal(number)
        signal.signal(number, note)
    try:
        yield came
    finally:
        for restored, handler in before.items():
            signal.signal(restored, handler)
