"""The training loop: batches in a fixed order, one optimizer step after the other, exact resume.

The state after a step is a function of the start, the data and the step number: a run that was
stopped, killed or moved goes on with the same bits. docs/determinism.md says why.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tml_core.errors import CheckpointError, InvalidArgument, TmlError, Unsupported
from tml_core.layout.state import Stream
from tml_core.model.config import ModelConfig, bundled_path
from tml_core.model.tokenizer import load_tokenizer
from tml_core.model.weights import load_weights
from tml_core.ops.linear_logp import IGNORED_TARGET
from tml_core.ops.router import load_balance_counts, update_router_bias
from tml_core.train.checkpoint import CheckpointFolder
from tml_core.train.config import TrainConfig
from tml_core.train.metrics import MetricsFile, StepMetrics
from tml_core.train.module import ModelOutput, TrainableModel
from tml_core.train.optimizer import Optimizer, clip_gradients
from tml_core.train.order import BatchOrder
from tml_core.train.packing import PackedBatch, Transcript
from tml_core.train.sessions import read_sessions
from tml_core.train.shards import ShardReader

__all__ = ["Trainer", "TrainingStopped", "stream_weights"]

_SMOOTHING: Final = 0.95  # of the loss that divergence is judged by
_SETTLING: Final = 10  # steps before it is judged

# A resumed run must have been told the same of everything that decides the bits.
_FREE: Final = frozenset(
    {
        "data.path",
        "data.skip_corrupt",
        "model.path",
        "model.recompute",
        "run.divergence_factor",
        "run.folder",
        "run.keep",
        "run.save_every",
    }
)


class TrainingStopped(TmlError, ArithmeticError):
    """Training cannot go on: the loss or a gradient is no number, or the loss ran away."""


@dataclass
class _Progress:
    """What is carried from step to step beside the weights."""

    step: int = 0
    num_tokens: int = 0
    smooth_loss: float | None = None
    lowest_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None


@dataclass
class _Sums:
    """Of the batches of one step."""

    loss: list[float] = field(default_factory=list)
    by_stream: dict[Stream, list[float]] = field(default_factory=dict)
    expert_counts: list[Tensor] = field(default_factory=list)
    num_tokens: int = 0


class Trainer:
    """A run, begun or resumed: ``config.run.folder`` with checkpoints goes on from the newest.

    ``data``: transcripts, instead of those at ``config.data.path``. Raises InvalidArgument for
    data the model cannot take, Unsupported for a device that is not there, CheckpointError for a
    model, dataset or checkpoint that is missing or damaged, or for a checkpoint of a run that was
    told something else, naming it.
    """

    def __init__(self, config: TrainConfig, data: Iterable[Transcript] | None = None) -> None:
        self.config = config
        source = config.model
        self._device = torch.device(source.device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise Unsupported(f"model.device: {source.device} is not there")
        is_bundled = source.path == "nano"
        self._directory = bundled_path("nano") if is_bundled else Path(source.path)
        self.model_config = replace(
            ModelConfig.from_path(self._directory), is_trained=True, init_seed=None
        )
        self._data: Sequence[Transcript]
        if data is None:
            self._data = self._open_data()
        else:
            self._data = data if isinstance(data, Sequence) else list(data)
        self._order = self._make_order()
        self._folder = Path(config.run.folder)
        self._checkpoints = CheckpointFolder(self._folder / "checkpoints")
        self._metrics = MetricsFile(self._folder)
        self._told = self._what_was_told()
        self._progress = _Progress()
        steps = self._checkpoints.steps()
        checkpoint = self._checkpoints.load(steps[-1]) if steps else None
        if checkpoint is not None:
            self._refuse_other(checkpoint.told)
            self._progress = _Progress(**checkpoint.progress)
        weights = load_weights(
            self._directory if checkpoint is None else checkpoint.path,
            ModelConfig.from_path(self._directory) if checkpoint is None else self.model_config,
            torch.float32,
        )
        self.model = TrainableModel(
            self.model_config, weights, source.torch_dtype, recompute=source.recompute
        ).to(self._device)
        self._optimizer = Optimizer(dict(self.model.named_parameters()), config.optimizer)
        if checkpoint is not None:
            self._optimizer.load_state(checkpoint.optimizer_state())
        self._metrics.cut(self.step)
        self._run_model: Callable[[PackedBatch], ModelOutput] = self.model.run
        if source.compile:
            # Without emulation Inductor folds pairs of casts, and with them roundings.
            self._run_model = torch.compile(
                self.model.run,
                fullgraph=True,
                dynamic=True,
                options={"emulate_precision_casts": True},
            )
        self._batches: Iterator[tuple[int, list[int]]] = self._order.batches(
            self.step * config.optimizer.accumulate
        )
        self._weights_S = stream_weights(config.loss.by_stream()).to(self._device)

    @property
    def step(self) -> int:
        """Steps done."""
        return self._progress.step

    @property
    def skipped_shards(self) -> tuple[str, ...]:
        """Names of damaged shards that are left out because ``data.skip_corrupt`` asks for it."""
        return tuple(self._data.skipped) if isinstance(self._data, ShardReader) else ()

    def run(
        self,
        report: Callable[[StepMetrics], None] = lambda _metrics: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Path:
        """Train to the last step, or until ``should_stop`` says so between two steps.

        Saves on the way and at the end; ``report`` is told of every step. Returns the newest
        checkpoint. Raises TrainingStopped (the checkpoints before it stay) and CheckpointError
        when a checkpoint cannot be written (those before it stay too).
        """
        run = self.config.run
        while self.step < run.num_steps and not should_stop():
            report(self.train_step())
            if self.step % run.save_every == 0:
                self.save()
        if self.step not in self._checkpoints.steps():
            self.save()
        return self._checkpoints.path(self._checkpoints.steps()[-1])

    def plot(self) -> None:
        """Draw ``loss.png`` of the run so far. Raises MissingExtra without matplotlib."""
        self._metrics.plot()

    def train_step(self) -> StepMetrics:
        """One optimizer step over the next ``accumulate`` batches."""
        start_s = time.perf_counter()
        options = self.config.optimizer
        batches, epoch = self._next_batches()
        sums = self._accumulate(batches)
        rate = options.rate_at(self.step, self.config.run.num_steps)
        loss = math.fsum(sums.loss)
        norm = clip_gradients(self.model.parameters(), options.clip_norm)
        self._stop_if_not_finite(loss, norm)
        self._optimizer.step(rate)
        max_load = self._balance(sums.expert_counts, options.router_bias_rate)
        self.model.zero_grad(set_to_none=True)
        progress = self._progress
        progress.step += 1
        progress.num_tokens += sums.num_tokens
        elapsed_s = time.perf_counter() - start_s
        metrics = StepMetrics(
            step=progress.step,
            epoch=epoch,
            loss=loss,
            loss_by_stream={
                stream.name.lower(): math.fsum(values) / len(values)
                for stream, values in sorted(sums.by_stream.items())
            },
            learning_rate=rate,
            gradient_norm=norm,
            max_expert_load=max_load,
            num_tokens=sums.num_tokens,
            total_tokens=progress.num_tokens,
            elapsed_s=elapsed_s,
            tokens_per_s=sums.num_tokens / elapsed_s,
        )
        self._metrics.append(metrics)
        self._judge(loss)
        return metrics

    def save(self) -> Path:
        """Write a checkpoint of this step. Raises TrainingStopped if a weight is no number."""
        weights = self.model.state_dict()
        for name, value in weights.items():
            if not bool(value.isfinite().all()):
                raise TrainingStopped(f"train: {name} is not finite after step {self.step}")
        progress = self._progress
        smooth = progress.smooth_loss
        if smooth is not None and (progress.best_loss is None or smooth <= progress.best_loss):
            progress.best_loss, progress.best_step = smooth, self.step
        tokenizer = self._directory / "tokenizer.json"
        path = self._checkpoints.save(
            self.step,
            weights,
            self.model_config,
            tokenizer if tokenizer.is_file() else None,
            self._optimizer.state(),
            self._told,
            asdict(progress),
        )
        self._checkpoints.prune(self.config.run.keep, progress.best_step)
        return path

    def _open_data(self) -> Sequence[Transcript]:
        data = self.config.data
        path = Path(data.path)
        if path.suffix == ".jsonl":
            tokenizer = load_tokenizer(self._directory)
            return read_sessions(path, self.model_config, tokenizer)
        return ShardReader(path, self.model_config, skip_corrupt=data.skip_corrupt)

    def _make_order(self) -> BatchOrder:
        data, source = self.config.data, self._data
        longest = data.max_positions or self.model_config.text.max_positions
        if isinstance(source, ShardReader):
            lengths = source.lengths
        else:
            lengths = [one.num_tokens for one in source]
        for index, length in enumerate(lengths):
            if not 1 <= length <= longest:
                raise InvalidArgument(
                    f"transcripts[{index}]: expected 1 to {longest} positions, got {length}"
                )
        return BatchOrder(lengths, data.batch_tokens, data.seed, shuffle=data.shuffle)

    def _what_was_told(self) -> dict[str, Any]:
        """Everything that decides the bits, flat."""
        tables = self.config.to_dict()
        told = {f"{t}.{key}": value for t, table in tables.items() for key, value in table.items()}
        kept = {key: value for key, value in told.items() if key not in _FREE}
        source = self._data
        data = source.fingerprint if isinstance(source, ShardReader) else _fingerprint(source)
        told = {**kept, "dataset": data, "model": self.model_config.to_dict()}
        # As it comes back from a file: tuples are lists there.
        result: dict[str, Any] = json.loads(json.dumps(told))
        return result

    def _refuse_other(self, told: dict[str, Any]) -> None:
        for name in sorted(self._told.keys() | told.keys()):
            own, other = self._told.get(name), told.get(name)
            if own != other:
                raise CheckpointError(
                    f"resume: the checkpoint in {self._checkpoints.root} was made with "
                    f"{name} = {other!r}, this run has {own!r}; take another run.folder"
                )

    def _next_batches(self) -> tuple[list[PackedBatch], int]:
        batches, epoch = [], 0
        longest = self.config.data.max_positions or None
        for _ in range(self.config.optimizer.accumulate):
            epoch, indices = next(self._batches)
            transcripts = [self._data[index] for index in indices]
            batch = PackedBatch.pack(transcripts, self.model_config, max_positions=longest)
            batches.append(batch.to(self._device))
        return batches, epoch

    def _accumulate(self, batches: list[PackedBatch]) -> _Sums:
        """Gradients of the weighted mean over all positions of ``batches``, and what was seen."""
        weights = [_position_weights(batch, self._weights_S) for batch in batches]
        total = math.fsum(value for one in weights for value in one.tolist())
        if total == 0:
            raise InvalidArgument(
                f"data: expected a position with a loss in step {self.step}, got none; "
                "see the streams of the transcripts and the weights in [loss]"
            )
        sums = _Sums()
        for batch, weight_T in zip(batches, weights, strict=True):
            out = self._run_model(batch)
            out.logprobs.backward(weight_T / -total)
            loss_T = -out.logprobs.detach()
            sums.loss += (loss_T.double() * weight_T.double() / total).tolist()
            self._add_streams(sums, batch, loss_T)
            counts = [
                load_balance_counts(ids, self.model_config.text.num_experts)
                for ids in out.expert_ids
            ]
            before = sums.expert_counts or [torch.zeros_like(one) for one in counts]
            sums.expert_counts = [a + b for a, b in zip(before, counts, strict=True)]
            sums.num_tokens += batch.num_tokens
        return sums

    def _add_streams(self, sums: _Sums, batch: PackedBatch, loss_T: Tensor) -> None:
        is_target = batch.targets != IGNORED_TARGET
        for stream in Stream:
            values = loss_T[is_target & (batch.streams == int(stream))]
            if len(values):
                sums.by_stream.setdefault(stream, []).extend(values.tolist())

    def _balance(self, counts: list[Tensor], rate: float) -> float | None:
        """Move the choice biases; the most visits of an expert over the mean, None without any."""
        worst = None
        for layer, counts_E in zip(self.model.sparse_layers, counts, strict=True):
            if rate:
                bias_E = self.model.router_bias(layer)
                bias_E.copy_(update_router_bias(bias_E, counts_E, rate))
            load = float(counts_E.max()) * len(counts_E) / max(1, int(counts_E.sum()))
            worst = load if worst is None else max(worst, load)
        return worst

    def _stop_if_not_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise TrainingStopped(
            f"train: the {what} of step {self.step + 1} is not finite; {self._last_good()}"
        )

    def _judge(self, loss: float) -> None:
        """Stop if the smoothed loss ran away from its lowest value."""
        progress, factor = self._progress, self.config.run.divergence_factor
        before = progress.smooth_loss
        smooth = loss if before is None else _SMOOTHING * before + (1 - _SMOOTHING) * loss
        progress.smooth_loss = smooth
        lowest = progress.lowest_loss
        progress.lowest_loss = smooth if lowest is None else min(lowest, smooth)
        if factor and progress.step > _SETTLING and smooth > factor * progress.lowest_loss:
            raise TrainingStopped(
                f"train: the loss diverged at step {progress.step}: smoothed it is {smooth:.4g}, "
                f"{factor} times its lowest value is {factor * progress.lowest_loss:.4g}; "
                f"{self._last_good()}"
            )

    def _last_good(self) -> str:
        steps = self._checkpoints.steps()
        if not steps:
            return "no checkpoint was written before"
        return f"the last checkpoint before it is {self._checkpoints.path(steps[-1])}"


def stream_weights(by_stream: dict[Stream, float]) -> Tensor:
    """float32 [number of streams], to be indexed by ``PackedBatch.streams``."""
    return torch.tensor([by_stream[stream] for stream in Stream], dtype=torch.float32)


def _fingerprint(transcripts: Sequence[Transcript]) -> str:
    """Of what is learned: labels and streams."""
    digest = hashlib.sha256()
    for one in transcripts:
        digest.update(one.targets.numpy().tobytes() + one.streams.numpy().tobytes())
    return digest.hexdigest()[:16]


def _position_weights(batch: PackedBatch, weights_S: Tensor) -> Tensor:
    """float32 [T], 0 where there is no target."""
    weight_T = weights_S[batch.streams.long()]
    return torch.where(batch.targets == IGNORED_TARGET, 0.0, weight_T)
