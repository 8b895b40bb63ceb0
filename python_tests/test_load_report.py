"""Numbers of a load run: percentiles with ticks that never came, misses, slack, the search."""

import json
import math
from pathlib import Path

import pytest

from tml_core import errors
from tml_core.load import LoadReport, LoadSpec, find_capacity
from tml_core.load.plot import plot_capacity, plot_report
from tml_core.load.report import Histogram, Kind, Outcomes, Spread, TickOutcome

SPEC = LoadSpec(num_sessions=2, duration_s=20.0, warmup_s=1.0)


def report_of(ticks: list[tuple[float, Kind, float]], spec: LoadSpec = SPEC) -> LoadReport:
    """A report of (time, kind, latency) ticks."""
    outcomes = Outcomes(spec)
    for i, (at_s, kind, latency_ms) in enumerate(ticks):
        outcomes.add(TickOutcome(0, i, at_s, kind, latency_ms, late_ms=1.0, append_ms=0.5))
    return outcomes.report([], None, spec.num_sessions)


def test_percentiles_are_values_that_were_seen() -> None:
    spread = Spread.of([float(one) for one in range(1, 1001)])
    assert spread == Spread(p50=500, p90=900, p99=990, p99_9=999, max=1000)
    assert Spread.of([7.0]) == Spread(7, 7, 7, 7, 7)
    assert Spread.of([]) is None


def test_what_never_came_stands_behind_all_that_did() -> None:
    spread = Spread.of([10.0] * 98 + [math.inf] * 2)
    assert spread is not None
    assert spread.to_dict() == {"p50": 10, "p90": 10, "p99": None, "p99_9": None, "max": None}


def test_slack_is_counted_in_bins() -> None:
    found = Histogram.of_slack([200.0, 199.0, 0.0, -0.5, -20.0, -200.0, -201.0, -math.inf], 200.0)
    assert sum(found.counts) == 8
    assert len(found.counts) == len(found.edges) - 1
    by_low = dict(zip(found.edges, found.counts, strict=False))
    assert (by_low[200.0], by_low[180.0], by_low[0.0], by_low[-20.0]) == (1, 1, 1, 2)
    assert (by_low[-200.0], by_low[-math.inf]) == (1, 2)
    assert sum(Histogram.of_slack([], 200.0).counts) == 0
    assert len(found.to_dict()["counts"]) == len(found.to_dict()["edges_ms"]) + 1


def test_misses_are_late_or_never_and_the_client_s_own_ends_are_apart() -> None:
    found = report_of(
        [
            (0.5, "served", 900.0),  # warm-up
            (1.0, "served", 50.0),
            (1.2, "served", 200.0),
            (1.4, "served", 200.1),
            (1.6, "dropped", math.inf),
            (1.8, "refused", math.inf),
            (2.0, "failed", math.inf),
            (2.2, "barged", 30.0),
            (2.4, "left", math.inf),
            (21.0, "served", 900.0),  # tail
        ]
    )
    assert (found.num_ticks, found.num_missed) == (6, 4)
    assert found.miss_rate == pytest.approx(4 / 6)
    assert found.kinds == {
        "barged": 1,
        "dropped": 1,
        "failed": 1,
        "left": 1,
        "refused": 1,
        "served": 3,
    }
    assert found.latency is not None and found.latency.p50 == 200.1
    assert math.isinf(found.latency.p90)
    assert sum(found.slack.counts) == 6
    assert not found.is_generator_late
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["latency_ms"]["p99"] is None
    assert content["generator_late_ms"]["p50"] == 1.0
    assert content["cancel_ms"] is None


def test_an_empty_run_is_no_success() -> None:
    found = report_of([])
    assert (found.miss_rate, found.latency, found.miss_rate_bound) == (1.0, None, 1.0)


def test_the_bound_says_what_few_ticks_cannot_show() -> None:
    clean = report_of([(2.0, "served", 10.0)] * 1000)
    # The rule of three: no miss among n ticks leaves rates up to 3 / n possible.
    assert clean.miss_rate_bound == pytest.approx(3 / 1000, rel=0.01)
    assert report_of([(2.0, "served", 10.0)] * 5000).miss_rate_bound < 0.001
    bad = report_of([(2.0, "served", 10.0)] * 90 + [(2.0, "served", 300.0)] * 10)
    assert bad.miss_rate == 0.1
    assert bad.miss_rate_bound == pytest.approx(0.1637, abs=1e-3)  # R: binom.test(10, 100)


def test_a_late_generator_is_said() -> None:
    outcomes = Outcomes(SPEC)
    for late_ms, is_held in ((1.0, False), (90.0, True)):
        outcomes.add(TickOutcome(0, 0, 2.0, "served", 100.0, late_ms=late_ms, is_held=is_held))
    assert not outcomes.report([], None, 1).is_generator_late
    outcomes.add(TickOutcome(0, 0, 2.0, "served", 100.0, late_ms=21.0))
    assert outcomes.report([], None, 1).is_generator_late


def level(num_sessions: int, holds_to: int) -> LoadReport:
    num_late = 0 if num_sessions <= holds_to else 5
    ticks: list[tuple[float, Kind, float]] = [(2.0, "served", 4.0 * num_sessions)] * 1000
    ticks += [(2.0, "served", 300.0)] * num_late + [(2.0, "dropped", math.inf)] * num_late
    return report_of(ticks, LoadSpec(num_sessions=num_sessions))


@pytest.mark.parametrize("start", [1, 3, 16, 40])
@pytest.mark.parametrize("holds_to", [0, 1, 2, 13, 31, 40])
def test_the_search_finds_the_most_that_fit(start: int, holds_to: int) -> None:
    tried: list[int] = []

    def run(count: int) -> LoadReport:
        tried.append(count)
        return level(count, holds_to)

    found = find_capacity(run, 40, start=start)
    assert found.num_sessions == holds_to
    assert found.is_open_ended == (holds_to == 40)
    assert len(tried) == len(set(tried)) <= 12
    assert [one.spec.num_sessions for one in found.levels] == sorted(tried)
    assert json.loads(json.dumps(found.to_dict()))["num_sessions"] == holds_to


def test_search_refusals() -> None:
    for start in (0, 5):
        with pytest.raises(errors.InvalidArgument, match=f"start: expected 1 to 4, got {start}"):
            find_capacity(lambda count: level(count, 4), 4, start=start)
    with pytest.raises(errors.InvalidArgument, match="limit: expected more than 0"):
        find_capacity(lambda count: level(count, 4), 4, limit=0)


def test_pictures_are_written_or_refused(tmp_path: Path) -> None:
    found = find_capacity(lambda count: level(count, 5), 9)
    plot_capacity(found, tmp_path / "c.png", "capacity")
    for name, one in (("r", found.levels[-1]), ("empty", report_of([]))):
        plot_report(one, tmp_path / f"{name}.png", "run")
    for path in tmp_path.iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(errors.InvalidArgument, match=r"plot: cannot write .*: No such file"):
        plot_report(found.levels[0], tmp_path / "no" / "x.png", "run")


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(errors.MissingExtra, match=r"pip install 'tml_core\[plot\]'"):
        plot_report(report_of([]), Path("x.png"), "run")
