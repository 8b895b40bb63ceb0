"""One trainer a folder: a lock that the system takes back from a process that died."""

import fcntl
import os
import weakref
from pathlib import Path

from tml_core.errors import CheckpointError

__all__ = ["RunLock"]


class RunLock:
    """Holds ``folder``/lock until `release`, or until the object or its process is gone.

    ``folder`` is created. Raises CheckpointError naming the process that has it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 64).decode(errors="replace").strip()
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise CheckpointError(f"run.folder: {path} cannot be locked: {error}") from error
            raise CheckpointError(
                f"run.folder: {folder} is in use by another trainer, process {owner or 'unknown'}"
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self.release = weakref.finalize(self, os.close, descriptor)
