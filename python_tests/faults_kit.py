"""What tests of faults and long lives share: a real model so small that a turn takes a millisecond.

Hidden 32, one sliding and one global layer, window 96 (less than a page, so pages are dropped
early), four experts, nano's tokenizer, sound but no pictures; three text tokens and eight injected
ones a tick.
"""

import dataclasses
import functools
import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from byte_model import BYTE_MODEL
from session_kit import WAIT_S, engine_threads, noise, paused, step_by_step
from speaking_kit import make_talkative
from tml_core import Engine, Model, Session, Turn, load_model
from tml_core.model.config import ModelConfig
from tml_core.model.weights import random_weights, save_weights
from tml_core.ops.lm_head import SampleRows

WINDOW: Final = 96
NUM_SLOTS: Final = 12
MAX_POSITIONS: Final = 4096
INJECTED: Final = 8

_TEXT: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "swa_num_attention_heads": 1,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 32,
    "sliding_window_size": WINDOW,
    "d_rel": 4,
    "rel_extent": 64,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "mlp_layer_types": ["dense", "sparse"],
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}


def load_tiny(
    *,
    max_sequences: int = NUM_SLOTS,
    max_positions: int = MAX_POSITIONS,
    speaks: bool = False,
    **more: Any,
) -> Model:
    """A model of its own, with its own pages. One that ``speaks`` does so often."""
    config = json.loads((BYTE_MODEL / "config.json").read_text())
    config["text_config"] |= _TEXT
    config["audio_config"]["text_hidden_size"] = _TEXT["hidden_size"]
    config["vision_config"]["text_hidden_size"] = _TEXT["hidden_size"]
    config["interaction"] |= {"max_text_per_tick": 3, "max_injected_per_tick": INJECTED}
    with tempfile.TemporaryDirectory() as folder:
        if speaks:
            config["interaction"]["audio_out"] = {"width": 16, "num_layers": 1, "num_steps": 2}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        shutil.copy(BYTE_MODEL / "tokenizer.json", folder)
        if speaks:
            read = ModelConfig.from_path(folder)
            weights = random_weights(read, 3, torch.bfloat16)
            make_talkative(weights)
            save_weights(folder, weights, dataclasses.replace(read, init_seed=None))
        return load_model(folder, max_sequences=max_sequences, max_positions=max_positions, **more)


@functools.cache
def tiny() -> Model:
    """One such model for all tests."""
    return load_tiny()


def shape(session: Session) -> tuple[Any, ...]:
    """All that must not change when something is refused or undone (the epoch aside)."""
    info = session.info()
    return (
        info.position,
        info.tick,
        info.media_ms,
        info.num_waiting,
        info.is_busy,
        info.is_in_call,
        info.open_calls,
        info.num_pages,
        info.state_hash,
        session.token_ids().tolist(),
        len(session.transcript()),
    )


def bits(session: Session) -> tuple[str, list[int]]:
    """What the session is made of."""
    return session.info().state_hash, session.token_ids().tolist()


@functools.cache
def alone(seed: int, num_ticks: int) -> tuple[str, list[int]]:
    """The bits of a session of ``noise(0)``, ``noise(1)``, ... with nobody beside it."""
    with Session(tiny(), seed=seed) as session:
        for tick in range(num_ticks):
            session.append(noise(tick)).result(WAIT_S)
        return bits(session)


class Others:
    """Two sessions of an engine that go on while something happens to a third."""

    def __init__(self, engine: Engine) -> None:
        self._sessions = [engine.open(seed=seed) for seed in (101, 102)]
        self._turns: list[Turn] = []
        self._num_ticks = 0

    def begin_tick(self, *, is_read: bool = False) -> None:
        """Both have a turn open after this, in the same step as what comes next. ``is_read``: all
        of it will be read, however late."""
        with paused(self._sessions[0]):
            self._turns = [session.append(noise(self._num_ticks)) for session in self._sessions]
            if is_read:
                for turn in self._turns:
                    turn._read_all()
        self._num_ticks += 1

    def end_tick(self) -> None:
        for turn in self._turns:
            turn.result(WAIT_S)

    def assert_untouched(self) -> None:
        """Their bits are those of sessions that were alone."""
        self.begin_tick()
        self.end_tick()
        for session, seed in zip(self._sessions, (101, 102), strict=True):
            assert bits(session) == alone(seed, self._num_ticks)
            session.close()


class Trap:
    """Runs ``act`` from inside a draw of the sampler: the engine thread is then in the middle of a
    turn. ``num_draws`` draws go by before."""

    def __init__(self) -> None:
        self._sample = tiny().backbone.sample
        self._act: Callable[[], object] | None = None
        self._num_draws = 0

    def set(self, act: Callable[[], object], num_draws: int = 0) -> None:
        self._num_draws, self._act = num_draws, act

    def __call__(self, h_BD: Tensor, rows: SampleRows, **out: Any) -> tuple[Tensor, Tensor]:
        act = self._act
        if act is not None:
            if self._num_draws == 0:
                self._act = None
                act()
            self._num_draws -= 1
        return self._sample(h_BD, rows, **out)


@contextmanager
def trapped() -> Iterator[Trap]:
    """`Trap` in the place of the tiny model's sampler."""
    with pytest.MonkeyPatch.context() as patch:
        trap = Trap()
        step_by_step(patch)
        patch.setattr(tiny().backbone, "sample", trap)
        yield trap


@contextmanager
def clean_engine(**options: Any) -> Iterator[Engine]:
    """An engine of the tiny model. When the body is over and its sessions are closed or dropped,
    nothing may be held: no session, turn, page or thread."""
    with Engine(tiny(), **options) as engine:
        assert engine.num_sessions == 0  # waits for the warm-up, which holds pages too
        free = engine.stats().global_pages_free, engine.stats().sliding_pages_free
        yield engine
        gc.collect()
        assert engine.num_sessions == 0
        stats = engine.stats()
        assert (stats.num_sessions, stats.num_turns, stats.num_parked) == (0, 0, 0)
        assert (stats.global_pages_held, stats.sliding_pages_held) == (0, 0)
        assert (stats.global_pages_free, stats.sliding_pages_free) == free
    assert_nothing_left()


def assert_nothing_left() -> None:
    """No session, page or engine thread, and the books agree."""
    for thread in engine_threads():
        thread.join(WAIT_S)
    assert engine_threads() == []
    report = tiny().store.audit()
    assert (report.num_sequences, report.num_marks) == (0, 0)
    assert (report.global_pages_held, report.sliding_pages_held) == (0, 0)
