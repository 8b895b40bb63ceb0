"""Mark, rewind, fork, snapshot, restore: the whole session moves, also in the middle of a call."""

import json
from pathlib import Path
from typing import Any

import pytest

from session_kit import (
    CALL,
    END_CALL,
    SILENCE,
    WAIT_S,
    clip,
    nano,
    noise,
    scripted,
    spoken,
    standing,
)
from tml_core import Chunk, Engine, SamplingParams, Session, errors
from tml_core.sequence.snapshot import read_note

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def in_the_middle(session: Session) -> None:
    """Two ticks; then a call is open, a character is unfinished, text waits, a hop is unfinished
    and a tool result is kept for the next append."""
    body = list(b'{"name":"f"}')
    with scripted([CALL, *body[:8], *body[8:], END_CALL, 0xE2, 0x82, CALL, *body[:6]]):
        session.append(noise(0, 3000)).result(WAIT_S)
        (call,) = session.append(Chunk(is_idle=True)).result(WAIT_S).tool_calls
        session.append(Chunk(text="t" * 100)).result(WAIT_S)
    session.add_tool_result(call.call_id, {"answer": 42})
    info = session.info()
    assert info.is_in_call
    assert info.num_waiting == 36
    assert session._seat.state.utf8 == b"\xe2\x82"


def go_on(session: Session) -> tuple[Any, ...]:
    """What the next ticks give; the call is finished and the character too."""
    body = list(b'{"name":"f"}')
    with scripted([*body[6:], END_CALL, 0xAC, SILENCE - 1]):
        first = session.append(noise(3)).result(WAIT_S)
        second = session.append(noise(4)).result(WAIT_S)
    third = session.append(clip(1)[0]).result(WAIT_S)
    (call,) = first.tool_calls
    assert (call.name, call.call_id) == ("f", "call-1")
    assert second.text == "€"
    return (
        [one.done.token_ids for one in (first, second, third)],
        spoken(third.events)[1].tolist(),
        standing(session)[:6],
        session.info().state_hash,
        session.token_ids().tolist(),
    )


def test_rewind_restores_everything() -> None:
    with Session(nano(), seed=11) as session:
        in_the_middle(session)
        before = standing(session)
        mark = session.mark()
        assert (mark.position, mark.tick) == (session.info().position, 3)
        expected = go_on(session)
        for i in range(1, 3):
            session.rewind(mark)
            assert standing(session) == before
            assert session.epoch == i
            assert go_on(session) == expected


def test_a_fork_goes_on_alone_and_equal() -> None:
    with Session(nano(), seed=11) as session:
        in_the_middle(session)
        mark = session.mark()
        before = standing(session)
        with session.fork() as twin:
            assert standing(twin) == before
            expected = go_on(twin)
            assert standing(session) == before
        assert go_on(session) == expected
        with session.fork(mark) as late:
            assert standing(late) == before
            assert go_on(late) == expected


def test_forks_with_other_seeds_are_other_futures() -> None:
    with Session(nano(), seed=1) as session:
        session.append(noise(0)).result(WAIT_S)
        futures = set()
        for seed in (None, 1, 2, 3):
            with session.fork(seed=seed) as twin:
                futures.add(twin.append(noise(1)).result(WAIT_S).done.token_ids)
    assert len(futures) == 3


def test_a_fork_outlives_its_parent() -> None:
    parent = Session(nano(), seed=1)
    parent.append(noise(0)).result(WAIT_S)
    child = parent.fork()
    parent.close()
    assert child.append(noise(1)).result(WAIT_S).events
    child.close()


def test_snapshot_and_restore_in_the_middle_of_a_call(tmp_path: Path) -> None:
    path = tmp_path / "s.tml"
    params = SamplingParams(temperature=0.8, top_k=50, top_p=0.9)
    with Session(nano(), seed=11, sampling=params, system="be kind") as session:
        in_the_middle(session)
        session.snapshot(path)
        session.snapshot(tmp_path / "again.tml")
        before = standing(session)
        expected = go_on(session)
    assert path.read_bytes() == (tmp_path / "again.tml").read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["again.tml", "s.tml"]
    with Session.restore(path, nano()) as restored:
        assert standing(restored) == before
        assert go_on(restored) == expected
    with Engine(nano(), max_sessions=2) as engine, engine.restore(path) as restored:
        assert go_on(restored) == expected


def rewritten(source: Path, target: Path, change: Any) -> Path:
    """A copy of a session file with another note."""
    header = json.loads(read_note(source))
    change(header)
    with nano().restore_sequence(source) as sequence:
        sequence.snapshot(target, note=json.dumps(header).encode())
    return target


def test_restore_refuses_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "s.tml"
    with Session(nano()) as session:
        session.append(noise(0)).result(WAIT_S)
        session.snapshot(path)
    for change, message in [
        (lambda h: h.update(format="x"), "format: expected 'tml_core.session', got 'x'"),
        (lambda h: h.update(version=1), "version: expected 2, got 1"),
        (lambda h: h.update(contract=0), "contract: expected 1, got 0"),
        (lambda h: h.update(layout="inkling chat"), "layout: expected 'micro-turn v1'"),
        (lambda h: h.update(state={}), "layout: expected the fields"),
        (lambda h: h["state"].update(utf8="xyz"), "layout: damaged state"),
        (lambda h: h.pop("sampling"), "is damaged: 'sampling'"),
        (lambda h: h["sampling"].update(top_p=7), "is damaged: top_p: expected"),
    ]:
        with pytest.raises(errors.SnapshotError, match=message):
            Session.restore(rewritten(path, tmp_path / "bad.tml", change), nano())
    (tmp_path / "short.tml").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text.tml").write_text("hello")
    for name in ("short.tml", "text.tml", "missing.tml"):
        with pytest.raises(errors.SnapshotError, match=f"restore: .*{name} cannot be read"):
            Session.restore(tmp_path / name, nano())
    with nano().new_sequence() as sequence:
        sequence.snapshot(tmp_path / "bare.tml")
    with pytest.raises(errors.SnapshotError, match=r"bare\.tml is not a session"):
        Session.restore(tmp_path / "bare.tml", nano())
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.tml").write_bytes(damaged)
    with pytest.raises(errors.SnapshotError):
        Session.restore(tmp_path / "damaged.tml", nano())


def test_a_snapshot_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.tml"
    with Session(nano()) as session:
        session.snapshot(path)
        old = path.read_bytes()
        session.append(noise(0)).result(WAIT_S)
        before = standing(session)

        def full(*_: object) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space left"):
            session.snapshot(path)
        assert path.read_bytes() == old
        assert [one.name for one in tmp_path.iterdir()] == ["s.tml"]
        assert standing(session) == before


def test_a_mark_of_another_session_is_refused() -> None:
    with Session(nano()) as one, Session(nano()) as other:
        mark = one.mark()
        before = standing(other)
        with pytest.raises(errors.InvalidArgument, match="rewind: the mark was taken on another"):
            other.rewind(mark)
        with pytest.raises(errors.InvalidArgument, match="fork: the mark was taken on another"):
            other.fork(mark)
        assert standing(other) == before
        with pytest.raises(errors.InvalidType, match="mark: expected SessionMark, got int"):
            one.rewind(3)  # type: ignore[arg-type]


def test_marks_left_behind_are_refused() -> None:
    with Session(nano()) as session:
        early = session.mark()
        session.append(noise(0)).result(WAIT_S)
        late = session.mark()
        session.rewind(early)
        with pytest.raises(errors.InvalidArgument, match="no longer on the sequence's path"):
            session.rewind(late)
        assert session.info().position == 0
