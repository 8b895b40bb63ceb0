"""Idle sessions out of the way: a sequence goes to a file and comes back with the same bits."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tml_core.errors import SessionBusy
from tml_core.sequence.sequence import Sequence
from tml_core.sequence.values import Evicted

__all__ = ["Parked", "ParkingLot"]


@dataclass(frozen=True)
class Parked:
    """Where a sequence went, and what can be said of it meanwhile."""

    path: Path
    tip: int
    clock_ms: int
    evicted: Evicted | None
    state_hash: str


class ParkingLot:
    """The files of one engine's parked sequences, in a folder of their own below ``directory`` (the
    system's place for temporary files by default) that is made at the first need."""

    def __init__(
        self, restore: Callable[[Path], Sequence], directory: str | Path | None = None
    ) -> None:
        self._restore = restore
        self._directory = directory
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._num_files = 0

    def park(self, sequence: Sequence, num_own: int = 0) -> Parked:
        """Write the sequence to a file and close it; ``num_own`` of its marks may be lost.

        Raises SessionBusy if somebody holds another mark of it, OSError if the file cannot be
        written; the sequence is as it was then.
        """
        num_held = sequence.num_marks - num_own
        if num_held:
            raise SessionBusy(
                f"park: {num_held} marks of this session are held; they would be lost"
            )
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tml-parked-", dir=self._directory)
        self._num_files += 1
        path = Path(self._folder.name) / f"{self._num_files}.sequence"
        parked = Parked(
            path, sequence.tip, sequence.carry.clock_ms, sequence.evicted, sequence.state_hash
        )
        # Nobody looks for it after a crash.
        sequence.snapshot(path, durable=False)
        sequence.close()
        return parked

    def resume(self, parked: Parked) -> Sequence:
        """The sequence again; raises PoolExhausted without room, and the file stays."""
        sequence = self._restore(parked.path)
        self.drop(parked)
        return sequence

    def drop(self, parked: Parked) -> None:
        """Forget a parked sequence."""
        parked.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what is left."""
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()
