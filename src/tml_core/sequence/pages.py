"""Reference-counted page ids: who holds which page is counted here and nowhere else."""

import numpy as np
from numpy.typing import NDArray

from tml_core.errors import InvalidArgument, PoolExhausted, TmlError

__all__ = ["PageIds", "PagePool"]

PageIds = NDArray[np.int32]


class PagePool:
    """Ids 0 to ``num_pages - 1`` with a reference count each; the last page freed is used first.

    ``name`` begins the messages. Raises InvalidArgument for fewer than one page.
    """

    def __init__(self, num_pages: int, name: str = "pages") -> None:
        if num_pages < 1:
            raise InvalidArgument(f"PagePool: num_pages must be at least 1, got {num_pages}")
        self.name = name
        self.num_pages = num_pages
        self._refs: NDArray[np.int32] = np.zeros(num_pages, np.int32)
        self._free: PageIds = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._num_free = num_pages

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return self._num_free

    def refs(self, page_id: int) -> int:
        """Holders of a page."""
        return int(self._refs[page_id])

    def require(self, count: int, what: str) -> None:
        """Raise PoolExhausted, saying that ``what`` needs them, unless ``count`` pages are free."""
        if count > self._num_free:
            raise PoolExhausted(
                f"{self.name}: {what} needs {count} more, {self._num_free} of {self.num_pages} "
                "are free"
            )

    def alloc(self, count: int) -> PageIds:
        """Take ``count`` pages with one reference each, or raise PoolExhausted and take none."""
        self.require(count, "the caller")
        rest = self._num_free - count
        ids = self._free[rest : self._num_free][::-1].copy()
        self._num_free = rest
        self._refs[ids] = 1
        return ids

    def addref(self, ids: PageIds) -> None:
        """One more reference on each of ``ids``, which are distinct and held."""
        if len(ids):
            self._refs[ids] = self._held(ids) + 1

    def release(self, ids: PageIds) -> None:
        """One reference less on each of ``ids``, which are distinct; those at zero become free."""
        if not len(ids):
            return
        left = self._held(ids) - 1
        self._refs[ids] = left
        freed = ids[left == 0]
        self._free[self._num_free : self._num_free + len(freed)] = freed[::-1]
        self._num_free += len(freed)

    def audit(self, held: NDArray[np.int64]) -> None:
        """Compare with ``held`` [num_pages], references counted from scratch; raise TmlError."""
        wrong = np.flatnonzero(held != self._refs)
        if len(wrong):
            page = int(wrong[0])
            raise TmlError(
                f"{self.name}: page {page} is held {int(held[page])} times, its count says "
                f"{int(self._refs[page])} ({len(wrong)} pages differ)"
            )
        listed = np.bincount(self._free[: self._num_free], minlength=self.num_pages)
        wrong = np.flatnonzero(listed != (self._refs == 0))
        if len(wrong):
            page = int(wrong[0])
            raise TmlError(
                f"{self.name}: page {page} stands {int(listed[page])} times in the free list and "
                f"has {int(self._refs[page])} references"
            )

    def _held(self, ids: PageIds) -> NDArray[np.int32]:
        """Reference counts of ``ids``, which must not be free."""
        refs: NDArray[np.int32] = self._refs[ids]
        if int(refs.min()) < 1:
            page = int(ids[int(refs.argmin())])
            raise TmlError(f"{self.name}: page {page} is used by someone who does not hold it")
        return refs
