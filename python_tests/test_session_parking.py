"""Parked sessions: their memory is free for others, and they go on with the same bits."""

import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from byte_model import BYTE_MODEL
from session_kit import END_OUT, WAIT_S, engine_threads, nano, noise, scripted
from tml_core import Chunk, Engine, Model, Retention, Session, SessionInfo, errors, load_model


@functools.cache
def two() -> Model:
    """Nano with room for two sequences."""
    return load_model(BYTE_MODEL, max_sequences=2)


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    yield
    assert engine_threads() == []
    report = two().store.audit()
    assert report.num_sequences == report.num_marks == 0
    assert report.global_pages_held == report.sliding_pages_held == 0


def comparable(info: SessionInfo) -> tuple[object, ...]:
    return (info.position, info.tick, info.media_ms, info.evicted, info.state_hash, info.open_calls)


def test_a_parked_session_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    options = {"seed": 3, "system": "Be brief.", "retention": Retention(window_positions=128)}
    with Engine(two(), park_dir=tmp_path) as engine:
        with engine.open(**options) as session:  # type: ignore[arg-type]
            for i in range(12):
                session.append(noise(i, 3000)).result(WAIT_S)
            before, transcript = session.info(), session.transcript()
            with session.fork() as twin:
                session.park()
                session.park()  # it is already
                info = session.info()
                assert info.is_parked and not before.is_parked
                assert (info.num_pages, info.kv_bytes) == (0, 0)
                assert comparable(info) == comparable(before)
                assert session.tip == before.position
                assert session.transcript() == transcript
                stats = engine.stats()
                assert (stats.num_sessions, stats.num_parked, stats.parked) == (2, 1, 1)
                (folder,) = tmp_path.iterdir()
                assert len(list(folder.iterdir())) == 1
                for i in range(12, 18):
                    ids = [
                        one.append(noise(i, 3000)).result(WAIT_S).done.token_ids
                        for one in (session, twin)
                    ]
                    assert ids[0] == ids[1]
                assert session.info().state_hash == twin.info().state_hash
            assert not session.info().is_parked
            assert (engine.stats().num_parked, engine.stats().resumed) == (0, 1)
            assert list(folder.iterdir()) == []
            session.park()
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_refused_park_keeps_what_was_not_heard(tmp_path: Path) -> None:
    with (
        Engine(nano(), park_dir=tmp_path / "nowhere") as engine,
        engine.open(seed=1) as session,
        scripted([104, END_OUT] * 2),
    ):
        session.append(noise(0)).result(WAIT_S)
        session.append(noise(1)).result(WAIT_S)
        mark = session.mark()
        with pytest.raises(errors.SessionBusy, match="park: 1 marks of this session are held"):
            session.park()
        del mark
        with pytest.raises(FileNotFoundError):
            session.park()
        assert session.truncate(200) == 1
        (tmp_path / "nowhere").mkdir()
        session.park()
        assert session.truncate(0) is None  # what was parked counts as heard


@pytest.mark.parametrize("what", ["mark", "fork", "snapshot", "token_ids", "rewind"])
def test_whatever_needs_the_memory_brings_it_back(what: str, tmp_path: Path) -> None:
    with Engine(two()) as engine, engine.open(seed=1) as session:
        session.append(noise(0)).result(WAIT_S)
        ids, hashed = session.token_ids().tolist(), session.info().state_hash
        session.park()
        if what == "mark":
            mark = session.mark()
            session.append(noise(1)).result(WAIT_S)
            session.rewind(mark)
        elif what == "fork":
            with session.fork() as twin:
                assert twin.info().state_hash == hashed
        elif what == "snapshot":
            session.snapshot(tmp_path / "s.tml")
            with engine.restore(tmp_path / "s.tml") as other:
                assert other.info().state_hash == hashed
        elif what == "rewind":
            mark = session.mark()
            del mark
            session.park()
        assert session.token_ids().tolist() == ids
        assert session.info().state_hash == hashed
        assert not session.info().is_parked


def test_a_session_with_marks_or_a_turn_is_not_parked() -> None:
    with Engine(two()) as engine, engine.open() as session:
        mark = session.mark()
        with pytest.raises(errors.SessionBusy, match="park: 1 marks of this session are held"):
            session.park()
        assert not session.info().is_parked
        session.append(noise(0)).result(WAIT_S)
        session.rewind(mark)
        del mark
        session.park()
        reached, release = threading.Event(), threading.Event()

        def hold() -> None:
            reached.set()
            assert release.wait(WAIT_S)

        session._host.loop._post(hold)
        assert reached.wait(WAIT_S)
        turn = session.append(noise(1))
        with pytest.raises(errors.SessionBusy, match="park: a turn is still open"):
            session.park()
        release.set()
        assert turn.result(WAIT_S).done.tick == 0
    with pytest.raises(errors.SessionClosed, match="park: the session is closed"):
        session.park()


