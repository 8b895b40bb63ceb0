"""Turn-taking latency as Full-Duplex-Bench v1 has it: from the end of the user's turn to the first
word of the answer, negative as zero, over the items in which the model takes the turn.

There an output is a turn taken if it has more than three words or a second of sound; the answers
here are one or two written words, so any word is one. Its mean and our aim's median are both given.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from tml_core.evals.item import Item
from tml_core.evals.played import Played, heard_s
from tml_core.evals.suite import Mark, Suite
from tml_core.media.audio_file import SAMPLE_RATE
from tml_core.media.micro_turns import TICK_SAMPLES

__all__ = ["SUITE"]


def _mark(item: Item, played: Played) -> Mark:
    ends = [end for _, end in item.spans]
    ends += [tick * TICK_SAMPLES for tick, _ in item.script.typed]
    end_s = max(ends) / SAMPLE_RATE
    if not played.words:
        return Mark(None, item.task, facts={"latency_s": None, "is_early": None})
    latency_s = heard_s(played.words[0].start) - end_s
    facts = {"latency_s": round(latency_s, 4), "is_early": latency_s < 0}
    return Mark(max(0.0, latency_s), item.task, facts=facts)


def _extras(marks: Sequence[Mark]) -> dict[str, float]:
    taken = [one for one in marks if one.value is not None]
    found = {"turns taken": len(taken) / len(marks)}
    if taken:
        found["mean s"] = float(np.mean([one.value for one in taken]))
        found["before the end"] = sum(one.facts["is_early"] for one in taken) / len(taken)
    return found


SUITE: Final = Suite(
    "turntaking",
    "end of the user's turn to the first word",
    ("echo", "sum"),
    _mark,
    "median",
    aim=0.4,
    is_lower_better=True,
    scale=1.0,
    unit="s",
    extras=_extras,
)
