"""The pages of one pool as bytes: to copy one, to write them to a file, to fill them from one."""

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tml_core.contract import PAGE_LEN

__all__ = ["Bytes", "PageMemory", "as_bytes", "clean_page"]

Bytes = NDArray[np.uint8]

_WORDS: Final[dict[torch.dtype, Any]] = {torch.bfloat16: np.uint16, torch.float32: np.uint32}


class PageMemory:
    """Pages in the CPU's memory. ``pages``: [num_pages, layers, kv_heads, 2, 128 * head_dim]."""

    def __init__(self, pages: Tensor) -> None:
        self.pages = pages
        self._bytes = as_bytes(pages)

    def __len__(self) -> int:
        return len(self.pages)

    def copy(self, source: int, target: int) -> None:
        """Page ``target`` becomes what page ``source`` is."""
        np.copyto(self._bytes[target], self._bytes[source])

    def read(self, page_id: int) -> Bytes:
        """A page's bytes, not to be written to; good until the page changes."""
        page: Bytes = self._bytes[page_id]
        return page

    def read_clean(self, page_id: int, num_positions: int) -> Bytes:
        """`read` with everything past the first ``num_positions`` positions zeroed."""
        return clean_page(self.pages, page_id, num_positions)

    def blank(self, page_id: int) -> Bytes:
        """Memory to put a page's bytes into; `fill` follows."""
        page: Bytes = self._bytes[page_id]
        return page

    def fill(self, page_id: int, page: memoryview) -> None:
        """The page holds what was put into the memory that `blank` gave for it."""


def as_bytes(tensor: Tensor) -> Bytes:
    """A contiguous tensor's memory as [first dimension, bytes of one entry], without a copy."""
    count = tensor.shape[0]
    num_bytes = tensor[0].numel() * tensor.element_size() if count else 0
    flat: Bytes = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat.reshape(count, num_bytes)


def clean_page(pages: Tensor, page_id: int, num_positions: int) -> Bytes:
    """The bytes of one page with everything past its first ``num_positions`` positions zeroed.

    ``pages`` is ``global_pages`` or ``sliding_pages``. What stands past the end of a sequence is
    left over from other work, and must not reach a file.
    """
    num_layers, num_kv_heads, _, block_len = pages.shape[1:]
    head_dim = block_len // PAGE_LEN
    words = as_bytes(pages)[page_id].copy().view(_WORDS[pages.dtype])
    kv = words.reshape(num_layers * num_kv_heads, 2, block_len)
    # Both layouts put the elements of one 32-bit k-step side by side.
    step = 4 // pages.element_size()
    num_blocks = num_layers * num_kv_heads
    k = kv[:, 0].reshape(num_blocks, head_dim // step, PAGE_LEN, step)
    v = kv[:, 1].reshape(num_blocks, PAGE_LEN // step, head_dim, step)
    k[:, :, num_positions:] = 0
    for offset in range(step):
        v[:, -((offset - num_positions) // step) :, :, offset] = 0
    clean: Bytes = words.view(np.uint8)
    return clean
