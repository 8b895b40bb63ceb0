"""What the user did not hear is taken back, to the token; all that came in stays."""

from pathlib import Path

import pytest

from session_kit import (
    CALL,
    END_CALL,
    END_OUT,
    SILENCE,
    WAIT_S,
    clip,
    nano,
    noise,
    paused,
    scripted,
    standing,
)
from tml_core import Chunk, Notice, Retention, Session, errors
from tml_core.engine.seat import MAX_UNHEARD

HI, HO = [104, 105, END_OUT], [104, 111, END_OUT]
QUIET = [SILENCE]

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def live(session: Session, outputs: list[list[int]], start: int = 0) -> None:
    """One tick for each output, with sound, video and now and then text."""
    ticks = clip(start + len(outputs))[start:] if outputs else ()
    for number, (tick, output) in enumerate(zip(ticks, outputs, strict=True)):
        chunk = Chunk(
            audio=tick.audio, frames=tick.frames, text="ok" if (start + number) % 3 == 1 else None
        )
        with scripted(list(output)):
            session.append(chunk).result(WAIT_S)


def same_from_here(one: Session, other: Session) -> None:
    """Both stand at the same place, and go on with the same bits."""
    assert one.token_ids().tolist() == other.token_ids().tolist()
    assert one.tip == other.tip
    first, second = (each.info() for each in (one, other))
    assert (first.tick, first.media_ms, first.is_in_call) == (
        second.tick,
        second.media_ms,
        second.is_in_call,
    )
    ids = [each.append(noise(77)).result(WAIT_S).done.token_ids for each in (one, other)]
    assert ids[0] == ids[1]
    assert one.info().state_hash == other.info().state_hash


# [what was said] -> heard up to -> what stands afterwards; [] is cut, spelled <|/out|> alone
CASES = [
    ([HI, HO, HI], 600, None),
    ([HI, HO, HI], 401, None),
    ([HI, HO, HI], 400, [HI, HO, [END_OUT]]),
    ([HI, HO, HI], 250, [HI, HO, [END_OUT]]),
    ([HI, HO, HI], 200, [HI, [END_OUT], QUIET]),
    ([HI, HO, HI], 0, [[END_OUT], QUIET, QUIET]),
    ([QUIET, HI, QUIET, HO, QUIET], 300, [QUIET, HI, QUIET, [END_OUT], QUIET]),
    ([QUIET, HI, QUIET, HO, QUIET], 100, [QUIET, [END_OUT], QUIET, QUIET, QUIET]),
    ([QUIET, QUIET], 0, None),
]


@pytest.mark.parametrize(("said", "heard_ms", "stands"), CASES)
def test_truncate_leaves_a_session_that_really_went_so(
    said: list[list[int]], heard_ms: float, stands: list[list[int]] | None
) -> None:
    with Session(nano(), seed=8) as session, Session(nano(), seed=8) as really:
        live(session, said)
        before = standing(session)
        tick = session.truncate(heard_ms)
        if stands is None:
            assert tick is None
            assert standing(session) == before
            assert session.epoch == 0
            return
        assert tick == stands.index([END_OUT])
        assert session.epoch == 1
        records = session.transcript()
        assert [one.text_out for one in records[tick:]] == [""] * (len(said) - tick)
        assert {one.reason for one in records[tick:]} == {"cancelled"}
        assert records[:tick] == before[-1][:tick]
        assert [one.tick for one in records] == list(range(len(said)))
        assert session.truncate(heard_ms) is None  # nothing unheard is left
        live(really, stands[:tick])
        for number, output in enumerate(stands[tick:], tick):
            cut_or_silent(really, number, is_cut=output == [END_OUT])
        same_from_here(session, really)


def cut_or_silent(session: Session, number: int, *, is_cut: bool) -> None:
    tick = clip(number + 1)[number]
    text = "ok" if number % 3 == 1 else None
    chunk = Chunk(audio=tick.audio, frames=tick.frames, text=text)
    if not is_cut:
        session.append(chunk, answer=False).result(WAIT_S)
        return
    with paused(session):
        turn = session.append(chunk)
        turn.cancel(wait=False)
    turn.result(WAIT_S)


