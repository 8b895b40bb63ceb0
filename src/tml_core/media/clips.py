"""The clips that come with the package: real speech and a real video of the same length."""

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

__all__ = ["Clips", "clips"]


class Clips(NamedTuple):
    """``audio``: a FLAC file, 16 kHz mono speech. ``video``: an MP4 file. Both last 16 s."""

    audio: Path
    video: Path


def clips() -> Clips:
    """Paths of the bundled clips; origin and licences stand in LICENSES.md beside them."""
    folder = files("tml_core") / "assets" / "clips"
    return Clips(Path(str(folder / "talk.flac")), Path(str(folder / "scene.mp4")))
