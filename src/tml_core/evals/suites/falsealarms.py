"""False alarms a minute: how often something is begun, in words or a call, when nothing is due.

Something is due from one tick before to two seconds after each expected output; all other time is
silence to be kept. Whether what is said is right, other suites say.
"""

from collections.abc import Sequence
from typing import Final

from tml_core.evals.item import Item
from tml_core.evals.played import Played, utterances
from tml_core.evals.suite import Mark, Suite
from tml_core.media.micro_turns import TICK_MS

__all__ = ["SUITE"]

_EARLY_TICKS: Final = 1
_LATE_TICKS: Final = 9


def _mark(item: Item, played: Played) -> Mark:
    num_ticks = item.script.num_ticks
    is_due = [False] * num_ticks
    for one in item.expected:
        begin, end = max(0, one.tick - _EARLY_TICKS), one.tick + _LATE_TICKS + 1
        is_due[begin:end] = [True] * (min(end, num_ticks) - begin)
    groups = utterances(played.words)
    begun = [group[0].start for group in groups]
    # Only where a call closes is known; a call that is due may take as long as the answer's window.
    closed = [one.tick for one in played.calls if not _is_call_due(item, one.tick)]
    alarms = [tick for tick in (*begun, *closed) if not is_due[tick]]
    silent = [tick for tick in range(num_ticks) if not is_due[tick]]
    facts = {
        "alarm_ticks": sorted(alarms),
        "ticks": len(silent),
        "writing": sum(bool(played.texts[tick]) for tick in silent),
    }
    minutes = len(silent) * TICK_MS / 60000
    return Mark(float(len(alarms)), item.task, minutes, facts)


def _is_call_due(item: Item, tick: int) -> bool:
    return any(one.call is not None and 0 <= tick - one.tick <= 20 for one in item.expected)


def _extras(marks: Sequence[Mark]) -> dict[str, float]:
    num_ticks = sum(one.facts["ticks"] for one in marks)
    return {"writing in silence": sum(one.facts["writing"] for one in marks) / max(1, num_ticks)}


SUITE: Final = Suite(
    "falsealarms",
    "begun when nothing was due",
    (
        *("timer", "cue", "count", "when", "appear", "span", "story"),
        *("aside", "background_speech", "echo", "sum", "delegate", "refuse"),
    ),
    _mark,
    "rate",
    aim=1.0,
    is_lower_better=True,
    scale=1.0,
    unit="/min",
    extras=_extras,
)
