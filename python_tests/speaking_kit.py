"""A model that speaks, for tests of sessions: the byte model with a head, random weights."""

import dataclasses
import functools
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from byte_model import BYTE_MODEL
from session_kit import CALL, SAY, WAIT_S, noise, step_by_step
from tml_core import AudioChunk, Event, Model, Session, TurnResult, load_model
from tml_core.model.audio_out_config import AudioOutConfig
from tml_core.model.config import ModelConfig
from tml_core.model.weights import random_weights, save_weights

HEAD = AudioOutConfig(width=32, num_layers=1, num_steps=2)
FIRST_CONTROL = 274


def speaking_config(num_layers: int = 3) -> ModelConfig:
    """The byte model's with fewer layers and a head."""
    plain = ModelConfig.from_path(BYTE_MODEL)
    assert plain.interaction is not None
    text = dataclasses.replace(
        plain.text,
        num_layers=num_layers,
        layer_is_sliding=(True, *[False] * (num_layers - 1)),
        layer_is_dense=(True, *[False] * (num_layers - 1)),
    )
    interaction = dataclasses.replace(plain.interaction, audio_out=HEAD)
    return dataclasses.replace(plain, text=text, interaction=interaction)


def make_talkative(weights: dict[str, Tensor]) -> None:
    """Random weights become sure of control tokens, and speak as readily as they call tools."""
    head_VD = weights["lm_head.weight"]
    head_VD[FIRST_CONTROL:] *= 20.0
    head_VD[SAY] = head_VD[CALL] + 0.2 * head_VD[SAY]


def save_speaking(folder: Path) -> Path:
    """A checkpoint."""
    config = speaking_config()
    weights = random_weights(config, 3, torch.bfloat16)
    make_talkative(weights)
    save_weights(folder, weights, config)
    shutil.copy(BYTE_MODEL / "tokenizer.json", folder)
    return folder


@functools.cache
def speaker() -> Model:
    """The model, loaded once. It often speaks when it may choose."""
    with tempfile.TemporaryDirectory() as folder:
        return load_model(save_speaking(Path(folder)), max_sequences=8)


class Sampler:
    """Takes the place of the sampler: to each session, known by its seed, its own ``tokens``. Seed
    0 is that of an engine that warms up."""

    def __init__(self, tokens: Mapping[int, Sequence[int]]) -> None:
        self._tokens = {seed: iter(ids) for seed, ids in tokens.items()}

    def __call__(self, h_BD: Tensor, rows: Any, **_out: Any) -> tuple[Tensor, Tensor]:
        assert len(h_BD) == len(rows.seed_B)
        ids = [next(self._tokens[seed]) if seed else 0 for seed in rows.seed_B.tolist()]
        return torch.tensor(ids), torch.full((len(ids),), -1.0)


class Head:
    """Stands before the head and notes what it is asked for and what it says.

    ``held``: each draw waits for `step`; `reach` waits until the engine stands at a draw. An
    exception in ``faults`` is raised instead of the draw of its number.
    """

    def __init__(self, *, held: bool = False) -> None:
        self._draw = speaker().backbone.flow.draw
        self._held = held
        self._reached = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self.faults: dict[int, Exception] = {}
        self.num_draws = 0
        self.rows: list[int] = []  # of each draw
        self.said: dict[tuple[int, int], Tensor] = {}  # by seed and position

    def __call__(
        self, h_BD: Tensor, before_BM: Tensor, seeds: Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        if seeds == [0]:
            return self._draw(h_BD, before_BM, seeds, positions)
        if self._held:
            self._reached.release()
            assert self._go.acquire(timeout=WAIT_S)
        number, self.num_draws = self.num_draws, self.num_draws + 1
        if number in self.faults:
            raise self.faults[number]
        mel_BFM = self._draw(h_BD, before_BM, seeds, positions)
        self.rows.append(len(seeds))
        self.said.update(zip(zip(seeds, positions, strict=True), mel_BFM, strict=True))
        return mel_BFM

    def reach(self) -> None:
        assert self._reached.acquire(timeout=WAIT_S)

    def step(self) -> None:
        self._go.release()


@contextmanager
def scripted(
    tokens: Sequence[int] | Mapping[int, Sequence[int]] = (), *, held: bool = False
) -> Iterator[Head]:
    """`Sampler` and `Head` in the place of the speaker's. A list is what the session of seed 1
    draws."""
    head = Head(held=held)
    by_seed = tokens if isinstance(tokens, Mapping) else {1: tokens}
    with pytest.MonkeyPatch.context() as patch:
        step_by_step(patch)
        patch.setattr(speaker().backbone, "sample", Sampler(by_seed))
        patch.setattr(speaker().backbone.flow, "draw", head)
        yield head


def talk(*, seed: int = 1, **named: Any) -> Session:
    """A session of the speaker."""
    return Session(speaker(), seed=seed, **named)


def tick(session: Session, number: int, **named: Any) -> TurnResult:
    """Tick ``number`` of a user's quiet noise, to its end."""
    return session.append(noise(number), **named).result()


def heard(events: Sequence[Event]) -> np.ndarray:
    """The sound in a turn."""
    chunks = [one.pcm for one in events if isinstance(one, AudioChunk)]
    return np.concatenate([np.empty(0, np.float32), *chunks])
