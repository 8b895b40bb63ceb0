"""Numbered appends, expected tips, ticks without an answer, and input that is coalesced."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from session_kit import (
    CALL,
    END_OUT,
    SILENCE,
    WAIT_S,
    nano,
    noise,
    paused,
    scripted,
    standing,
    step_by_step,
)
from tml_core import Chunk, Engine, Notice, Retention, Session, ToolResult, Turn, errors
from tml_core.engine.seat import MAX_NUMBERED, MAX_PENDING

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def run_alone(session: Session, chunks: list[Chunk], answers: list[bool]) -> list[tuple[int, ...]]:
    """Token ids of the chunks put in one by one."""
    return [
        session.append(chunk, answer=answer).result(WAIT_S).done.token_ids
        for chunk, answer in zip(chunks, answers, strict=True)
    ]


# Numbers and tips.


def test_an_append_with_the_same_number_is_the_same_turn() -> None:
    with Session(nano()) as session:
        with scripted([104, END_OUT], held=True) as script:
            first = session.append(noise(0), seq=7)
            script.reach()
            assert session.append(noise(1), seq=7) is first
            script.step()
            script.step()
            first.result(WAIT_S)
        position = session.tip
        assert session.append(noise(1), seq=7) is first
        assert session.tip == position == session.info().position
        second = session.append(noise(1), seq=8)
        second.result(WAIT_S)
        assert session.append(noise(1), seq=7) is first
        assert session.append(noise(1), seq=8) is second
        assert session.info().tick == 2


def test_a_gap_or_a_forgotten_number_is_a_conflict() -> None:
    with Session(nano()) as session:
        session.append(noise(0), seq=0).result(WAIT_S)
        before = standing(session)
        for bad in (2, 5):
            with pytest.raises(errors.Conflict, match=f"seq: expected 1, got {bad}"):
                session.append(noise(1), seq=bad)
        assert standing(session) == before
        session.append(noise(1)).result(WAIT_S)  # without a number: none is used up
        with scripted([SILENCE] * MAX_NUMBERED):
            for number in range(1, MAX_NUMBERED + 1):
                session.append(noise(1), seq=number).result(WAIT_S)
        assert len(session._seat.numbered) == MAX_NUMBERED
        with pytest.raises(errors.Conflict, match=f"seq: expected {MAX_NUMBERED + 1}, got 0"):
            session.append(noise(1), seq=0)


def test_a_refused_append_does_not_use_its_number_up() -> None:
    with Session(nano()) as session:
        with pytest.raises(errors.InvalidArgument, match="call_id: expected the id of a tool call"):
            session.append(bad_chunk(), seq=0)
        session.append(noise(0), seq=0).result(WAIT_S)
        with paused(session):
            session.append(noise(1), seq=1)
            with pytest.raises(errors.SessionBusy, match="append: a turn is still open"):
                session.append(noise(2), seq=2)
            with pytest.raises(errors.Conflict, match="expect_tip: expected 3, but a turn is open"):
                session.append(noise(2), seq=2, expect_tip=3)
    with pytest.raises(errors.SessionClosed, match="append: the session is closed"):
        session.append(noise(0), seq=0)


def test_numbers_go_on_after_a_restore(tmp_path: Path) -> None:
    path = tmp_path / "s.tml"
    with Session(nano(), degrade="shrink_output") as session:
        session.append(noise(0), seq=4).result(WAIT_S)
        session.snapshot(path)
    with Session.restore(path, nano()) as session:
        assert session._seat.degrade == "shrink_output"
        with pytest.raises(errors.Conflict, match="seq: expected 5, got 4"):
            session.append(noise(0), seq=4)
        session.append(noise(1), seq=5).result(WAIT_S)


def test_the_expected_tip_is_held_against_the_session() -> None:
    with Session(nano(), system="Be brief.") as session:
        assert session.tip == session.info().position > 0
        session.append(noise(0), expect_tip=session.tip).result(WAIT_S)
        before = standing(session)
        message = f"expect_tip: expected {session.tip - 1}, the session is at {session.tip}"
        with pytest.raises(errors.Conflict, match=message):
            session.append(noise(1), expect_tip=session.tip - 1)
        assert standing(session) == before
        mark = session.mark()
        turn = session.append(noise(1), expect_tip=session.tip)
        turn.result(WAIT_S)
        assert session.tip == session.info().position > mark.position
        session.rewind(mark)
        assert session.tip == mark.position
        with session.fork() as twin:
            assert twin.tip == mark.position
        cancelled = session.append(noise(2))
        cancelled.cancel("none")
        assert session.tip in (mark.position, session.info().position)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"seq": -1}, errors.InvalidArgument, "seq: expected at least 0, got -1"),
        ({"seq": True}, errors.InvalidType, "seq: expected an int, got bool"),
        ({"expect_tip": "x"}, errors.InvalidType, "expect_tip: expected an int, got str"),
        ({"deadline_ms": 0}, errors.InvalidArgument, "deadline_ms: expected more than 0, got 0"),
        ({"deadline_ms": "1"}, errors.InvalidType, "deadline_ms: expected a number, got str"),
        (
            {"deadline_ms": float("nan")},
            errors.InvalidArgument,
            "deadline_ms: expected more than 0, got nan",
        ),
    ],
)
def test_bad_options_change_nothing(
    options: dict[str, object], kind: type[Exception], message: str
) -> None:
    with Session(nano()) as session:
        with pytest.raises(kind, match=message):
            session.append(noise(0), **options)  # type: ignore[arg-type]
        assert not session.is_busy
        assert session.info().position == 0


# Ticks without an answer.


def test_a_tick_without_an_answer_is_silent() -> None:
    with Session(nano()) as session:
        done = session.append(noise(0), answer=False).result(WAIT_S).done
        assert (done.reason, done.token_ids) == ("input", (SILENCE,))
        assert session.token_ids().tolist() == [274, -1, -1, -1, -1, 275, SILENCE]
        hashed_at = session.append(noise(1)).result(WAIT_S).done.token_ids
        hashed = session.info().state_hash
    with Session(nano()) as session:
        with scripted([SILENCE]):
            session.append(noise(0)).result(WAIT_S)
        assert session.append(noise(1)).result(WAIT_S).done.token_ids == hashed_at
        assert session.info().state_hash == hashed


def test_a_tick_without_an_answer_can_be_cancelled() -> None:
    with Session(nano()) as session:
        for keep, position in (("none", 0), ("input", 7)):
            with paused(session):
                turn = session.append(noise(0), answer=False)
                turn.cancel(keep, wait=False)  # type: ignore[arg-type]
            done = turn.result(WAIT_S).done
            assert done.reason == "cancelled"
            assert session.info().position == position
        assert done.token_ids == (SILENCE,)


# Coalesced input.


def coalesced(session: Session, first: Chunk, rest: list[Chunk]) -> tuple[Turn, list[Turn]]:
    """One turn is open while ``rest`` comes in."""
    with paused(session):
        opened = session.append(first)
        waiting = [session.append(chunk) for chunk in rest]
    return opened, waiting


@pytest.mark.parametrize("retention", [None, Retention(window_positions=256)])
def test_waiting_ticks_go_in_together_and_the_last_is_answered(
    retention: Retention | None,
) -> None:
    chunks = [noise(i) for i in range(5)]
    answers = [True, False, False, False, True]
    with (
        Session(nano(), seed=3, degrade="coalesce_input", retention=retention) as session,
        Session(nano(), seed=3, retention=retention) as alone,
    ):
        for _ in range(4):
            opened, waiting = coalesced(session, chunks[0], chunks[1:])
            assert opened.result(WAIT_S).done.reason != "degraded"
            results = [turn.result(WAIT_S) for turn in waiting]
            for result in results[:-1]:
                (notice,) = [one for one in result.events if isinstance(one, Notice)]
                assert (notice.kind, notice.data["policy"]) == ("degraded", "coalesce_input")
                assert (result.done.reason, result.done.token_ids) == ("degraded", (SILENCE,))
            assert results[-1].done.reason not in ("degraded", "input")
            ids = run_alone(alone, chunks, answers)
            assert [opened.result().done.token_ids, *(one.done.token_ids for one in results)] == ids
            assert session.info().state_hash == alone.info().state_hash
            assert session.token_ids().tolist() == alone.token_ids().tolist()
            assert session.tip == alone.tip
            assert [one.tick for one in session.transcript()] == list(range(session.info().tick))


def test_waiting_ticks_are_bounded() -> None:
    with Session(nano(), degrade="coalesce_input") as session:
        with paused(session):
            turns = [session.append(noise(i), seq=i) for i in range(MAX_PENDING + 1)]
            with pytest.raises(
                errors.Overloaded, match=f"append: {MAX_PENDING} appends wait already"
            ) as caught:
                session.append(noise(99), seq=MAX_PENDING + 1)
            assert caught.value.reason == "pending"
            assert caught.value.retry_after_ms > 0
            assert session.append(noise(0), seq=3) is turns[3]
            with pytest.raises(errors.SessionBusy, match="mark: a turn is still open"):
                session.mark()
        for turn in turns:
            turn.result(WAIT_S)
        session.append(noise(99), seq=MAX_PENDING + 1).result(WAIT_S)
        assert session.info().tick == MAX_PENDING + 2


@pytest.mark.parametrize("retention", [None, Retention(window_positions=256)])
@pytest.mark.parametrize("undone", [0, 1, 2])
@pytest.mark.parametrize("keep", ["none", "input"])
def test_a_waiting_tick_can_be_cancelled(
    undone: int, keep: str, retention: Retention | None
) -> None:
    chunks = [noise(i) for i in range(4)]
    with (
        Session(nano(), degrade="coalesce_input", retention=retention) as session,
        Session(nano(), retention=retention) as alone,
    ):
        with paused(session):
            turns = [session.append(chunk) for chunk in chunks]
            assert turns[1 + undone].cancel(keep, wait=False)  # type: ignore[arg-type]
        for turn in turns:
            turn.result(WAIT_S)
        done = turns[1 + undone].result().done
        assert done.reason == "cancelled"
        kept = [chunks[0], *(one for i, one in enumerate(chunks[1:]) if i != undone)]
        if keep == "none":
            run_alone(alone, kept, [True, False, True])
        elif undone < 2:
            run_alone(alone, chunks, [True, False, False, True])
        else:
            run_alone(alone, chunks[:3], [True, False, False])
            with paused(alone):
                last = alone.append(chunks[3])
                last.cancel(wait=False)
            last.result(WAIT_S)
        assert session.info().state_hash == alone.info().state_hash
        assert session.token_ids().tolist() == alone.token_ids().tolist()
        assert not session.is_busy


def test_cancelling_one_of_the_ticks_that_went_in_undoes_only_that_one() -> None:
    chunks = [noise(i) for i in range(4)]
    script_ids = [SILENCE, 104, 105, 106, 107, END_OUT]
    with Session(nano(), degrade="coalesce_input") as session:
        with scripted(script_ids, held=True) as script:
            turns = [session.append(chunks[0])]
            script.reach()
            turns += [session.append(chunk) for chunk in chunks[1:]]
            script.step()
            # The last of the three is being answered.
            for _ in range(2):
                script.reach()
                script.step()
            script.reach()
            events = iter(turns[3])
            assert next(events).text == "h"  # type: ignore[attr-defined]
            assert turns[2].cancel("none", wait=False)
            for _ in range(4):
                script.step()
            results = [turn.result(WAIT_S) for turn in turns]
        # What was read of the last one was undone, and came again.
        assert results[2].done.reason == "cancelled"
        assert results[3].done.tick == 2
        assert results[3].text == "k"
        ids = session.token_ids().tolist()
        assert ids.count(274) == 3
        assert session.info().tick == 3
        assert session.epoch == 1


def test_a_waiting_tick_that_cannot_be_taken_ends_alone() -> None:
    with Session(nano(), degrade="coalesce_input") as session:
        with paused(session):
            turns = [session.append(chunk) for chunk in (noise(0), noise(1), bad_chunk())]
            turns.append(session.append(noise(2)))
        with pytest.raises(errors.InvalidArgument, match="call_id: expected the id of a tool call"):
            turns[2].result(WAIT_S)
        assert [turns[i].result(WAIT_S).done.tick for i in (0, 1, 3)] == [0, 1, 2]
        assert not session.is_busy


def test_a_failed_step_undoes_all_that_went_in_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with Session(nano(), degrade="coalesce_input") as session:
        session.append(noise(0)).result(WAIT_S)
        before = standing(session)
        with paused(session):
            turns = [session.append(noise(i)) for i in range(3)]
            step = nano().backbone.step
            calls: list[int] = []

            def failing(*arguments: Any, **out: Any) -> object:
                calls.append(1)
                if len(calls) > 1:
                    raise RuntimeError("broken")
                return step(*arguments, **out)

            step_by_step(monkeypatch)
            monkeypatch.setattr(nano().backbone, "step", failing)
            turns[0].cancel("none", wait=False)
        # The first step is of the two that waited; the second of their first token.
        for turn in turns[1:]:
            with pytest.raises(RuntimeError, match="broken"):
                turn.result(WAIT_S)
        monkeypatch.undo()
        assert standing(session) == before
        session.append(noise(1)).result(WAIT_S)


def test_close_ends_the_waiting_turns() -> None:
    session = Session(nano(), degrade="coalesce_input")
    closing = threading.Thread(target=session.close)
    with paused(session):
        turns = [session.append(noise(i)) for i in range(3)]
        closing.start()
        while session._host.loop._inbox.qsize() < 2:
            closing.join(0.001)
    for turn in turns:
        with pytest.raises(errors.SessionClosed, match="turn: the session was closed"):
            turn.result(WAIT_S)
    closing.join(WAIT_S)


def test_tool_results_go_in_with_the_first_waiting_tick() -> None:
    body = list(b'{"name":"f"}')
    with Session(nano(), degrade="coalesce_input") as session:
        with scripted([CALL, *body[:8], *body[8:], 280]):
            session.append(noise(0)).result(WAIT_S)
            (call,) = session.append(noise(1)).result(WAIT_S).tool_calls
        with paused(session):
            turns = [session.append(noise(2))]
            session.add_tool_result(call.call_id, "seen")
            turns += [session.append(noise(i)) for i in (3, 4)]
        for turn in turns:
            turn.result(WAIT_S)
        records = session.transcript()[-3:]
        assert [one.num_items for one in records] == [0, 1, 0]
        ids = [one for one in session.token_ids().tolist() if 0 <= one < 256]
        assert b'"content":"seen"' in bytes(ids)


def test_unknown_policies_are_refused() -> None:
    message = "degrade: expected one of none, emit_silence, shrink_output, coalesce_input, got 'x'"
    with Engine(nano()) as engine:
        with pytest.raises(errors.InvalidArgument, match=message):
            engine.open(degrade="x")  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidArgument, match="degrade: expected one of none"):
            Session(nano(), degrade=None)  # type: ignore[arg-type]


def bad_chunk() -> Chunk:
    """A chunk that any session refuses, but only when it is its turn."""
    return Chunk(audio=np.zeros(800, np.float32), items=[ToolResult("call-99", "x")])
