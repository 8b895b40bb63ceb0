"""Ctrl-C and asyncio cancellation at every place where somebody waits for the engine.

A call that was interrupted has either happened or not; nobody is left owning a seat, a page, a task
or a lock, and the session goes on.
"""

import asyncio
import dis
import gc
import signal
import sys
import threading
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from tml_core import Engine, Session, Turn, errors

SEED = 9

pytestmark = pytest.mark.usefixtures("nothing_leaks_of_faults")


def interrupted(
    engine: Engine, act: Callable[[], object], before: Callable[[], object] = lambda: None
) -> None:
    """Run ``act`` in this thread and raise a real SIGINT in it once it has posted what it waits
    for; the engine then goes on with it. ``before`` runs when the engine stands already."""
    is_acting, caught, has_struck = (threading.Event() for _ in range(3))
    main, inbox = threading.get_ident(), engine._host.loop._inbox

    def strike() -> None:
        assert is_acting.wait(WAIT_S)
        while not inbox.qsize():
            caught.wait(0.001)
        # One that comes right before the wait begins does not end it; so again.
        while not caught.is_set():
            signal.pthread_kill(main, signal.SIGINT)
            caught.wait(0.05)

    def on_signal(*_: object) -> None:
        if not has_struck.is_set():
            has_struck.set()
            raise KeyboardInterrupt

    usual = signal.signal(signal.SIGINT, on_signal)
    engine._host.loop._post(strike)
    try:
        before()
        with pytest.raises(KeyboardInterrupt):
            is_acting.set()
            act()
    finally:
        caught.set()
        engine._host.loop.call(lambda: None)
        signal.signal(signal.SIGINT, usual)


def test_an_interrupted_open_leaves_no_seat(tmp_path: Path) -> None:
    path = tmp_path / "s.tml"
    with clean_engine(max_sessions=3) as engine, engine.open(seed=SEED) as session:
        session.append(noise(0)).result(WAIT_S)
        session.snapshot(path)
        for _ in range(5):
            interrupted(engine, engine.open)
            interrupted(engine, lambda: engine.restore(path))
            interrupted(engine, session.fork)
            assert engine.num_sessions == 1
        # All seats are still to be had.
        with engine.open(), session.fork():
            assert engine.num_sessions == 3
        assert bits(session) == alone(SEED, 1)


def test_an_interrupt_while_instructions_are_read_leaves_no_seat() -> None:
    with clean_engine() as engine, trapped():
        others = Others(engine)
        real = engine._host.loop.submit
        with pytest.MonkeyPatch.context() as patch:

            def submit(job: Any) -> None:
                real(job)
                raise KeyboardInterrupt

            patch.setattr(engine._host.loop, "submit", submit)
            for _ in range(5):
                with pytest.raises(KeyboardInterrupt):
                    engine.open(system="be brief")
        assert engine.num_sessions == 2
        others.assert_untouched()


@pytest.mark.parametrize(
    "name", ["mark", "info", "token_ids", "snapshot", "fork", "append", "cancel", "transcript"]
)
def test_an_interrupted_look_or_move_changes_nothing(name: str, tmp_path: Path) -> None:
    acts: dict[str, Callable[[Session], object]] = {
        "mark": Session.mark,
        "info": Session.info,
        "token_ids": Session.token_ids,
        "snapshot": lambda session: session.snapshot(tmp_path / "s.tml"),
        "fork": Session.fork,
        "append": lambda _: turns[0].result(WAIT_S),
        "cancel": lambda _: turns[0].cancel("none"),
        "transcript": lambda session: (session.transcript(), session.info()),
    }
    with clean_engine() as engine:
        others = Others(engine)
        with engine.open(seed=SEED) as session:
            for tick in range(2):
                session.append(noise(tick)).result(WAIT_S)
            others.begin_tick()
            turns: list[Turn] = []

            def before() -> None:
                if name in ("append", "cancel"):
                    turns.append(session.append(noise(2)))

            interrupted(engine, lambda: acts[name](session), before)
            others.end_tick()
            engine._host.loop.call(lambda: None)
            for path in tmp_path.iterdir():  # a whole file, or none
                with engine.restore(path) as restored:
                    assert bits(restored) == alone(SEED, 2)
            if name == "append":
                # The turn nobody waits for runs to its end.
                while session.is_busy:
                    engine._host.loop.call(lambda: None)
                assert bits(session) == alone(SEED, 3)
            else:
                while session.is_busy:
                    engine._host.loop.call(lambda: None)
                assert bits(session) == alone(SEED, 2)
                session.append(noise(2)).result(WAIT_S)
                assert bits(session) == alone(SEED, 3)
        others.assert_untouched()


def test_an_interrupted_rewind_happens_wholly_or_not_at_all() -> None:
    with clean_engine() as engine, engine.open(seed=SEED) as session:
        session.append(noise(0)).result(WAIT_S)
        mark = session.mark()
        for tick in (1, 2):
            session.append(noise(tick)).result(WAIT_S)
        interrupted(engine, lambda: session.rewind(mark))
        info = session.info()
        assert (info.tick, info.position == mark.position) in ((1, True), (3, False))
        assert len(session.transcript()) == info.tick
        for tick in range(info.tick, 4):
            session.append(noise(tick)).result(WAIT_S)
        assert bits(session) == alone(SEED, 4)


