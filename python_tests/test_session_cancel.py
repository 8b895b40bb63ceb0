"""Cancel: at every point of a turn the session ends where the documentation says."""

import asyncio
import dataclasses
import threading

import pytest

from session_kit import (
    CALL,
    END_OUT,
    WAIT_S,
    nano,
    noise,
    paused,
    scripted,
    standing,
)
from tml_core import Chunk, Notice, Session, ToolCall, TurnDone, errors

TOKENS = [104, 105, CALL, 123, 34, 110, 97, 109]

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def go_on(session: Session) -> tuple[int, ...]:
    return session.append(noise(9)).result(WAIT_S).done.token_ids


def cancelled_at(draw: int | None, keep: str) -> tuple[Session, TurnDone, tuple[object, ...]]:
    """A session whose second turn was cancelled at a draw (None: before the engine began)."""
    session = Session(nano(), seed=5)
    session.append(noise(0)).result(WAIT_S)
    before = standing(session)
    with scripted(TOKENS, held=True) as script:
        if draw is None:
            with paused(session):
                turn = session.append(noise(1))
                assert turn.cancel(keep, wait=False)  # type: ignore[arg-type]
        else:
            turn = session.append(noise(1))
            for _ in range(draw):
                script.reach()
                script.step()
            script.reach()
            assert turn.cancel(keep, wait=False)  # type: ignore[arg-type]
            script.step()
        done = turn.result(WAIT_S).done
    return session, done, before


@pytest.mark.parametrize("draw", [None, 0, 1, 2, 3, 7])
def test_keep_none_is_as_if_the_append_had_not_been(draw: int | None) -> None:
    session, done, before = cancelled_at(draw, "none")
    with session, Session(nano(), seed=5) as untouched:
        untouched.append(noise(0)).result(WAIT_S)
        assert done == TurnDone(tick=1, t_ms=200, epoch=1, reason="cancelled")
        assert standing(session) == before
        assert session.epoch == 1
        assert go_on(session) == go_on(untouched)
        assert standing(session)[:-1] == standing(untouched)[:-1]


@pytest.mark.parametrize("draw", [None, 0, 1, 2, 3, 7])
def test_keep_input_leaves_the_input_and_an_empty_output(draw: int | None) -> None:
    session, done, before = cancelled_at(draw, "input")
    with session:
        assert done == TurnDone(tick=1, t_ms=200, epoch=1, reason="cancelled", token_ids=(END_OUT,))
        ids = session.token_ids().tolist()
        kept = len(before[-2])  # type: ignore[arg-type]
        assert ids[:kept] == before[-2]
        assert ids[kept:] == [274, -1, -1, -1, -1, 275, END_OUT]
        info = session.info()
        assert (info.tick, info.media_ms, info.is_in_call, info.epoch) == (2, 400, False, 1)
        assert session.transcript()[-1].reason == "cancelled"
        assert session.transcript()[-1].text_out == ""
        went_on = go_on(session)
        hashed = session.info().state_hash
    # Wherever it was cancelled, the session is the same one.
    reference, _, _ = cancelled_at(None, "input")
    with reference:
        assert go_on(reference) == went_on
        assert reference.info().state_hash == hashed


def test_events_not_yet_read_are_withdrawn() -> None:
    with Session(nano()) as session, scripted(TOKENS, held=True) as script:
        turn = session.append(noise(0))
        events = iter(turn)
        for _ in range(2):
            script.reach()
            script.step()
        script.reach()
        assert next(events).text == "h"  # type: ignore[attr-defined]
        turn.cancel(wait=False)
        script.step()
        (last,) = list(events)
        assert last == turn.result(WAIT_S).done
        assert last.epoch == session.epoch == 1
        assert turn.result(WAIT_S).text == ""


def test_a_second_cancel_and_one_after_the_end_change_nothing() -> None:
    with Session(nano()) as session:
        with scripted(TOKENS, held=True) as script:
            turn = session.append(noise(0))
            script.reach()
            assert turn.cancel("none", wait=False)
            assert turn.cancel("input", wait=False)
            script.step()
            turn.result(WAIT_S)
            assert session.info().position == 0
        assert not turn.cancel("none")
        assert session.epoch == 1
        with pytest.raises(
            errors.InvalidArgument, match="keep: expected 'input', 'heard' or 'none'"
        ):
            turn.cancel("all")  # type: ignore[arg-type]


def test_cancel_waits_until_the_session_is_free() -> None:
    with Session(nano()) as session:
        for i in range(20):
            turn = session.append(noise(i))
            turn.cancel("input" if i % 2 else "none")
            assert not session.is_busy
        assert session.info().tick >= 10


def test_tool_results_taken_by_an_undone_turn_come_back() -> None:
    body = list(b'{"name":"f"}')
    with Session(nano()) as session:
        with scripted([CALL, *body[:8], *body[8:], 280]):
            session.append(noise(0)).result(WAIT_S)
            (call,) = session.append(noise(1)).result(WAIT_S).tool_calls
        assert isinstance(call, ToolCall)
        session.add_tool_result(call.call_id, "seen")
        with paused(session):
            turn = session.append(Chunk(is_idle=True))
            turn.cancel("none", wait=False)
        turn.result(WAIT_S)
        before = session.info().position
        session.append(Chunk(is_idle=True)).result(WAIT_S)
        injected = bytes(one for one in session.token_ids()[before:].tolist() if one < 256)
        assert b'"content":"seen"' in injected


def test_a_result_for_a_call_that_was_undone_is_dropped_and_reported() -> None:
    body = list(b'{"name":"f"}')
    with Session(nano()) as session:
        with scripted([CALL, *body[:8]]):
            session.append(noise(0)).result(WAIT_S)
        with scripted([*body[8:], 280], held=True) as script:
            turn = session.append(noise(1))
            for _ in range(4):
                script.reach()
                script.step()
            script.reach()
            # The engine stands before the draw that closes the call: it is not known yet.
            with pytest.raises(errors.InvalidArgument, match="call_id: expected the id of a tool"):
                session.add_tool_result("call-0", "early")
            script.step()
            (call,) = turn.result(WAIT_S).tool_calls
        mark = session.mark()
        session.add_tool_result(call.call_id, "late")
        session._seat.state = dataclasses.replace(session._seat.state, open_calls=())
        events = session.append(Chunk(is_idle=True)).result(WAIT_S).events
        (notice,) = [one for one in events if isinstance(one, Notice)]
        assert (notice.kind, notice.data) == ("dropped", {"num_items": 1})
        session.rewind(mark)
        assert session._seat.waiting_items == ()


async def test_a_cancelled_task_can_cancel_its_turn() -> None:
    with Session(nano()) as session, scripted(TOKENS, held=True) as script:

        async def read() -> None:
            turn = session.append(noise(0))
            try:
                await turn
            except asyncio.CancelledError:
                turn.cancel("none", wait=False)
                raise

        task = asyncio.create_task(read())
        await asyncio.to_thread(script.reach)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        script.step()
        while session.is_busy:
            await asyncio.to_thread(session.info)
        assert session.info().position == 0


def test_close_ends_an_open_turn() -> None:
    session = Session(nano())
    closing = threading.Thread(target=session.close)
    with paused(session):
        turn = session.append(noise(0))
        closing.start()
        # Both are posted before the engine goes on: the turn, then the close.
        while session._host.loop._inbox.qsize() < 2:
            closing.join(0.001)
    with pytest.raises(errors.SessionClosed, match="turn: the session was closed"):
        turn.result(WAIT_S)
    closing.join(WAIT_S)
    assert session.is_closed
