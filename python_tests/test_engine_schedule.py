"""The cost model learns what steps take; the scheduler fills a step by deadline and by cost."""

from dataclasses import dataclass

import numpy as np
import pytest

from tml_core.engine.cost_model import CostModel
from tml_core.engine.scheduler import MIN_PIECE, compose

TOKEN_S, ROW_S, FIXED_S = 1e-4, 5e-5, 2e-3


def taught(num_steps: int = 400, seed: int = 0) -> CostModel:
    """A model that has seen steps of the costs above, with some noise."""
    random = np.random.default_rng(seed)
    costs = CostModel()
    for _ in range(num_steps):
        rows = int(random.integers(1, 17))
        tokens = rows * int(random.choice([1, 20]))
        seconds = FIXED_S + TOKEN_S * tokens + ROW_S * rows
        costs.learn(tokens, rows, seconds * float(random.uniform(0.95, 1.05)))
    return costs


@dataclass(eq=False)
class Entry:
    num_left: int
    due_s: float


def test_nothing_is_expected_before_a_few_steps_were_seen() -> None:
    costs = CostModel()
    assert not costs.is_learnt
    assert costs.step_s(100, 10) == 0.0
    assert costs.num_tokens(0.001, 1) > 10**6
    for _ in range(8):
        costs.learn(10, 1, 0.004)
    assert costs.is_learnt
    assert costs.step_s(10, 1) == pytest.approx(0.004, rel=0.05)


def test_costs_are_learnt_and_followed() -> None:
    costs = taught()
    for tokens, rows in [(1, 1), (16, 16), (20, 1), (320, 16)]:
        expected = FIXED_S + TOKEN_S * tokens + ROW_S * rows
        assert costs.step_s(tokens, rows) == pytest.approx(expected, rel=0.1)
    count = costs.num_tokens(0.01, 4)
    assert costs.step_s(count, 4) == pytest.approx(0.01, rel=0.02)
    assert 1.0 <= costs.tail < 1.3
    # A machine that got twice as slow is noticed.
    for _ in range(3000):
        costs.learn(16, 16, 2 * (FIXED_S + 16 * TOKEN_S + 16 * ROW_S))
    assert costs.step_s(16, 16) == pytest.approx(2 * (FIXED_S + 16 * TOKEN_S + 16 * ROW_S), rel=0.1)


def test_one_stall_does_not_change_what_is_expected() -> None:
    costs = taught()
    before = costs.step_s(16, 16)
    costs.learn(16, 16, 2.0)
    assert costs.step_s(16, 16) == pytest.approx(before, rel=0.1)


def test_the_tail_grows_with_steps_that_take_longer() -> None:
    costs, random = CostModel(), np.random.default_rng(1)
    for _ in range(6000):
        slow = 2.0 if random.uniform() < 0.03 else 1.0
        costs.learn(8, 8, 0.005 * slow)
    # Three steps in a hundred take twice the time: the 99th percentile is there.
    assert 1.5 < costs.tail < 2.6


def test_steps_of_one_kind_keep_the_numbers_small() -> None:
    costs = CostModel()
    for _ in range(20_000):
        costs.learn(1, 1, 0.003)
    assert costs.step_s(1, 1) == pytest.approx(0.003, rel=1e-3)
    assert max(abs(one) for row in costs._spread for one in row) < 1e7


def test_one_turn_alone_gets_the_whole_step() -> None:
    (only,) = compose([Entry(700, 1.0)], 512, CostModel(), 0.0)
    assert only[1] == 512


def test_tokens_go_first_then_inputs_by_deadline() -> None:
    late, early = Entry(300, 9.0), Entry(300, 3.0)
    talking = [Entry(1, 5.0), Entry(2, 4.0)]
    step = compose([late, *talking, early], 512, CostModel(), 0.0)
    assert [(one.num_left, count) for one, count in step] == [
        (2, 2),
        (1, 1),
        (300, 300),
        (300, 209),
    ]
    assert [one for one, _ in step][2:] == [early, late]
    assert sum(count for _, count in step) == 512


def test_inputs_are_cut_where_they_would_make_others_late() -> None:
    costs = taught()
    talking, long = Entry(1, 0.1), Entry(5000, 0.5)
    step = compose([talking, long], 512, costs, 0.0)
    ((_, one), (_, piece)) = step
    # A quarter of the 100 ms that are left.
    assert one == 1
    assert costs.step_s(1 + piece, 2) == pytest.approx(0.025, rel=0.05)
    # Who is late already is not waited for, but a step stays short.
    ((_, _), (_, short)) = compose([talking, long], 512, costs, 0.2)
    assert costs.step_s(1 + short, 2) == pytest.approx(0.01, rel=0.05)
    # However slow the machine, the input moves on.
    slow = CostModel()
    for i in range(100):
        slow.learn(1 + i % 9, 1, 0.05 * (1 + i % 9))
    ((_, _), (_, least)) = compose([talking, long], 512, slow, 0.0)
    assert least == MIN_PIECE


def test_a_full_step_leaves_out_those_with_the_latest_deadlines() -> None:
    entries = [Entry(2, float(9 - i)) for i in range(6)]
    step = compose(entries, 7, CostModel(), 0.0)
    assert [one.due_s for one, _ in step] == [4.0, 5.0, 6.0]
