"""Being interrupted: a long answer stops within a second of the user's first sound, and comes whole
when nobody interrupts. Of Full-Duplex-Bench's user interruption, what can be told of written words.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from tml_core.data import tick_at
from tml_core.evals.item import Item
from tml_core.evals.played import Played, heard_s, normal_words
from tml_core.evals.suite import Mark, Suite
from tml_core.media.audio_file import SAMPLE_RATE

__all__ = ["SUITE"]

_STOP_TICKS: Final = 5
_LATE_TICKS: Final = 9


def _mark(item: Item, played: Played) -> Mark:
    words = played.words
    wanted = [word for one in item.expected for word in normal_words(one.text)]
    said = [one.text for one in words]
    begin = item.expected[0].tick
    is_begun = bool(words) and -1 <= words[0].start - begin <= _LATE_TICKS
    start = item.later_spans[0][0] if item.later_spans else None
    # An answer that is due to be over before the user speaks is not interrupted.
    if start is None or tick_at(start) > item.expected[-1].tick + 1:
        is_right = is_begun and said[: len(wanted)] == wanted and len(said) == len(wanted)
        return Mark(float(is_right), "left alone", facts={"said": said, "stop_s": None})
    stop_s = heard_s(words[-1].start) - start / SAMPLE_RATE if words else None
    is_talking = is_begun and words[0].start <= tick_at(start)
    is_over = bool(words) and words[-1].start <= tick_at(start) + _STOP_TICKS
    facts = {"said": said, "stop_s": None if stop_s is None else round(max(0.0, stop_s), 3)}
    return Mark(float(is_talking and is_over and said[0] == wanted[0]), "interrupted", facts=facts)


def _extras(marks: Sequence[Mark]) -> dict[str, float]:
    stops = [one.facts["stop_s"] for one in marks if one.facts["stop_s"] is not None]
    return {"median stop s": float(np.median(stops))} if stops else {}


SUITE: Final = Suite(
    "interruption",
    "stops when interrupted, else goes on",
    ("recite",),
    _mark,
    "macro",
    extras=_extras,
)
