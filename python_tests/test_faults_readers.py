"""Readers that are slow, absent or gone: their turn may suffer, session and engine do not."""

import asyncio
import gc
import threading

import pytest

from faults_kit import (
    WAIT_S,
    Others,
    alone,
    bits,
    clean_engine,
    noise,
    trapped,
)
from session_kit import paused
from tml_core import TurnDone, errors
from tml_core.engine import turn as turn_module

SEED = 5

pytestmark = pytest.mark.usefixtures("nothing_leaks_of_faults")


def test_turns_that_nobody_reads_run_to_their_end() -> None:
    with clean_engine() as engine:
        others = Others(engine)
        with engine.open(seed=SEED) as session:
            for tick in range(20):
                others.begin_tick()
                session.append(noise(tick))  # the turn is dropped at once
                others.end_tick()
                while session.is_busy:
                    engine._host.loop.call(lambda: None)
            assert bits(session) == alone(SEED, 20)
        others.assert_untouched()


def test_a_reader_that_stops_in_the_middle_holds_nothing_up() -> None:
    with clean_engine() as engine, engine.open(seed=SEED) as session:
        for tick in range(5):
            turn = session.append(noise(tick))
            events = iter(turn)
            next(events)
            del events
            turn.result(WAIT_S)
        assert bits(session) == alone(SEED, 5)


def test_a_reader_thread_that_dies_harms_nobody() -> None:
    errors_seen: list[str] = []

    class Gone(Exception):
        pass

    def read(turn: object) -> None:
        try:
            for _ in turn:  # type: ignore[attr-defined]
                raise Gone("reader")
        except Gone as error:
            errors_seen.append(str(error))

    with clean_engine() as engine, engine.open(seed=SEED) as session:
        for tick in range(5):
            turn = session.append(noise(tick))
            readers = [threading.Thread(target=read, args=(turn,)) for _ in range(3)]
            for reader in readers:
                reader.start()
            turn.result(WAIT_S)
            for reader in readers:
                reader.join(WAIT_S)
        assert len(errors_seen) == 15
        assert bits(session) == alone(SEED, 5)


def test_a_reader_whose_loop_is_gone_harms_nobody() -> None:
    with clean_engine() as engine, engine.open(seed=SEED) as session:
        with paused(session):
            turn = session.append(noise(0))
            loop = asyncio.new_event_loop()
            task = loop.create_task(_wait(turn))
            loop.run_until_complete(asyncio.sleep(0))
            assert not task.done()
            loop.close()
        assert isinstance(turn.result(WAIT_S).events[-1], TurnDone)
        assert bits(session) == alone(SEED, 1)
        # The task of the closed loop can only be let go.
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "_closed", False)
            task.get_coro().close()  # type: ignore[union-attr]
        del task
        gc.collect()


async def _wait(turn: object) -> None:
    await turn  # type: ignore[misc]


def test_a_reader_that_stays_away_loses_its_turn_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With room for one unread event, the turn rests after its first token and is given up."""
    with clean_engine() as engine, trapped() as trap:
        others = Others(engine)
        with engine.open(seed=SEED) as session:
            session.append(noise(0)).result(WAIT_S)
            before = bits(session)
            others.begin_tick(is_read=True)
            monkeypatch.setattr(turn_module, "MAX_UNREAD", 1)
            monkeypatch.setattr(turn_module, "READER_PATIENCE_S", 0.0)
            num_given_up = 0
            for tick in range(30):
                turn = session.append(noise(tick))
                while not turn.is_done:
                    engine._host.loop.call(lambda: None)
                try:
                    turn.result(WAIT_S)
                except errors.Overloaded as error:
                    num_given_up += 1
                    assert error.reason == "reader"
                    assert "1 events were not read; it was given up" in str(error)
                    assert bits(session) == before
                    assert not session.is_busy
                else:
                    before = bits(session)
            others.end_tick()
            assert num_given_up > 5
            monkeypatch.undo()
            with trapped():
                trap.set(lambda: None)
                session.append(noise(1)).result(WAIT_S)
        others.assert_untouched()
        assert engine.stats().turns["failed"] == num_given_up


def test_readers_that_come_late_see_all_of_it() -> None:
    with clean_engine() as engine, engine.open(seed=SEED) as session:
        turn = session.append(noise(0))
        result = turn.result(WAIT_S)
        session.append(noise(1)).result(WAIT_S)
        assert tuple(turn) == result.events
        assert tuple(turn) == result.events


async def test_many_readers_of_one_turn_in_one_loop() -> None:
    with clean_engine() as engine, engine.open(seed=SEED) as session:
        with paused(session):
            turn = session.append(noise(0))
            tasks = [asyncio.create_task(_wait(turn)) for _ in range(50)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.sleep(0)
        done, _ = await asyncio.wait(tasks)
        assert sum(task.cancelled() for task in done) == 25
        assert turn._watchers == []
