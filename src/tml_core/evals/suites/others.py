"""Talking to others and background speech: right is silence, in words and in calls.

Of Full-Duplex-Bench's two scenarios, where a judge wants the model to go on as if nothing had been
said. The user here has asked for nothing, so going on is saying nothing.
"""

from typing import Final

from tml_core.evals.item import Item
from tml_core.evals.played import Played
from tml_core.evals.suite import Mark, Suite

__all__ = ["SUITE"]


def _mark(item: Item, played: Played) -> Mark:
    said = [one.text for one in played.words]
    is_silent = not played.num_writing_ticks and not played.calls
    return Mark(float(is_silent), item.task, facts={"said": said})


SUITE: Final = Suite(
    "others",
    "silent while others are talked to, or talk",
    ("aside", "background_speech"),
    _mark,
    "macro",
    aim=0.95,
)