@pytest.mark.parametrize("draw", [None, 0, 1, 2])
@pytest.mark.parametrize("heard_ms", [0, 200, 201, 400, 401])
def test_cancel_keeps_what_was_heard(draw: int | None, heard_ms: float) -> None:
    said, last = [QUIET, HI], clip(3)[2]
    chunk = Chunk(audio=last.audio, frames=last.frames)
    with Session(nano(), seed=8) as session, Session(nano(), seed=8) as really:
        live(session, said)
        with scripted([104, 105, 106, 107], held=True) as script:
            if draw is None:
                with paused(session):
                    turn = session.append(chunk)
                    turn.cancel("heard", heard_ms=heard_ms, wait=False)
            else:
                turn = session.append(chunk)
                for _ in range(draw):
                    script.reach()
                    script.step()
                script.reach()
                turn.cancel("heard", heard_ms=heard_ms, wait=False)
                script.step()
            done = turn.result(WAIT_S).done
        assert (done.reason, done.tick, done.epoch) == ("cancelled", 2, 1)
        if heard_ms <= 200:  # the tick before was not heard either
            live(really, [QUIET])
            cut_or_silent(really, 1, is_cut=True)
            really.append(chunk, answer=False).result(WAIT_S)
            assert done.token_ids == (SILENCE,)
        elif heard_ms <= 400 or not draw:
            live(really, said)
            with paused(really):
                other = really.append(chunk)
                other.cancel(wait=False)
            assert other.result(WAIT_S).done.token_ids == done.token_ids == (END_OUT,)
        else:
            live(really, said)
            with scripted([*[104, 105, 106][:draw], END_OUT]):
                other = really.append(chunk)
                assert other.result(WAIT_S).done.token_ids == done.token_ids
            assert len(done.token_ids) == draw + 1
        assert [one.text_out for one in session.transcript()] == [
            one.text_out for one in really.transcript()
        ]
        same_from_here(session, really)


@pytest.mark.parametrize("draw", [0, 2])
def test_waiting_ticks_behind_a_cancel_go_in_after_it(draw: int) -> None:
    with (
        Session(nano(), seed=8, degrade="coalesce_input") as session,
        Session(nano(), seed=8) as really,
    ):
        live(session, [HI, HO])
        tokens = [104, 105, 106][: draw + 1]
        with scripted([*tokens, 108, 109, END_OUT], held=True) as script:
            turn = session.append(noise(0))
            for _ in range(draw):
                script.reach()
                script.step()
            script.reach()
            later = [session.append(noise(i)) for i in (1, 2)]
            turn.cancel("heard", heard_ms=100, wait=False)
            for _ in range(4):
                script.step()
            assert turn.result(WAIT_S).done.token_ids == (SILENCE,)
            results = [one.result(WAIT_S) for one in later]
        assert results[0].done.reason == "degraded"
        live(really, [HI])
        cut_or_silent(really, 1, is_cut=True)
        for i in (0, 1):
            really.append(noise(i), answer=False).result(WAIT_S)
        with scripted([108, 109, END_OUT]):
            really.append(noise(2)).result(WAIT_S)
        same_from_here(session, really)


def test_a_call_made_in_unheard_ticks_is_undone_and_its_result_dropped() -> None:
    body = list(b'{"name":"f"}')
    with Session(nano()) as session:
        live(session, [HI, [CALL, *body[:8]], [*body[8:], END_CALL]])
        (call,) = session.transcript()[-1].calls
        session.add_tool_result(call[1], "seen")
        live(session, [QUIET], start=3)
        assert session.truncate(0) == 0
        assert session.info().open_calls == ()
        with pytest.raises(errors.InvalidArgument, match="call_id: expected the id of a tool call"):
            session.add_tool_result(call[1], "seen")
        ids = [one for one in session.token_ids().tolist() if 0 <= one < 256]
        assert b"seen" not in bytes(ids)
        live(session, [QUIET], start=4)


def test_calls_alone_are_not_something_to_hear() -> None:
    body = list(b'{"name":"f"}')
    with Session(nano()) as session:
        live(session, [[CALL, *body[:8]], [*body[8:], END_CALL]])
        assert session.truncate(0) is None
        assert len(session.info().open_calls) == 1