def test_an_interrupted_close_closes() -> None:
    with clean_engine() as engine:
        session = engine.open()
        turn = session.append(noise(0))
        turn.result(WAIT_S)
        interrupted(engine, session.close)
        assert engine.num_sessions == 0
        assert session.is_closed
        session.close()


def test_a_refused_call_keeps_nothing_alive() -> None:
    """What an error passed through must not hold on to marks and sessions until a collection."""
    with clean_engine() as engine, engine.open() as one, engine.open() as two:
        session_mark = one.mark()
        with pytest.raises(errors.InvalidArgument, match="taken on another sequence"):
            two.rewind(session_mark)
        del session_mark
        two.mark()

        def look() -> int:
            one._seat.sequence._idle_slot("look")
            two._seat.sequence._idle_slot("look")
            return engine.model.store.audit().num_marks

        assert engine._host.loop.call(look) == 0


# asyncio.


@types.coroutine
def cancelled_at(
    work: Coroutine[Any, Any, Any], number: int
) -> Generator[Any, Any, tuple[bool, Any]]:
    """Await ``work``, but cancel what it waits for at its suspension of that number. Returns
    (whether it came so far, its result or None)."""
    count = 0
    error: BaseException | None = None
    while True:
        try:
            waiting = work.send(None) if error is None else work.throw(error)
        except StopIteration as stop:
            return count > number, stop.value
        except asyncio.CancelledError:
            return True, None
        error = None
        if count == number and waiting is not None:
            waiting.cancel()
        count += 1
        try:
            yield waiting
        except BaseException as caught:
            error = caught


async def life(engine: Engine, folder: Path) -> tuple[str, list[int]]:
    """A session as an asyncio service has it: every wait there is."""
    session = await asyncio.to_thread(engine.open, seed=SEED)
    try:
        async for _ in session.append(noise(0)):
            pass
        await session.append(noise(1))
        await asyncio.to_thread(session.snapshot, folder / "s.tml")
        mark = await asyncio.to_thread(session.mark)
        twin = await asyncio.to_thread(session.fork)
        try:
            await asyncio.gather(twin.append(noise(5)), session.append(noise(5)))
        finally:
            await asyncio.to_thread(twin.close)
        await asyncio.to_thread(session.rewind, mark)
        await asyncio.to_thread(session.close)
        session = await asyncio.to_thread(engine.restore, folder / "s.tml")
        await session.append(noise(2))
        return await asyncio.to_thread(bits, session)
    finally:
        await asyncio.to_thread(session.close)


def run_cancelled(work: Coroutine[Any, Any, Any], number: int) -> tuple[bool, Any]:
    """`cancelled_at` in a loop of its own; its threads and tasks have ended on return."""

    async def main() -> tuple[bool, Any]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        outcome: tuple[bool, Any] = await cancelled_at(work, number)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return outcome

    return asyncio.run(main())


def test_cancelled_at_every_await(tmp_path: Path) -> None:
    num_awaits = 0
    with clean_engine(max_sessions=5) as engine:
        others = Others(engine)
        for number in range(200):
            others.begin_tick()
            was_cancelled, found = run_cancelled(life(engine, tmp_path), number)
            others.end_tick()
            gc.collect()  # a cancelled task's traceback may hold its session
            assert engine.num_sessions == 2
            if not was_cancelled:
                assert found == alone(SEED, 3)
                break
            num_awaits += 1
        others.assert_untouched()
    assert num_awaits >= 12


async def test_a_cancelled_reader_leaves_the_turn_and_no_watcher() -> None:
    with clean_engine() as engine, engine.open(seed=SEED) as session:
        with paused(session):
            turn = session.append(noise(0))
            readers = [asyncio.create_task(_read(turn)) for _ in range(3)]
            waiters = [asyncio.create_task(_wait(turn)) for _ in range(3)]
            await asyncio.sleep(0)
            for task in (*readers, *waiters):
                task.cancel()
            await asyncio.wait([*readers, *waiters])
            assert all(task.cancelled() for task in (*readers, *waiters))
            assert turn._watchers == []
        await turn
        assert bits(session) == alone(SEED, 1)


async def _read(turn: Any) -> None:
    async for _ in turn:
        pass


async def _wait(turn: Any) -> None:
    await turn


@contextmanager
def struck_at(number: int, codes: tuple[types.CodeType, ...]) -> Iterator[None]:
    """A KeyboardInterrupt at the ``number``-th place of these functions where the interpreter
    looks for signals: on entry, and after each call."""
    left, last = [number], {}

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code not in codes:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            before = dis.opname[code.co_code[last.get(code, 0)]]
            last[code] = frame.f_lasti
            left[0] -= before.startswith(("CALL", "RESUME"))
            if left[0] < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_an_append_interrupted_anywhere_is_whole_or_nothing() -> None:
    codes = Session.append.__code__, Session._submit.__code__
    with clean_engine() as engine, engine.open(seed=SEED) as session:
        session.append(noise(0)).result(WAIT_S)
        mark, seat = session.mark(), session._seat
        ends, number = set(), 0
        while True:
            try:
                with struck_at(number, codes):
                    turn = session.append(noise(1))
                break
            except KeyboardInterrupt:
                number += 1
            while seat.turns:
                engine._host.loop.call(lambda: None)
            assert seat.waiting_items == () and not seat.lock.locked()
            ends.add(session.info().tick)
            session.rewind(mark)
        assert number > 10 and ends == {1, 2}
        turn.result(WAIT_S)
        assert bits(session) == alone(SEED, 2)
        del mark
