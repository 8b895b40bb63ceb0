"""Which turns go into the next step, and with how much of what they bring."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

__all__ = ["Schedulable", "compose"]


class Schedulable(Protocol):
    """A turn as the scheduler sees it."""

    @property
    def deadline_s(self) -> float:
        """When it should be over; inf if nobody waits by the clock."""

    @property
    def num_left(self) -> int:
        """Positions it still has to append before its next token."""


Entry = TypeVar("Entry", bound=Schedulable)


def compose(entries: Sequence[Entry], max_tokens: int) -> list[tuple[Entry, int]]:
    """The next step: earliest deadline first, ``max_tokens`` positions in all, with the number of
    positions each may bring.

    A turn about to draw its next token goes in whenever there is room, before what is left is given
    to inputs: one position costs a step next to nothing, and makes the turn wait for all of it.
    """
    order = sorted(entries, key=lambda one: (one.deadline_s, one.num_left))
    small = [one for one in order if one.num_left <= 2][:max_tokens]
    chosen = [(one, one.num_left) for one in small]
    left = max_tokens - sum(count for _, count in chosen)
    for one in order:
        if left <= 0:
            break
        if one.num_left > 2:
            count = min(one.num_left, left)
            chosen.append((one, count))
            left -= count
    return chosen
