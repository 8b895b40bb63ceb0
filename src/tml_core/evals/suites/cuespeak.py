"""CueSpeak: say it at a word of the user's, while the user goes on talking.

The published rule is TimeSpeak's, with speech that overlaps the user's. Here the window is from the
tick in which the cue ends to 1 s after the first that can have heard it, and the user must still be
talking. Groups are the ways it was asked for.
"""

from typing import Final

from tml_core.evals.item import Item
from tml_core.evals.match import Matching, match
from tml_core.evals.played import Played
from tml_core.evals.suite import Mark, Suite, share
from tml_core.evals.suites.timing import timing, timing_facts
from tml_core.media.micro_turns import TICK_SAMPLES

__all__ = ["EARLY_TICKS", "LATE_TICKS", "SUITE"]

EARLY_TICKS: Final = 1
LATE_TICKS: Final = 4


def _mark(item: Item, played: Played) -> Mark:
    found = match(played.words, item.expected, EARLY_TICKS, LATE_TICKS)
    is_over_speech = _overlaps(item, found)
    facts = {**timing_facts(found), "is_over_speech": is_over_speech}
    return Mark(float(found.is_right and is_over_speech), item.script.phrasing, facts=facts)


def _overlaps(item: Item, found: Matching) -> bool:
    """Whether all that was said was begun while somebody talked."""
    for one in found.matches:
        if one.off is not None:
            at = (one.expected.tick + one.off) * TICK_SAMPLES
            if not any(start <= at < end for start, end in item.spans):
                return False
    return True


SUITE: Final = Suite(
    "cuespeak",
    "right words at a cue, over the user's speech",
    ("cue",),
    _mark,
    "macro",
    aim=0.85,
    extras=lambda marks: {**timing(marks), "over speech": share(marks, "is_over_speech") or 0.0},
)
