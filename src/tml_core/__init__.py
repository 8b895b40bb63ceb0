"""tml_core: an open runtime for interaction models, 200 ms micro-turns on one persistent sequence.

    with tml_core.Session("nano") as session:
        for chunk in tml_core.media.micro_turns(audio="talk.wav", video="clip.mp4"):
            for event in session.append(chunk):
                ...

Names are imported when they are first used, so that ``import tml_core`` costs no more than torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import torch as _torch  # noqa: F401  (its libgomp must be the one we share)

if TYPE_CHECKING:
    from tml_core import errors, media
    from tml_core.background.runner import BackgroundRunner
    from tml_core.contract import CONTRACT_VERSION
    from tml_core.engine.model import Model, load_model
    from tml_core.engine.sampler import SamplingParams
    from tml_core.engine.seat import TickRecord
    from tml_core.engine.stats import EngineStats
    from tml_core.engine.turn import Turn, TurnResult, TurnStats
    from tml_core.errors import (
        CheckpointError,
        Conflict,
        InvalidArgument,
        InvalidType,
        MediaError,
        MissingExtra,
        Overloaded,
        PoolExhausted,
        SessionBusy,
        SessionClosed,
        SnapshotError,
        TmlError,
        Unsupported,
    )
    from tml_core.layout.chunk import Chunk, ToolResult
    from tml_core.layout.events import (
        AudioChunk,
        Event,
        Notice,
        Silence,
        TextToken,
        ToolCall,
        TurnDone,
    )
    from tml_core.layout.tool_call import tool_schema
    from tml_core.media.micro_turns import MicroTurn
    from tml_core.media.segments import Audio, Block, Image, Tokens
    from tml_core.model.config import ModelConfig
    from tml_core.sequence.sequence import Sequence
    from tml_core.sequence.values import Retention
    from tml_core.session import Engine, Session, SessionInfo, SessionMark

__all__ = [
    "CONTRACT_VERSION",
    "Audio",
    "AudioChunk",
    "BackgroundRunner",
    "Block",
    "CheckpointError",
    "Chunk",
    "Conflict",
    "Engine",
    "EngineStats",
    "Event",
    "Image",
    "InvalidArgument",
    "InvalidType",
    "MediaError",
    "MicroTurn",
    "MissingExtra",
    "Model",
    "ModelConfig",
    "Notice",
    "Overloaded",
    "PoolExhausted",
    "Retention",
    "SamplingParams",
    "Sequence",
    "Session",
    "SessionBusy",
    "SessionClosed",
    "SessionInfo",
    "SessionMark",
    "Silence",
    "SnapshotError",
    "TextToken",
    "TickRecord",
    "TmlError",
    "Tokens",
    "ToolCall",
    "ToolResult",
    "Turn",
    "TurnDone",
    "TurnResult",
    "TurnStats",
    "Unsupported",
    "errors",
    "load_model",
    "media",
    "tool_schema",
]

_HOME: Final = {
    "background.runner": ("BackgroundRunner",),
    "contract": ("CONTRACT_VERSION",),
    "engine.model": ("Model", "load_model"),
    "engine.sampler": ("SamplingParams",),
    "engine.seat": ("TickRecord",),
    "engine.stats": ("EngineStats",),
    "engine.turn": ("Turn", "TurnResult", "TurnStats"),
    "errors": (
        "CheckpointError",
        "Conflict",
        "InvalidArgument",
        "InvalidType",
        "MediaError",
        "MissingExtra",
        "Overloaded",
        "PoolExhausted",
        "SessionBusy",
        "SessionClosed",
        "SnapshotError",
        "TmlError",
        "Unsupported",
    ),
    "layout.chunk": ("Chunk", "ToolResult"),
    "layout.events": (
        "AudioChunk",
        "Event",
        "Notice",
        "Silence",
        "TextToken",
        "ToolCall",
        "TurnDone",
    ),
    "layout.tool_call": ("tool_schema",),
    "media.micro_turns": ("MicroTurn",),
    "media.segments": ("Audio", "Block", "Image", "Tokens"),
    "model.config": ("ModelConfig",),
    "sequence.sequence": ("Sequence",),
    "sequence.values": ("Retention",),
    "session": ("Engine", "Session", "SessionInfo", "SessionMark"),
}
_MODULE_OF: Final = {name: module for module, names in _HOME.items() for name in names}
_MODULES: Final = ("errors", "media")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"tml_core.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tml_core' has no attribute {name!r}")
    value = getattr(import_module(f"tml_core.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
