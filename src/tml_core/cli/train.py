"""``tml-core train``: a run from a TOML file, with a bar of its progress."""

import signal
from collections.abc import Iterator
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
from tml_core.train.config import TrainConfig
from tml_core.train.metrics import StepMetrics
from tml_core.train.trainer import Trainer

__all__ = ["run_train"]


def run_train(path: Path, console: Console) -> Path:
    """Begin or resume the run of ``path`` and show it; returns its newest checkpoint.

    The first SIGINT or SIGTERM ends it after the step with a checkpoint. Raises what `Trainer`
    raises.
    """
    trainer = Trainer(TrainConfig.from_toml(path))
    num_steps = trainer.config.run.num_steps
    if trainer.skipped_shards:
        console.print(f"left out, damaged: {', '.join(trainer.skipped_shards)}")
    if trainer.step:
        console.print(f"resuming after step {trainer.step}")
    bar = Progress(
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    last: list[StepMetrics] = []
    with bar, _stop_requests() as requests:
        task = bar.add_task("train", total=num_steps, completed=trainer.step, loss=0.0, speed=0.0)

        def report(metrics: StepMetrics) -> None:
            last[:] = [metrics]
            speed = metrics.tokens_per_s
            bar.update(task, completed=metrics.step, loss=metrics.loss, speed=speed)

        checkpoint = trainer.run(report, lambda: bool(requests))
    if last:
        streams = ", ".join(f"{name} {value:.4f}" for name, value in last[0].loss_by_stream.items())
        console.print(f"step {last[0].step}: loss {last[0].loss:.4f} ({streams})")
    if trainer.step < num_steps:
        console.print(f"stopped after step {trainer.step} of {num_steps}; run again to resume")
    console.print(f"checkpoint: {checkpoint}", soft_wrap=True)
    try:
        trainer.plot()
    except MissingExtra as error:
        console.print(f"no loss.png: {error}", soft_wrap=True)
    return checkpoint


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
