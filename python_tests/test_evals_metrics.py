"""Published scores of single items, and intervals: against numbers worked out by hand."""

import numpy as np
import pytest

from tml_core import errors
from tml_core.evals import metrics


def test_wilson_is_the_textbook_interval() -> None:
    # 8 of 10: Wilson (1927) as in Agresti and Coull, 0.490 to 0.943.
    low, high = metrics.wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    # None of n: [0, z^2 / (n + z^2)].
    low, high = metrics.wilson(0, 50)
    assert low == 0.0
    assert high == pytest.approx(3.8414588 / 53.8414588)
    assert metrics.wilson(50, 50) == (pytest.approx(1 - high), pytest.approx(1.0))
    with pytest.raises(errors.InvalidArgument, match="num: expected at least 1, got 0"):
        metrics.wilson(0, 0)


def test_one_group_has_the_interval_of_its_share() -> None:
    value, interval = metrics.macro_interval([[1, 1, 0, 1]])
    assert value == 0.75
    assert interval == pytest.approx(metrics.wilson(3, 4))


def test_macro_average_weighs_groups_not_items() -> None:
    value, (low, high) = metrics.macro_interval([[1.0] * 30, [0.0, 0.0]])
    assert value == 0.5
    # The two halves know little and much: below 0.5 the large group's doubt, above the small one's.
    below = 0.5 * (1 - metrics.wilson(30, 30)[0])
    above = 0.5 * metrics.wilson(0, 2)[1]
    assert (low, high) == (pytest.approx(0.5 - below), pytest.approx(0.5 + above))


def test_bootstrap_is_the_same_for_a_seed_and_holds_the_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0] * 8

    def mean(values_RI: np.ndarray, _weights: np.ndarray) -> np.ndarray:
        return np.asarray(values_RI.mean(-1))

    first = metrics.bootstrap(values, mean, seed=3)
    assert first == metrics.bootstrap(values, mean, seed=3)
    assert first != metrics.bootstrap(values, mean, seed=4)
    # The normal interval of 5/8 among 64 is 0.625 +- 0.119.
    assert first == (pytest.approx(0.506, abs=0.02), pytest.approx(0.744, abs=0.02))
    with pytest.raises(errors.InvalidArgument, match="values: expected at least one"):
        metrics.bootstrap([], mean)


@pytest.mark.parametrize(
    ("count", "low", "high"), [(0, 0.0, 3.689), (1, 0.0253, 5.572), (10, 4.795, 18.39)]
)
def test_poisson_interval_is_garwoods(count: int, low: float, high: float) -> None:
    # Table of Garwood (1936).
    assert metrics.poisson_interval(count) == (
        pytest.approx(low, abs=1e-3),
        pytest.approx(high, abs=5e-3),
    )


def test_pauc_of_silence_and_of_a_wrong_answer() -> None:
    assert metrics.pauc((4.0, 10.0), []) == 0.25
    assert metrics.pauc((4.0, 10.0), [(4.0, 0)]) == 0.0
    assert metrics.pauc((4.0, 10.0), [(4.0, 2)]) == 1.0
    # Outside the span nothing counts.
    assert metrics.pauc((4.0, 10.0), [(3.9, 2), (10.1, 2)]) == 0.25


def test_pauc_shrinks_time_by_omega() -> None:
    # Right after 4 of 8 seconds: (4 x 0.5 + 4 x 2) / 16; at omega 0.5 it counts as after 2.
    assert metrics.pauc((0.0, 8.0), [(4.0, 2)], omega=0.0) == pytest.approx(10 / 16)
    assert metrics.pauc((0.0, 8.0), [(4.0, 2)], omega=0.5) == pytest.approx(13 / 16)
    assert metrics.pauc((0.0, 8.0), [(4.0, 2)], omega=1.0) == 1.0
    # Two replies, half right and then wholly: (1 x 0.5 + 1 x 1 + 6 x 2) / 16.
    assert metrics.pauc((0.0, 8.0), [(2.0, 1), (4.0, 2)]) == pytest.approx(13.5 / 16)
    with pytest.raises(errors.InvalidArgument, match=r"omega: expected 0 to 1, got 1\.5"):
        metrics.pauc((0.0, 1.0), [], omega=1.5)
    with pytest.raises(errors.InvalidArgument, match="span: expected an end after its begin"):
        metrics.pauc((1.0, 1.0), [])


def test_temporal_iou() -> None:
    assert metrics.temporal_iou((1.0, 3.0), (1.0, 3.0)) == 1.0
    assert metrics.temporal_iou((0.0, 2.0), (1.0, 3.0)) == pytest.approx(1 / 3)
    assert metrics.temporal_iou((4.0, 5.0), (1.0, 3.0)) == 0.0
    assert metrics.temporal_iou(None, (1.0, 3.0)) == 0.0
    assert metrics.temporal_iou((3.0, 2.0), (1.0, 3.0)) == 0.0


@pytest.mark.parametrize(
    ("said", "wanted", "wrong"),
    [
        ("", "", 0),
        ("a b c", "", 3),
        ("", "a b", 2),
        ("a b c", "a b c", 0),
        ("a x c", "a b c", 1),
        ("a c", "a b c", 1),
        ("x a b c", "a b c", 1),
        ("b a", "a b", 2),
    ],
)
def test_word_errors(said: str, wanted: str, wrong: int) -> None:
    assert metrics.word_errors(said.split(), wanted.split()) == wrong
    pairs = metrics.equal_words(said.split(), wanted.split())
    assert all(said.split()[a] == wanted.split()[b] for a, b in pairs)
    assert pairs == sorted(set(pairs))


def test_equal_words_are_those_of_an_alignment_with_fewest_changes() -> None:
    assert metrics.equal_words(["a", "c", "x"], ["a", "b", "c"]) == [(0, 0), (1, 2)]
    assert metrics.equal_words([], ["a"]) == []
