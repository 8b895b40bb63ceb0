"""What a suite is: which tasks it plays, how it marks an item, how marks become one score."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import numpy as np

from tml_core.errors import InvalidArgument
from tml_core.evals.item import Item
from tml_core.evals.metrics import Floats, Interval, bootstrap, macro_interval, poisson_interval
from tml_core.evals.played import Played

__all__ = ["Kind", "Mark", "Score", "Suite", "share"]

Kind = Literal["macro", "mean", "median", "ratio", "rate"]


@dataclass(frozen=True)
class Mark:
    """What an item is worth. ``value``: by the suite's rule, None if it says nothing (a latency of
    silence). ``weight``: what a ratio's or a rate's value is divided by. ``group``: items of equal
    kind, for macro averages. ``facts``: what the value came from, as JSON values."""

    value: float | None
    group: str = ""
    weight: float = 1.0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A suite's number. ``value``, ``low``, ``high``: with its interval of 95 %, None if no item
    says anything. ``groups``: (value, items) of each. ``extras``: other numbers of the suite."""

    value: float | None
    low: float | None
    high: float | None
    num_items: int
    groups: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    extras: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Suite:
    """``mark`` is the published rule for one item. ``kind`` of the number it adds up to:

    - "macro": the mean over groups of the share of right items (value 1);
    - "mean", "median": over items, with a value;
    - "ratio": sum of values over sum of weights; "rate": the same where values count rare events.

    ``aim``: what should be reached; ``is_lower_better`` of latencies, errors and rates.
    ``scale``, ``unit``: how it is shown. ``extras``: other numbers worth seeing, of all marks.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    mark: Callable[[Item, Played], Mark]
    kind: Kind
    aim: float | None = None
    is_lower_better: bool = False
    scale: float = 100.0
    unit: str = "%"
    extras: Callable[[Sequence[Mark]], dict[str, float]] = lambda _marks: {}

    def score(self, marks: Sequence[Mark], seed: int = 0) -> Score:
        """All marks as one number; ``seed``: of what is drawn for the interval."""
        told = [one for one in marks if one.value is not None]
        extras = self.extras(marks) if marks else {}
        if not told:
            return Score(None, None, None, 0, extras=extras)
        values = _groups(told)
        value, (low, high) = self._value(told, seed)
        groups = {name: (_plain(self.kind, group), len(group)) for name, group in values.items()}
        return Score(value, low, high, len(told), groups if len(groups) > 1 else {}, extras)

    def show(self, value: float | None) -> str:
        """A value of this suite in its unit."""
        if value is None:
            return "none"
        shown = value * self.scale
        digits = 1 if self.scale == 100.0 else 2
        return f"{shown:.{digits}f}{'' if self.unit == '%' else ' '}{self.unit}".rstrip()

    def reaches(self, value: float | None) -> bool | None:
        """Whether a value is as good as the aim; None without an aim or a value."""
        if self.aim is None or value is None:
            return None
        return value <= self.aim if self.is_lower_better else value >= self.aim

    def _value(self, marks: Sequence[Mark], seed: int) -> tuple[float, Interval]:
        values = [float(one.value or 0.0) for one in marks]
        weights = [one.weight for one in marks]
        if self.kind == "macro":
            return macro_interval(
                [[float(m.value or 0) for m in g] for g in _groups(marks).values()]
            )
        value = _plain(self.kind, marks)
        drawn = bootstrap(values, _STATISTICS[self.kind], weights, seed)
        if self.kind != "rate":
            return value, drawn
        # Events come in bunches or not at all: the wider of what items and what counts say.
        exact = poisson_interval(round(sum(values)))
        total = sum(weights)
        return value, (min(drawn[0], exact[0] / total), max(drawn[1], exact[1] / total))


def share(marks: Sequence[Mark], fact: str) -> float | None:
    """The share of marks with a true ``fact`` among those that have it; None if none has."""
    having = [bool(one.facts[fact]) for one in marks if one.facts.get(fact) is not None]
    return sum(having) / len(having) if having else None


def _mean(values_RI: Floats, _weights: Floats) -> Floats:
    return np.asarray(values_RI.mean(-1))


def _median(values_RI: Floats, _weights: Floats) -> Floats:
    return np.asarray(np.median(values_RI, -1))


def _ratio(values_RI: Floats, weights_RI: Floats) -> Floats:
    return np.asarray(values_RI.sum(-1) / np.maximum(weights_RI.sum(-1), 1e-12))


_STATISTICS: Final = {"mean": _mean, "macro": _mean, "median": _median, "ratio": _ratio}
_STATISTICS["rate"] = _ratio


def _groups(marks: Sequence[Mark]) -> dict[str, list[Mark]]:
    groups: dict[str, list[Mark]] = defaultdict(list)
    for one in marks:
        groups[one.group].append(one)
    return {name: groups[name] for name in sorted(groups)}


def _plain(kind: Kind, marks: Sequence[Mark]) -> float:
    """The number of some marks, without groups."""
    if not marks:
        raise InvalidArgument("marks: expected at least one, got none")
    values = np.array([float(one.value or 0.0) for one in marks])
    return float(_STATISTICS[kind](values, np.array([one.weight for one in marks])))
