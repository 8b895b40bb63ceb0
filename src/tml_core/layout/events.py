"""What a turn reports: small frozen records, tagged with the tick they belong to.

Every event carries ``tick`` (the micro-turn), ``t_ms`` (where that tick begins on the media clock)
and ``epoch`` (raised by every cancel and rewind, so that late readers can drop what was undone).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AudioChunk",
    "Event",
    "Notice",
    "Silence",
    "Tags",
    "TextToken",
    "ToolCall",
    "TurnDone",
    "TurnEnd",
]

TurnEnd = Literal["silence", "end", "call", "budget", "input", "cancelled", "degraded"]


class Tags(TypedDict):
    """The fields all events share, as keyword arguments."""

    tick: int
    t_ms: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Event:
    """What all events have in common."""

    tick: int
    t_ms: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class TextToken(Event):
    """One text token the model wrote.

    ``text``: the characters this token completes; bytes of an unfinished character wait for the
    token that finishes it, so it may be empty. Bytes that are no UTF-8 become U+FFFD.
    ``channel``: "thinking" inside a thinking part of a chat answer, else "text".
    """

    text: str
    token_id: int
    logprob: float
    channel: Literal["text", "thinking"] = "text"


@dataclass(frozen=True, kw_only=True, eq=False)
class AudioChunk(Event):
    """Sound the model made: float32 [S] in [-1, 1]; only from models with an audio-out head."""

    pcm: NDArray[np.float32]
    sample_rate: int


@dataclass(frozen=True, kw_only=True)
class ToolCall(Event):
    """A finished tool call; the caller runs the tool and answers with `ToolResult`.

    ``raw`` is what the model wrote. Where it is no call (malformed JSON, no name), ``error`` says
    why, ``name`` is "" and ``args`` empty. ``token_ids``: the tokens between the call markers.
    """

    name: str
    args: Mapping[str, Any]
    call_id: str
    raw: str
    error: str | None = None
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Silence(Event):
    """The model chose to say nothing in this tick."""

    logprob: float


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """Something the runtime did. ``data``: what and how much.

    ``kind``: "evicted", "padded", "waiting" (text that has to wait for the next ticks), "dropped"
    (tool results whose call was undone), "degraded" (``data["policy"]`` says how) or "unheard"
    (output the user did not hear that could not be taken back).
    """

    kind: str
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TurnDone(Event):
    """The last event of a turn. ``token_ids``: the output half as it stands in the sequence.

    ``reason``: "silence"; "end" (the model closed the tick or the answer); "call" (closed after a
    tool call); "budget" (the token budget was used up); "input" (nothing was asked of the model);
    "cancelled"; "degraded" (closed early, or not begun, to keep the clock: a `Notice` says which).
    """

    reason: TurnEnd
    token_ids: tuple[int, ...] = ()
