"""Delegating: the right call, within four seconds and once; then the result said in the user's
pause. The score is the call; what became of the result is beside it."""

from collections.abc import Sequence
from typing import Final

from tml_core.evals.item import Item
from tml_core.evals.match import match
from tml_core.evals.played import Played, normal_words
from tml_core.evals.suite import Mark, Suite, share

__all__ = ["SUITE"]

_CALL_LATE_TICKS: Final = 20  # until the call is closed: it takes several ticks to write
_ANSWER_LATE_TICKS: Final = 9


def _mark(item: Item, played: Played) -> Mark:
    due = next(one for one in item.expected if one.call is not None)
    assert due.call is not None
    name, args = due.call
    calls = played.calls
    is_right = (
        len(calls) == 1
        and calls[0].name == name
        and 0 <= calls[0].tick - due.tick <= _CALL_LATE_TICKS
        and {k: normal_words(str(v)) for k, v in calls[0].args.items()}
        == {k: normal_words(str(v)) for k, v in args.items()}
    )
    answers = [one for one in item.expected if one.text]
    found = match(played.words, answers, 1, _ANSWER_LATE_TICKS)
    facts = {
        "calls": [[one.tick - due.tick, one.name, dict(one.args)] for one in calls],
        "said": [one.text for one in played.words],
        "is_answered": found.is_right if any(t is not None for t in played.result_ticks) else None,
    }
    return Mark(float(is_right), item.script.phrasing, facts=facts)


def _extras(marks: Sequence[Mark]) -> dict[str, float]:
    answered = share(marks, "is_answered")
    return {} if answered is None else {"results said in time": answered}


SUITE: Final = Suite(
    "delegate", "questions handed to the background", ("delegate",), _mark, "macro", extras=_extras
)