def test_only_the_last_ticks_are_remembered() -> None:
    with Session(nano()) as session:
        with scripted([*HI, *QUIET * (MAX_UNHEARD - 1)]):
            for i in range(MAX_UNHEARD):
                session.append(noise(i)).result(WAIT_S)
        assert len(session._seat.recent) == MAX_UNHEARD
        with scripted(QUIET):
            session.append(noise(0)).result(WAIT_S)
        # Silence alone holds nothing.
        assert len(session._seat.recent) == 0
        assert session.truncate(0) is None
        assert session._seat.sequence.slot.sliding.pins == []


def test_moving_away_forgets_what_was_said_there(tmp_path: Path) -> None:
    with Session(nano()) as session:
        live(session, [HI])
        mark = session.mark()
        live(session, [HO], start=1)
        session.snapshot(tmp_path / "s.tml")
        with session.fork() as twin:
            assert twin.truncate(0) is None
        session.rewind(mark)
        assert [one.tick for one in session._seat.recent] == [0]
        assert session.truncate(200) is None
        live(session, [HO], start=1)
        assert session.truncate(200) == 1
        assert session.truncate(0) == 0
        assert session.info().tick == 2
    with Session.restore(tmp_path / "s.tml", nano()) as session:
        assert session.truncate(0) is None


def test_what_retention_has_dropped_stays_as_it_is() -> None:
    with Session(nano(), retention=Retention(window_positions=128)) as session:
        for i in range(14):
            live(session, [HI], start=i)
        assert session.info().evicted is not None
        before = standing(session)
        assert session.truncate(0) is None
        assert standing(session) == before
        with paused(session):
            turn = session.append(noise(0))
            turn.cancel("heard", heard_ms=0, wait=False)
        result = turn.result(WAIT_S)
        (notice,) = [one for one in result.events if isinstance(one, Notice)]
        assert notice.kind == "unheard"
        assert result.done.token_ids == (END_OUT,)


def test_inside_the_window_it_is_exact_under_retention_too() -> None:
    options = {"retention": Retention(window_positions=256), "seed": 8}
    with Session(nano(), **options) as session, Session(nano(), **options) as really:  # type: ignore[arg-type]
        live(session, [QUIET, HI, HO, QUIET])
        assert session.truncate(300) == 2
        live(really, [QUIET, HI])
        cut_or_silent(really, 2, is_cut=True)
        cut_or_silent(really, 3, is_cut=False)
        same_from_here(session, really)


def test_a_replay_that_fails_leaves_the_session_after_the_last_heard_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Session(nano(), seed=8) as session, Session(nano(), seed=8) as really:
        live(session, [HI, HO, HI])

        def failing(*_: object) -> None:
            raise errors.PoolExhausted("reserve: no room")

        with monkeypatch.context() as patch:
            patch.setattr(nano(), "prepare", failing)
            with pytest.raises(errors.PoolExhausted, match="reserve: no room"):
                session.truncate(200)
        live(really, [HI])
        cut_or_silent(really, 1, is_cut=True)
        assert not session.is_busy
        same_from_here(session, really)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"keep": "heard"}, errors.InvalidArgument, "heard_ms: expected a time with keep='heard'"),
        (
            {"keep": "input", "heard_ms": 3},
            errors.InvalidArgument,
            "heard_ms: expected None with keep='input', got 3",
        ),
        (
            {"keep": "heard", "heard_ms": -1},
            errors.InvalidArgument,
            "heard_ms: expected at least 0, got -1",
        ),
        ({"keep": "heard", "heard_ms": "1"}, errors.InvalidType, "heard_ms: expected a number"),
        ({"keep": "all"}, errors.InvalidArgument, "keep: expected 'input', 'heard' or 'none'"),
    ],
)
def test_bad_times_are_refused(
    options: dict[str, object], kind: type[Exception], message: str
) -> None:
    with Session(nano()) as session:
        turn = session.append(noise(0))
        with pytest.raises(kind, match=message):
            turn.cancel(**options)  # type: ignore[arg-type]
        turn.result(WAIT_S)
        assert session.epoch == 0
        with pytest.raises(errors.InvalidArgument, match="heard_ms: expected at least 0, got nan"):
            session.truncate(float("nan"))
        with paused(session):
            turn = session.append(noise(1))
            with pytest.raises(errors.SessionBusy, match="truncate: a turn is still open"):
                session.truncate(0)
        turn.result(WAIT_S)
