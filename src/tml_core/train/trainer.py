"""The training loop: batches in a fixed order, one optimizer step after the other, exact resume.

The state after a step is a function of the start, the data and the step number: a run that was
stopped, killed or moved goes on with the same bits. docs/determinism.md says why.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from tml_core.errors import CheckpointError, InvalidArgument, TmlError, Unsupported
from tml_core.model.config import ModelConfig, bundled_path
from tml_core.model.weights import load_weights
from tml_core.ops.router import load_balance_counts, update_router_bias
from tml_core.train.checkpoint import CheckpointFolder
from tml_core.train.config import TrainConfig, default_of
from tml_core.train.feed import Draw, Feed, Place, TranscriptSource, open_feed
from tml_core.train.flow_loss import flow_seed
from tml_core.train.loss import (
    StreamLosses,
    batch_loss,
    position_losses,
    position_weights,
    stream_weights,
    total_weight,
)
from tml_core.train.metrics import HeldOut, MetricsFile, StepMetrics
from tml_core.train.module import ModelOutput, TrainableModel
from tml_core.train.optimizer import Optimizer, clip_gradients
from tml_core.train.packing import PackedBatch
from tml_core.train.run_lock import RunLock
from tml_core.train.spec_augment import spec_augment

__all__ = ["Trainer", "TrainingStopped", "finished"]

_SMOOTHING: Final = 0.95  # of the loss that divergence is judged by
_SETTLING: Final = 10  # steps before it is judged
_HELD_OUT_SEED: Final = 2**64 - 1  # of the noise that held-out sound is judged with, in every run

# A resumed run must have been told the same of everything that decides the bits.
_FREE: Final = frozenset(
    {
        "data.path",
        "data.skip_corrupt",
        "eval.every",
        "eval.num_batches",
        "eval.path",
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
    place: Place | None = None  # in a stream

    def __post_init__(self) -> None:
        if self.place is not None:  # a list, if it comes from a file
            self.place = Place(*self.place)


@dataclass
class _Sums:
    """Of the batches of one step."""

    losses: StreamLosses = field(default_factory=StreamLosses)
    expert_counts: list[Tensor] = field(default_factory=list)
    num_tokens: int = 0


class Trainer:
    """A run, begun or resumed: ``config.run.folder`` with checkpoints goes on from the newest.

    ``data``: transcripts, instead of those at ``config.data.path``. A sequence is gone through in
    epochs. Anything else is a stream without end, of which ``data.buffer`` transcripts are held at
    a time: a function of a number that yields the transcripts from that one on, the same ones
    whenever it is called; or a plain iterable, which a resumed run goes through from its beginning.

    The folder is this trainer's until `close`, or until it or its process is gone. Raises
    InvalidArgument for data the model cannot take, Unsupported for a device that is not there,
    CheckpointError for a model, dataset or checkpoint that is missing or damaged, for a checkpoint
    of a run that was told something else, naming it, and for a folder another trainer is in.
    """

    def __init__(self, config: TrainConfig, data: TranscriptSource | None = None) -> None:
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
        self._weights_S = stream_weights(config.loss.by_stream()).to(self._device)
        interaction = self.model_config.interaction
        has_head = interaction is not None and interaction.audio_out is not None
        self._learns_sound = has_head and config.loss.audio > 0
        if self._learns_sound and source.compile:
            raise Unsupported(
                "model.compile: expected false where own sound is learned, whose noise cannot be "
                "traced; loss.audio = 0 leaves the head as it is"
            )
        self._feed = open_feed(config.data, self._directory, self.model_config, data)
        self._held_out = self._open_held_out()
        self._folder = Path(config.run.folder)
        self._lock = RunLock(self._folder)
        try:
            self._resume_or_begin()
        except BaseException:
            self.close()
            raise

    def _resume_or_begin(self) -> None:
        config, source = self.config, self.config.model
        self._checkpoints = CheckpointFolder(self._folder / "checkpoints")
        self._metrics = MetricsFile(self._folder)
        # As it comes back from a file: tuples are lists there.
        about = {"dataset": self._feed.fingerprint, "model": self.model_config.to_dict()}
        self._told: dict[str, Any] = json.loads(json.dumps({**_told(config), **about}))
        self._progress = _Progress()
        steps = self._checkpoints.steps()
        checkpoint = self._checkpoints.load(steps[-1]) if steps else None
        if checkpoint is not None:
            _refuse_other(self._checkpoints, checkpoint.told, self._told)
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
        self._run_model: Callable[..., ModelOutput] = self.model.run
        if source.compile:
            # Without emulation Inductor folds pairs of casts, and with them roundings.
            self._run_model = torch.compile(
                self.model.run,
                fullgraph=True,
                dynamic=True,
                options={"emulate_precision_casts": True},
            )
        self._draws: Iterator[Draw] = self._feed.draws(
            self.step * config.optimizer.accumulate, self._progress.place
        )

    @property
    def step(self) -> int:
        """Steps done."""
        return self._progress.step

    @property
    def skipped_shards(self) -> tuple[str, ...]:
        """Names of damaged shards that are left out because ``data.skip_corrupt`` asks for it."""
        return self._feed.skipped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder to others; for a trainer that takes no more steps."""
        self._lock.release()

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
        batches, epoch, place = self._next_batches()
        sums = self._accumulate(batches)
        rate = options.rate_at(self.step, self.config.run.num_steps)
        loss = sums.losses.mean()
        norm = clip_gradients(self.model.parameters(), options.clip_norm)
        self._stop_if_not_finite(loss, norm)
        self._optimizer.step(rate)
        max_load = self._balance(sums.expert_counts, options.router_bias_rate)
        self.model.zero_grad(set_to_none=True)
        progress = self._progress
        progress.step += 1
        progress.num_tokens += sums.num_tokens
        progress.place = place
        elapsed_s = time.perf_counter() - start_s
        metrics = StepMetrics(
            step=progress.step,
            epoch=epoch,
            loss=loss,
            loss_by_stream=sums.losses.means(),
            learning_rate=rate,
            gradient_norm=norm,
            max_expert_load=max_load,
            num_tokens=sums.num_tokens,
            total_tokens=progress.num_tokens,
            elapsed_s=elapsed_s,
            tokens_per_s=sums.num_tokens / elapsed_s,
            held_out=self.evaluate() if self._is_eval_due() else None,
        )
        self._metrics.append(metrics)
        self._judge(loss)
        return metrics

    def evaluate(self) -> HeldOut:
        """The loss on ``eval.path``, of sound with the same noise every time. Raises
        InvalidArgument if the run has none."""
        if self._held_out is None:
            raise InvalidArgument("eval.path: expected data to evaluate on, got none")
        losses, weights = StreamLosses(), []
        with torch.no_grad():
            for index, batch in enumerate(self._held_out_batches(self._held_out)):
                weights.append(position_weights(batch, self._weights_S))
                out = self._run(batch, _HELD_OUT_SEED, 0, index)
                losses.add(batch, position_losses(batch, out), weights[-1], 1.0)
        return HeldOut(losses.mean() / total_weight(weights), losses.means())

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

    def _open_held_out(self) -> Feed | None:
        options = self.config.eval
        if not options.path:
            return None
        config = replace(
            self.config.data, path=options.path, weights=(), shuffle=False, skip_corrupt=False
        )
        feed = open_feed(config, self._directory, self.model_config)
        batches = self._held_out_batches(feed)
        if not any(position_weights(batch, self._weights_S).any() for batch in batches):
            raise InvalidArgument("eval.path: expected a position with a loss, got none")
        return feed

    def _held_out_batches(self, feed: Feed) -> Iterator[PackedBatch]:
        draws = itertools.takewhile(lambda draw: draw.epoch == 0, feed.draws(0, None))
        return map(self._pack, itertools.islice(draws, self.config.eval.num_batches or None))

    def _is_eval_due(self) -> bool:
        is_last = self.step == self.config.run.num_steps
        return self._held_out is not None and (is_last or self.step % self.config.eval.every == 0)

    def _next_batches(self) -> tuple[list[PackedBatch], int, Place | None]:
        """The batches of a step, the epoch of the last, and the place behind it in a stream."""
        draws = list(itertools.islice(self._draws, self.config.optimizer.accumulate))
        batches = [self._altered(self._pack(draw), index) for index, draw in enumerate(draws)]
        return batches, draws[-1].epoch, draws[-1].next_place

    def _pack(self, draw: Draw) -> PackedBatch:
        longest = self.config.data.max_positions or None
        config = self.model_config
        batch = PackedBatch.pack(draw.transcripts, config, max_positions=longest)
        return batch.to(self._device)

    def _altered(self, batch: PackedBatch, index: int) -> PackedBatch:
        """``batch``, the step's number ``index``, as it is learned from."""
        data, audio = self.config.data, self.model_config.audio
        if audio is None or not data.spec_augment:
            return batch
        place = (data.seed, self.step, index)
        bins_FM = spec_augment(batch.bins.cpu(), audio.num_levels, data.spec_augment, *place)
        return replace(batch, bins=bins_FM.to(self._device))

    def _accumulate(self, batches: list[PackedBatch]) -> _Sums:
        """Gradients of the weighted mean over all positions of ``batches``, and what was seen."""
        weights = [position_weights(batch, self._weights_S) for batch in batches]
        total = total_weight(weights)
        if total == 0:
            raise InvalidArgument(
                f"data: expected a position with a loss in step {self.step}, got none; "
                "see the streams of the transcripts and the weights in [loss]"
            )
        sums = _Sums()
        for index, (batch, weight_T) in enumerate(zip(batches, weights, strict=True)):
            share_T = weight_T / total
            out = self._run(batch, self.config.data.seed, self.step, index, share_T)
            batch_loss(batch, out, share_T).backward()
            sums.losses.add(batch, position_losses(batch, out), weight_T, total)
            counts = [
                load_balance_counts(ids, self.model_config.text.num_experts)
                for ids in out.expert_ids
            ]
            before = sums.expert_counts or [torch.zeros_like(one) for one in counts]
            sums.expert_counts = [a + b for a, b in zip(before, counts, strict=True)]
            sums.num_tokens += batch.num_tokens
        return sums

    def _run(
        self, batch: PackedBatch, seed: int, step: int, index: int, weights: Tensor | None = None
    ) -> ModelOutput:
        """One pass, for which the noise of own sound is a function of seed, step and index."""
        if not self._learns_sound:
            return self._run_model(batch, weights=weights)
        return self.model.run(batch, weights=weights, flow_seed=flow_seed(seed, step, index))

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


