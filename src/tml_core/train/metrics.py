"""What a run reports: a line of JSON for each step, and a picture of the loss."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tml_core.errors import MissingExtra
from tml_core.train.files import replaced_file

__all__ = ["HeldOut", "MetricsFile", "StepMetrics", "plot_losses"]


@dataclass(frozen=True)
class HeldOut:
    """Of data that is not learned from. ``loss``, ``loss_by_stream``: as in `StepMetrics`."""

    loss: float
    loss_by_stream: dict[str, float]


@dataclass(frozen=True)
class StepMetrics:
    """One step. ``loss``: weighted mean in nats. ``loss_by_stream``: plain means.
    ``gradient_norm``: before clipping. ``max_expert_load``: visits of the busiest expert over the
    mean, of the worst layer. ``num_tokens``: positions of the step. ``elapsed_s``: wall time,
    without that of ``held_out``, which is there after steps that evaluate."""

    step: int
    epoch: int
    loss: float
    loss_by_stream: dict[str, float]
    learning_rate: float
    gradient_norm: float
    max_expert_load: float | None
    num_tokens: int
    total_tokens: int
    elapsed_s: float
    tokens_per_s: float
    held_out: HeldOut | None = None


class MetricsFile:
    """``metrics.jsonl`` and ``loss.png`` of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self._picture = folder / "loss.png"

    def append(self, metrics: StepMetrics) -> None:
        """Add a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All complete lines."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def cut(self, step: int) -> None:
        """Drop what a run that did not end left behind the checkpoint of ``step``."""
        if not self.path.is_file():
            return
        kept = [one for one in self.read() if one["step"] <= step]
        with replaced_file(self.path) as file:
            file.write_text("".join(json.dumps(one) + "\n" for one in kept), encoding="utf-8")

    def plot(self) -> None:
        """Draw ``loss.png``. Raises MissingExtra without matplotlib."""
        plot_losses(self.read(), self._picture)


def plot_losses(
    rows: Sequence[Mapping[str, Any]], file: Path, stages: Mapping[str, int] | None = None
) -> None:
    """Draw the loss of each stream over the steps, and with dashes that of data held out.

    ``rows``: lines of a `MetricsFile`. ``stages``: names of stages and their first steps. Raises
    MissingExtra without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("plot: needs matplotlib; pip install 'tml_core[plot]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    held_out = [{**row["held_out"], "step": row["step"]} for row in rows if row.get("held_out")]
    names = sorted({name for row in rows for name in row["loss_by_stream"]})
    for number, name in enumerate(["", *names]):
        color = "black" if not name else f"C{number - 1}"
        for source, style in ((rows, "-"), (held_out, "--")):
            own = [row for row in source if not name or name in row["loss_by_stream"]]
            if not own:
                continue
            label = f"{name or 'loss'}{', held out' if source is held_out else ''}"
            axes.plot(
                [row["step"] for row in own],
                [row["loss_by_stream"][name] if name else row["loss"] for row in own],
                style,
                color=color,
                linewidth=0.8 if name else 1.5,
                marker="." if source is held_out else None,
                label=label,
            )
    for name, step in (stages or {}).items():
        axes.axvline(step, color="gray", linewidth=0.8, linestyle=":")
        axes.annotate(name, (step, 0.98), xycoords=("data", "axes fraction"), va="top")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with replaced_file(file) as picture:
        figure.savefig(picture, format="png", dpi=120)
