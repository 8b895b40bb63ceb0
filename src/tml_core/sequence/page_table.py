"""One sequence's pages in one pool: growth that can be undone, truncation, dropping, sharing.

Positions become logical pages (position // 128); the row says which page of the pool holds each.
A sequence writes only at and after its tip, so the page the tip stands in is the only one that
can be both shared with another sequence and about to be written: it is copied first.
"""

from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from tml_core.contract import PAGE_LEN
from tml_core.errors import TmlError
from tml_core.model.page_memory import PageMemory
from tml_core.sequence.pages import PageIds, PagePool

__all__ = ["PageTable", "Pin", "pages_for"]


def pages_for(num_positions: int) -> int:
    """Pages that hold the first ``num_positions`` positions."""
    return -(-num_positions // PAGE_LEN)


class Pin(NamedTuple):
    """What a mark needs of a table: the pages [floor, end), as they were when it was taken."""

    serial: int
    floor: int
    end: int


def _serial(pin: Pin) -> int:
    return pin.serial


class _Growth(NamedTuple):
    end: int  # before
    shared_page: int | None = None  # logical page that was copied, and what it was a copy of
    shared_id: int = -1


class PageTable:
    """The row a sequence owns in one page table.

    ``row``: int32 [max_pages], shared with the kernels. ``memory``: the pool's, by page.
    Held are the logical pages [0, keep) and [floor, end); those between were dropped (-1).
    ``pins`` are in the order they were made, so their bounds never fall; ``pinned`` maps the
    dropped pages that one of them needs to their ids.
    """

    def __init__(self, pool: PagePool, row: PageIds, memory: PageMemory, keep: int = 0) -> None:
        self.pool = pool
        self.row = row
        self.keep = keep
        self.floor = keep
        self.end = 0
        self.pins: list[Pin] = []
        self.pinned: dict[int, int] = {}
        self._memory = memory
        self._growth: _Growth | None = None

    @property
    def num_pages(self) -> int:
        """Pages in the row, without the pinned ones."""
        return min(self.keep, self.end) + max(0, self.end - self.floor)

    def missing(self, tip: int, new_tip: int) -> int:
        """Pages that `grow` to ``new_tip`` will take from the pool."""
        return pages_for(new_tip) - self.end + self._is_tail_shared(tip)

    def grow(self, tip: int, new_tip: int) -> None:
        """Make positions [tip, new_tip) writable; `undo_growth` or `accept_growth` must follow."""
        new_end = pages_for(new_tip)
        growth = _Growth(self.end)
        if self._is_tail_shared(tip):
            page = tip // PAGE_LEN
            growth = _Growth(self.end, page, int(self.row[page]))
            self.row[page] = self._copied(growth.shared_id)
        self._growth = growth
        if new_end > self.end:
            self.row[self.end : new_end] = self.pool.alloc(new_end - self.end)
            self.end = new_end

    def undo_growth(self) -> None:
        """Give back what `grow` took. Nothing happens without one."""
        if self._growth is None:
            return
        growth, self._growth = self._growth, None
        self._truncate(growth.end)
        if growth.shared_page is not None:
            self.pool.release(self.row[growth.shared_page : growth.shared_page + 1].copy())
            self.row[growth.shared_page] = growth.shared_id

    def accept_growth(self) -> None:
        """Keep what `grow` took."""
        growth, self._growth = self._growth, None
        if growth is not None and growth.shared_page is not None:
            self.pool.release(np.array([growth.shared_id], np.int32))

    def trim(self, end: int) -> None:
        """Give back the last pages from ``end`` on, which nothing was written to."""
        if end < self.end:
            self._truncate(end)

    def drop_before(self, page: int) -> None:
        """Drop the pages [floor, page); those a pin needs are kept aside for `rewind`."""
        page = min(page, self.end)
        if page <= self.floor:
            return
        # The last pin reaches furthest, and no pin begins after the floor.
        split = min(max(self.pins[-1].end if self.pins else 0, self.floor), page)
        for one in range(self.floor, split):
            self.pinned[one] = int(self.row[one])
        self.pool.release(self.row[split:page].copy())
        self.row[self.floor : page] = -1
        self.floor = page

    def pin(self, serial: int) -> Pin:
        """Keep what is held now until `unpin`; serials rise."""
        pin = Pin(serial, self.floor, self.end)
        self.pins.append(pin)
        return pin

    def has_pin(self, serial: int) -> bool:
        """Whether the pin is in place: neither unpinned nor behind a `rewind`."""
        index = bisect_left(self.pins, serial, key=_serial)
        return index < len(self.pins) and self.pins[index].serial == serial

    def unpin(self, serial: int) -> None:
        """Take a pin away and release what nobody else needs. An unknown one is ignored."""
        if not self.has_pin(serial):
            return
        index = bisect_left(self.pins, serial, key=_serial)
        pin = self.pins.pop(index)
        # Bounds never fall, so only the neighbours can need the same pages.
        start = self.pins[index - 1].end if index else pin.floor
        stop = self.pins[index].floor if index < len(self.pins) else pin.end
        self._release_pinned(range(max(start, pin.floor), min(stop, pin.end)))

    def rewind(self, pin: Pin) -> None:
        """Hold again what the pin, which stays, was made on; later pins are taken away."""
        self._truncate(pin.end)
        for page in range(pin.floor, min(self.floor, pin.end)):
            self.row[page] = self.pinned.pop(page)
        self.floor = pin.floor
        del self.pins[bisect_left(self.pins, pin.serial, key=_serial) + 1 :]
        self._release_pinned([page for page in self.pinned if page >= pin.floor])

    def cut(self, floor: int, end: int) -> None:
        """`rewind` for a table without pins: [0, keep) and [floor, end) are held, where nothing
        below ``end`` was dropped since."""
        self._truncate(end)
        self.floor = floor

    def share_with(self, child: "PageTable", floor: int, tip: int) -> None:
        """Give the empty ``child`` the pages that held the first ``tip`` positions.

        Full pages gain a reference, a partial last page is copied (one page of the pool).
        """
        end, num_full = pages_for(tip), tip // PAGE_LEN
        child.keep, child.floor = self.keep, floor
        for page in range(floor, min(self.floor, end)):
            child.row[page] = self.pinned[page]
        for part in (slice(0, min(self.keep, end)), slice(max(self.floor, floor), end)):
            child.row[part] = self.row[part]
        self.pool.addref(child._held(0, num_full))
        child.end = num_full
        if num_full < end:
            child.row[num_full] = self._copied(int(child.row[num_full]))
            child.end = end

    def ids(self) -> PageIds:
        """Ids of the held pages in logical order, without the pinned ones."""
        return self._held(0, self.end)

    def adopt(self, keep: int, floor: int, end: int) -> PageIds:
        """Fill an empty row with fresh pages for [0, keep) and [floor, end); returns their ids."""
        self.keep, self.floor, self.end = keep, floor, end
        ids = self.pool.alloc(self.num_pages)
        num_kept = min(keep, end)
        self.row[:num_kept] = ids[:num_kept]
        self.row[floor : floor + len(ids) - num_kept] = ids[num_kept:]
        return ids

    def close(self) -> None:
        """Release everything."""
        self.undo_growth()
        self._truncate(0)
        self.pins.clear()
        self._release_pinned(list(self.pinned))
        self.floor = self.keep

    def references(self) -> PageIds:
        """Every page this table holds a reference on, for the audit; raises TmlError if the row
        contradicts ``keep``, ``floor`` and ``end``."""
        expected = np.zeros(len(self.row), np.bool_)
        expected[: min(self.keep, self.end)] = True
        expected[self.floor : max(self.floor, self.end)] = True
        wrong = np.flatnonzero((self.row >= 0) != expected)
        if len(wrong):
            raise TmlError(
                f"{self.pool.name}: logical page {int(wrong[0])} is {int(self.row[wrong[0]])} in a "
                f"row that holds [0, {self.keep}) and [{self.floor}, {self.end})"
            )
        for page in range(self.floor):
            is_needed = any(pin.floor <= page < pin.end for pin in self.pins)
            if is_needed != (page in self.pinned):
                raise TmlError(
                    f"{self.pool.name}: dropped page {page} is "
                    f"{'needed by a mark' if is_needed else 'needed by no mark'} and "
                    f"{'pinned' if page in self.pinned else 'not pinned'}"
                )
        others = list(self.pinned.values())
        if self._growth is not None and self._growth.shared_page is not None:
            others.append(self._growth.shared_id)
        return np.concatenate((self.row[expected], np.array(others, np.int32)))

    def _is_tail_shared(self, tip: int) -> bool:
        return tip % PAGE_LEN != 0 and self.pool.refs(int(self.row[tip // PAGE_LEN])) > 1

    def _copied(self, page_id: int) -> int:
        copy = int(self.pool.alloc(1)[0])
        self._memory.copy(page_id, copy)
        return copy

    def _release_pinned(self, pages: Iterable[int]) -> None:
        if not self.pinned:
            return
        ids = [self.pinned.pop(page) for page in pages if page in self.pinned]
        self.pool.release(np.array(ids, np.int32))

    def _truncate(self, end: int) -> None:
        self.pool.release(self._held(end, self.end))
        self.row[end : min(self.keep, self.end)] = -1
        self.row[max(end, self.floor) : self.end] = -1
        self.end = min(self.end, end)

    def _held(self, start: int, stop: int) -> PageIds:
        """Ids of the held pages among [start, stop)."""
        kept, recent = (
            self.row[start : min(self.keep, stop)],
            self.row[max(start, self.floor) : stop],
        )
        return np.concatenate((kept, recent))
