"""Video files in: frames with their presentation times, or sampled on a regular grid.

Legend: H height, W width. Decoding and scaling are PyAV's.
"""

import os
from collections.abc import Iterator
from fractions import Fraction
from types import TracebackType
from typing import Any

import av
import numpy as np
import torch

from tml_core.errors import MediaError
from tml_core.media._checks import Rgb, positive_int, rgb_array
from tml_core.media._container import checked_path, guarded_frames, reason_of

__all__ = ["DEFAULT_MAX_EDGE", "VideoReader", "fit_frame"]

# One below four patches of 40: a 4:3 or 16:9 picture becomes 3 x 4 = 12 patches. At 160 the extra
# column that follows a full one would make it 15, three of them empty.
DEFAULT_MAX_EDGE = 159


class VideoReader:
    """The first video stream of a file, read once, front to back.

    Iterating gives ``(time_ms, rgb)``: presentation time counted from the first frame, and
    uint8 [H, W, 3], upright, scaled down (never up) so that the longer edge is at most
    ``max_edge`` pixels; ``max_edge=None`` keeps the size. The file stays open until ``close()``,
    the end of a ``with`` block or the end of the stream.

    Raises MediaError, naming path and reason, if the file is missing, unreadable, truncated (as
    far as its format tells), has no video stream, or is read a second time.
    """

    def __init__(
        self, path: str | os.PathLike[str], max_edge: int | None = DEFAULT_MAX_EDGE
    ) -> None:
        self._max_edge = None if max_edge is None else positive_int("max_edge", max_edge)
        name, self._what = checked_path(path, "video")
        try:
            self._container: Any = av.open(name)
        except av.FFmpegError as error:
            raise MediaError(f"{self._what}: {reason_of(error)}") from error
        if not self._container.streams.video:
            self._container.close()
            raise MediaError(f"{self._what}: it has no video stream")
        self._is_used = False

    def __iter__(self) -> Iterator[tuple[int, Rgb]]:
        for time_ms, _, frame in self._frames():
            yield round(time_ms), self._rgb(frame)

    def frames_on_grid(self, fps: int = 10) -> Iterator[tuple[int, Rgb]]:
        """``(time_ms, rgb)`` at i * 1000 / fps for i = 0, 1, ... until the last frame has passed.

        The picture at time t is the last one presented at or before t. One that stays is given
        again (the same array); one that comes and goes between two grid times is never given.
        """
        step_ms = Fraction(1000, positive_int("fps", fps))
        grid_ms = Fraction(0)
        for end_ms, frame in self._shown_until():
            rgb_HWC: Rgb | None = None
            while grid_ms < end_ms:
                # Only what is given is converted and scaled.
                rgb_HWC = self._rgb(frame) if rgb_HWC is None else rgb_HWC
                yield round(grid_ms), rgb_HWC
                grid_ms += step_ms

    def close(self) -> None:
        """Close the file; may be called again. A closed reader gives no more frames."""
        self._is_used = True
        self._container.close()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _shown_until(self) -> Iterator[tuple[Fraction, Any]]:
        """Each frame with the time in ms at which the next one replaces it."""
        held: Any = None
        time_ms = duration_ms = gap_ms = Fraction(0)
        for next_ms, next_duration_ms, frame in self._frames():
            if held is not None:
                yield next_ms, held
                gap_ms = next_ms - time_ms
            held, time_ms, duration_ms = frame, next_ms, next_duration_ms
        if held is not None:
            # Without a duration the last frame stays as long as the one before it.
            yield time_ms + (duration_ms or gap_ms or 1), held

    def _frames(self) -> Iterator[tuple[Fraction, Fraction, Any]]:
        """Frames with presentation time and duration (0 if unknown) in ms."""
        if self._is_used:
            raise MediaError(f"{self._what}: it was read or closed before, open it again")
        self._is_used = True
        stream = self._container.streams.video[0]
        first: int | None = None
        try:
            for frame in guarded_frames(self._container, stream, self._what):
                pts = frame.dts if frame.pts is None else frame.pts
                if pts is None:
                    raise MediaError(f"{self._what}: a frame has no presentation time")
                first = pts if first is None else first
                unit_ms = frame.time_base * 1000
                yield (pts - first) * unit_ms, (frame.duration or 0) * unit_ms, frame
        finally:
            self._container.close()

    def _rgb(self, frame: Any) -> Rgb:
        rgb_HWC = _scaled(frame, self._max_edge)
        # Phones store portrait pictures lying down, with the counterclockwise angle to undo it.
        return np.ascontiguousarray(np.rot90(rgb_HWC, round(frame.rotation / 90)))


def fit_frame(rgb: Rgb | torch.Tensor, max_edge: int | None = DEFAULT_MAX_EDGE) -> Rgb:
    """``rgb`` (uint8 [H, W, 3]) scaled down, if need be, to at most ``max_edge`` pixels an edge."""
    rgb_HWC = rgb_array("rgb", rgb)
    if max_edge is None or max(rgb_HWC.shape[:2]) <= positive_int("max_edge", max_edge):
        return rgb_HWC
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb_HWC), format="rgb24")
    return _scaled(frame, max_edge)


def _scaled(frame: Any, max_edge: int | None) -> Rgb:
    width, height = frame.width, frame.height
    longer = max(width, height)
    if max_edge is not None and longer > max_edge:
        width, height = (max(1, round(edge * max_edge / longer)) for edge in (width, height))
    fitted = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA")
    rgb_HWC: Rgb = fitted.to_ndarray()
    return rgb_HWC
