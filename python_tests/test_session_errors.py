"""Every refusal is typed and named, and leaves the session exactly where it was."""

import functools
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byte_model import BYTE_MODEL
from session_kit import (
    WAIT_S,
    assert_nothing_left,
    engine_threads,
    nano,
    noise,
    paused,
    scripted,
    standing,
)
from tml_core import (
    Chunk,
    Engine,
    Model,
    Retention,
    SamplingParams,
    Session,
    ToolResult,
    errors,
    load_model,
)


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    yield
    gc.collect()
    for thread in engine_threads():
        thread.join(WAIT_S)
    assert engine_threads() == []
    assert_nothing_left()


@functools.cache
def small() -> Model:
    """Nano with room for one short sequence."""
    return load_model(BYTE_MODEL, max_sequences=1, max_positions=256)


PCM = np.zeros(800, np.float32)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Chunk(audio=PCM, sample_rate=8000), errors.InvalidArgument, "sample_rate"),
        (lambda: Chunk(audio=PCM * np.nan), errors.InvalidArgument, "expected finite samples"),
        (lambda: Chunk(audio=PCM + 2), errors.InvalidArgument, r"expected samples in \[-1, 1\]"),
        (lambda: Chunk(audio=np.zeros(4000, np.float32)), errors.InvalidArgument, "got 4000"),
        (lambda: Chunk(), errors.InvalidArgument, "got nothing"),
        (
            lambda: Chunk(frames=[np.zeros((0, 4, 3), np.uint8)]),
            errors.InvalidArgument,
            r"got shape \[0, 4, 3\]",
        ),
        (lambda: Chunk(audio=PCM.astype(float)), errors.InvalidArgument, "got dtype float64"),
        (lambda: "hello", errors.InvalidType, "chunk: expected Chunk or MicroTurn, got str"),
        (lambda: PCM, errors.InvalidType, "chunk: expected Chunk or MicroTurn, got ndarray"),
        (lambda: Chunk(text="\udc80"), errors.InvalidArgument, "text: expected valid Unicode"),
        (
            lambda: Chunk(items=[ToolResult("call-7", "x")]),
            errors.InvalidArgument,
            "call_id: expected the id of a tool call of this session .* got 'call-7'",
        ),
    ],
)
def test_bad_input_changes_nothing(
    make: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with Session(nano(), seed=3) as session:
        session.append(noise(0, 1000)).result(WAIT_S)
        before = standing(session)
        with pytest.raises(kind, match=message) as caught:
            session.append(make())
        assert isinstance(caught.value, errors.TmlError)
        assert standing(session) == before
        assert session.epoch == 0
        assert session.append(noise(1)).result(WAIT_S).events


def test_busy_sessions_refuse_all_that_would_move_them(tmp_path: Path) -> None:
    with Session(nano()) as session:
        mark = session.mark()
        with paused(session):
            turn = session.append(noise(0))
            for name, act in {
                "append": lambda: session.append(noise(1)),
                "mark": session.mark,
                "rewind": lambda: session.rewind(mark),
                "fork": session.fork,
                "snapshot": lambda: session.snapshot(tmp_path / "s.tml"),
                "token_ids": session.token_ids,
            }.items():
                with pytest.raises(errors.SessionBusy, match=f"{name}: a turn is still open"):
                    act()
        assert turn.result(WAIT_S).done.tick == 0
        assert session.info().tick == 1


def test_closed_sessions_say_so() -> None:
    session = Session(nano())
    session.close()
    session.close()
    for name, act in {
        "append": lambda: session.append(noise(1)),
        "mark": session.mark,
        "fork": session.fork,
        "info": session.info,
        "add_tool_result": lambda: session.add_tool_result("call-0", "x"),
    }.items():
        with pytest.raises(errors.SessionClosed, match=f"{name}: the session is closed"):
            act()
    assert session.transcript() == ()
    assert repr(session) == "Session(micro-turn v1, closed)"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"seed": -1}, errors.InvalidArgument, "seed: expected an unsigned 64-bit"),
        ({"seed": 2**64}, errors.InvalidArgument, "seed: expected an unsigned 64-bit"),
        ({"seed": "x"}, errors.InvalidType, "seed: expected an int, got str"),
        ({"system": 3}, errors.InvalidType, "system: expected str, got int"),
        ({"tools": print}, errors.InvalidType, "tools: expected a list"),
        ({"tools": [3]}, errors.InvalidType, "tool: expected a function or a mapping"),
        ({"sampling": {}}, errors.InvalidType, "sampling: expected SamplingParams, got dict"),
        ({"retention": 3}, errors.InvalidType, "retention: expected Retention, got int"),
        ({"effort": 0.5}, errors.InvalidArgument, "effort: expected None for a micro-turn model"),
        ({"effort": "some"}, errors.InvalidArgument, "effort: expected one of"),
        ({"effort": []}, errors.InvalidType, "effort: expected a number or a word, got list"),
        ({"colour": 1}, TypeError, "colour"),
    ],
)
def test_bad_options_open_nothing(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        Session(nano(), **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"temperature": -1}, errors.InvalidArgument, "temperature: expected 0 or at least"),
        ({"temperature": float("nan")}, errors.InvalidArgument, "temperature: expected 0 or"),
        ({"temperature": "hot"}, errors.InvalidType, "temperature: expected a number, got str"),
        ({"top_k": -1}, errors.InvalidArgument, "top_k: expected at least 0, got -1"),
        ({"top_k": 1.5}, errors.InvalidType, "top_k: expected an int, got float"),
        ({"top_p": 0}, errors.InvalidArgument, "top_p: expected more than 0"),
        ({"top_p": float("nan")}, errors.InvalidArgument, "top_p: expected more than 0"),
    ],
)
def test_bad_sampling_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        SamplingParams(**options)


