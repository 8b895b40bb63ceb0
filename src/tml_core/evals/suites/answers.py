"""Echo and sum: the right words within two seconds of the question, and nothing else."""

from typing import Final

from tml_core.evals.item import Item
from tml_core.evals.match import match
from tml_core.evals.played import Played
from tml_core.evals.suite import Mark, Suite
from tml_core.evals.suites.timing import timing, timing_facts

__all__ = ["ECHO", "LATE_TICKS", "SUM"]

EARLY_TICKS: Final = 1
LATE_TICKS: Final = 9


def _mark(item: Item, played: Played) -> Mark:
    found = match(played.words, item.expected, EARLY_TICKS, LATE_TICKS)
    spoken = item.script.spoken
    engine = spoken[0].voice.engine if spoken else "typed"
    facts = {**timing_facts(found), "said": [one.text for one in played.words]}
    return Mark(float(found.is_right), engine, facts=facts)


ECHO: Final = Suite("echo", "words repeated", ("echo",), _mark, "macro", extras=timing)
SUM: Final = Suite("sum", "sums never seen in training", ("sum",), _mark, "macro", extras=timing)
