"""RepCount: count what is seen. The last number said after the last repetition but one is the
answer; right (off-by-one accuracy) if it is at most one from the truth. Silence answers 0.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from tml_core.evals.item import Item
from tml_core.evals.match import match
from tml_core.evals.played import Played, as_number
from tml_core.evals.suite import Mark, Suite

__all__ = ["SUITE"]

_LATE_TICKS: Final = 4


def _mark(item: Item, played: Played) -> Mark:
    truth = len(item.expected)
    # Said after the repetition: from the tick on in which it ended.
    since = item.expected[-2].tick - 1 if truth > 1 else 0
    said = [as_number(one.text) for one in played.words if one.start >= since]
    answer = next((one for one in reversed(said) if one is not None), 0)
    live = match(played.words, item.expected, 1, _LATE_TICKS)
    facts = {
        "count": truth,
        "said": answer,
        "live": sum(one.is_right for one in live.matches),
        "off": [one.off for one in live.matches],
    }
    return Mark(float(abs(answer - truth) <= 1), facts=facts)


def _extras(marks: Sequence[Mark]) -> dict[str, float]:
    """Exact counts; the mean of |said - count| / (count + 0.1); repetitions counted within 1 s."""
    truth = np.array([one.facts["count"] for one in marks], np.float64)
    wrong = np.abs(np.array([one.facts["said"] for one in marks]) - truth)
    return {
        "exact": float((wrong == 0).mean()),
        "mean error": float((wrong / (truth + 0.1)).mean()),
        "each in time": float(sum(one.facts["live"] for one in marks) / truth.sum()),
        "always 5": float((np.abs(truth - 5) <= 1).mean()),
    }


SUITE: Final = Suite(
    "repcount",
    "repetitions counted, at most one off",
    ("count",),
    _mark,
    "macro",
    aim=0.80,
    extras=_extras,
)
