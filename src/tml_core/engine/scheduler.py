"""Which turns go into the next step, and with how much of what they bring."""

from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

from tml_core.engine.cost_model import CostModel

__all__ = ["MIN_PIECE", "Schedulable", "compose"]

# An input goes in by at least so many positions: less would spend the step on its fixed cost.
MIN_PIECE: Final = 32
# What a turn brings once its input is in: a token, and what closed the tick before.
_NUM_SMALL: Final = 2
# Beside turns that have begun to answer, a step is made longer by inputs up to this part of what is
# left until the first of their deadlines, but by so much in any case.
_SLACK_SHARE: Final = 0.25
_LEAST_S: Final = 0.01


class Schedulable(Protocol):
    """A turn as the scheduler sees it."""

    @property
    def due_s(self) -> float:
        """When it should be over, in `time.perf_counter`; earlier goes first."""

    @property
    def num_left(self) -> int:
        """Positions it still has to append before its next token."""


Entry = TypeVar("Entry", bound=Schedulable)


def compose(
    entries: Sequence[Entry], max_tokens: int, costs: CostModel, now_s: float
) -> list[tuple[Entry, int]]:
    """The next step: at most ``max_tokens`` positions in all, and how many of them each brings.

    Turns that are about to draw a token all go in: one position more costs a step next to nothing,
    and leaving it out would cost the turn a whole step. Inputs follow, earliest deadline first, cut
    where the step would get too long for those turns; the first gets `MIN_PIECE` in any case.
    """
    if len(entries) == 1:
        (one,) = entries
        return [(one, min(one.num_left, max_tokens))]
    small = [one for one in entries if one.num_left <= _NUM_SMALL]
    if len(small) == len(entries) and _NUM_SMALL * len(small) <= max_tokens:
        return [(one, one.num_left) for one in small]
    small.sort(key=_due_s)
    chosen, left = [], max_tokens
    for one in small:
        if one.num_left <= left:
            chosen.append((one, one.num_left))
            left -= one.num_left
    inputs = sorted((one for one in entries if one.num_left > _NUM_SMALL), key=_due_s)
    if chosen and inputs:
        slack_s = min((one.due_s - now_s for one, _ in chosen if one.due_s > now_s), default=0.0)
        limit_s = max(_LEAST_S, _SLACK_SHARE * slack_s)
        affordable = costs.num_tokens(limit_s, len(chosen) + len(inputs))
        left = min(left, max(MIN_PIECE, affordable - (max_tokens - left)))
    for one in inputs:
        if left <= 0:
            break
        count = min(one.num_left, left)
        chosen.append((one, count))
        left -= count
    return chosen


def _due_s(entry: Schedulable) -> float:
    return entry.due_s
