"""A small model with random weights that spells bytes: what most tests run, whatever ships."""

from pathlib import Path
from typing import Final

__all__ = ["BYTE_MODEL"]

BYTE_MODEL: Final = Path(__file__).parent / "checkpoints" / "bytes"
