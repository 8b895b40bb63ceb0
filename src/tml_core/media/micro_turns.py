"""Micro-turns: sound and pictures cut into 200 ms pieces on one clock.

Legend: S samples, H height, W width. Tick k begins at k * 200 ms. Everything is lazy: a tick is
given as soon as its own samples and frames are there, and nothing after it has been asked for.
"""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media._checks import Pcm, Rgb, pcm_array, positive_int, rgb_array
from tml_core.media.audio_file import SAMPLE_RATE, audio_blocks, resample_blocks
from tml_core.media.video_file import DEFAULT_MAX_EDGE, VideoReader, fit_frame

__all__ = ["TICK_MS", "TICK_SAMPLES", "MicroTurn", "micro_turns"]

TICK_MS = 200
TICK_SAMPLES = SAMPLE_RATE * TICK_MS // 1000

AudioSource = str | os.PathLike[str] | Pcm | torch.Tensor | Iterable[Pcm]
VideoSource = str | os.PathLike[str] | Iterable[Rgb | None]


@dataclass(frozen=True, eq=False)
class MicroTurn:
    """200 ms of input.

    ``audio``: float32 [S] in [-1, 1], 16 kHz mono, S <= 3200, or None where there is no sound.
    ``frames``: at most two pictures of one shape, uint8 [H, W, 3], oldest first.
    ``text``: typed text or None. ``index``: the tick. ``start_ms``: index * 200, set if left out.
    ``num_padded``: how many samples at the end of ``audio`` are zeros that fill up the tick.

    Raises InvalidArgument or InvalidType, naming the field, for anything else.
    """

    audio: Pcm | None = None
    frames: tuple[Rgb, ...] = ()
    text: str | None = None
    index: int = 0
    start_ms: int = -1
    num_padded: int = 0

    def __post_init__(self) -> None:
        num_samples = 0
        if self.audio is not None:
            audio_S = pcm_array("MicroTurn.audio", self.audio)
            object.__setattr__(self, "audio", audio_S)
            num_samples = len(audio_S)
        if num_samples > TICK_SAMPLES:
            raise InvalidArgument(
                f"MicroTurn.audio: expected at most {TICK_SAMPLES} samples, got {num_samples}"
            )
        if not isinstance(self.frames, (tuple, list)):
            raise InvalidType(
                f"MicroTurn.frames: expected a tuple, got {type(self.frames).__name__}"
            )
        if len(self.frames) > 2:
            raise InvalidArgument(f"MicroTurn.frames: expected at most 2, got {len(self.frames)}")
        frames = tuple(
            rgb_array(f"MicroTurn.frames[{i}]", frame) for i, frame in enumerate(self.frames)
        )
        if len(frames) == 2 and frames[0].shape != frames[1].shape:
            raise InvalidArgument(
                "MicroTurn.frames: expected one shape, "
                f"got {list(frames[0].shape)} and {list(frames[1].shape)}"
            )
        object.__setattr__(self, "frames", frames)
        if self.text is not None and not isinstance(self.text, str):
            raise InvalidType(f"MicroTurn.text: expected str, got {type(self.text).__name__}")
        for field in ("index", "start_ms", "num_padded"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidType(f"MicroTurn.{field}: expected an int, got {type(value).__name__}")
        if self.index < 0:
            raise InvalidArgument(f"MicroTurn.index: expected at least 0, got {self.index}")
        if self.start_ms == -1:
            object.__setattr__(self, "start_ms", self.index * TICK_MS)
        if self.start_ms != self.index * TICK_MS:
            raise InvalidArgument(
                f"MicroTurn.start_ms: expected index * {TICK_MS} = {self.index * TICK_MS}, "
                f"got {self.start_ms}"
            )
        if not 0 <= self.num_padded <= num_samples:
            raise InvalidArgument(
                f"MicroTurn.num_padded: expected 0 to {num_samples}, got {self.num_padded}"
            )


def micro_turns(
    audio: AudioSource | None = None,
    video: VideoSource | None = None,
    *,
    sample_rate: int | None = None,
    fps: int = 10,
    max_edge: int | None = DEFAULT_MAX_EDGE,
    duration_s: float | None = None,
    pad: bool = True,
) -> Iterator[MicroTurn]:
    """Cut sound and pictures into micro-turns, tick after tick, until both have ended.

    ``audio``: a file; or samples, float32 [S]; or an iterable of such pieces, of any lengths
    (a live feed). Samples have no rate of their own: give ``sample_rate``; what is not 16 kHz is
    resampled. ``video``: a file, sampled at each tick's 0 and 100 ms (``fps=10``) or 0 ms alone
    (``fps=5``); or an iterable of pictures, uint8 [H, W, 3], one for every grid time in turn
    (None where there was none). Pictures are scaled down to ``max_edge`` pixels (None: never).
    ``duration_s``: stop before the first tick that begins there or later.

    At the end of the sound the last tick is filled up with zeros, counted in its ``num_padded``;
    with ``pad=False`` it is shorter instead. Afterwards ``audio`` is None while video goes on;
    after the end of the video ``frames`` is empty. No sample and no grid frame is dropped.

    Raises InvalidArgument, InvalidType or MediaError: at once for arguments and files that do not
    open, else when the bad piece is reached.
    """
    frames_per_tick = {5: 1, 10: 2}.get(fps)
    if frames_per_tick is None:
        raise InvalidArgument(f"fps: expected 5 or 10 (1 or 2 frames a tick), got {fps}")
    if max_edge is not None:
        positive_int("max_edge", max_edge)
    if audio is None and video is None:
        raise InvalidArgument("micro_turns: expected audio, video or both, got neither")
    ticks = _ticks(duration_s)
    with ExitStack() as stack:
        blocks = _audio_source(audio, sample_rate, stack)
        frames = _video_source(video, fps, max_edge, stack)
        opened = stack.pop_all()
    return _generate(ticks, _Samples(blocks), frames, frames_per_tick, pad, opened)


def _generate(
    ticks: Iterable[int],
    samples: "_Samples",
    frames: Iterator[Rgb | None],
    frames_per_tick: int,
    pad: bool,
    opened: ExitStack,
) -> Iterator[MicroTurn]:
    with opened:
        for index in ticks:
            audio_S = samples.take(TICK_SAMPLES)
            slots = list(islice(frames, frames_per_tick))
            if not len(audio_S) and not slots:
                return
            num_padded = TICK_SAMPLES - len(audio_S) if pad and len(audio_S) else 0
            if num_padded:
                audio_S = np.concatenate((audio_S, np.zeros(num_padded, np.float32)))
            yield MicroTurn(
                audio=audio_S if len(audio_S) else None,
                frames=tuple(frame for frame in slots if frame is not None),
                index=index,
                num_padded=num_padded,
            )


class _Samples:
    """Pieces of any length in, pieces of a wanted length out; pulls no further than it must."""

    def __init__(self, blocks: Iterator[Pcm]) -> None:
        self._blocks = blocks
        self._rest = np.zeros(0, np.float32)

    def take(self, num_samples: int) -> Pcm:
        """The next ``num_samples``, fewer only at the end of the signal; a copy of its own."""
        taken_S = np.empty(num_samples, np.float32)
        filled = 0
        while filled < num_samples:
            if not len(self._rest):
                block_S = next(self._blocks, None)
                if block_S is None:
                    break
                self._rest = block_S
            piece_S = self._rest[: num_samples - filled]
            # Copied before the next block is asked for: a feed may reuse its buffer.
            taken_S[filled : filled + len(piece_S)] = piece_S
            self._rest = self._rest[len(piece_S) :]
            filled += len(piece_S)
        return taken_S[:filled]


def _ticks(duration_s: float | None) -> Iterable[int]:
    if duration_s is None:
        return count()
    if isinstance(duration_s, bool) or not isinstance(duration_s, (int, float)):
        raise InvalidType(f"duration_s: expected a number, got {type(duration_s).__name__}")
    if not 0.0 < duration_s < math.inf:
        raise InvalidArgument(f"duration_s: expected a positive number, got {duration_s}")
    # Rounded to the microsecond first, so that 0.6 is three ticks and not four.
    return range(-(-round(duration_s * 1e6) // (TICK_MS * 1000)))


def _audio_source(
    audio: AudioSource | None, sample_rate: int | None, stack: ExitStack
) -> Iterator[Pcm]:
    if audio is None or isinstance(audio, (str, os.PathLike)):
        if sample_rate is not None:
            what = "without audio" if audio is None else "with a file, which knows its own rate"
            raise InvalidArgument(f"sample_rate: expected None {what}, got {sample_rate}")
        if audio is None:
            return iter(())
        return stack.enter_context(closing(audio_blocks(audio)))
    if not isinstance(audio, Iterable):
        raise InvalidType(
            f"audio: expected a path, samples or an iterable of samples, got {type(audio).__name__}"
        )
    if sample_rate is None:
        raise InvalidArgument("sample_rate: expected the rate of the samples in audio, got None")
    source_rate = positive_int("sample_rate", sample_rate)
    pieces: Iterator[Pcm]
    if isinstance(audio, (np.ndarray, torch.Tensor)):
        pieces = iter((pcm_array("audio", audio),))
    else:
        pieces = (pcm_array(f"audio[{i}]", piece) for i, piece in enumerate(audio))
    return resample_blocks(pieces, source_rate, SAMPLE_RATE)


def _video_source(
    video: VideoSource | None, fps: int, max_edge: int | None, stack: ExitStack
) -> Iterator[Rgb | None]:
    if video is None:
        return iter(())
    if isinstance(video, (str, os.PathLike)):
        reader = stack.enter_context(VideoReader(video, max_edge))
        return (rgb_HWC for _, rgb_HWC in reader.frames_on_grid(fps))
    if isinstance(video, (np.ndarray, torch.Tensor)) or not isinstance(video, Iterable):
        raise InvalidType(
            f"video: expected a path or an iterable of pictures, got {type(video).__name__}"
        )
    # Copied, for a feed may reuse its buffer.
    return (
        None if frame is None else np.array(fit_frame(rgb_array(f"video[{i}]", frame), max_edge))
        for i, frame in enumerate(video)
    )
