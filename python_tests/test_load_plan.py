"""The plan of a load run: a function of the spec, absolute in time, faults independent."""

import dataclasses
import math
from typing import Any

import pytest

from tml_core import errors
from tml_core.load import Arrival, ClientPlan, LoadSpec, make_plan

TICK_S = 0.2
FAULTS = {"jitter_ms": 60.0, "stalls": 6.0, "disconnects": 6.0, "barge_ins": 12.0}


def spec(**fields: Any) -> LoadSpec:
    return LoadSpec(**{"num_sessions": 3, "duration_s": 120.0, "warmup_s": 0.0, **fields})


def times(plan: ClientPlan) -> list[float]:
    return [one.at_s for one in plan.arrivals]


def num_counted(plans: tuple[ClientPlan, ...], of: LoadSpec) -> int:
    return sum(of.is_counted(one.at_s) for plan in plans for one in plan.arrivals)


def test_without_faults_a_client_is_a_clock() -> None:
    plain = spec()
    plans = make_plan(plain)
    for plan in plans:
        assert plan.num_lost == plan.num_away == 0
        first = plan.arrivals[0].at_s
        assert 0 <= first < TICK_S
        assert times(plan) == [pytest.approx(first + TICK_S * i) for i in range(len(times(plan)))]
        assert plain.total_s - TICK_S <= times(plan)[-1] < plain.total_s
        assert [one.tick for one in plan.arrivals] == list(range(len(plan.arrivals)))
    assert num_counted(plans, plain) == 3 * 600
    assert len({plan.arrivals[0].at_s for plan in plans}) == 3
    assert [plan.seed for plan in plans] == [0, 1, 2]


@pytest.mark.parametrize(
    ("phase", "offsets"), [("aligned", [0, 0, 0, 0]), ("spread", [0, 0.05, 0.1, 0.15])]
)
def test_phases(phase: Any, offsets: list[float]) -> None:
    plans = make_plan(spec(num_sessions=4, phase=phase))
    assert [plan.arrivals[0].at_s for plan in plans] == pytest.approx(offsets)


def test_a_plan_is_a_function_of_its_seed() -> None:
    one = spec(**FAULTS)
    assert make_plan(one) == make_plan(one)
    assert make_plan(one) != make_plan(dataclasses.replace(one, seed=1))


def test_a_client_does_not_depend_on_how_many_there_are() -> None:
    few, many = make_plan(spec(**FAULTS)), make_plan(spec(**FAULTS, num_sessions=9))
    assert many[:3] == few


def test_jitter_only_delays_and_keeps_the_order() -> None:
    plain, late = make_plan(spec()), make_plan(spec(jitter_ms=500.0))
    for before, after in zip(plain, late, strict=True):
        assert times(after) == sorted(times(after))
        delays = [b - a for a, b in zip(times(before), times(after), strict=True)]
        assert all(0 <= one < 0.5 for one in delays)
        assert max(delays) > 0.4
    assert make_plan(spec(jitter_ms=0.0)) == plain


def test_a_stall_loses_all_but_the_newest_chunk() -> None:
    stalling = spec(stalls=10.0, num_sessions=1, phase="aligned")
    (plan,) = make_plan(stalling)
    held = [one for one in plan.arrivals if one.at_s > one.tick * TICK_S]
    assert len(held) > 10
    # What comes late is the last chunk that was due before the stall was over.
    assert all(one.tick == math.floor(one.at_s / TICK_S) for one in held)
    assert times(plan) == sorted(times(plan))
    ticks = {one.tick for one in plan.arrivals}
    in_window = [i for i in range(600) if i not in ticks]
    # A stall that the end of the run cuts off holds its newest chunk for good.
    assert 0 <= len(in_window) - plan.num_lost <= 1
    assert len(in_window) > len(held)


def test_one_who_disconnects_comes_back_and_is_absent_between() -> None:
    plan = make_plan(spec(disconnects=6.0, num_sessions=1))[0]
    leaving = [one for one in plan.arrivals if one.leave_s is not None]
    assert len(leaving) > 3
    for one in leaving:
        assert one.back_s is not None and one.leave_s is not None
        assert one.at_s + one.leave_s < one.back_s <= one.at_s + 3.0
        assert not [x for x in times(plan) if one.at_s < x < one.back_s]
    assert plan.num_away > 0


def test_switching_one_fault_on_leaves_the_others() -> None:
    def barge_ins(plans: tuple[ClientPlan, ...]) -> set[tuple[int, int]]:
        return {
            (plan.client, one.tick)
            for plan in plans
            for one in plan.arrivals
            if one.barge_in_s is not None
        }

    few, more = spec(barge_ins=12.0), spec(barge_ins=12.0, jitter_ms=80.0)
    assert barge_ins(make_plan(few)) == barge_ins(make_plan(more))
    assert barge_ins(make_plan(spec(barge_ins=6.0))) < barge_ins(make_plan(few))
    with_leaves = barge_ins(make_plan(spec(barge_ins=12.0, disconnects=2.0)))
    assert with_leaves < barge_ins(make_plan(few))


def test_the_window_leaves_warm_up_and_tail_out() -> None:
    one = spec(num_sessions=1, warmup_s=2.0, duration_s=10.0, phase="aligned")
    (plan,) = make_plan(one)
    counted = [x for x in times(plan) if one.is_counted(x)]
    assert len(counted) == 50
    assert counted[0] == pytest.approx(2.0)
    assert plan.arrivals[-1] == Arrival(64, pytest.approx(12.8))  # type: ignore[arg-type]
    assert one.total_s == 13.0


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"num_sessions": 0}, errors.InvalidArgument, "num_sessions: expected at least 1, got 0"),
        ({"num_sessions": 1.5}, errors.InvalidType, "num_sessions: expected an int, got float"),
        ({"seed": -1}, errors.InvalidArgument, "seed: expected at least 0, got -1"),
        ({"phase": "late"}, errors.InvalidArgument, r"phase: expected one of \['random', 'spread'"),
        ({"duration_s": 0}, errors.InvalidArgument, "duration_s: expected 0.2 to 86400, got 0"),
        ({"warmup_s": -1}, errors.InvalidArgument, "warmup_s: expected 0 to 3600, got -1"),
        ({"jitter_ms": math.nan}, errors.InvalidArgument, "jitter_ms: expected 0 to 60000, got"),
        ({"stalls": 301}, errors.InvalidArgument, "stalls: expected 0 to 300, got 301"),
        ({"barge_ins": True}, errors.InvalidType, "barge_ins: expected a number, got bool"),
        ({"disconnects": "x"}, errors.InvalidType, "disconnects: expected a number, got str"),
        ({"deadline_ms": 0.5}, errors.InvalidArgument, "deadline_ms: expected 1 to 60000, got"),
    ],
)
def test_refusals(fields: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        LoadSpec(**fields)
