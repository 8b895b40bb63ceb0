"""Random lives of sessions, for proofs: what the engine samples under all that can happen to it.

Sound, pictures and typed text come in pieces of any size; several sessions share a step; steps are
cut anywhere; sessions are forked and rewound on the way, and end at different lengths.

Legend: N drawn tokens.
"""

import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tml_core.contract import PAGE_LEN
from tml_core.engine.model import Model, weights_fingerprint
from tml_core.engine.sampler import SamplingParams
from tml_core.errors import TmlError
from tml_core.layout.chunk import Chunk
from tml_core.layout.micro_turn import MicroTurnLayout
from tml_core.layout.state import Stream
from tml_core.media.micro_turns import TICK_SAMPLES
from tml_core.model.config import ModelConfig
from tml_core.model.kv_store import KvStore
from tml_core.model.tokenizer import load_tokenizer
from tml_core.model.weights import load_weights
from tml_core.ops.linear_logp import IGNORED_TARGET
from tml_core.sequence.store import SequenceStore
from tml_core.session import Engine, Session, SessionMark
from tml_core.train.packing import Transcript
from tml_core.train.recorder import Drawn, RecordingBackbone

__all__ = ["RandomLives", "SampledTranscript"]

_NUM_LIVE: Final = 4  # sessions that run together, forks aside
_NUM_SLOTS: Final = 8
_MAX_POSITIONS: Final = 2048
_LIFE_POSITIONS: Final = (200, 700, 1800)  # where a session may end
_MAX_WORDS: Final = 80  # characters typed at a time
_STEP_TOKENS: Final = (3, 17, 64, 512)
_SAMPLING: Final = (
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=40),
    SamplingParams(top_p=0.9),
    SamplingParams(temperature=0.0),
)


@dataclass(frozen=True, eq=False)
class SampledTranscript:
    """A transcript and what the sampler said of its targets: float32 [N], in order. ``seed``: of
    its draws."""

    transcript: Transcript
    logprobs_N: Tensor
    seed: int


@dataclass(frozen=True, eq=False)
class _Tick:
    chunk: Chunk
    drawn: tuple[Drawn, ...]  # the layout's own left out

    @property
    def logprobs(self) -> list[float]:
        """Of the tokens."""
        return [one.logprob for one in self.drawn if one.logprob is not None]


@dataclass(eq=False)
class _Life:
    """A session on its way, with all that happened to it."""

    session: Session
    seed: int
    prefix: tuple[int, ...]
    last_position: int
    ticks: list[_Tick] = field(default_factory=list)
    num_inherited: int = 0  # ticks before its fork, which count for the parent
    mark: tuple[SessionMark, int] | None = None

    @property
    def num_drawn(self) -> int:
        return sum(len(one.logprobs) for one in self.ticks[self.num_inherited :])