def test_unknown_models(tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointError, match="expected 'nano' or a checkpoint directory"):
        Session("no-such-model")
    with pytest.raises(errors.CheckpointError, match=r"config\.json does not exist"):
        Session(tmp_path)
    with pytest.raises(errors.InvalidType, match="model: expected a name, a path or a Model"):
        Session(3)  # type: ignore[arg-type]


def test_engine_refusals() -> None:
    with pytest.raises(errors.InvalidArgument, match="max_sessions: expected 1 to 12"):
        Engine(nano(), max_sessions=13)
    with pytest.raises(errors.InvalidType, match="max_sessions: expected an int, got str"):
        Engine(nano(), max_sessions="2")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidType, match="model: expected Model, got str"):
        Engine("nano")  # type: ignore[arg-type]
    with Engine(nano(), max_sessions=2) as engine:
        with pytest.raises(errors.InvalidArgument, match="model: another engine runs it"):
            Engine(nano())
        one = engine.open()
        with engine.open():
            with pytest.raises(errors.PoolExhausted, match="all 2 sessions are open"):
                engine.open()
            with pytest.raises(errors.PoolExhausted, match="all 2 sessions are open"):
                one.fork()
            assert engine.num_sessions == 2
        assert engine.num_sessions == 1
        assert engine.open().append(noise(0)).result(WAIT_S).events
    assert engine.is_closed
    assert one.is_closed
    engine.close()
    with pytest.raises(errors.SessionClosed, match="engine: it is closed"):
        engine.open()


def test_a_session_without_engine_joins_the_one_that_runs_its_model() -> None:
    with Engine(nano(), max_sessions=2) as engine, Session(nano()) as session:
        assert engine.num_sessions == 1
        assert len(engine_threads()) == 1
        assert session.append(noise(0)).result(WAIT_S).events


def test_the_pool_may_run_dry_and_the_session_stays() -> None:
    model = small()
    with Session(model) as session:
        with pytest.raises(errors.PoolExhausted, match="limit of 256"):
            for _ in range(5):
                session.append(Chunk(text="x" * 64)).result(WAIT_S)
        before = standing(session)
        with pytest.raises(errors.PoolExhausted, match=r"reserve: .* pass the sequence's limit"):
            session.append(Chunk(text="x" * 64)).result(WAIT_S)
        assert standing(session) == before
        assert not session.is_busy
    report = model.store.audit()
    assert report.global_pages_held == report.sliding_pages_held == 0


def test_a_prefix_that_does_not_fit_opens_nothing() -> None:
    model = small()
    with pytest.raises(errors.PoolExhausted, match="limit of 256"):
        Session(model, system="x" * 300)
    assert model.store.audit().num_sequences == 0


def test_a_collected_session_frees_its_slot() -> None:
    with Engine(nano(), max_sessions=1) as engine:
        for seed in range(3):
            session = engine.open(seed=seed)
            session.append(noise(0)).result(WAIT_S)
            del session
            gc.collect()
            assert engine.num_sessions == 0
        # While a turn runs it keeps its session.
        with scripted([277], held=True) as script:
            turn = engine.open().append(noise(0))
            gc.collect()
            script.step()
            assert turn.result(WAIT_S).done.reason == "silence"
        gc.collect()
        assert engine.num_sessions == 0


def test_a_collected_engine_ends_its_thread() -> None:
    engine = Engine(nano())
    (thread,) = engine_threads()
    session = engine.open()
    del engine
    gc.collect()
    assert session.append(noise(0)).result(WAIT_S).events
    del session
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_sessions_from_many_threads() -> None:
    results: dict[int, list[tuple[int, ...]]] = {}

    def client(seed: int) -> None:
        with Session(nano(), seed=seed) as session:
            results[seed] = [
                session.append(noise(i)).result(WAIT_S).done.token_ids for i in range(3)
            ]

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    together = dict(results)
    for seed in range(6):
        client(seed)
    assert results == together


def test_retention_covers_the_prefix() -> None:
    with Session(nano(), system="x" * 300, retention=Retention(64)) as session:
        assert session._seat.sequence.retention == Retention(64, pinned_prefix=300)
