"""The small values a sequence is described by."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tml_core.errors import InvalidArgument
from tml_core.media.dmel import DmelState

__all__ = ["Carry", "Evicted", "Retention"]


@dataclass(frozen=True, eq=False)
class Carry:
    """What goes from one append to the next beside KV; replaced, never written to.

    ``audio``: samples the next dMel frame needs. ``frame``: uint8 [H, W, 3], a video frame that
    waits for the second of its pair. ``num_sampled`` and ``num_noise`` count draws. ``clock_ms``
    is the media time that has been appended.
    """

    audio: DmelState | None = None
    frame: NDArray[np.uint8] | None = None
    num_sampled: int = 0
    num_noise: int = 0
    clock_ms: int = 0


@dataclass(frozen=True)
class Retention:
    """What an endless sequence keeps: the last ``window_positions`` and the first
    ``pinned_prefix``, both rounded up to whole pages and micro-turns. Positions never shift.

    It governs the global layers; sliding layers keep their own window. A page is dropped when it
    lies wholly before the last micro-turn start that is at least the window back.
    """

    window_positions: int
    pinned_prefix: int = 0

    def __post_init__(self) -> None:
        if self.window_positions < 1:
            raise InvalidArgument(
                f"Retention.window_positions: expected at least 1, got {self.window_positions}"
            )
        if self.pinned_prefix < 0:
            raise InvalidArgument(
                f"Retention.pinned_prefix: expected at least 0, got {self.pinned_prefix}"
            )


@dataclass(frozen=True)
class Evicted:
    """Notice that the positions [start, end) are no longer seen by global layers."""

    start: int
    end: int
