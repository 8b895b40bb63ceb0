"""Ten thousand sessions opened and closed, two hours of ticks: nothing is left, nothing grows."""

import gc
import os
import random
import threading
from pathlib import Path

import pytest

from faults_kit import (
    WAIT_S,
    Others,
    alone,
    bits,
    clean_engine,
    engine_threads,
    load_tiny,
    noise,
    tiny,
)
from tml_core import Engine, Retention, Session, errors

NUM_CYCLES = 10_000
NUM_TICKS = 36_000  # two hours at five a second

pytestmark = pytest.mark.usefixtures("nothing_leaks_of_faults")


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_ten_thousand_sessions_open_and_close() -> None:
    with clean_engine() as engine:
        others = Others(engine)
        gc.collect()
        before_mb = resident_mb()
        for number in range(NUM_CYCLES):
            session = engine.open(seed=number)
            if number % 100 == 0:
                others.begin_tick()
                session.append(noise(number))  # and is closed in the middle of it
            session.close()
            if number % 100 == 0:
                others.end_tick()
        assert engine.num_sessions == 2
        assert resident_mb() - before_mb < 64
        others.assert_untouched()


def test_sessions_that_are_dropped_are_closed() -> None:
    with clean_engine(max_sessions=4) as engine:
        for number in range(2000):
            turn = engine.open(seed=number).append(noise(0)) if number % 20 == 0 else None
            if turn is None:
                engine.open(seed=number)
            else:
                turn.result(WAIT_S)
        assert engine.num_sessions <= 1


def test_engines_come_and_go_with_their_last_session() -> None:
    threads = threading.active_count()
    for number in range(100):
        with Session(tiny(), seed=3) as session:
            if number % 10 == 0:
                session.append(noise(0)).result(WAIT_S)
                assert bits(session) == alone_once()
        assert engine_threads() == []
    assert threading.active_count() <= threads + 1


_alone: list[tuple[str, list[int]]] = []


def alone_once() -> tuple[str, list[int]]:
    """The bits of that session; worked out in the first one's engine."""
    if not _alone:
        _alone.append(alone(3, 1))
    return _alone[0]


def test_forks_and_rewinds_by_the_thousand_hold_nothing() -> None:
    with clean_engine() as engine, engine.open(seed=1) as session:
        for tick in range(12):
            session.append(noise(tick)).result(WAIT_S)
        held = engine.stats().global_pages_held, engine.stats().sliding_pages_held
        mark = session.mark()
        for number in range(2000):
            session.fork().close()
            if number % 10 == 0:
                session.append(noise(number)).cancel("none")
            session.rewind(mark)
        assert (engine.stats().global_pages_held, engine.stats().sliding_pages_held) == held
        del mark
        session.append(noise(12)).result(WAIT_S)
        assert bits(session)[1] == alone(1, 13)[1]


def test_opening_more_than_there_is_room_for_is_refused_each_time() -> None:
    with clean_engine(max_sessions=3) as engine:
        kept = [engine.open() for _ in range(3)]
        for _ in range(500):
            with pytest.raises(errors.PoolExhausted, match="all 3 sessions are open"):
                engine.open()
        assert engine.stats().refused == 500
        for session in kept:
            session.close()
        with engine.open():
            pass


def test_sessions_from_many_threads_come_and_go() -> None:
    failures: list[BaseException] = []

    def client(engine: Engine, seed: int) -> None:
        try:
            for number in range(60):
                with engine.open(seed=seed) as session:
                    session.append(noise(0)).result(WAIT_S)
                    if number % 3:
                        session.append(noise(1)).cancel("none", wait=bool(number % 2))
                    else:
                        session.append(noise(1))
        except BaseException as error:
            failures.append(error)

    with clean_engine() as engine:
        others = Others(engine)
        threads = [threading.Thread(target=client, args=(engine, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            others.begin_tick()
            others.end_tick()
        for thread in threads:
            thread.join(WAIT_S)
        assert failures == []
        others.assert_untouched()


def soak(num_ticks: int, *, sample_every: int) -> list[float]:
    """Live for so many ticks: three endless sessions with faults all along, and one that is looked
    at. Returns resident memory after the first tenth and then now and again."""
    model = load_tiny(max_sequences=6, max_positions=1 << 20)
    dice = random.Random(5)
    sizes: list[float] = []
    with Engine(model) as engine:
        retention = Retention(600)
        sessions = [engine.open(seed=seed, retention=retention) for seed in range(3)]
        marks = [session.mark() for session in sessions]
        most_held = 0
        for tick in range(num_ticks):
            turns = [session.append(noise(tick % 97, 3200 - tick % 700)) for session in sessions]
            which = dice.randrange(3)
            match dice.randrange(12):
                case 0:
                    turns[which].cancel("input", wait=False)
                case 1:
                    turns[which].cancel("none", wait=False)
            for turn in turns:
                turn.result(WAIT_S)
            match dice.randrange(40):
                case 0:
                    marks[which] = sessions[which].mark()
                case 1:
                    try:
                        sessions[which].rewind(marks[which])
                    except errors.InvalidArgument as error:
                        assert "were evicted" in str(error)
                case 2:
                    with sessions[which].fork() as twin:
                        twin.append(noise(tick % 97)).result(WAIT_S)
                case 3:
                    sessions[which].close()
                    sessions[which] = engine.open(seed=which, retention=retention)
                    marks[which] = sessions[which].mark()
            stats = engine.stats()
            most_held = max(most_held, stats.global_pages_held)
            if tick % sample_every == 0:
                engine._host.loop.call(model.store.audit)
                if tick >= num_ticks // 10:
                    gc.collect()
                    sizes.append(resident_mb())
        # A window of 600 positions is six pages, marks and the tick at hand two more.
        assert most_held <= 3 * 10 + 10
        marks.clear()
        for session in sessions:
            session.close()
        stats = engine.stats()
        assert (stats.num_sessions, stats.num_turns, stats.global_pages_held) == (0, 0, 0)
        assert stats.sliding_pages_held == 0
    report = model.store.audit()
    assert (report.num_sequences, report.global_pages_held, report.sliding_pages_held) == (0, 0, 0)
    return sizes


def test_a_short_soak() -> None:
    sizes = soak(400, sample_every=40)
    assert max(sizes) - min(sizes) < 64


@pytest.mark.slow
def test_a_two_hour_soak() -> None:
    sizes = soak(NUM_TICKS, sample_every=500)
    # What a session remembers of its ids and its last hour of ticks may grow; no more than that.
    assert max(sizes[len(sizes) // 2 :]) - sizes[0] < 48
    assert abs(sizes[-1] - sizes[len(sizes) // 2]) < 24