def finished(config: TrainConfig) -> Path | None:
    """The last checkpoint of a run that is over, without looking at its data or model; else None.

    Raises CheckpointError if it is damaged or the run was told something else, naming it.
    """
    checkpoints = CheckpointFolder(Path(config.run.folder) / "checkpoints")
    steps = checkpoints.steps()
    if not steps or steps[-1] < config.run.num_steps:
        return None
    checkpoint = checkpoints.load(steps[-1])
    theirs = {name: value for name, value in checkpoint.told.items() if "." in name}
    _refuse_other(checkpoints, theirs, json.loads(json.dumps(_told(config))))
    return checkpoint.path


def _told(config: TrainConfig) -> dict[str, Any]:
    """Every setting that decides the bits, flat."""
    tables = config.to_dict()
    told = {f"{t}.{key}": value for t, table in tables.items() for key, value in table.items()}
    return {key: value for key, value in told.items() if key not in _FREE}


def _refuse_other(
    checkpoints: CheckpointFolder, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        own = ours.get(name)
        # A setting that came into the world after the checkpoint had its default.
        other = theirs.get(name, json.loads(json.dumps(default_of(name))))
        if own != other:
            raise CheckpointError(
                f"resume: the checkpoint in {checkpoints.root} was made with "
                f"{name} = {other!r}, this run has {own!r}; take another run.folder"
            )
