"""Every error the package raises on purpose: one root, each child also the builtin it refines."""

__all__ = [
    "CheckpointError",
    "Conflict",
    "InvalidArgument",
    "InvalidType",
    "MediaError",
    "MissingExtra",
    "OutOfDeviceMemory",
    "Overloaded",
    "PoolExhausted",
    "SessionBusy",
    "SessionClosed",
    "SnapshotError",
    "TmlError",
    "Unsupported",
]


class TmlError(Exception):
    """Root of the package's errors; the message begins with the op or argument it is about."""


class InvalidArgument(TmlError, ValueError):
    """An argument has a value, shape or dtype the callee does not take."""


class InvalidType(TmlError, TypeError):
    """An argument is of the wrong Python type."""


class CheckpointError(TmlError, ValueError):
    """A checkpoint directory, config or tensor is missing, damaged or of another architecture."""


class MediaError(TmlError, ValueError):
    """An audio or video source cannot be read or does not hold what was promised."""


class SnapshotError(TmlError, ValueError):
    """A session snapshot is damaged or belongs to another model, dtype or contract."""


class PoolExhausted(TmlError, MemoryError):
    """The page pool or the sequence slots are used up; nothing was changed."""


class OutOfDeviceMemory(TmlError, MemoryError):
    """A model does not fit a device; the message says what it takes and what would fit."""


class SessionClosed(TmlError, RuntimeError):
    """The session or sequence was closed."""


class SessionBusy(TmlError, RuntimeError):
    """A turn is still open on this session."""


class Conflict(TmlError, RuntimeError):
    """What the caller takes for the session's state is not: a tip or a sequence number; nothing was
    changed."""


class Overloaded(TmlError, RuntimeError):
    """There is no capacity for this now; nothing was changed.

    ``reason``: "capacity", "pending", "reader", "jobs" or "duplicate".
    ``retry_after_ms``: when trying again may succeed.
    """

    def __init__(self, message: str, *, reason: str, retry_after_ms: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_ms = retry_after_ms


class MissingExtra(TmlError, ImportError):
    """An optional dependency is not installed; the message names the command that installs it."""


class Unsupported(TmlError, NotImplementedError):
    """The build or machine lacks what was asked for (for example a CUDA build)."""