class RandomLives:
    """Random sessions of the checkpoint in ``directory``, served in ``dtype``.

    The model must have micro-turns and a tokenizer; raises CheckpointError otherwise. Everything
    follows from ``seed``.
    """

    def __init__(self, directory: Path, config: ModelConfig, dtype: torch.dtype, seed: int) -> None:
        weights = load_weights(directory, config, dtype)
        fingerprint = weights_fingerprint(config, weights)
        self._recorder = RecordingBackbone(config, weights, dtype)
        max_positions = min(_MAX_POSITIONS, config.text.max_positions)
        num_pages = 2 * _NUM_SLOTS * -(-max_positions // PAGE_LEN)  # marks hold some too
        kv = KvStore(config.text, dtype, _NUM_SLOTS, max_positions, num_pages, num_pages)
        tokenizer = load_tokenizer(directory)
        store = SequenceStore(kv, fingerprint)
        self._model = Model(config, self._recorder, store, tokenizer=tokenizer)
        self._layout = layout = MicroTurnLayout(config, tokenizer)
        # Room for one more tick: its text, what is put in, sound and pictures.
        tick_tokens = layout.grammar.max_text + _MAX_WORDS + PAGE_LEN
        self._max_life = max(1, max_positions - tick_tokens)
        self._rng = random.Random(seed)
        self._noise = np.random.default_rng(seed)
        self._num_seeds = 0

    def run(self, num_tokens: int, progress: Callable[[int], None]) -> Iterator[SampledTranscript]:
        """Sessions with at least ``num_tokens`` drawn tokens in all, each as it ends.

        ``progress`` is told how many were drawn so far (a rewind takes some back).
        """
        lives: list[_Life] = []
        num_ended = 0
        with Engine(self._model, max_sessions=_NUM_SLOTS) as engine:
            while num_ended + sum(one.num_drawn for one in lives) < num_tokens:
                while len(lives) < _NUM_LIVE:
                    lives.append(self._open(engine))
                self._tick(lives)
                progress(num_ended + sum(one.num_drawn for one in lives))
                for life in list(lives):
                    if life.session.info().position >= life.last_position:
                        life.session.close()
                        lives.remove(life)
                        num_ended += life.num_drawn
                        yield self._transcript(life)
                self._move(lives)
        for life in lives:
            if life.num_drawn:
                yield self._transcript(life)

    def _open(self, engine: Engine) -> _Life:
        rng = self._rng
        system = self._words() if rng.random() < 0.5 else None
        seed = self._new_seed()
        session = engine.open(system=system, seed=seed, sampling=rng.choice(_SAMPLING))
        return _Life(session, seed, self._layout.encode_prefix(system), self._lifetime())

    def _tick(self, lives: list[_Life]) -> None:
        """One turn of every session, all in the same steps."""
        self._model.runner.max_step_tokens = self._rng.choice(_STEP_TOKENS)  # no turn is open
        chunks = [self._chunk() for _ in lives]
        turns = [life.session.append(one) for life, one in zip(lives, chunks, strict=True)]
        for life, chunk, turn in zip(lives, chunks, turns, strict=True):
            result = turn.result()
            token_ids = result.done.token_ids[: result.stats.num_output_tokens]
            drawn = self._recorder.take(life.seed)
            if tuple(one.token_id for one in drawn) != token_ids:
                raise TmlError(f"align: the session has {token_ids}, the sampler drew {drawn}")
            life.ticks.append(_Tick(chunk, tuple(drawn)))

    def _move(self, lives: list[_Life]) -> None:
        """Mark, rewind or fork some of them."""
        for life in list(lives):
            dice = self._rng.random()
            if dice < 0.2:
                life.mark = (life.session.mark(), len(life.ticks))
            elif dice < 0.3 and life.mark is not None:
                mark, num_ticks = life.mark
                life.session.rewind(mark)
                del life.ticks[num_ticks:]
            elif 0.3 <= dice < 0.36 and len(lives) < _NUM_SLOTS:
                seed = self._new_seed()
                child = life.session.fork(seed=seed)
                ticks = list(life.ticks)
                lifetime = self._lifetime()
                lives.append(_Life(child, seed, life.prefix, lifetime, ticks, len(ticks)))

    def _transcript(self, life: _Life) -> SampledTranscript:
        ticks = [(tick.chunk, [one.item for one in tick.drawn]) for tick in life.ticks]
        segments, streams = self._layout.encode_session(ticks, life.prefix)
        transcript = Transcript.next_tokens(segments, streams)
        num_before = sum(len(one.drawn) for one in life.ticks[: life.num_inherited])
        labelled = (transcript.streams != int(Stream.INPUT)).nonzero()[:num_before, 0]
        transcript.targets[labelled] = IGNORED_TARGET
        transcript.streams[labelled] = int(Stream.INPUT)
        values = [value for one in life.ticks[life.num_inherited :] for value in one.logprobs]
        return SampledTranscript(transcript, torch.tensor(values, dtype=torch.float32), life.seed)

    def _chunk(self) -> Chunk:
        rng, config = self._rng, self._model.config
        audio, frames, text = None, [], None
        if config.audio is not None and rng.random() < 0.7:
            num_samples = rng.choice((TICK_SAMPLES, rng.randint(1, TICK_SAMPLES)))
            level = 10.0 ** rng.uniform(-3, 0)
            audio = (level * self._noise.uniform(-1, 1, num_samples)).astype(np.float32)
        if config.vision is not None and rng.random() < 0.4:
            size = 2 * config.vision.patch_size
            shape = (rng.randint(1, size), rng.randint(1, size), 3)
            num_frames = rng.randint(1, 2)
            frames = [self._noise.integers(0, 256, shape, np.uint8) for _ in range(num_frames)]
        interaction = config.interaction
        if interaction is not None and interaction.max_injected_per_tick and rng.random() < 0.2:
            text = self._words()
        is_idle = audio is None and not frames and text is None
        return Chunk(audio=audio, frames=frames, text=text, is_idle=is_idle)

    def _words(self) -> str:
        return "".join(
            self._rng.choices(string.ascii_lowercase + " ", k=self._rng.randint(1, _MAX_WORDS))
        )

    def _lifetime(self) -> int:
        return min(self._max_life, self._rng.choice(_LIFE_POSITIONS))

    def _new_seed(self) -> int:
        # From 1: the engine warms up with seed 0.
        self._num_seeds += 1
        return self._num_seeds
