"""Cancels at every point of a turn, turns without a token, and chunks that come too late.

Whatever the moment, the session is afterwards the one the documentation names, bit for bit, and the
sessions beside it are the ones they would have been alone.
"""

from typing import Any

import numpy as np
import pytest

from faults_kit import (
    WAIT_S,
    Others,
    Trap,
    bits,
    clean_engine,
    noise,
    shape,
    tiny,
    trapped,
)
from session_kit import paused
from tml_core import Chunk, Session, Turn, errors

KEEPS = ("input", "none")
# Where the cancel finds the turn: not begun, or in the middle of a draw.
MOMENTS = ("queued", "draw 0", "draw 1", "draw 2")

pytestmark = pytest.mark.usefixtures("nothing_leaks_of_faults")


def cancelled(session: Session, trap: Trap, chunk: Chunk, keep: Any, moment: str) -> Turn | None:
    """Append and cancel at that moment; None if the turn was over before it came."""
    with paused(session):
        turn = session.append(chunk)
        if moment == "queued":
            assert turn.cancel(keep, wait=False)
        else:
            trap.set(lambda: turn.cancel(keep, wait=False), int(moment[-1]))
    is_cancelled = turn.result(WAIT_S).done.reason == "cancelled"
    trap.set(lambda: None)
    return turn if is_cancelled else None


def as_documented(seed: int, num_before: int, keep: str, last: int) -> tuple[str, list[int]]:
    """A session that really went so: ``num_before`` turns, the cancelled one, and one more."""
    with Session(tiny(), seed=seed) as session:
        for tick in range(num_before):
            session.append(noise(tick)).result(WAIT_S)
        if keep == "input":
            with paused(session):
                turn = session.append(noise(num_before))
                assert turn.cancel("input", wait=False)
            turn.result(WAIT_S)
        session.append(noise(last)).result(WAIT_S)
        return bits(session)


