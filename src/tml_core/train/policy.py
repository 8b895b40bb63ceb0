"""On-policy learning: groups of sessions sampled by the engine, then updates in GRPO's manner.

The trainer recomputes the log-probability of every drawn token with the sampler's bits, so on the
first update after sampling the importance ratio is exactly one, and what the clipping then sees is
the policy's own movement and nothing else. Group-relative advantages: Shao et al., arXiv
2402.03300.

Legend: T positions, N drawn tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tml_core.contract import PAGE_LEN
from tml_core.engine.model import Model, weights_fingerprint
from tml_core.engine.sampler import SamplingParams
from tml_core.errors import CheckpointError, InvalidArgument
from tml_core.layout.chunk import Chunk
from tml_core.layout.events import TextToken
from tml_core.layout.micro_turn import MicroTurnLayout
from tml_core.layout.sound import RunItem
from tml_core.model.kv_store import KvStore
from tml_core.model.tokenizer import load_tokenizer
from tml_core.ops.linear_logp import IGNORED_TARGET
from tml_core.sequence.store import SequenceStore
from tml_core.session import Engine
from tml_core.train.module import TrainableModel
from tml_core.train.optimizer import Optimizer, clip_gradients
from tml_core.train.packing import PackedBatch, Transcript
from tml_core.train.recorder import RecordingBackbone

__all__ = ["GroupSampler", "PolicyUpdate", "Rollout", "group_advantages", "update_policy"]


@dataclass(frozen=True, eq=False)
class Rollout:
    """A sampled session. ``text``: what the model said. ``logprobs``: the sampler's, float32 [N],
    of the transcript's targets in order."""

    transcript: Transcript
    text: str
    logprobs: Tensor


@dataclass(frozen=True)
class PolicyUpdate:
    """One inner step. ``objective``: mean clipped advantage of a token. ``smallest_ratio`` and
    ``largest_ratio``: importance ratios of all tokens; ``clipped``: the part that was clipped.
    ``gradient_norm``: before clipping."""

    objective: float
    smallest_ratio: float
    largest_ratio: float
    clipped: float
    gradient_norm: float


class GroupSampler:
    """Samples sessions of a trainable model's current weights in the serving engine.

    ``directory``: of the checkpoint, for its tokenizer. ``max_positions``: of one session.
    Raises CheckpointError for a model without micro-turns or tokenizer.
    """

    def __init__(
        self, model: TrainableModel, directory: Path, *, max_positions: int = 1024
    ) -> None:
        self._trained = model
        self._tokenizer = load_tokenizer(directory)
        if self._tokenizer is None:
            raise CheckpointError(f"tokenizer: expected tokenizer.json in {directory}, got none")
        self._layout = MicroTurnLayout(model.config, self._tokenizer)
        self._max_positions = max_positions

    def sample(
        self, chunks: Sequence[Chunk], seeds: Sequence[int], temperature: float = 1.0
    ) -> list[Rollout]:
        """One session for each seed, all in common steps, each fed ``chunks`` tick by tick.

        Raises InvalidArgument for seeds that are none, not distinct or below 1.
        """
        if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 1:
            raise InvalidArgument(f"seeds: expected distinct ones from 1, got {list(seeds)}")
        model, backbone = self._serve(len(seeds))
        params = SamplingParams(temperature=temperature)
        texts = ["" for _ in seeds]
        ticks: list[list[tuple[Chunk, tuple[RunItem, ...]]]] = [[] for _ in seeds]
        logprobs: list[list[float]] = [[] for _ in seeds]
        with Engine(model, max_sessions=len(seeds)) as engine:
            sessions = [engine.open(seed=seed, sampling=params) for seed in seeds]
            for chunk in chunks:
                turns = [session.append(chunk) for session in sessions]
                for row, turn in enumerate(turns):
                    events = turn.result().events
                    texts[row] += "".join(e.text for e in events if isinstance(e, TextToken))
                    drawn = backbone.take(seeds[row])
                    ticks[row].append((chunk, tuple(one.item for one in drawn)))
                    logprobs[row] += [one.logprob for one in drawn if one.logprob is not None]
        return [
            Rollout(self._transcript(ticks[row]), texts[row], torch.tensor(logprobs[row]))
            for row in range(len(seeds))
        ]

    def _serve(self, num_sessions: int) -> tuple[Model, RecordingBackbone]:
        config, dtype = self._trained.config, self._trained.dtype
        weights = self._trained.serving_weights()
        fingerprint = weights_fingerprint(config, weights)
        backbone = RecordingBackbone(config, weights, dtype)
        num_pages = num_sessions * -(-self._max_positions // PAGE_LEN)
        kv = KvStore(config.text, dtype, num_sessions, self._max_positions, num_pages, num_pages)
        store = SequenceStore(kv, fingerprint)
        return Model(config, backbone, store, tokenizer=self._tokenizer), backbone

    def _transcript(self, ticks: list[tuple[Chunk, tuple[RunItem, ...]]]) -> Transcript:
        segments, streams = self._layout.encode_session(ticks)
        return Transcript.next_tokens(segments, streams)


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward's distance from the group's mean in standard deviations; 0 if all are equal."""
    values = torch.tensor(rewards, dtype=torch.float64)
    spread = values.std(correction=0)
    if float(spread) == 0.0:
        return [0.0 for _ in rewards]
    scaled: list[float] = ((values - values.mean()) / spread).tolist()
    return scaled


def update_policy(
    model: TrainableModel,
    optimizer: Optimizer,
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    rate: float,
    num_inner_steps: int = 2,
    clip_range: float = 0.2,
    clip_norm: float = 1.0,
    report: Callable[[PolicyUpdate], None] = lambda _update: None,
) -> list[PolicyUpdate]:
    """Steps on one set of rollouts: min(ratio A, clip(ratio) A), averaged over drawn tokens.

    The ratio is against the log-probability the sampler reported, which is that of the whole
    vocabulary: the share that the layout's grammar masks is left out on both sides. ``rate``:
    learning rate. Raises InvalidArgument when there is not one advantage for each rollout.
    """
    if len(advantages) != len(rollouts):
        raise InvalidArgument(f"advantages: expected {len(rollouts)}, got {len(advantages)}")
    batch = PackedBatch.pack([one.transcript for one in rollouts], model.config)
    is_drawn_T = batch.targets != IGNORED_TARGET
    sampled_N = torch.cat([one.logprobs for one in rollouts])
    advantage_N = torch.cat(
        [
            torch.full((len(one.logprobs),), advantage, dtype=torch.float32)
            for one, advantage in zip(rollouts, advantages, strict=True)
        ]
    )
    updates = []
    for _ in range(num_inner_steps):
        logprobs_N = model(batch)[is_drawn_T]
        ratio_N = (logprobs_N - sampled_N).exp()
        bounded_N = ratio_N.clamp(1 - clip_range, 1 + clip_range)
        objective_N = torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
        objective = objective_N.sum() / len(objective_N)
        model.zero_grad(set_to_none=True)
        (-objective).backward()
        norm = clip_gradients(model.parameters(), clip_norm)
        optimizer.step(rate)
        updates.append(
            PolicyUpdate(
                objective=float(objective.detach()),
                smallest_ratio=float(ratio_N.detach().min()),
                largest_ratio=float(ratio_N.detach().max()),
                clipped=float((ratio_N.detach() != bounded_N.detach()).float().mean()),
                gradient_norm=norm,
            )
        )
        report(updates[-1])
    model.zero_grad(set_to_none=True)
    return updates
