"""Sessions and the engine they run in: what users import."""

from tml_core.session.engine import Engine
from tml_core.session.session import Session
from tml_core.session.values import SessionInfo, SessionMark

__all__ = ["Engine", "Session", "SessionInfo", "SessionMark"]
