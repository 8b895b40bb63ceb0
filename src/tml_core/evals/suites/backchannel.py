"""Backchannels: "mm" at the pauses of a story, and nowhere else. An item is worth its right ones
over all that were due or given; one is right from 0.4 s before to 0.6 s after its tick."""

from collections.abc import Sequence
from typing import Final

from tml_core.evals.item import Item
from tml_core.evals.match import match
from tml_core.evals.played import Played
from tml_core.evals.suite import Mark, Suite

__all__ = ["SUITE"]

_EARLY_TICKS, _LATE_TICKS = 2, 3


def _mark(item: Item, played: Played) -> Mark:
    found = match(played.words, item.expected, _EARLY_TICKS, _LATE_TICKS)
    num_right = sum(one.is_right for one in found.matches)
    num_late = sum(one.off is not None and not one.is_right for one in found.matches)
    extra = len(found.extra) + num_late
    facts = {
        "due": len(found.matches),
        "right": num_right,
        "extra": extra,
        "off": [one.off for one in found.matches],
    }
    return Mark(num_right / max(1, len(found.matches) + extra), facts=facts)


def _extras(marks: Sequence[Mark]) -> dict[str, float]:
    due = max(1, sum(one.facts["due"] for one in marks))
    return {
        "of those due": sum(one.facts["right"] for one in marks) / due,
        "others a story": sum(one.facts["extra"] for one in marks) / len(marks),
    }


SUITE: Final = Suite(
    "backchannel", "mm at pauses, only there", ("story",), _mark, "mean", extras=_extras
)
