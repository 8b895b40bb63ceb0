"""`tml-core load`: clients on a real engine, what they count, and that nothing is left behind.

Nothing here depends on how fast the machine is: where it matters the sampler is held.
"""

import dataclasses
import io
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from session_kit import (
    SILENCE,
    Script,
    nano,
    noise,
    scripted,
)
from tml_core import Engine, Session, cli, errors
from tml_core.cli.load import LoadOptions, run_load_command
from tml_core.load import Capacity, LoadReport, LoadSpec, Progress, run_load

# As an attribute of the package this name is the command.
COMMAND = sys.modules["tml_core.cli.load"]
CHUNKS = [noise(i) for i in range(7)]

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command uses the model that is loaded already."""
    monkeypatch.setattr(COMMAND, "load_model", lambda *_, **__: nano())


@contextmanager
def held_engine() -> Iterator[tuple[Engine, Script]]:
    """An engine, warmed up, whose sampler waits for `Script.step` and then is silent."""
    with Engine(nano()) as engine:
        assert engine.num_sessions == 0  # waits for the warm-up, which samples too
        with scripted([SILENCE] * 99, held=True) as script:
            yield engine, script


def short(num_sessions: int = 2, duration_s: float = 0.6, **fields: float) -> LoadSpec:
    spec = LoadSpec(num_sessions, duration_s, warmup_s=0.0, phase="spread")
    return LoadSpec(**{**spec.__dict__, **fields})


def test_every_tick_of_the_window_is_counted_once() -> None:
    seen: list[Progress] = []
    with Engine(nano(), max_sessions=3) as engine:
        report = run_load(engine, short(3), CHUNKS, watch=seen.append)
        assert engine.num_sessions == 0
    assert report.num_ticks == 9
    assert sorted(report.kinds) == ["served"] or report.num_missed
    assert sorted((one.client, one.tick) for one in report.outcomes) == [
        (client, tick) for client in range(3) for tick in range(3)
    ]
    served = [one for one in report.outcomes if one.kind == "served"]
    assert served
    for one in served:
        assert one.stats is not None and one.stats.total_ms is not None
        # The client sees the end after the engine has made it, and counts from the arrival.
        assert one.late_ms >= 0
        assert one.latency_ms > one.stats.total_ms + one.late_ms
    assert report.num_sessions_opened == 3
    assert seen[-1].total_s == pytest.approx(1.6)
    assert [one.elapsed_s for one in seen] == sorted(one.elapsed_s for one in seen)


def test_a_slow_engine_gets_no_burst_and_hides_nothing() -> None:
    """The sampler stands still for the whole window: one chunk waits, the rest is given up."""
    with held_engine() as (engine, script):

        def release(seen: Progress) -> None:
            if seen.num_missed == 4:  # given up, all but the first
                for _ in range(99):
                    script.step()

        report = run_load(engine, short(1, duration_s=1.0), CHUNKS, watch=release)
    assert report.num_ticks == report.num_missed == 5
    assert report.miss_rate == 1.0
    assert report.kinds == {"dropped": 4, "served": 1}
    first = min(report.outcomes, key=lambda one: one.tick)
    assert (first.tick, first.kind) == (0, "served")
    assert first.latency_ms > 1000
    assert all(math.isinf(one.latency_ms) for one in report.outcomes if one is not first)


def test_sessions_that_coalesce_take_in_what_came_meanwhile() -> None:
    """Nothing is given up: the ticks that waited go in together, late and mostly unanswered."""
    spec = dataclasses.replace(short(1, duration_s=1.0), degrade="coalesce_input")
    with held_engine() as (engine, script):

        def release(_: Progress) -> None:
            if sum(len(seat.turns) for seat in engine._host.loop._seats) >= 6:
                for _ in range(99):
                    script.step()

        report = run_load(engine, spec, CHUNKS, watch=release)
    assert report.kinds == {"served": 5}
    assert report.num_missed == 5
    assert report.num_degraded >= 3
    assert report.work is not None
    assert report.work.num_turns >= 5
    assert report.work.host_us_per_turn > 0
    assert 0 < report.work.kernel_share < 1


def test_who_finds_no_room_is_in_the_denominator() -> None:
    with Engine(nano(), max_sessions=1) as engine:
        report = run_load(engine, short(3), CHUNKS)
    assert report.num_sessions_opened == 1
    assert report.num_ticks == 9
    assert report.kinds["refused"] == 6
    assert report.num_missed >= 6


def test_clients_that_cancel_and_vanish_are_counted_apart() -> None:
    spec = short(2, duration_s=1.2, barge_ins=90.0, disconnects=90.0, stalls=30.0, jitter_ms=30.0)
    with Engine(nano()) as engine:
        report = run_load(engine, spec, CHUNKS)
        assert engine.num_sessions == 0
    by_client = report.kinds.get("barged", 0) + report.kinds.get("left", 0)
    assert report.num_ticks + by_client == len(report.outcomes)
    assert report.num_lost + report.num_away > 0
    assert report.num_sessions_opened > 2


def test_a_barge_in_is_timed_to_the_end_of_the_turn() -> None:
    """Held at its first draw the turn cannot end before it is cancelled."""
    spec = short(1, duration_s=0.2, barge_ins=300.0)
    with held_engine() as (engine, script):

        def release(_: Progress) -> None:
            turns = [turn for seat in engine._host.loop._seats for turn in seat.turns]
            if any(turn.cancelled for turn in turns):
                for _ in range(99):
                    script.step()

        report = run_load(engine, spec, CHUNKS, watch=release)
    assert report.kinds == {"barged": 1}
    assert (report.num_ticks, report.miss_rate) == (0, 1.0)
    assert report.cancel is not None
    assert report.cancel.max > 0


def test_a_failing_turn_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(nano()) as engine:
        before = nano().prepare

        def prepare(sequence: object, *rest: object) -> object:
            if getattr(sequence, "seed", None) == 1:
                raise errors.MediaError("prepare: no picture today")
            return before(sequence, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(nano(), "prepare", prepare, raising=False)
        report = run_load(engine, short(2), CHUNKS)
    assert {(one.client, one.kind) for one in report.outcomes if one.kind == "failed"} == {
        (1, "failed")
    }
    assert report.kinds["failed"] == 3


def test_an_interrupt_closes_all_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_seen: Progress) -> None:
        raise KeyboardInterrupt

    with Engine(nano()) as engine:
        with pytest.raises(KeyboardInterrupt):
            run_load(engine, short(2), CHUNKS, watch=interrupt)
        assert engine.num_sessions == 0

    with Engine(nano()) as engine:
        real = Session.append
        monkeypatch.setattr(Session, "append", lambda *_: real("nothing", CHUNKS[0]))  # type: ignore[arg-type]
        with pytest.raises(BaseExceptionGroup, match="unhandled errors in a TaskGroup"):
            run_load(engine, short(1), CHUNKS)
        assert engine.num_sessions == 0


def test_nothing_to_feed_is_refused() -> None:
    with (
        Engine(nano()) as engine,
        pytest.raises(errors.InvalidArgument, match="chunks: expected at least one, got none"),
    ):
        run_load(engine, short(), [])


@pytest.mark.usefixtures("loaded")
def test_the_command_shows_and_writes(tmp_path: Path) -> None:
    file = io.StringIO()
    options = LoadOptions(short(2), json_path=tmp_path / "l.json", plot_path=tmp_path / "l.png")
    found = run_load_command(options, Console(file=file, width=120))
    assert isinstance(found, LoadReport)
    shown = file.getvalue()
    for words in (
        "nano (untrained, bfloat16",
        "sound and video, spread phases, no faults, deadline 200 ms",
        "chunk in to last token out",
        "6 ticks of 2 sessions, ",
        "slack, ms: ticks",
        "us a turn outside kernels",
    ):
        assert words in shown
    content = json.loads((tmp_path / "l.json").read_text())
    assert content["report"] == found.to_dict()
    assert content["machine"]["num_threads"] >= 1
    assert (tmp_path / "l.png").stat().st_size > 10_000


@pytest.mark.usefixtures("loaded")
def test_the_search_for_the_capacity(tmp_path: Path) -> None:
    file = io.StringIO()
    # No tick can miss this deadline: the search ends at what was asked for.
    spec = short(1, duration_s=0.4, deadline_ms=60_000.0)
    options = LoadOptions(spec, has_video=False, max_sessions=3, json_path=tmp_path / "c.json")
    found = run_load_command(options, Console(file=file, width=120))
    assert isinstance(found, Capacity)
    shown = file.getvalue()
    assert (found.num_sessions, found.is_open_ended) == (3, True)
    assert [one.spec.num_sessions for one in found.levels] == [1, 2, 3]
    assert "   2 sessions: p50 " in shown
    assert "capacity: 3 or more sessions with fewer than 0.1 % of the ticks missed" in shown
    assert len(json.loads((tmp_path / "c.json").read_text())["capacity"]["levels"]) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--phase", "late"], "phase: expected one of ['random', 'spread', 'aligned'], got 'late'"),
        (["--degrade", "panic"], "degrade: expected one of ['none', 'emit_silence', "),
        (["--seconds", "0"], "duration_s: expected 0.2 to 86400, got 0.0"),
        (["--stalls", "-1"], "stalls: expected 0 to 300, got -1.0"),
        (["--json", "no/such/x.json"], "json: cannot write no/such/x.json: no such folder"),
        (["--model", "nowhere"], "load_model: expected 'nano' or a checkpoint directory"),
        (["--sessions", "3", "--capacity", "2"], "start: expected 1 to 2, got 3"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--capacity" in args:
        monkeypatch.setattr(COMMAND, "load_model", lambda *_, **__: nano())
    monkeypatch.setattr(sys, "argv", ["tml-core", "load", *args])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tml-core: error: {message}")
