"""
Compiled kernels of tml_core; use tml_core.ops, which checks and documents them.
"""

from typing import Annotated

import torch


CONTRACT_VERSION: int = 1

PAGE_LEN: int = 128

SEGMENT_LEN: int = 2048

CONV_TAPS: int = 4

VOCAB_BLOCK: int = 128

PANEL: int = 32

LANES: int = 16

WITH_CUDA: bool = False

def isa() -> str:
    """
    Instruction set of the CPU kernels: scalar, avx2, avx512 or avx512bf16.
    """

def set_isa(name: str) -> None: ...

def supported_isas() -> list[str]: ...

def huge_empty(num_bytes: int) -> Annotated[torch.Tensor, dict(dtype='uint8', shape=(None,))]:
    """
    uint8 [num_bytes] in zeroed huge-page memory, committed on first touch.
    """

def num_scratch_growths() -> int:
    """
    Times kernel scratch grew since the process started; a steady state adds none.
    """

def pack_weight(w: object, packed: object, num_threads: int) -> None: ...

def linear(x: object, weight: object, out: object, num_threads: int) -> None: ...

def moe(x: object, expert_ids: object, weights: object, gammas: object, w13: object, w2: object, width: int, out: object, num_threads: int) -> None: ...
