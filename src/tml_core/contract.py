"""Contract v1 in Python: the mirror of ``csrc/core/contract.h`` (a test compares the two)."""

from typing import Final

__all__ = [
    "CONTRACT_VERSION",
    "CONV_TAPS",
    "GRAD_BLOCK",
    "LANES",
    "PAGE_LEN",
    "PANEL",
    "SEGMENT_LEN",
    "VOCAB_BLOCK",
]

CONTRACT_VERSION: Final = 1
PAGE_LEN: Final = 128
SEGMENT_LEN: Final = 2048
CONV_TAPS: Final = 4
VOCAB_BLOCK: Final = 128
PANEL: Final = 32
LANES: Final = 16
GRAD_BLOCK: Final = 512
