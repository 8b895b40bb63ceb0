"""TimeSpeak: say it when the user said it should be said.

The published rule: one expected response and one window an item; right only if meaning and time
are right; macro average. The benchmark itself is private. Here the meaning is right if exactly the
expected words are said and nothing else in the whole item, and the window is 0.6 s to either side.
Where several things are due (reminders until told to stop, seconds counted aloud, two timers) all
of them must be right. Groups are the times asked for, and the other kinds of request.
"""

from typing import Final

from tml_core.evals.item import Item
from tml_core.evals.match import match
from tml_core.evals.played import Played
from tml_core.evals.suite import Mark, Suite
from tml_core.evals.suites.timing import timing, timing_facts
from tml_core.media.audio_file import SAMPLE_RATE
from tml_core.media.micro_turns import TICK_SAMPLES

__all__ = ["SUITE", "WINDOW_TICKS"]

WINDOW_TICKS: Final = 3


def _mark(item: Item, played: Played) -> Mark:
    found = match(played.words, item.expected, WINDOW_TICKS, WINDOW_TICKS)
    group = item.task
    if item.task == "timer":
        asked = (item.expected[0].tick + 1) * TICK_SAMPLES - item.asked
        group = f"timer {asked // SAMPLE_RATE:02d} s"
    return Mark(float(found.is_right), group, facts=timing_facts(found))


SUITE: Final = Suite(
    "timespeak",
    "right words at the time asked for",
    ("timer", "timers", "periodic", "stopwatch"),
    _mark,
    "macro",
    aim=0.85,
    extras=timing,
)
