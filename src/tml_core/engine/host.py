"""Which engine runs a model, what its sessions share, and how a session's options are read."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self, get_args

import numpy as np
import torch

from tml_core.engine.admission import Admission
from tml_core.engine.engine import EngineLoop
from tml_core.engine.model import Model, load_model
from tml_core.engine.sampler import SampleRequest, SamplingParams, sample_rows
from tml_core.engine.seat import Degrade, Seat
from tml_core.errors import InvalidArgument, InvalidType, SessionClosed, Unsupported
from tml_core.layout.chat_template import EFFORTS, ChatLayout
from tml_core.layout.chunk import Chunk
from tml_core.layout.micro_turn import MicroTurnLayout
from tml_core.layout.text import bitmask
from tml_core.layout.tool_call import tool_schemas
from tml_core.media.micro_turns import TICK_SAMPLES
from tml_core.media.vocoder import GriffinLim
from tml_core.sequence.values import Retention

__all__ = [
    "AnyLayout",
    "Host",
    "SessionOptions",
    "Tool",
    "engine_seat",
    "loaded_model",
    "new_loop",
    "new_seat",
    "require_degrade",
    "require_seed",
]

AnyLayout = MicroTurnLayout | ChatLayout
Tool = Callable[..., object] | Mapping[str, Any]

_PICTURE: Final = (90, 159, 3)  # 16:9 at the default size of media.micro_turns

# One engine runs a model: its sequences belong to one thread. The thread keeps its loop alive.
_loops: "Final[weakref.WeakKeyDictionary[Model, weakref.ref[EngineLoop]]]" = (
    weakref.WeakKeyDictionary()
)
_loops_gate: Final = threading.Lock()


@dataclass(frozen=True)
class Host:
    """What the sessions of one engine share."""

    loop: EngineLoop
    model: Model
    layout: AnyLayout


@dataclass(frozen=True)
class SessionOptions:
    """The checked options of a new session."""

    prefix: tuple[int, ...]
    seed: int
    sampling: SamplingParams
    retention: Retention | None
    degrade: Degrade

    @classmethod
    def checked(
        cls,
        layout: AnyLayout,
        system: str | None,
        tools: SequenceOf[Tool],
        seed: int,
        sampling: SamplingParams | None,
        retention: Retention | None,
        effort: float | str | None,
        degrade: Degrade,
    ) -> Self:
        if system is not None and not isinstance(system, str):
            raise InvalidType(f"system: expected str, got {type(system).__name__}")
        require_seed(seed)
        if sampling is not None and not isinstance(sampling, SamplingParams):
            raise InvalidType(f"sampling: expected SamplingParams, got {type(sampling).__name__}")
        if retention is not None and not isinstance(retention, Retention):
            raise InvalidType(f"retention: expected Retention, got {type(retention).__name__}")
        require_degrade(degrade, layout)
        prefix = layout.encode_prefix(system, tool_schemas(tools), _effort(effort))
        if retention is not None and retention.pinned_prefix < len(prefix):
            retention = replace(retention, pinned_prefix=len(prefix))
        return cls(prefix, seed, sampling or SamplingParams(), retention, degrade)


def new_seat(host: Host, options: SessionOptions) -> Seat:
    sequence = host.model.new_sequence(seed=options.seed, retention=options.retention)
    seat = Seat(sequence, host.layout, options.sampling, options.degrade)
    seat.state = host.layout.initial_state()
    return seat


def new_loop(
    model: Model,
    layout: AnyLayout,
    max_sessions: int,
    *,
    admission: Admission,
    park_after_s: float | None,
    park_dir: str | Path | None,
) -> EngineLoop:
    """An engine of its own for ``model``; raises InvalidArgument if one runs it already."""
    with _loops_gate:
        if _running_loop(model) is not None:
            raise InvalidArgument("model: another engine runs it; close that one first")
        loop = EngineLoop(
            model,
            max_sessions,
            admission=admission,
            park_after_s=park_after_s,
            park_dir=park_dir,
            warm_up=lambda: _warm_up(model, layout),
        )
        _loops[model] = weakref.ref(loop)
        return loop


def _warm_up(model: Model, layout: AnyLayout) -> None:
    """One tick through encoders, decoder and sampler, so that a session's first is not late: the
    thread's workers and scratch memory are made at their first use."""
    takes_media = model.config.audio is not None and model.config.vision is not None
    chunk = Chunk(text="a")
    if takes_media:
        chunk = Chunk(
            audio=np.zeros(TICK_SAMPLES, np.float32), frames=[np.zeros(_PICTURE, np.uint8)]
        )
    encoded = layout.encode_input(chunk, layout.initial_state())
    with model.new_sequence() as sequence:
        (h_TD,) = model.runner.run([model.prepare(sequence, encoded.segments)])
        anything = bitmask(np.ones(model.vocab_size, np.bool_))
        request = SampleRequest(SamplingParams(), 0, sequence.tip, anything)
        model.backbone.sample(h_TD[-1:], sample_rows([request]))
        head = model.backbone.flow
        if head is not None:
            silence_1M = torch.full((1, head.config.num_mel_bins), head.config.mel.min_log10)
            mel_1FM = head.draw(h_TD[-1:], silence_1M, [0], [sequence.tip])
            GriffinLim(head.config.mel).push(mel_1FM[0])


def _running_loop(model: Model) -> EngineLoop | None:
    known = _loops.get(model)
    loop = None if known is None else known()
    return None if loop is None or loop.is_shut else loop


def engine_seat(model: Model, layout: AnyLayout, make: Callable[[Host], Seat]) -> tuple[Host, Seat]:
    """A seat in the engine that runs ``model``, or in a new one that ends with its last session."""
    with _loops_gate:
        running = _running_loop(model)
        if running is not None:
            host = Host(running, model, layout)
            with contextlib.suppress(SessionClosed):
                return host, running.add_seat(lambda: make(host))
            # It was ending: its last session has just gone.
            running.shutdown()
        loop = EngineLoop(
            model,
            model.store.kv.num_slots,
            stops_when_empty=True,
            warm_up=lambda: _warm_up(model, layout),
        )
        host = Host(loop, model, layout)
        try:
            seat = loop.add_seat(lambda: make(host))
        except BaseException:
            loop.shutdown()
            raise
        _loops[model] = weakref.ref(loop)
        return host, seat


def loaded_model(model: object) -> Model:
    if isinstance(model, Model):
        return model
    if not isinstance(model, (str, Path)):
        raise InvalidType(f"model: expected a name, a path or a Model, got {type(model).__name__}")
    return load_model(model)


def _effort(effort: object) -> float | None:
    if isinstance(effort, str):
        if effort not in EFFORTS:
            raise InvalidArgument(f"effort: expected one of {list(EFFORTS)}, got {effort!r}")
        return EFFORTS[effort]
    if effort is None or (isinstance(effort, (int, float)) and not isinstance(effort, bool)):
        return None if effort is None else float(effort)
    raise InvalidType(f"effort: expected a number or a word, got {type(effort).__name__}")


def require_degrade(degrade: object, layout: AnyLayout) -> None:
    if degrade not in get_args(Degrade):
        known = ", ".join(get_args(Degrade))
        raise InvalidArgument(f"degrade: expected one of {known}, got {degrade!r}")
    if degrade != "none" and not layout.knows_ticks:
        raise Unsupported(f"degrade: this model knows no ticks; expected 'none', got {degrade!r}")


def require_seed(seed: object) -> None:
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidType(f"seed: expected an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise InvalidArgument(f"seed: expected an unsigned 64-bit integer, got {seed}")
