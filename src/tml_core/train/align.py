"""Does the trainer agree with the sampler, bit for bit? Transcripts are sampled, then recomputed.

`RandomLives` samples sessions in the engine; `TrainableModel` then computes, from whole packed
transcripts, the log-probability of every token that was drawn, and what every block of sound was
drawn from.

Legend: N drawn tokens, A drawn blocks, D hidden size, F frames, M mel channels.
"""

import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from tml_core.errors import InvalidArgument, Unsupported
from tml_core.layout.state import Stream
from tml_core.model.config import ModelConfig, bundled_path
from tml_core.model.flow import FlowHead, flow_shapes
from tml_core.model.weights import load_weights, save_weights
from tml_core.ops.linear_logp import IGNORED_TARGET
from tml_core.train.lives import RandomLives, SampledTranscript
from tml_core.train.module import TrainableModel
from tml_core.train.packing import PackedBatch, Transcript

__all__ = ["AlignReport", "Progress", "align"]

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total) as the work goes on."""

_PACKED_POSITIONS: Final = 4096
_KEPT_POSITIONS: Final = 16_384  # of transcripts to train on
_TRAIN_TRANSCRIPTS: Final = 3


@dataclass(frozen=True)
class AlignReport:
    """What one comparison found.

    ``num_steps``: optimizer steps before it. ``num_positions``: of the transcripts, of which
    ``num_tokens`` were drawn and compared; ``num_differing`` have other bits, by at most
    ``largest_difference`` (nats). ``num_blocks`` of own sound were drawn, of which
    ``num_differing_blocks`` come out otherwise. ``sample_s``, ``recompute_s``: wall time of both.
    """

    dtype: str
    num_steps: int
    num_transcripts: int
    num_positions: int
    num_tokens: int
    num_differing: int
    largest_difference: float
    sample_s: float
    recompute_s: float
    num_blocks: int = 0
    num_differing_blocks: int = 0

    @property
    def is_aligned(self) -> bool:
        """Whether every bit agreed."""
        return self.num_differing == self.num_differing_blocks == 0


def align(
    model: str | Path = "nano",
    *,
    num_tokens: int = 2000,
    dtype: torch.dtype = torch.bfloat16,
    num_steps: int = 0,
    seed: int = 0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> list[AlignReport]:
    """Compare ``num_tokens`` drawn tokens; with ``num_steps``, again after training that long.

    ``model``: "nano" or a checkpoint directory with an ``interaction`` block. ``dtype``: of the
    model served and trained; AdamW steps float32 masters. The second comparison serves the trained
    weights after they were written to a checkpoint and read back.
    Raises InvalidArgument for counts below one (steps: below zero) or an unknown model,
    CheckpointError for one that cannot be read, Unsupported for one without micro-turns.
    """
    if num_tokens < 1:
        raise InvalidArgument(f"num_tokens: expected at least 1, got {num_tokens}")
    if num_steps < 0:
        raise InvalidArgument(f"num_steps: expected at least 0, got {num_steps}")
    directory = bundled_path(str(model)) if str(model) == "nano" else Path(model)
    config = ModelConfig.from_path(directory)
    if config.interaction is None:
        raise Unsupported("align: expected a model of micro-turns, got a plain chat checkpoint")
    trainable = TrainableModel(config, load_weights(directory, config, torch.float32), dtype)
    reports = []
    first, transcripts = _compare(directory, trainable, 0, num_tokens, seed, progress)
    reports.append(first)
    if num_steps:
        _train(trainable, transcripts, num_steps, seed, progress)
        with tempfile.TemporaryDirectory() as folder:
            save_weights(folder, trainable.serving_weights(), config)
            shutil.copy(directory / "tokenizer.json", folder)
            reports.append(
                _compare(Path(folder), trainable, num_steps, num_tokens, seed + 1, progress)[0]
            )
    return reports


def _compare(
    directory: Path,
    trainable: TrainableModel,
    num_steps: int,
    num_tokens: int,
    seed: int,
    progress: Progress,
) -> tuple[AlignReport, list[Transcript]]:
    """The report, and some of the transcripts."""
    suffix = f" after {num_steps} steps" if num_steps else ""
    lives = RandomLives(directory, trainable.config, trainable.dtype, seed)
    tally = _Tally(trainable)
    kept: list[Transcript] = []
    num_kept = 0

    def drawn(done: int) -> None:
        progress(f"sample{suffix}", min(done, num_tokens), num_tokens)

    start_s = time.perf_counter()
    for one in lives.run(num_tokens, drawn):
        tally.add(one)
        progress(f"recompute{suffix}", min(tally.num_tokens, num_tokens), num_tokens)
        if num_kept < _KEPT_POSITIONS:
            kept.append(one.transcript)
            num_kept += one.transcript.num_tokens
    tally.finish()
    progress(f"recompute{suffix}", num_tokens, num_tokens)
    report = AlignReport(
        dtype=str(trainable.dtype).removeprefix("torch."),
        num_steps=num_steps,
        num_transcripts=tally.num_transcripts,
        num_positions=tally.num_positions,
        num_tokens=tally.num_tokens,
        num_differing=tally.num_differing,
        largest_difference=tally.largest_difference,
        sample_s=time.perf_counter() - start_s - tally.elapsed_s,
        recompute_s=tally.elapsed_s,
        num_blocks=tally.num_blocks,
        num_differing_blocks=tally.num_differing_blocks,
    )
    return report, kept


class _Tally:
    """Recomputes transcripts as soon as a batch is full, and counts; none is kept."""

    def __init__(self, trainable: TrainableModel) -> None:
        self._trainable = trainable
        self._waiting: list[SampledTranscript] = []
        self._num_waiting = 0
        self.num_transcripts = self.num_positions = self.num_tokens = self.num_differing = 0
        self.num_blocks = self.num_differing_blocks = 0
        self.largest_difference = self.elapsed_s = 0.0
        self._head = _served_head(trainable)

    def add(self, one: SampledTranscript) -> None:
        if self._num_waiting + one.transcript.num_tokens > _PACKED_POSITIONS:
            self.finish()
        self._waiting.append(one)
        self._num_waiting += one.transcript.num_tokens

    def finish(self) -> None:
        if not self._waiting:
            return
        start_s = time.perf_counter()
        batch = PackedBatch.pack([one.transcript for one in self._waiting], self._trainable.config)
        # With gradients on, as in training: the forward then keeps what the backward needs.
        got_N = self._trainable(batch).detach()[batch.targets != IGNORED_TARGET]
        self._compare_blocks(batch)
        self.elapsed_s += time.perf_counter() - start_s
        expected_N = torch.cat([one.logprobs_N for one in self._waiting])
        is_other = got_N.view(torch.int32) != expected_N.view(torch.int32)
        self.num_differing += int(is_other.sum())
        difference = float((got_N - expected_N)[is_other].abs().max()) if is_other.any() else 0.0
        # A difference that is not a number is larger than any.
        worst = math.inf if math.isnan(difference) else difference
        self.largest_difference = max(self.largest_difference, worst)
        self.num_transcripts += len(self._waiting)
        self.num_positions += batch.num_tokens
        self.num_tokens += len(expected_N)
        self._waiting, self._num_waiting = [], 0

    def _compare_blocks(self, batch: PackedBatch) -> None:
        """Draw every block again, from the trainer's hidden states."""
        is_own_A = batch.streams[batch.own_after] == int(Stream.AUDIO)
        after_A = batch.own_after[is_own_A]
        if not len(after_A) or self._head is None:
            return
        h_AD = self._trainable.hidden(batch).detach()[after_A]
        index_A = torch.searchsorted(batch.cu_tokens.long(), after_A, right=True) - 1
        positions_A = after_A + 1 - batch.cu_tokens[index_A]
        seeds = [self._waiting[index].seed for index in index_A.tolist()]
        got_AFM = self._head.draw(h_AD, batch.own_before[is_own_A], seeds, positions_A.tolist())
        is_other_AFM = got_AFM.view(torch.int32) != batch.own_mel[is_own_A].view(torch.int32)
        self.num_blocks += len(after_A)
        self.num_differing_blocks += int(is_other_AFM.any(dim=(1, 2)).sum())


def _served_head(trainable: TrainableModel) -> FlowHead | None:
    """The head as it would be served."""
    interaction = trainable.config.interaction
    if interaction is None or interaction.audio_out is None:
        return None
    names = flow_shapes(interaction.audio_out, trainable.config.text.hidden_size)
    weights = trainable.serving_weights()
    return FlowHead(interaction.audio_out, {name: weights[name] for name in names})


def _train(
    model: TrainableModel,
    transcripts: Sequence[Transcript],
    num_steps: int,
    seed: int,
    progress: Progress,
) -> None:
    """AdamW on batches of random transcripts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rng = random.Random(seed)
    for step in range(num_steps):
        chosen = rng.sample(transcripts, min(_TRAIN_TRANSCRIPTS, len(transcripts)))
        batch = PackedBatch.pack(chosen, model.config)
        loss = -model(batch).sum() / max(1, batch.num_targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress("train", step + 1, num_steps)
