"""The context package: all that a background model is told besides the request.

The interaction model delegates with the whole conversation, not with a lone query: typed text, what
the model said, its calls and their results, when there was sound and how loud, and the last
pictures. Sound is described, not transcribed: what was spoken is in the request, in the words of
the model that heard it, and a backend that forks the session hears it itself.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from tml_core.engine.seat import TickRecord
from tml_core.errors import InvalidArgument, InvalidType
from tml_core.layout.chunk import ToolResult
from tml_core.media.micro_turns import TICK_MS

__all__ = ["CallItem", "ContextPackage", "Frame", "ResultItem", "SoundItem", "TextItem"]

# A pause of this many ticks ends a text or a stretch of sound.
_GAP_TICKS: Final = 5
SPEECH_RMS: Final = 0.01  # -40 dB of full scale


@dataclass(frozen=True)
class TextItem:
    """Words. ``role``: "user" typed them, "model" said them. Times on the session's media clock."""

    role: Literal["user", "model"]
    text: str
    start_ms: int
    end_ms: int


@dataclass(frozen=True)
class SoundItem:
    """A stretch in which the microphone was not quiet; ``rms``: its mean level, 0 to 1."""

    start_ms: int
    end_ms: int
    rms: float


@dataclass(frozen=True)
class CallItem:
    """A tool call of the interaction model; ``raw``: the JSON it wrote."""

    name: str
    call_id: str
    raw: str
    start_ms: int


@dataclass(frozen=True)
class ResultItem:
    """A result that entered the conversation."""

    call_id: str
    content: str
    is_error: bool
    start_ms: int


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture the session saw: uint8 [H, W, 3]."""

    rgb: NDArray[np.uint8]
    start_ms: int


Item = TextItem | SoundItem | CallItem | ResultItem


@dataclass(frozen=True, eq=False)
class ContextPackage:
    """What a job is about. ``items``: the conversation, oldest first. ``frames``: the last ones.

    ``now_ms``: media time at which the package was made. ``session_ref``: a weak reference to the
    live session it is of; remembering a job must not keep a session open.
    """

    request: str
    items: tuple[Item, ...] = ()
    frames: tuple[Frame, ...] = ()
    now_ms: int = 0
    session_ref: "weakref.ref[Any] | None" = None

    def __post_init__(self) -> None:
        if not isinstance(self.request, str):
            raise InvalidType(f"request: expected str, got {type(self.request).__name__}")
        if not self.request.strip():
            raise InvalidArgument("request: expected what is to be done, got none")

    @property
    def session(self) -> Any:
        """The live session, None for a job outside any and once the session is collected; a
        backend may fork it, never append to it."""
        return None if self.session_ref is None else self.session_ref()

    @classmethod
    def from_records(
        cls,
        request: str,
        records: Sequence[TickRecord],
        results: Iterable[tuple[int, ToolResult]] = (),
        frames: tuple[Frame, ...] = (),
        session: Any = None,
    ) -> "ContextPackage":
        """The package of ticks as `Session.transcript` gives them. ``results``: (tick, result)."""
        items: list[Item] = []
        items += _texts(records, "user")
        items += _texts(records, "model")
        items += _sounds(records)
        items += (
            CallItem(name, call_id, raw, one.t_ms)
            for one in records
            for name, call_id, raw in one.calls
        )
        items += (
            ResultItem(one.call_id, one.text(), one.is_error, tick * TICK_MS)
            for tick, one in results
        )
        items.sort(key=lambda one: one.start_ms)
        now_ms = records[-1].t_ms + TICK_MS if records else 0
        ref = None if session is None else weakref.ref(session)
        return cls(request, tuple(items), frames, now_ms, ref)

    def conversation(self, max_chars: int = 8000) -> str:
        """The items as lines of text with times, the oldest left out beyond ``max_chars``."""
        lines = [_line(one) for one in self.items]
        kept: list[str] = []
        room = max_chars
        for line in reversed(lines):
            room -= len(line) + 1
            if room < 0:
                kept.append(f"({len(lines) - len(kept)} older lines left out)")
                break
            kept.append(line)
        return "\n".join(reversed(kept))


def _texts(records: Sequence[TickRecord], role: Literal["user", "model"]) -> list[TextItem]:
    items: list[TextItem] = []
    for one in records:
        text = one.text_in if role == "user" else one.text_out
        if not text:
            continue
        end_ms = one.t_ms + TICK_MS
        last = items[-1] if items else None
        # A model's words run on from tick to tick; what is typed comes whole.
        if last is not None and role == "model" and one.t_ms - last.end_ms < _GAP_TICKS * TICK_MS:
            items[-1] = TextItem(role, last.text + text, last.start_ms, end_ms)
        else:
            items.append(TextItem(role, text, one.t_ms, end_ms))
    return items


def _sounds(records: Sequence[TickRecord]) -> list[SoundItem]:
    items: list[SoundItem] = []
    counts: list[int] = []
    for one in records:
        if one.audio_rms is None or one.audio_rms < SPEECH_RMS:
            continue
        end_ms = one.t_ms + TICK_MS
        if items and one.t_ms - items[-1].end_ms < _GAP_TICKS * TICK_MS:
            last, count = items[-1], counts[-1]
            mean = (last.rms * count + one.audio_rms) / (count + 1)
            items[-1], counts[-1] = SoundItem(last.start_ms, end_ms, mean), count + 1
        else:
            items.append(SoundItem(one.t_ms, end_ms, one.audio_rms))
            counts.append(1)
    return items


def _line(item: Item) -> str:
    clock = f"[{item.start_ms / 1000:.1f} s]"
    match item:
        case TextItem(role="user"):
            return f"{clock} user typed: {item.text}"
        case TextItem():
            return f"{clock} assistant said: {item.text}"
        case SoundItem():
            return f"{clock} sound until {item.end_ms / 1000:.1f} s"
        case CallItem():
            return f"{clock} assistant called: {item.raw}"
        case ResultItem():
            kind = "error" if item.is_error else "result"
            return f"{clock} {kind} of {item.call_id}: {item.content}"
