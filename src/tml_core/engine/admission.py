"""Who gets a seat: as many sessions as there are seats, and as there is time for."""

from collections.abc import Set as AbstractSet
from typing import Final, Literal

from tml_core.engine.cost_model import CostModel
from tml_core.engine.seat import Seat
from tml_core.engine.stats import EngineCounters
from tml_core.errors import Overloaded, PoolExhausted
from tml_core.media.micro_turns import TICK_MS

__all__ = ["Admission", "admit", "capacity_of"]

Admission = Literal["none", "capacity"]

# When a session that was refused may ask again.
_RETRY_MS: Final = 1000


def admit(
    seats: AbstractSet[Seat], max_sessions: int, capacity: int | None, counters: EngineCounters
) -> None:
    """Raise PoolExhausted or Overloaded unless there is room for one more beside ``seats``.

    ``capacity``: how many may be awake at once; None for any number.
    """
    if len(seats) >= max_sessions:
        counters.refused += 1
        raise PoolExhausted(f"engine: all {max_sessions} sessions are open; close one first")
    num_awake = sum(seat.parked is None for seat in seats)
    if capacity is not None and num_awake >= max(1, capacity):
        counters.refused += 1
        raise Overloaded(
            f"engine: {num_awake} sessions are open, and with one more a tick in a "
            f"hundred would take longer than {TICK_MS} ms",
            reason="capacity",
            retry_after_ms=_RETRY_MS,
        )


def capacity_of(costs: CostModel, counters: EngineCounters) -> int | None:
    """Sessions whose ticks all at once are over within one tick, with the tail of late; None before
    there were any."""
    if not costs.is_learnt or not counters.tick_input:
        return None
    num_input, num_output = counters.tick_input, counters.tick_output
    fixed_s, token_s, row_s = costs.weights
    # One step of inputs, then one for each token; the tail is of a step, and holds for a tick
    # all the more.
    budget_s = TICK_MS / 1000 / costs.tail - (1 + num_output) * fixed_s
    session_s = (num_input + num_output) * token_s + (1 + num_output) * row_s
    return max(0, int(budget_s / max(session_s, 1e-9)))
