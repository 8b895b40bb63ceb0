"""The sound of output halves: what one tick hands to the next, and how blocks stand among tokens.

Legend: F frames of a block, M mel channels, S samples.
"""

from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tml_core.errors import SnapshotError, Unsupported
from tml_core.layout.events import Event
from tml_core.media._checks import Pcm
from tml_core.media.mel import Mel
from tml_core.media.micro_turns import TICK_MS
from tml_core.media.segments import OwnAudio, Segment, Tokens
from tml_core.media.vocoder import Vocoder, VocoderState
from tml_core.model.audio_out_config import BLOCK_MS

__all__ = [
    "BLOCKS_PER_TICK",
    "SOUND",
    "Heard",
    "RunItem",
    "Unheard",
    "Voice",
    "WrittenHalf",
    "spelled",
]

BLOCKS_PER_TICK: Final = TICK_MS // BLOCK_MS
# Stands for a block of sound among token ids.
SOUND: Final = -1

# What a model puts out: a token, or the mel frames of a block, float32 [F, M].
RunItem = int | Mel


class Unheard(NamedTuple):
    """A tick's sound that is whole: log10 frames float32 [F, M], to be made heard by ``vocoder``
    from its ``state``, None where it begins."""

    vocoder: Vocoder
    state: VocoderState | None
    mel_FM: Mel


class Heard(NamedTuple):
    """The same as PCM, float32 [S], and the vocoder's state after it."""

    pcm: Pcm
    state: VocoderState


@dataclass(frozen=True, eq=False)
class Voice:
    """A sound that goes on in the next tick, or blocks of it that the model has not been given.

    ``last``: the frame said last, float32 [M], None where the tick was not filled with sound.
    ``vocoder``: after that frame, None where nobody listens. ``unsent``: the blocks that stand in
    the output half's unsent tokens, in order.
    """

    last: torch.Tensor | None = None
    vocoder: VocoderState | None = None
    unsent: tuple[OwnAudio, ...] = ()

    def sent(self) -> "Voice | None":
        """The same once the model has been given all of it; None after silence."""
        return None if self.last is None else replace(self, unsent=())

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "last": None if self.last is None else _packed(self.last.numpy()),
            "vocoder": None
            if self.vocoder is None
            else [self.vocoder.name, [_packed(one) for one in self.vocoder.arrays]],
            "unsent": [
                [_packed(one.mel.numpy()), None if one.before is None else _packed(_np(one.before))]
                for one in self.unsent
            ],
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Voice":
        """The inverse of `to_dict`; raises `SnapshotError` for anything else."""
        try:
            last, vocoder, unsent = values["last"], values["vocoder"], values["unsent"]
            return cls(
                last=None if last is None else torch.from_numpy(_unpacked(last)),
                vocoder=None
                if vocoder is None
                else VocoderState(str(vocoder[0]), tuple(_unpacked(one) for one in vocoder[1])),
                unsent=tuple(
                    OwnAudio(
                        torch.from_numpy(_unpacked(mel)),
                        None if before is None else torch.from_numpy(_unpacked(before)),
                    )
                    for mel, before in unsent
                ),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SnapshotError(f"layout: damaged voice: {error}") from error


class WrittenHalf:
    """What an output half without sound answers when it is asked for sound."""

    token_ids: list[int]
    wants_sound: Final = False
    has_unfed_sound: Final = False

    @property
    def before_M(self) -> torch.Tensor:
        """Raises `Unsupported`."""
        raise Unsupported("before_M: this layout has no sound")

    def completed_by(self, mel_FM: torch.Tensor) -> Unheard | None:  # noqa: ARG002
        """Raises `Unsupported`."""
        raise Unsupported("mel: this layout has no sound")

    def accept_sound(
        self,
        mel_FM: torch.Tensor,  # noqa: ARG002
        heard: Heard | None = None,  # noqa: ARG002
    ) -> list[Event]:
        """Raises `Unsupported`."""
        raise Unsupported("mel: this layout has no sound")

    def take_unfed(self) -> list[int]:
        """See `OutputHalf.take_unfed`."""
        raise NotImplementedError

    def take_unfed_segments(self) -> list[Segment]:
        """See `OutputHalf.take_unfed_segments`."""
        return spelled(self.take_unfed(), ())

    def segments(self) -> list[Segment]:
        """See `OutputHalf.segments`."""
        return spelled(self.token_ids, ())


def spelled(token_ids: Sequence[int], sound: Sequence[OwnAudio]) -> list[Segment]:
    """The segments of ids in which `SOUND` stands for the blocks of ``sound``, in order; blocks
    that follow each other become one segment."""
    segments: list[Segment] = []
    ids: list[int] = []
    blocks: list[OwnAudio] = []

    def close_blocks() -> None:
        if blocks:
            mel = torch.cat([one.mel for one in blocks])
            segments.append(OwnAudio(mel, blocks[0].before))
            blocks.clear()

    rest = iter(sound)
    for token_id in token_ids:
        if token_id == SOUND:
            if ids:
                segments.append(Tokens(tuple(ids)))
                ids = []
            blocks.append(next(rest))
        else:
            close_blocks()
            ids.append(token_id)
    close_blocks()
    if ids:
        segments.append(Tokens(tuple(ids)))
    return segments


def _np(value: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = value.numpy()
    return array


def _packed(array: NDArray[Any]) -> list[Any]:
    data = np.ascontiguousarray(array)
    return [data.dtype.str, list(data.shape), b64encode(data.tobytes()).decode()]


def _unpacked(values: Any) -> NDArray[Any]:
    kind, shape, data = values
    if kind not in ("<f4", "<f8"):
        raise ValueError(f"expected float32 or float64, got {kind!r}")
    return np.frombuffer(b64decode(data, validate=True), kind).reshape(shape).copy()
