"""What the session tests share: one loaded model, input to feed, and a hand on the sampler."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from byte_model import BYTE_MODEL
from tml_core import (
    Chunk,
    Event,
    MicroTurn,
    Model,
    Session,
    TextToken,
    load_model,
    media,
)
from tml_core.engine import stepper

END_OUT, SILENCE, SAY, CALL, END_CALL = range(276, 281)
WAIT_S = 150.0  # for what comes at once, on a machine with other work


@functools.cache
def nano() -> Model:
    """The bundled model in bf16, loaded once."""
    return load_model(BYTE_MODEL, max_sequences=12)


@functools.cache
def clip(num_ticks: int) -> tuple[MicroTurn, ...]:
    """The first ticks of the bundled recording, sound and video."""
    clips = media.clips()
    turns = media.micro_turns(clips.audio, clips.video, duration_s=num_ticks * 0.2)
    return tuple(turns)


def noise(seed: int, num_samples: int = 3200) -> Chunk:
    """200 ms of quiet noise."""
    pcm = np.random.default_rng(seed).uniform(-0.1, 0.1, num_samples).astype(np.float32)
    return Chunk(audio=pcm)


def spoken(events: tuple[Event, ...]) -> tuple[list[int], Tensor]:
    """Text tokens and their log-probabilities."""
    said = [one for one in events if isinstance(one, TextToken)]
    return [one.token_id for one in said], torch.tensor([one.logprob for one in said])


def standing(session: Session) -> tuple[Any, ...]:
    """All that must not change when something is refused or undone (the epoch aside)."""
    info = session.info()
    return (
        info.position,
        info.tick,
        info.media_ms,
        info.num_waiting,
        info.is_in_call,
        info.open_calls,
        info.num_pages,
        info.state_hash,
        session.token_ids().tolist(),
        session.transcript(),
    )


class Script:
    """Takes the place of the sampler and gives ``tokens`` in order, log-probability -1.

    ``held``: each draw waits for `step`; `reach` waits until the engine stands at a draw.
    """

    def __init__(self, tokens: list[int], *, held: bool = False) -> None:
        self._tokens = iter(tokens)
        self._held = held
        self._reached = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def __call__(self, h_BD: Tensor, rows: Any, **_out: Any) -> tuple[Tensor, Tensor]:
        assert len(h_BD) == len(rows.seed_B)
        if self._held:
            self._reached.release()
            assert self._go.acquire(timeout=WAIT_S)
        tokens = [next(self._tokens) for _ in h_BD]
        return torch.tensor(tokens), torch.full((len(tokens),), -1.0)

    def reach(self) -> None:
        assert self._reached.acquire(timeout=WAIT_S)

    def step(self) -> None:
        self._go.release()


@contextmanager
def scripted(tokens: list[int], *, held: bool = False) -> Iterator[Script]:
    """`Script` in the place of nano's sampler."""
    script = Script(tokens, held=held)
    with pytest.MonkeyPatch.context() as patch:
        step_by_step(patch)
        patch.setattr(nano().backbone, "sample", script)
        yield script


def step_by_step(patch: pytest.MonkeyPatch) -> None:
    """Every step goes through the backbone's `step` and `sample`, which may be replaced."""
    patch.setattr(stepper, "RUN_S", 0.0)


@contextmanager
def paused(session: Session) -> Iterator[None]:
    """The engine stands still inside the ``with``; what is posted waits."""
    reached, release = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        assert release.wait(WAIT_S)

    session._host.loop._post(hold)
    assert reached.wait(WAIT_S)
    try:
        yield
    finally:
        release.set()


def assert_nothing_left() -> None:
    """No session holds a slot or a page, and the books agree."""
    report = nano().store.audit()
    assert report.num_sequences == 0
    assert report.global_pages_held == 0
    assert report.sliding_pages_held == 0


def engine_threads() -> list[threading.Thread]:
    """Engine threads that are alive."""
    return [one for one in threading.enumerate() if one.name == "tml-engine"]
