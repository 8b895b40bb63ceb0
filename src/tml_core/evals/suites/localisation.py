"""Action localisation: "start" and "stop" said around a named action. The overlap of the two
intervals over their union (temporal IoU), without either word 0; mean over items.

The interval is that of the movements, so whoever waits until he has seen enough cannot reach 1.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from tml_core.evals.item import Item
from tml_core.evals.metrics import Interval, temporal_iou
from tml_core.evals.played import Played, heard_s
from tml_core.evals.suite import Mark, Suite
from tml_core.evals.suites.events import action_span

__all__ = ["SUITE"]

_KNOWN_S: Final = 0.4


def _mark(item: Item, played: Played) -> Mark:
    truth = action_span(item, heard_s(item.expected[0].tick) - _KNOWN_S)
    said = _said(played)
    facts = {
        "span_s": [round(one, 3) for one in truth],
        "said_s": None if said is None else [round(one, 3) for one in said],
    }
    return Mark(temporal_iou(said, truth), facts=facts)


def _said(played: Played) -> Interval | None:
    """From the first "start" to the first "stop" after it."""
    start = next((one.start for one in played.words if one.text == "start"), None)
    if start is None:
        return None
    stops = (one.start for one in played.words if one.text == "stop" and one.start > start)
    stop = next(stops, None)
    return None if stop is None else (heard_s(start), heard_s(stop))


def _extras(marks: Sequence[Mark]) -> dict[str, float]:
    values = np.array([float(one.value or 0.0) for one in marks])
    found = {f"IoU over {limit}": float((values >= limit).mean()) for limit in (0.3, 0.5, 0.7)}
    found["both said"] = sum(one.facts["said_s"] is not None for one in marks) / len(marks)
    return found


SUITE: Final = Suite(
    "localisation",
    "overlap of start and stop with the action",
    ("span",),
    _mark,
    "mean",
    aim=0.60,
    extras=_extras,
)
