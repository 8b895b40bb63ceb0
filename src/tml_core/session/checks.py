"""What arguments of sessions and engines must be; each raises InvalidType or InvalidArgument."""

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.session.values import SessionMark

__all__ = ["require_count", "require_deadline", "require_mark", "require_park_after"]


def require_count(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidType(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0:
        raise InvalidArgument(f"{name}: expected at least 0, got {value}")


def require_park_after(park_after_s: object) -> None:
    if park_after_s is None:
        return
    if isinstance(park_after_s, bool) or not isinstance(park_after_s, (int, float)):
        raise InvalidType(f"park_after_s: expected a number, got {type(park_after_s).__name__}")
    if not park_after_s >= 0:
        raise InvalidArgument(f"park_after_s: expected at least 0, got {park_after_s}")


def require_deadline(deadline_ms: object) -> None:
    if deadline_ms is None:
        return
    if isinstance(deadline_ms, bool) or not isinstance(deadline_ms, (int, float)):
        raise InvalidType(f"deadline_ms: expected a number, got {type(deadline_ms).__name__}")
    if not deadline_ms > 0:
        raise InvalidArgument(f"deadline_ms: expected more than 0, got {deadline_ms}")


def require_mark(name: str, mark: object) -> None:
    if not isinstance(mark, SessionMark):
        raise InvalidType(f"{name}: expected SessionMark, got {type(mark).__name__}")
