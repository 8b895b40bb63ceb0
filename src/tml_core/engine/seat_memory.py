"""The memory of open seats: idle ones parked and brought back, room made where it runs short."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tml_core.engine.parking import ParkingLot
from tml_core.engine.seat import Seat
from tml_core.engine.stats import EngineCounters
from tml_core.errors import PoolExhausted, SessionBusy
from tml_core.sequence.sequence import Sequence

__all__ = ["SeatMemory"]

T = TypeVar("T")


class SeatMemory:
    """The memory of ``seats``, the engine's open ones; used by the engine thread alone.

    Seats idle for ``park_after_s`` are parked below ``park_dir``, and earlier if memory runs short;
    with None only `park` parks. ``restore`` brings back the sequence of a file.
    """

    def __init__(
        self,
        seats: set[Seat],
        restore: Callable[[Path], Sequence],
        counters: EngineCounters,
        *,
        park_after_s: float | None,
        park_dir: str | Path | None,
    ) -> None:
        self._seats = seats
        self._lot = ParkingLot(restore, park_dir)
        self._counters = counters
        self._park_after_s = park_after_s

    def awake(self, seat: Seat) -> Sequence:
        """The seat's sequence, brought back if it was parked; call it in the engine thread.

        Raises PoolExhausted without room for it.
        """
        parked = seat.parked
        if parked is not None:
            seat.sequence = self.with_room(lambda: self._lot.resume(parked), seat)
            seat.parked = None
            seat.idle_since_s = time.perf_counter()
            self._counters.resumed += 1
        return seat.sequence

    def park(self, seat: Seat) -> None:
        """Park an idle seat; call it in the engine thread, with the seat's lock held.

        Raises SessionBusy if marks are held, OSError if the file cannot be written; nothing has
        changed then.
        """
        if seat.parked is None:
            seat.parked = self._lot.park(seat.sequence, seat.num_marks)
            seat.forget_recent()
            self._counters.parked += 1

    def park_idle(self, is_interrupted: Callable[[], bool]) -> None:
        """Park the seats that have been idle for long enough, but do not keep others waiting."""
        if self._park_after_s is None:
            return
        now_s = time.perf_counter()
        for seat in list(self._seats):
            is_due = _can_park(seat) and now_s - seat.idle_since_s >= self._park_after_s
            if is_due and not self._try_park(seat):
                seat.idle_since_s = now_s  # try again after as long
            if is_interrupted():
                return

    def _try_park(self, seat: Seat) -> bool:
        # Who holds the lock may be waiting for this thread.
        if not seat.lock.acquire(blocking=False):
            return False
        try:
            if not _can_park(seat):
                return False
            self.park(seat)
        except (SessionBusy, OSError):
            return False
        finally:
            seat.lock.release()
        return True

    def with_room(self, act: Callable[[], T], seat: Seat | None = None) -> T:
        """``act``, again and again while it finds no room and something can still be put away."""
        while True:
            try:
                return act()
            except PoolExhausted:
                if not self.make_room(seat):
                    raise

    def make_room(self, but: Seat | None) -> bool:
        """Give up memory that can be done without; False if there is none."""
        for seat in self._seats:
            # Points to go back to for output that was not heard.
            if seat.recent and seat is not but and seat.lock.acquire(blocking=False):
                try:
                    seat.forget_recent()
                finally:
                    seat.lock.release()
                return True
        if self._park_after_s is None:
            return False
        idle = sorted(self._seats, key=lambda seat: seat.idle_since_s)
        return any(self._try_park(seat) for seat in idle if seat is not but and _can_park(seat))

    def next_due_s(self) -> float:
        """When the first idle seat is to be parked, in `time.perf_counter`; inf if none is."""
        if self._park_after_s is None:
            return math.inf
        idle = (seat.idle_since_s for seat in self._seats if _can_park(seat))
        return min(idle, default=math.inf) + self._park_after_s

    def free(self, seat: Seat) -> None:
        """Free what a seat holds, in memory or in a file."""
        if seat.parked is not None:
            self._lot.drop(seat.parked)
        seat.sequence.close()

    def close(self) -> None:
        """Remove the files."""
        self._lot.close()


def _can_park(seat: Seat) -> bool:
    return seat.parked is None and not seat.turns and not seat.is_closed