@pytest.mark.parametrize("num_before", [0, 1, 7], ids=["first turn", "second turn", "eighth turn"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("keep", KEEPS)
def test_the_abort_matrix(keep: str, moment: str, num_before: int) -> None:
    num_cancelled = 0
    with clean_engine() as engine, trapped() as trap:
        others = Others(engine)
        for seed in range(4):
            with engine.open(seed=seed) as session:
                for tick in range(num_before):
                    others.begin_tick()
                    session.append(noise(tick)).result(WAIT_S)
                    others.end_tick()
                before = shape(session)
                others.begin_tick()
                turn = cancelled(session, trap, noise(num_before), keep, moment)
                others.end_tick()
                if turn is None:
                    continue
                num_cancelled += 1
                assert session.epoch == 1
                assert turn.stats.total_ms is not None
                assert turn.result().text == ""
                if keep == "none":
                    assert shape(session) == before
                # The next turn, at once.
                session.append(noise(50)).result(WAIT_S)
                went_on = bits(session)
            assert went_on == _once(seed, num_before, keep)
        others.assert_untouched()
    assert num_cancelled >= (4 if moment in MOMENTS[:2] else 1)


_known: dict[tuple[int, int, str], tuple[str, list[int]]] = {}


def _once(seed: int, num_before: int, keep: str) -> tuple[str, list[int]]:
    """`as_documented`, worked out in the same engine once for all moments."""
    key = (seed, num_before, keep)
    if key not in _known:
        _known[key] = as_documented(seed, num_before, keep, 50)
    return _known[key]


def test_a_cancel_after_the_end_is_refused_and_changes_nothing() -> None:
    with clean_engine() as engine, engine.open() as session:
        turn = session.append(noise(0))
        turn.result(WAIT_S)
        before = shape(session)
        for keep in KEEPS:
            assert not turn.cancel(keep)  # type: ignore[arg-type]
        assert (shape(session), session.epoch) == (before, 0)
        session.append(noise(1)).result(WAIT_S)
        assert not turn.cancel("none")
        assert session.info().tick == 2


def test_a_cancel_of_a_closed_session_is_refused() -> None:
    with clean_engine() as engine:
        session = engine.open()
        with paused(session):
            turn = session.append(noise(0))
            engine._host.loop.abandon_seat(session._seat)
        with pytest.raises(errors.SessionClosed, match="turn: the session was closed"):
            turn.result(WAIT_S)
        assert not turn.cancel()
        session.close()


def test_two_cancels_at_once_are_one() -> None:
    with clean_engine() as engine, trapped() as trap, engine.open() as session:
        for first, second in (("input", "none"), ("none", "input")):
            start = session.info().tick
            with paused(session):
                turn = session.append(noise(0))
                trap.set(lambda: (turn.cancel(first, wait=False), turn.cancel(second, wait=False)))  # type: ignore[arg-type]  # noqa: B023
            assert turn.result(WAIT_S).done.reason == "cancelled"
            assert session.info().tick == start + (first == "input")
        assert session.epoch == 2


def test_a_chunk_that_comes_while_a_cancel_is_under_way_revives_nothing() -> None:
    with clean_engine() as engine, engine.open(seed=3) as session:
        with paused(session):
            turn = session.append(noise(0))
            assert turn.cancel("none", wait=False)
            with pytest.raises(errors.SessionBusy, match="append: a turn is still open"):
                session.append(noise(1))
        assert turn.result(WAIT_S).done.reason == "cancelled"
        assert session.info().position == 0
        session.append(noise(1)).result(WAIT_S)
        assert bits(session) == as_documented(3, 0, "none", 1)


def test_a_chunk_for_a_closed_session_revives_nothing() -> None:
    with clean_engine() as engine:
        session = engine.open()
        with paused(session):
            turn = session.append(noise(0))
            turn.cancel("input", wait=False)
            engine._host.loop.abandon_seat(session._seat)
        with pytest.raises(errors.SessionClosed, match="turn: the session was closed"):
            turn.result(WAIT_S)
        for _ in range(3):
            with pytest.raises(errors.SessionClosed, match="append: the session is closed"):
                session.append(noise(1))
        assert engine.num_sessions == 0
        assert engine.stats().num_turns == 0


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_cancels_among_ticks_that_wait(keep: str, which: int) -> None:
    """A session that coalesces has four ticks open; one of them is cancelled before they begin."""
    with clean_engine() as engine:
        others = Others(engine)
        with engine.open(seed=4, degrade="coalesce_input") as session:
            others.begin_tick()
            with paused(session):
                turns = [session.append(noise(i)) for i in range(4)]
                assert turns[which].cancel(keep, wait=False)  # type: ignore[arg-type]
            others.end_tick()
            reasons = [turn.result(WAIT_S).done.reason for turn in turns]
            assert reasons[which] == "cancelled"
            assert "cancelled" not in [one for i, one in enumerate(reasons) if i != which]
            assert session.info().tick == 4 - (keep == "none")
            assert not session.is_busy
            session.append(noise(9)).result(WAIT_S)
        others.assert_untouched()


def test_turns_without_a_token() -> None:
    """Ticks that bring nothing, ask nothing, or less than a frame of sound."""
    empty = [
        (Chunk(is_idle=True), True),
        (Chunk(is_idle=True), False),
        (Chunk(audio=np.zeros(1, np.float32)), True),
        (Chunk(audio=np.zeros(799, np.float32)), False),
        (Chunk(text="x"), False),
    ]
    with clean_engine() as engine:
        others = Others(engine)
        with engine.open(seed=6) as session:
            for i in range(60):
                others.begin_tick()
                chunk, answer = empty[i % len(empty)]
                result = session.append(chunk, answer=answer).result(WAIT_S)
                assert result.done.reason != "cancelled"
                assert answer or result.stats.num_output_tokens == 0
                others.end_tick()
            assert session.info().tick == 60
            assert session.info().media_ms == 12_000
        others.assert_untouched()


def test_a_hundred_turns_that_are_all_undone_leave_the_first() -> None:
    with clean_engine() as engine, trapped() as trap, engine.open(seed=7) as session:
        session.append(noise(0)).result(WAIT_S)
        before = shape(session)
        num_undone = 0
        for i in range(100):
            moment = MOMENTS[i % 2]
            num_undone += cancelled(session, trap, noise(i), "none", moment) is not None
        assert num_undone == 100
        assert shape(session) == before
        assert session.epoch == 100
