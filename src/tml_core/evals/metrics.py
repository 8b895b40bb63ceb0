"""Published scores of single items, and intervals of 95 % for what many items say."""

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from tml_core.errors import InvalidArgument

__all__ = [
    "Interval",
    "bootstrap",
    "equal_words",
    "macro_interval",
    "pauc",
    "poisson_interval",
    "temporal_iou",
    "wilson",
    "word_errors",
]

Interval = tuple[float, float]
Floats = NDArray[np.float64]

_Z: Final = 1.959963984540054  # of 95 %
_NUM_RESAMPLES: Final = 2000
_EDIT: Final = 1 << 20  # more than there are words in an item


def wilson(num_right: float, num: int) -> Interval:
    """Wilson's interval of a share: inside [0, 1] and never of width zero."""
    if num < 1:
        raise InvalidArgument(f"num: expected at least 1, got {num}")
    share, square = num_right / num, _Z * _Z
    middle = (share + square / (2 * num)) / (1 + square / num)
    half = _Z / (1 + square / num) * math.sqrt(share * (1 - share) / num + square / (4 * num**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def macro_interval(groups: Sequence[Sequence[float]]) -> tuple[float, Interval]:
    """The mean of the groups' shares of ones, and its interval, put together from Wilson's of each
    group by the recovery of variances (Zou and Donner 2008)."""
    weight = 1.0 / len(groups)
    value = below = above = 0.0
    for group in groups:
        share = sum(group) / len(group)
        low, high = wilson(sum(group), len(group))
        value += weight * share
        below += (weight * (share - low)) ** 2
        above += (weight * (high - share)) ** 2
    return value, (max(0.0, value - math.sqrt(below)), min(1.0, value + math.sqrt(above)))


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[Floats, Floats], Floats],
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Interval:
    """Percentiles of ``statistic(values, weights)`` over items drawn again with replacement.

    The statistic takes arrays [resamples, items] and gives one number a row.
    """
    if not values:
        raise InvalidArgument("values: expected at least one, got none")
    rng = Generator(Philox(key=seed))
    values_I = np.array(values, np.float64)
    weights_I = np.ones_like(values_I) if weights is None else np.array(weights, np.float64)
    drawn_RI = rng.integers(len(values_I), size=(_NUM_RESAMPLES, len(values_I)))
    seen_R = statistic(values_I[drawn_RI], weights_I[drawn_RI])
    low, high = np.percentile(seen_R, [2.5, 97.5])
    return float(low), float(high)


def poisson_interval(count: int) -> Interval:
    """The exact interval (Garwood) of the mean number of events, when ``count`` were seen."""
    low = 0.0 if count == 0 else _solve(lambda mean: 1.0 - _poisson_cdf(count - 1, mean), count)
    high = _solve(lambda mean: 1.0 - _poisson_cdf(count, mean), count, 1.0 - 0.025)
    return low, high


def pauc(
    span: Interval, scored: Sequence[tuple[float, int]], omega: float = 0.5, top: int = 2
) -> float:
    """ProactiveVideoQA's area under the curve of one turn, 0 to 1; silence gets 0.25.

    ``span``: when the answer is right to give. ``scored``: (time, score of all said so far) of each
    reply, scores 0 to ``top``, in order. ``omega``: how much of the score is for correctness alone:
    times shrink by 1 - ``omega`` towards the span's begin. Replies outside the span do not count.
    """
    begin, end = span
    if end <= begin:
        raise InvalidArgument(f"span: expected an end after its begin, got {span}")
    if not 0.0 <= omega <= 1.0:
        raise InvalidArgument(f"omega: expected 0 to 1, got {omega}")
    level, at, area = 0.5, begin, 0.0
    for time, score in scored:
        if not begin <= time <= end:
            continue
        moved = begin + (1.0 - omega) * (time - begin)
        area += (moved - at) * level
        level, at = float(score), moved
    return (area + (end - at) * level) / ((end - begin) * top)


def temporal_iou(a: Interval | None, b: Interval) -> float:
    """Length of the overlap over the length of both together; 0 without a prediction ``a``."""
    if a is None or a[1] <= a[0]:
        return 0.0
    overlap = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return overlap / (a[1] - a[0] + b[1] - b[0] - overlap)


def word_errors(said: Sequence[str], wanted: Sequence[str]) -> int:
    """Fewest words to put in, take out or change to make ``wanted`` of ``said``."""
    return int(-(-_costs(said, wanted)[-1, -1] // _EDIT))


def equal_words(said: Sequence[str], wanted: Sequence[str]) -> list[tuple[int, int]]:
    """Which words of ``said`` are which of ``wanted``: as many as can be with fewest changes."""
    cost = _costs(said, wanted)
    pairs = []
    a, b = len(said), len(wanted)
    while a and b:
        is_equal = said[a - 1] == wanted[b - 1]
        if cost[a, b] == cost[a - 1, b - 1] + (-1 if is_equal else _EDIT):
            a, b = a - 1, b - 1
            if is_equal:
                pairs.append((a, b))
        elif cost[a, b] == cost[a - 1, b] + _EDIT:
            a -= 1
        else:
            b -= 1
    return pairs[::-1]


def _costs(said: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64]:
    """From the first words of the one to the first of the other: `_EDIT` a change, -1 a word that
    stays, so that of two ways with equal changes the one that keeps more words is cheaper."""
    cost = np.zeros((len(said) + 1, len(wanted) + 1), np.int64)
    cost[:, 0], cost[0] = np.arange(len(said) + 1) * _EDIT, np.arange(len(wanted) + 1) * _EDIT
    for a, word in enumerate(said, 1):
        for b, other in enumerate(wanted, 1):
            paired = cost[a - 1, b - 1] + (-1 if word == other else _EDIT)
            cost[a, b] = min(paired, cost[a - 1, b] + _EDIT, cost[a, b - 1] + _EDIT)
    return cost


def _poisson_cdf(count: int, mean: float) -> float:
    if mean == 0.0:
        return 1.0
    terms = (math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count + 1))
    return math.fsum(terms)


def _solve(rising: Callable[[float], float], count: int, target: float = 0.025) -> float:
    """Where a rising function of the mean is ``target``."""
    low, high = 0.0, count + 10.0 * math.sqrt(count + 1.0)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return high
