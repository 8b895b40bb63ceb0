"""All sequences of one model: two page pools, the slots, and an audit that trusts neither."""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tml_core.errors import PoolExhausted, TmlError
from tml_core.model.kv_store import KvStore
from tml_core.sequence.page_table import PageTable, pages_for
from tml_core.sequence.pages import PagePool

__all__ = ["AuditReport", "SequenceStore", "Slot"]


@dataclass(eq=False)
class Slot:
    """What one sequence holds of the store: its rows, and the pages named in them.

    ``conv`` [num_layers, 3, width] is the sequence's part of ``conv_rows``; ``conv_before`` keeps
    what stood there before the step in flight. ``is_growing``: between reserve and commit.
    """

    index: int
    global_: PageTable
    sliding: PageTable
    conv: Tensor
    conv_before: Tensor
    tip: int = 0
    is_growing: bool = False


@dataclass(frozen=True)
class AuditReport:
    """What an audit found in order."""

    num_sequences: int
    num_marks: int
    global_pages_held: int
    sliding_pages_held: int
    global_pages_shared: int
    sliding_pages_shared: int


class SequenceStore:
    """Hands out slots and pages of a KvStore. One thread at a time may use it.

    ``fingerprint`` names the model's weights; it is written into snapshots and compared on restore.
    """

    def __init__(self, kv: KvStore, fingerprint: str = "") -> None:
        self.kv = kv
        self.fingerprint = fingerprint
        self.global_pool = PagePool(len(kv.global_memory), "global pages")
        self.sliding_pool = PagePool(len(kv.sliding_memory), "sliding pages")
        # Slots of sequences that were collected without close(): a finalizer may run anywhere, so
        # it only leaves a note here.
        self.orphans: deque[int] = deque()
        # Copies of convolution rows that nobody needs any more: marks come and go with every turn.
        self._spare_conv: list[Tensor] = []
        self._global_rows = kv.global_table.numpy()
        self._sliding_rows = kv.sliding_table.numpy()
        self._conv_before = kv.empty(tuple(kv.conv_rows.shape), kv.dtype)
        self._free_slots = list(range(kv.num_slots - 1, -1, -1))
        self._slots: dict[int, Slot] = {}

    @property
    def num_sequences(self) -> int:
        """Open sequences."""
        self._reclaim()
        return len(self._slots)

    def open_slot(self, num_kept_pages: int = 0) -> Slot:
        """A slot with no pages and zero convolution rows; raises PoolExhausted without one."""
        self._reclaim()
        if not self._free_slots:
            raise PoolExhausted(
                f"sequences: all {self.kv.num_slots} slots are in use; close a sequence first"
            )
        index = self._free_slots.pop()
        slot = Slot(
            index,
            PageTable(
                self.global_pool, self._global_rows[index], self.kv.global_memory, num_kept_pages
            ),
            PageTable(self.sliding_pool, self._sliding_rows[index], self.kv.sliding_memory),
            self.kv.conv_rows[index],
            self._conv_before[index],
        )
        self._slots[index] = slot
        slot.conv.zero_()
        return slot

    def close_slot(self, index: int) -> None:
        """Release all that the slot holds."""
        slot = self._slots.pop(index)
        slot.global_.close()
        slot.sliding.close()
        self._free_slots.append(index)

    def copy_conv(self, conv: Tensor) -> Tensor:
        """A copy of a slot's convolution rows; `spare_conv` takes it back."""
        try:
            copy = self._spare_conv.pop()
        except IndexError:
            return conv.clone()
        return copy.copy_(conv)

    def spare_conv(self, copy: Tensor) -> None:
        """Take back what `copy_conv` gave, for the next one."""
        if len(self._spare_conv) < 2 * self.kv.num_slots:
            self._spare_conv.append(copy)

    def require_pages(self, num_global: int, num_sliding: int, what: str) -> None:
        """Raise PoolExhausted, saying that ``what`` needs them, unless both counts are free."""
        self._reclaim()
        self.global_pool.require(num_global, what)
        self.sliding_pool.require(num_sliding, what)

    def audit(self) -> AuditReport:
        """Count every reference from scratch and compare with the pools, rows and slots.

        Raises TmlError naming the first difference.
        """
        self._reclaim()
        if sorted([*self._slots, *self._free_slots]) != list(range(self.kv.num_slots)):
            raise TmlError(
                f"sequences: slots {sorted(self._slots)} are in use and "
                f"{sorted(self._free_slots)} free, of {self.kv.num_slots}"
            )
        held_global: NDArray[np.int64] = np.zeros(self.global_pool.num_pages, np.int64)
        held_sliding: NDArray[np.int64] = np.zeros(self.sliding_pool.num_pages, np.int64)
        for index, slot in self._slots.items():
            for table, held in ((slot.global_, held_global), (slot.sliding, held_sliding)):
                ids = table.references()
                if len(np.unique(ids)) != len(ids):
                    raise TmlError(f"{table.pool.name}: slot {index} holds a page twice")
                held[ids] += 1
                if not slot.is_growing and table.end != pages_for(slot.tip):
                    raise TmlError(
                        f"{table.pool.name}: slot {index} has {table.end} logical pages at "
                        f"position {slot.tip}"
                    )
        for index in self._free_slots:
            if (self._global_rows[index] != -1).any() or (self._sliding_rows[index] != -1).any():
                raise TmlError(f"sequences: the table row of free slot {index} is not empty")
        self.global_pool.audit(held_global)
        self.sliding_pool.audit(held_sliding)
        return AuditReport(
            num_sequences=len(self._slots),
            num_marks=sum(len(slot.sliding.pins) for slot in self._slots.values()),
            global_pages_held=int((held_global > 0).sum()),
            sliding_pages_held=int((held_sliding > 0).sum()),
            global_pages_shared=int((held_global > 1).sum()),
            sliding_pages_shared=int((held_sliding > 1).sum()),
        )

    def _reclaim(self) -> None:
        while self.orphans:
            self.close_slot(self.orphans.popleft())
