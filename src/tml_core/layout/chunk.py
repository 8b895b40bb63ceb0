"""What goes into one turn: 200 ms of sound, pictures, typed text and tool results.

Legend: S samples, H height, W width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media._checks import Pcm, Rgb, pcm_array, rgb_array
from tml_core.media.audio_file import SAMPLE_RATE
from tml_core.media.micro_turns import TICK_MS, TICK_SAMPLES, MicroTurn

__all__ = ["Chunk", "ToolResult", "as_chunk"]


@dataclass(frozen=True)
class ToolResult:
    """The answer to a `ToolCall`. ``content``: text, or any JSON value, which is written as JSON.

    ``name``: the tool, for a result of something the model did not call (``call_id`` is then free);
    None takes the name from the call. Raises InvalidType or InvalidArgument if the content is not
    JSON.
    """

    call_id: str
    content: Any
    is_error: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.call_id, str):
            raise InvalidType(f"call_id: expected str, got {type(self.call_id).__name__}")
        if self.name is not None and not isinstance(self.name, str):
            raise InvalidType(f"name: expected str, got {type(self.name).__name__}")
        self.text()

    def text(self) -> str:
        """The content as the text the model reads."""
        if isinstance(self.content, str):
            return self.content
        return compact_json("content", self.content)


@dataclass(frozen=True, eq=False)
class Chunk:
    """One turn's input; every part may be missing, but not all of them.

    ``audio``: float32 [S] in [-1, 1], mono, 1 <= S <= 3200 samples of 16 kHz. ``frames``: at most
    two pictures of one shape, uint8 [H, W, 3], oldest first. ``text``: what was typed. ``items``:
    tool results. ``is_idle=True`` says on purpose that time passed and nothing came.
    ``num_padded``: how many samples at the end of ``audio`` are filling, which is reported.

    Raises InvalidArgument or InvalidType, naming the field, for anything else.
    """

    audio: Pcm | None = None
    frames: Sequence[Rgb] = ()
    text: str | None = None
    items: Sequence[ToolResult] = ()
    sample_rate: int = SAMPLE_RATE
    is_idle: bool = False
    num_padded: int = 0

    def __post_init__(self) -> None:
        if self.sample_rate != SAMPLE_RATE:
            raise InvalidArgument(
                f"Chunk.sample_rate: expected {SAMPLE_RATE}, got {self.sample_rate}; "
                "tml_core.media.micro_turns resamples"
            )
        if self.audio is not None:
            audio_S = pcm_array("Chunk.audio", self.audio)
            if not 1 <= len(audio_S) <= TICK_SAMPLES:
                raise InvalidArgument(
                    f"Chunk.audio: expected 1 to {TICK_SAMPLES} samples ({TICK_MS} ms), "
                    f"got {len(audio_S)}"
                )
            object.__setattr__(self, "audio", audio_S)
        object.__setattr__(self, "frames", _frames(self.frames))
        if self.text is not None and not isinstance(self.text, str):
            raise InvalidType(f"Chunk.text: expected str, got {type(self.text).__name__}")
        if not isinstance(self.items, (list, tuple)):
            raise InvalidType(f"Chunk.items: expected a list, got {type(self.items).__name__}")
        for i, item in enumerate(self.items):
            if not isinstance(item, ToolResult):
                raise InvalidType(
                    f"Chunk.items[{i}]: expected ToolResult, got {type(item).__name__}"
                )
        object.__setattr__(self, "items", tuple(self.items))
        is_empty = self.audio is None and not self.frames and not self.text and not self.items
        if is_empty and not self.is_idle:
            raise InvalidArgument(
                "Chunk: expected audio, frames, text or items, got nothing "
                "(is_idle=True says that nothing came)"
            )
        if self.is_idle and not is_empty:
            raise InvalidArgument("Chunk.is_idle: expected an empty chunk, got content")


def as_chunk(chunk: object) -> Chunk:
    """``chunk`` itself, or a `MicroTurn` as a chunk. Raises InvalidType for anything else."""
    if isinstance(chunk, Chunk):
        return chunk
    if not isinstance(chunk, MicroTurn):
        raise InvalidType(f"chunk: expected Chunk or MicroTurn, got {type(chunk).__name__}")
    has_audio = chunk.audio is not None and len(chunk.audio) > 0
    return Chunk(
        audio=chunk.audio if has_audio else None,
        frames=chunk.frames,
        text=chunk.text,
        is_idle=not has_audio and not chunk.frames and not chunk.text,
        num_padded=chunk.num_padded,
    )


def compact_json(name: str, value: object) -> str:
    """``value`` in the one JSON spelling the models see: sorted keys, no spaces, UTF-8 as it is."""
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name}: expected a JSON value: {error}") from error


def _frames(frames: object) -> tuple[Rgb, ...]:
    if not isinstance(frames, (list, tuple)):
        raise InvalidType(f"Chunk.frames: expected a list, got {type(frames).__name__}")
    if len(frames) > 2:
        raise InvalidArgument(f"Chunk.frames: expected at most 2 a tick, got {len(frames)}")
    checked = tuple(rgb_array(f"Chunk.frames[{i}]", frame) for i, frame in enumerate(frames))
    if len(checked) == 2 and checked[0].shape != checked[1].shape:
        raise InvalidArgument(
            "Chunk.frames: expected one shape, "
            f"got {list(checked[0].shape)} and {list(checked[1].shape)}"
        )
    return checked
