"""Every error the package raises on purpose: one root, each child also the builtin it refines."""

__all__ = [
    "CheckpointError",
    "InvalidArgument",
    "InvalidType",
    "MediaError",
    "MissingExtra",
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


class SessionClosed(TmlError, RuntimeError):
    """The session or sequence was closed."""


class SessionBusy(TmlError, RuntimeError):
    """A turn is still open on this session."""


class MissingExtra(TmlError, ImportError):
    """An optional dependency is not installed; the message names the command that installs it."""


class Unsupported(TmlError, NotImplementedError):
    """The build or machine lacks what was asked for (for example a CUDA build)."""
