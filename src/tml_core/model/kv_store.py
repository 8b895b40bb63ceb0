"""The memory of all sequences of a model: page pools, page tables, convolution rows.

A page holds K and V of every layer of one kind (global or sliding) for 128 positions. Which page
belongs to whom is decided above; the kernels read and write these tensors in place.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from tml_core.contract import CONV_TAPS, PAGE_LEN
from tml_core.errors import InvalidArgument
from tml_core.model.config import TextConfig
from tml_core.model.page_memory import PageMemory
from tml_core.ops._common import huge_empty

__all__ = ["KvSizes", "KvStore", "kv_sizes"]

_DTYPES: Final = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class KvSizes:
    """Bytes a sequence takes, from its configuration alone.

    ``window_pages``: pages of sliding layers that are visible at once.
    """

    global_page_bytes: int
    sliding_page_bytes: int
    conv_bytes: int
    window_pages: int

    @property
    def bytes_per_position(self) -> float:
        """What one more position costs for good: the global layers' K and V."""
        return self.global_page_bytes / PAGE_LEN

    def sequence_bytes(self, num_positions: int) -> int:
        """Bytes of a sequence of ``num_positions`` with nothing pinned or evicted."""
        num_pages = -(-num_positions // PAGE_LEN)
        return (
            num_pages * self.global_page_bytes
            + min(num_pages, self.window_pages) * self.sliding_page_bytes
            + self.conv_bytes
        )


def kv_sizes(config: TextConfig, dtype: torch.dtype) -> KvSizes:
    """Sizes for a decoder of this configuration whose state is kept in ``dtype``.

    Raises InvalidArgument unless ``dtype`` is float32 or bfloat16.
    """
    if dtype not in _DTYPES:
        raise InvalidArgument(f"dtype: expected float32 or bfloat16, got {dtype}")
    num_sliding = sum(config.layer_is_sliding)
    num_global = config.num_layers - num_sliding
    pair_bytes = 2 * PAGE_LEN * dtype.itemsize
    return KvSizes(
        global_page_bytes=num_global * config.num_kv_heads * config.head_dim * pair_bytes,
        sliding_page_bytes=num_sliding * config.swa_num_kv_heads * config.swa_head_dim * pair_bytes,
        conv_bytes=config.num_layers * (CONV_TAPS - 1) * _conv_width(config) * dtype.itemsize,
        window_pages=-(-(config.window - 1) // PAGE_LEN) + 1,
    )


class KvStore:
    """Allocates, and names, what the step kernels work on. Memory is committed on first touch.

    ``global_pages``, ``sliding_pages``: [num_pages, layers of the kind, kv_heads, 2,
    128 * head_dim] in ``dtype``; per head a K block, then a V block (csrc/ops/step_batch.h).
    ``global_table``, ``sliding_table``: int32 [num_slots, max_pages], logical page to page id, -1
    for none or dropped.
    ``conv_rows``: [num_slots, num_layers, 3, 2 * kv_width_max + 2 * hidden] in ``dtype``, oldest
    first; parts k, v, attention out, MLP out.
    ``layout`` names where and how pages are laid out; a snapshot of another one does not fit.
    ``global_memory``, ``sliding_memory``: the pools, page by page.

    Raises InvalidArgument for counts below one or another dtype.
    """

    layout: ClassVar[str] = "cpu"
    device: torch.device = torch.device("cpu")

    def __init__(
        self,
        config: TextConfig,
        dtype: torch.dtype,
        num_slots: int,
        max_positions: int,
        num_global_pages: int,
        num_sliding_pages: int,
    ) -> None:
        self.sizes = kv_sizes(config, dtype)
        for name, value in (
            ("num_slots", num_slots),
            ("max_positions", max_positions),
            ("num_global_pages", num_global_pages),
            ("num_sliding_pages", num_sliding_pages),
        ):
            if value < 1:
                raise InvalidArgument(f"KvStore: {name} must be at least 1, got {value}")
        self.config = config
        self.dtype = dtype
        self.num_slots = num_slots
        self.max_positions = max_positions
        self.max_pages = -(-max_positions // PAGE_LEN)
        num_sliding = sum(config.layer_is_sliding)
        num_global = config.num_layers - num_sliding
        self.global_pages = self.empty(
            (num_global_pages, num_global, config.num_kv_heads, 2, PAGE_LEN * config.head_dim),
            dtype,
        )
        self.sliding_pages = self.empty(
            (
                num_sliding_pages,
                num_sliding,
                config.swa_num_kv_heads,
                2,
                PAGE_LEN * config.swa_head_dim,
            ),
            dtype,
        )
        self.global_table = huge_empty((num_slots, self.max_pages), torch.int32)
        self.sliding_table = huge_empty((num_slots, self.max_pages), torch.int32)
        self.global_table.fill_(-1)
        self.sliding_table.fill_(-1)
        self.conv_rows = self.empty(
            (num_slots, config.num_layers, CONV_TAPS - 1, _conv_width(config)), dtype
        )
        self.global_memory = self._memory(self.global_pages)
        self.sliding_memory = self._memory(self.sliding_pages)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory like that of pages and convolution rows."""
        return huge_empty(shape, dtype)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of both pools and the convolution rows once every page has been touched."""
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in (self.global_pages, self.sliding_pages, self.conv_rows)
        )

    def _memory(self, pages: Tensor) -> PageMemory:
        return PageMemory(pages)


def _conv_width(config: TextConfig) -> int:
    kv_width = max(
        config.kv_heads(layer) * config.head_size(layer) for layer in range(config.num_layers)
    )
    return 2 * kv_width + 2 * config.hidden_size