def test_a_file_that_cannot_be_written_leaves_the_session_in_memory(tmp_path: Path) -> None:
    with Engine(two(), park_dir=tmp_path / "nowhere") as engine, engine.open() as session:
        session.append(noise(0)).result(WAIT_S)
        with pytest.raises(FileNotFoundError):
            session.park()
        assert not session.info().is_parked
        session.append(noise(1)).result(WAIT_S)


def test_idle_sessions_are_parked_by_themselves() -> None:
    with (
        Engine(two(), park_after_s=0.0) as engine,
        engine.open(seed=1) as session,
        engine.open(seed=1) as other,
    ):
        found = []
        for i in range(3):
            for one in (session, other):
                found.append(one.append(noise(i)).result(WAIT_S).done.token_ids)
            until_parked(engine, 2)
            held = engine.stats()
            assert held.global_pages_held == held.sliding_pages_held == 0
        assert found[::2] == found[1::2]
        assert engine.stats().resumed >= 4
        # Held by a mark, it stays.
        mark = session.mark()
        other.append(noise(9)).result(WAIT_S)
        session.append(noise(9)).result(WAIT_S)
        until_parked(engine, 1)
        assert not session.info().is_parked
        session.rewind(mark)


def until_parked(engine: Engine, count: int) -> None:
    """Wait for the engine to find nothing better to do."""
    never = threading.Event()
    while engine.stats().num_parked < count:
        never.wait(0.001)


def test_more_sessions_than_memory_take_turns() -> None:
    with Engine(two(), max_sessions=5, park_after_s=3600.0) as engine:
        sessions = [engine.open(seed=i % 2) for i in range(5)]
        with pytest.raises(errors.PoolExhausted, match="engine: all 5 sessions are open"):
            engine.open()
        found = [
            [one.append(noise(i)).result(WAIT_S).done.token_ids for one in sessions]
            for i in range(3)
        ]
        for row in found:
            assert row[0] == row[2] == row[4]
            assert row[1] == row[3]
        assert engine.stats().num_parked == 3
        # All at once there is no room for all: those that got none say so, and stand as before.
        turns = [one.append(noise(7)) for one in sessions]
        outcomes = []
        for turn in turns:
            try:
                outcomes.append(turn.result(WAIT_S).done.reason)
            except errors.PoolExhausted:
                outcomes.append("no room")
        assert outcomes.count("no room") <= 3
        for one in sessions:
            one.append(noise(8)).result(WAIT_S)
        for one in sessions:
            one.close()
        assert engine.stats().num_parked == 0


def test_memory_for_unheard_output_is_given_up_first() -> None:
    model = load_model(BYTE_MODEL, max_sequences=2, max_positions=8192)
    with Engine(model) as engine, engine.open() as talker, engine.open() as other:
        for _ in range(30):
            talker.append(Chunk(text="w" * 60)).result(WAIT_S)
        pool = model.store.sliding_pool
        assert len(talker._seat.recent) > 0
        spare = pool.alloc(pool.free_pages)
        try:
            # Nothing is free any more; what the marks of the talker kept is enough for this.
            for _ in range(3):
                other.append(Chunk(text="w" * 60)).result(WAIT_S)
            assert len(talker._seat.recent) == 0
        finally:
            pool.release(spare)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"park_after_s": -1}, errors.InvalidArgument, "park_after_s: expected at least 0, got -1"),
        ({"park_after_s": True}, errors.InvalidType, "park_after_s: expected a number, got bool"),
        ({"max_sessions": 3}, errors.InvalidArgument, "max_sessions: expected 1 to 2"),
        (
            {"max_sessions": 0, "park_after_s": 1},
            errors.InvalidArgument,
            "max_sessions: expected 1 to 2",
        ),
    ],
)
def test_bad_options_are_refused(
    options: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        Engine(two(), **options)  # type: ignore[arg-type]


def test_a_session_of_its_own_can_be_parked_and_collected() -> None:
    session = Session(two())
    session.append(noise(0)).result(WAIT_S)
    session.park()
    assert two().store.audit().num_sequences == 0
    del session
    for thread in engine_threads():
        thread.join(WAIT_S)
