"""What a run reports: a line of JSON for each step, and a picture of the loss."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tml_core.errors import MissingExtra
from tml_core.train.files import replaced_file

__all__ = ["MetricsFile", "StepMetrics"]


@dataclass(frozen=True)
class StepMetrics:
    """One step. ``loss``: weighted mean in nats. ``loss_by_stream``: plain means.
    ``gradient_norm``: before clipping. ``max_expert_load``: visits of the busiest expert over the
    mean, of the worst layer. ``num_tokens``: positions of the step. ``elapsed_s``: wall time."""

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
        """Draw the loss and that of each stream over the steps.

        Raises MissingExtra without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtra("plot: needs matplotlib; pip install 'tml_core[plot]'") from error
        rows = self.read()
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        steps = [row["step"] for row in rows]
        axes.plot(steps, [row["loss"] for row in rows], color="black", label="loss")
        for name in sorted({name for row in rows for name in row["loss_by_stream"]}):
            own = [row for row in rows if name in row["loss_by_stream"]]
            axes.plot(
                [row["step"] for row in own],
                [row["loss_by_stream"][name] for row in own],
                linewidth=0.8,
                label=name,
            )
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        with replaced_file(self._picture) as file:
            figure.savefig(file, format="png", dpi=120)
