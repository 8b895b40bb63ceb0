"""Long sessions of several requests on one clock: right words in time over all that were due or
said, in all items together. A word is in time from one tick before to two seconds after its tick.
"""

from typing import Final

from tml_core.data import Expected
from tml_core.evals.item import Item
from tml_core.evals.match import match
from tml_core.evals.played import Played, normal_words
from tml_core.evals.suite import Mark, Suite
from tml_core.evals.suites.answers import EARLY_TICKS, LATE_TICKS

__all__ = ["SUITE"]


def _mark(item: Item, played: Played) -> Mark:
    due = [Expected(one.tick, word) for one in item.expected for word in normal_words(one.text)]
    found = match(played.words, due, EARLY_TICKS, LATE_TICKS)
    num_right = sum(one.is_right for one in found.matches)
    num_said = len(played.words)
    facts = {"due": len(due), "right": num_right, "said": num_said}
    return Mark(float(num_right), "", max(1.0, len(due) + num_said - num_right), facts)


SUITE: Final = Suite("sessions", "right words of long sessions", ("chain",), _mark, "ratio")
