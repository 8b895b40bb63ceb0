"""Proactive events: say it when it is seen, and nothing before. ProactiveVideoQA's area under the
curve (PAUC) at omega 0.5, silence 25.

An event lasts from the first movement (or the step into the room) to the last (or the way out).
Instead of a judge's 0 to 2 for all said so far: 2 if it is what was asked for and nothing else, 1
if both, 0 if only something else. What is said too early stands when the event begins.
"""

from typing import Final

from tml_core.evals.item import Item
from tml_core.evals.metrics import Interval, pauc
from tml_core.evals.played import Played, heard_s, normal_words
from tml_core.evals.suite import Mark, Suite

__all__ = ["SUITE", "action_span"]

_KNOWN_S: Final = 0.4  # until a movement can be told, as the labels have it


def action_span(item: Item, by_s: float) -> Interval:
    """When the action that is known ``by_s`` began and ended: the last repetition begun until then
    and all of the same kind after it."""
    assert item.script.scene is not None
    reps = [one for one in item.script.scene.reps if not one.is_other]
    first = max(index for index, one in enumerate(reps) if one.start_s <= by_s)
    run = []
    for one in reps[first:]:
        if one.action != reps[first].action:
            break
        run.append(one)
    return run[0].start_s, run[-1].end_s


def _span(item: Item) -> Interval:
    scene = item.script.scene
    assert scene is not None
    if scene.visits:
        return scene.visits[0]
    return action_span(item, heard_s(item.expected[0].tick) - _KNOWN_S)


def _mark(item: Item, played: Played) -> Mark:
    span = _span(item)
    wanted = normal_words(item.expected[0].text)
    scored: list[tuple[float, int]] = []
    is_right = is_wrong = False
    for word in played.words:
        is_right = is_right or word.text in wanted
        is_wrong = is_wrong or word.text not in wanted
        is_early = heard_s(word.start) < span[0]
        # Said before there was anything to say, the right word is a wrong one.
        is_wrong = is_wrong or is_early
        is_right = is_right and not is_early
        level = (2 - is_wrong) if is_right else 0
        scored.append((max(span[0], heard_s(word.start)), level))
    value = pauc(span, scored)
    late_s = [heard_s(one.start) - span[0] for one in played.words if one.text in wanted]
    facts = {
        "span_s": [round(one, 3) for one in span],
        "said": [[one.start, one.text] for one in played.words],
        "late_s": round(late_s[0], 3) if late_s else None,
    }
    return Mark(value, item.task, facts=facts)


SUITE: Final = Suite(
    "events", "PAUC of events seen", ("when", "appear"), _mark, "mean", aim=0.60, unit=""
)
