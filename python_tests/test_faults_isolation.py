"""One session's fault, wherever it is raised, ends that session's turn and nothing else.

A fault is planted in each part a turn goes through, for one session in a batch of three. Its turn
must raise it, the session must stand where it stood and go on, and the two beside it must be, bit
for bit, what they would have been alone.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from faults_kit import (
    WAIT_S,
    Others,
    alone,
    assert_nothing_left,
    bits,
    clean_engine,
    engine_threads,
    load_tiny,
    noise,
    shape,
    tiny,
)
from session_kit import paused, step_by_step
from tml_core import Chunk, Engine, Retention, Session, errors
from tml_core.layout.micro_turn import MicroTurnLayout
from tml_core.layout.output import TickOutput

SEED = 7


class Planted(Exception):
    """What the tests raise."""


pytestmark = pytest.mark.usefixtures("nothing_leaks_of_faults")


def fail() -> None:
    raise Planted("planted")


Patch = pytest.MonkeyPatch
Plant = Callable[[Patch, Session], None]


def in_prepare(patch: Patch, victim: Session) -> None:
    real = tiny().prepare

    def prepare(sequence: Any, *rest: Any) -> Any:
        return fail() if sequence is victim._seat.sequence else real(sequence, *rest)

    patch.setattr(tiny(), "prepare", prepare, raising=False)


def before_step(patch: Patch, victim: Session) -> None:
    in_step(patch, victim, is_after=False)


def after_step(patch: Patch, victim: Session) -> None:
    """The worst: K, V and convolution rows of all three are written, then it fails."""
    in_step(patch, victim, is_after=True)


def in_step(patch: Patch, victim: Session, *, is_after: bool) -> None:
    real = tiny().backbone.step

    def step(x_TD: Any, batch: Any, kv: Any, **out: Any) -> Any:
        has_victim = victim._seat.sequence.slot.index in batch.slots.tolist()
        h_TD = real(x_TD, batch, kv, **out) if is_after or not has_victim else None
        return fail() if has_victim else h_TD

    step_by_step(patch)
    patch.setattr(tiny().backbone, "step", step)


def in_third_step(patch: Patch, victim: Session) -> None:
    real, seen = tiny().backbone.step, [0]

    def step(x_TD: Any, batch: Any, kv: Any, **out: Any) -> Any:
        has_victim = victim._seat.sequence.slot.index in batch.slots.tolist()
        seen[0] += has_victim
        return fail() if has_victim and seen[0] >= 3 else real(x_TD, batch, kv, **out)

    step_by_step(patch)
    patch.setattr(tiny().backbone, "step", step)


def in_sampler(patch: Patch, victim: Session) -> None:
    real, seed = tiny().backbone.sample, victim._seat.sequence.seed

    def sample(h_BD: Any, rows: Any, **out: Any) -> Any:
        return fail() if seed in rows.seed_B.tolist() else real(h_BD, rows, **out)

    step_by_step(patch)
    patch.setattr(tiny().backbone, "sample", sample)


def in_mask(patch: Patch, victim: Session) -> None:
    real = TickOutput.allowed
    patch.setattr(
        TickOutput,
        "allowed",
        lambda self: fail() if self is victim._seat.output else real(self),
    )


def in_accept(patch: Patch, victim: Session) -> None:
    real = TickOutput.accept
    patch.setattr(
        TickOutput,
        "accept",
        lambda self, *rest: fail() if self is victim._seat.output else real(self, *rest),
    )


def in_second_token(patch: Patch, victim: Session) -> None:
    real = TickOutput.take_unfed
    patch.setattr(
        TickOutput,
        "take_unfed",
        lambda self: fail() if self is victim._seat.output else real(self),
    )


def in_begin_output(patch: Patch, victim: Session) -> None:
    real = MicroTurnLayout.begin_output

    def begin(self: Any, state: Any, epoch: int = 0) -> Any:
        # The victim alone has been through a cancel.
        return fail() if epoch == victim.epoch else real(self, state, epoch)

    patch.setattr(MicroTurnLayout, "begin_output", begin)


def in_mark(patch: Patch, victim: Session) -> None:
    real = type(victim._seat.sequence).mark
    patch.setattr(
        type(victim._seat.sequence),
        "mark",
        lambda self: fail() if self is victim._seat.sequence else real(self),
    )


def in_boundary(patch: Patch, victim: Session) -> None:
    real = type(victim._seat.sequence).note_boundary
    patch.setattr(
        type(victim._seat.sequence),
        "note_boundary",
        lambda self: fail() if self is victim._seat.sequence else real(self),
    )


PLACES: dict[str, Plant] = {
    "prepare": in_prepare,
    "before the step": before_step,
    "after the step": after_step,
    "third step": in_third_step,
    "sampler": in_sampler,
    "mask": in_mask,
    "accept": in_accept,
    "feeding a token": in_second_token,
    "begin_output": in_begin_output,
    "mark": in_mark,
    "boundary": in_boundary,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_before", [0, 3], ids=["first turn", "fourth turn"])
def test_a_fault_stays_with_its_session(place: str, num_before: int) -> None:
    with clean_engine() as engine:
        others = Others(engine)
        with engine.open(seed=SEED) as victim:
            with paused(victim):
                turn = victim.append(noise(0))
                turn.cancel("none", wait=False)
            turn.result(WAIT_S)
            for tick in range(num_before):
                others.begin_tick()
                victim.append(noise(tick)).result(WAIT_S)
                others.end_tick()
            before = shape(victim)
            others.begin_tick()  # a turn of each is under way when it happens
            num_failed = 0
            for i in range(6):
                if i:
                    others.begin_tick()
                with pytest.MonkeyPatch.context() as patch:
                    PLACES[place](patch, victim)
                    with paused(victim):
                        turn = victim.append(noise(num_before))
                    try:
                        turn.result(WAIT_S)
                    except Planted:
                        num_failed += 1
                        assert shape(victim) == before
                    else:
                        # Over before it came to the place: a first token that ended the tick.
                        assert place in ("third step", "feeding a token")
                        break
                    finally:
                        others.end_tick()
            if num_failed == 6:
                victim.append(noise(num_before)).result(WAIT_S)
            assert bits(victim) == alone(SEED, num_before + 1)
        others.assert_untouched()
        assert engine.stats().turns["failed"] == num_failed


def test_bad_input_of_one_reaches_nobody() -> None:
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: Chunk(audio=np.full(10, np.inf, np.float32)), "expected finite samples"),
        (lambda: Chunk(frames=[np.zeros((0, 4, 3), np.uint8)]), "got shape"),
        (lambda: Chunk(text="\ud800"), "expected valid Unicode"),
        (lambda: {"audio": 3}, "chunk: expected Chunk or MicroTurn, got dict"),
    ]
    with clean_engine() as engine:
        others = Others(engine)
        with engine.open(seed=SEED) as victim:
            for make, message in bad * 3:
                others.begin_tick()
                before = shape(victim)
                with pytest.raises(errors.TmlError, match=message):
                    victim.append(make())
                assert shape(victim) == before
                others.end_tick()
            victim.append(noise(0)).result(WAIT_S)
            assert bits(victim) == alone(SEED, 1)
        others.assert_untouched()


def test_a_session_that_is_full_stays_and_the_others_go_on() -> None:
    """It comes to the last position it may have; those beside it have room."""
    model = load_tiny(max_sequences=3, max_positions=256)
    with Engine(model) as engine:
        beside = engine.open(seed=1, retention=Retention(64))
        with engine.open(seed=2) as victim:
            num_full = num_ticks = 0
            for tick in range(60):
                turns = [victim.append(Chunk(text="x" * 8))]
                if beside.info().position < 200:
                    turns.append(beside.append(noise(tick)))
                    num_ticks += 1
                before = None
                try:
                    turns[0].result(WAIT_S)
                except errors.PoolExhausted as error:
                    assert "pass the sequence's limit of 256" in str(error)
                    num_full += 1
                    before = shape(victim)
                for turn in turns[1:]:
                    turn.result(WAIT_S)
                assert before is None or shape(victim) == before
        assert num_full > 10
        went_on = bits(beside)
        beside.close()
        with engine.open(seed=1, retention=Retention(64)) as again:
            for tick in range(num_ticks):
                again.append(noise(tick)).result(WAIT_S)
            assert bits(again) == went_on
    report = model.store.audit()
    assert (report.global_pages_held, report.sliding_pages_held) == (0, 0)


def test_a_pool_that_is_empty_ends_turns_one_by_one_and_nobody_waits_for_ever() -> None:
    """More sessions than pages: turns are refused, none hangs, room that comes free is used."""
    model = load_tiny(max_sequences=6, max_positions=4096, kv_memory_bytes=800_000)
    assert 2 <= model.store.global_pool.num_pages < 12
    with Engine(model) as engine:
        sessions = [engine.open(seed=seed) for seed in range(6)]
        num_refused = 0
        for tick in range(80):
            turns = [session.append(noise(tick)) for session in sessions]
            for turn in turns:
                try:
                    turn.result(WAIT_S)
                except errors.PoolExhausted:
                    num_refused += 1
            if num_refused and len(sessions) > 2:
                sessions.pop().close()
                num_refused = 0
            model.store.audit() if engine.is_closed else engine._host.loop.call(model.store.audit)
        assert len(sessions) < 6
        for session in sessions:
            session.close()
        stats = engine.stats()
        assert (stats.global_pages_held, stats.sliding_pages_held, stats.num_turns) == (0, 0, 0)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_ends_the_engine_thread_is_told_to_all(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors end turns; an interrupt in the engine thread ends the engine, and leaves nothing."""
    ended: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: ended.append(args.exc_type))
    real = tiny().backbone.step

    def step(*_: Any, **_out: Any) -> Any:
        monkeypatch.setattr(tiny().backbone, "step", real)
        raise kind("planted")

    with Engine(tiny()) as engine:
        sessions = [engine.open(seed=seed) for seed in range(3)]
        with paused(sessions[0]):
            monkeypatch.setattr(tiny().backbone, "step", step)
            turns = [session.append(noise(0)) for session in sessions]
        if kind is MemoryError:  # an error as any other: those it did not belong to go on
            for turn in turns:
                turn.result(WAIT_S)
            assert not engine.is_closed
        else:
            for turn in turns:
                with pytest.raises(kind, match="planted"):
                    turn.result(WAIT_S)
            assert all(session.is_closed for session in sessions)
            with pytest.raises(errors.SessionClosed, match="engine: it is closed"):
                engine.open()
            for thread in engine_threads():
                thread.join(WAIT_S)
            assert ended == [kind]
    assert_nothing_left()
    assert alone(SEED, 1)  # a new engine runs the same model
