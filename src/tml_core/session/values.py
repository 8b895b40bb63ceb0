"""What a session hands out of itself: a point to come back to, and where it stands."""

from dataclasses import dataclass

from tml_core.engine.seat import Seat
from tml_core.layout.chunk import ToolResult
from tml_core.layout.state import LayoutState
from tml_core.sequence.sequence import Mark
from tml_core.sequence.store import SequenceStore
from tml_core.sequence.values import Evicted

__all__ = ["SessionInfo", "SessionMark", "info_of"]


@dataclass(frozen=True)
class SessionMark:
    """A point of a session to come back to; taken by `Session.mark`.

    It keeps some memory (the sliding layers' window of its time) as long as it lives.
    """

    position: int
    tick: int
    _mark: Mark
    _state: LayoutState
    _items: tuple[ToolResult, ...]


@dataclass(frozen=True)
class SessionInfo:
    """Where a session stands.

    ``position``: positions in the sequence, those still unsent included. ``tick``: the one that
    comes next. ``media_ms``: media time appended. ``num_waiting``: ids of text and tool results
    that wait for their budget. ``num_pages``, ``kv_bytes``: memory held, what forks share included.
    ``evicted``: positions dropped by retention. ``state_hash``: of all that was run through the
    model; equal for equal prefixes.
    """

    layout: str
    position: int
    tick: int
    media_ms: int
    epoch: int
    is_busy: bool
    num_waiting: int
    is_in_call: bool
    open_calls: tuple[tuple[str, str], ...]
    num_pages: int
    kv_bytes: int
    evicted: Evicted | None
    state_hash: str
    is_parked: bool


def info_of(seat: Seat, store: SequenceStore) -> SessionInfo:
    """Where the session on ``seat`` stands; call it in the engine thread."""
    sequence, state, parked = seat.sequence, seat.state, seat.parked
    num_unsent = 0 if seat.is_busy else len(state.unsent)
    return SessionInfo(
        layout=seat.layout.name,
        position=(sequence.tip if parked is None else parked.tip) + num_unsent,
        tick=state.tick,
        media_ms=sequence.carry.clock_ms if parked is None else parked.clock_ms,
        epoch=seat.epoch,
        is_busy=seat.is_busy,
        num_waiting=state.num_waiting,
        is_in_call=state.is_in_call,
        open_calls=state.open_calls,
        num_pages=0 if parked else sequence.num_pages,
        kv_bytes=0 if parked else store.kv.sizes.sequence_bytes(sequence.tip),
        evicted=parked.evicted if parked else sequence.evicted,
        state_hash=parked.state_hash if parked else sequence.state_hash,
        is_parked=parked is not None,
    )
