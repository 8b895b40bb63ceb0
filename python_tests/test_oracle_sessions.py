"""Random lives of many sessions in one engine, every operation against a NumPy oracle.

Turns (sound, text, silence; alone and together), cancels at every point of a turn, marks, rewinds,
forks, snapshots, eviction, refusals: after each operation the sessions it touched are compared with
the oracle id by id, and the pages of all of them are counted. At the end of a chapter the sessions
that live are lived again, alone, and must have the same ids and the same hash.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from torch import Tensor

from faults_kit import INJECTED, MAX_POSITIONS, NUM_SLOTS, WAIT_S, WINDOW, load_tiny
from session_kit import paused, step_by_step
from session_oracle import Input, MarkOracle, Pool, SessionOracle
from tml_core import (
    Chunk,
    Engine,
    Model,
    Retention,
    Session,
    SessionMark,
    TextToken,
    Turn,
    TurnResult,
    errors,
)
from tml_core.layout import SOUND

MAX_LIVES: Final = NUM_SLOTS - 1  # one slot is for replays
# Room for what one more turn may bring.
LONGEST: Final = MAX_POSITIONS - 64
CHAPTER: Final = 2500
RETENTIONS: Final = (None, None, (300, 0), (256, 130))
WEIGHTS: Final = {
    "turn": 36,
    "turns_together": 6,
    "quiet_turn": 3,
    "cancel_queued": 6,
    "cancel_midway": 9,
    "truncate": 2,
    "mark": 9,
    "rewind": 7,
    "drop_mark": 4,
    "fork": 5,
    "fork_at_mark": 3,
    "move": 2,
    "park": 2,
    "open": 4,
    "close": 3,
    "refusals": 3,
}


@dataclass(frozen=True)
class Done:
    """One turn that stands, to do again: ``ending`` is "", or "cut" if its output was dropped, or
    "quiet" if none was asked for."""

    number: int
    ending: str


@dataclass(eq=False)
class Life:
    session: Session
    oracle: SessionOracle
    seed: int
    retention: tuple[int, int] | None
    turns: list[Done] = field(default_factory=list)
    marks: list[tuple[SessionMark, MarkOracle, int]] = field(default_factory=list)


def chunk(number: int) -> tuple[Chunk, Input]:
    """The input of that number: sound of many lengths, text over the budget, both, or nothing."""
    dice = np.random.default_rng(number)
    kind = number % 4
    pcm = dice.uniform(-0.1, 0.1, int(dice.integers(1, 3201))).astype(np.float32)
    text = f"n{number}" * int(dice.integers(1, 5))
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    if kind == 0:
        return Chunk(is_idle=True), Input()
    if kind == 1:
        return Chunk(text=text), Input(text=ids)
    if kind == 2:
        return Chunk(audio=pcm), Input(num_samples=len(pcm))
    return Chunk(audio=pcm, text=text), Input(num_samples=len(pcm), text=ids)


class Trap:
    """In the place of the sampler, and of the head that speaks: cancels a turn from inside one of
    its draws."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._sample = model.backbone.sample
        self._flow = model.backbone.flow
        self._say = None if self._flow is None else self._flow.draw
        self.turn: Turn | None = None
        self.keep: Any = "input"
        self.num_draws = 0

    @contextmanager
    def set(self) -> Iterator[None]:
        """Where draws go through it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.model.backbone, "sample", self.sample)
            if self._flow is not None:
                patch.setattr(self._flow, "draw", self.say)
            yield

    def sample(self, h_BD: Tensor, rows: Any, **out: Any) -> tuple[Tensor, Tensor]:
        self._count()
        return self._sample(h_BD, rows, **out)

    def say(self, *asked: Any) -> Tensor:
        assert self._say is not None
        self._count()
        return self._say(*asked)

    def _count(self) -> None:
        if self.turn is not None:
            if self.num_draws == 0:
                self.turn.cancel(self.keep, wait=False)
                self.turn = None
            self.num_draws -= 1


class World:
    """All sessions of a model, and what they should be."""

    def __init__(self, model: Model, seed: int, folder: Path) -> None:
        self.model = model
        self.trap = Trap(model)
        self.dice = random.Random(seed)
        self.folder = folder
        self.counts = dict.fromkeys(WEIGHTS, 0)
        self.num_turns = self.num_spoken = 0

    # A chapter.

    def live(self, num_operations: int) -> None:
        self.lives: list[Life] = []
        self.pools = Pool(), Pool()
        with self.trap.set(), Engine(self.model) as engine:
            self.engine = engine
            self.open()
            for _ in range(num_operations):
                self.act()
            for life in self.dice.sample(self.lives, min(3, len(self.lives))):
                self.live_again(life)
            while self.lives:
                self.end(self.lives[0])
            assert engine.num_sessions == 0
        self.audit()

    def act(self) -> None:
        (name,) = self.dice.choices(list(WEIGHTS), list(WEIGHTS.values()))
        self.counts[name] += 1
        if name in ("open", "turns_together"):
            getattr(self, name)()
        else:
            getattr(self, name)(self.dice.choice(self.lives))
        self.audit()

    # Turns.

    def turn(self, life: Life) -> None:
        self.run_together([life])

    def turns_together(self) -> None:
        self.run_together(self.dice.sample(self.lives, self.dice.randint(1, len(self.lives))))

    def run_together(self, lives: list[Life]) -> None:
        given = []
        for life in lives:
            number = self.number(life)
            tip = {"expect_tip": life.session.tip} if number % 3 == 0 else {}
            given.append((life, number, life.session.append(chunk(number)[0], **tip)))
        for life, number, turn in given:
            result = turn.result(WAIT_S)
            self.answered(life, number, result)
        self.compare(*lives)

    def answered(self, life: Life, number: int, result: TurnResult) -> None:
        output = np.array(result.done.token_ids, np.int64)
        has_spoken = SOUND in result.done.token_ids
        has_said = has_spoken or any(isinstance(one, TextToken) for one in result.events)
        self.num_spoken += has_spoken
        num_drawn = result.stats.num_output_tokens
        life.oracle.turn(chunk(number)[1], output, num_drawn, has_said=has_said)
        life.turns.append(Done(number, ""))

    def quiet_turn(self, life: Life) -> None:
        number = self.number(life)
        result = life.session.append(chunk(number)[0], answer=False).result(WAIT_S)
        life.oracle.turn(chunk(number)[1], np.array(result.done.token_ids, np.int64), 0)
        life.turns.append(Done(number, "quiet"))
        self.compare(life)

    def cancel_queued(self, life: Life) -> None:
        number, keep = self.number(life), self.dice.choice(("input", "none"))
        with paused(life.session):
            turn = life.session.append(chunk(number)[0])
            assert turn.cancel(keep, wait=False)  # type: ignore[arg-type]
        assert turn.result(WAIT_S).done.reason == "cancelled"
        self.cancelled(life, number, keep, has_begun=False)

    def cancel_midway(self, life: Life) -> None:
        number, keep = self.number(life), self.dice.choice(("input", "none"))
        with pytest.MonkeyPatch.context() as patch:
            step_by_step(patch)
            with paused(life.session):
                turn = life.session.append(chunk(number)[0])
                num_draws = self.dice.randrange(3 if self.model.backbone.flow is None else 7)
                self.trap.keep, self.trap.num_draws = keep, num_draws
                self.trap.turn = turn
            result = turn.result(WAIT_S)
        self.trap.turn = None
        if result.done.reason == "cancelled":
            return self.cancelled(life, number, keep, has_begun=True)
        self.answered(life, number, result)
        return self.compare(life)

    def cancelled(self, life: Life, number: int, keep: str, *, has_begun: bool) -> None:
        if keep == "input":
            life.oracle.cancelled_turn(chunk(number)[1])
            life.turns.append(Done(number, "cut"))
        else:
            life.oracle.undone_turn(chunk(number)[1], has_begun=has_begun)
        self.compare(life)

    def truncate(self, life: Life) -> None:
        """Go back to what was heard: every output since is silenced, every input stays."""
        if life.retention is not None:
            return
        heard_ms = 200 * (life.oracle.state.tick - self.dice.randrange(60))
        first = life.oracle.truncate(max(0, heard_ms))
        assert life.session.truncate(max(0, heard_ms)) == first
        if first is not None:
            endings = ["cut"] + ["quiet"] * (len(life.turns) - first - 1)
            numbers = [one.number for one in life.turns[first:]]
            life.turns[first:] = [Done(*both) for both in zip(numbers, endings, strict=True)]
            life.marks = [one for one in life.marks if one[1].pin is not None]
        self.compare(life)

    def number(self, life: Life) -> int:
        """The next chunk; a session that is nearly full goes back or ends first."""
        self.num_turns += 1
        if len(life.oracle.state.ids) > LONGEST:
            old = [one for one in life.marks if one[1].pin and not life.oracle.is_evicted(one[1])]
            if old and len(old[0][1].state.ids) <= LONGEST // 2:
                self.go_back(life, *old[0])
            else:
                self.replace(life)
        return self.dice.randrange(1 << 20)

    # Moving.

    def mark(self, life: Life) -> None:
        mark = life.session.mark()
        info = life.session.info()
        assert (mark.position, mark.tick) == (info.position, info.tick)
        known = life.oracle.mark(info.state_hash)
        life.marks.append((mark, known, len(life.turns)))
        if len(life.marks) > 12:
            self.give_up(life, 0)

    def rewind(self, life: Life) -> None:
        if not life.marks:
            return None
        mark, known, num_turns = self.dice.choice(life.marks)
        if (reason := self.obstacle(life, known)) is not None:
            with pytest.raises(errors.InvalidArgument, match=reason):
                life.session.rewind(mark)
            return self.compare(life)
        return self.go_back(life, mark, known, num_turns)

    def go_back(self, life: Life, mark: SessionMark, known: MarkOracle, num_turns: int) -> None:
        life.session.rewind(mark)
        life.oracle.rewind(known)
        del life.turns[num_turns:]
        assert life.session.info().state_hash == known.state_hash
        self.compare(life)

    def obstacle(self, life: Life, known: MarkOracle) -> str | None:
        """Why a mark cannot be reached, if it cannot."""
        if known.pin is None:
            return "no longer on the sequence's path"
        return "were evicted" if life.oracle.is_evicted(known) else None

    def drop_mark(self, life: Life) -> None:
        if life.marks:
            self.give_up(life, self.dice.randrange(len(life.marks)))

    def give_up(self, life: Life, index: int) -> None:
        _, known, _ = life.marks.pop(index)
        life.oracle.drop_mark(known)

    def fork(self, life: Life) -> None:
        if len(self.lives) < MAX_LIVES:
            child = life.session.fork()
            self.adopt(life, child, life.oracle.fork(), len(life.turns))
            assert child.info().state_hash == life.session.info().state_hash

    def fork_at_mark(self, life: Life) -> None:
        if not life.marks or len(self.lives) == MAX_LIVES:
            return None
        mark, known, num_turns = self.dice.choice(life.marks)
        if (reason := self.obstacle(life, known)) is not None:
            with pytest.raises(errors.InvalidArgument, match=reason):
                life.session.fork(mark)
            return self.compare(life)
        child = life.session.fork(mark)
        self.adopt(life, child, life.oracle.fork(known), num_turns)
        assert child.info().state_hash == known.state_hash
        return None

    def adopt(self, life: Life, child: Session, oracle: SessionOracle, num_turns: int) -> None:
        new = Life(child, oracle, life.seed, life.retention, life.turns[:num_turns])
        self.lives.append(new)
        self.compare(life, new)

    def move(self, life: Life) -> None:
        """To a file, and back into the same engine."""
        path = self.folder / "session.tml"
        life.session.snapshot(path)
        life.session.close()
        life.session = self.engine.restore(path)
        life.oracle = life.oracle.restored()
        life.marks.clear()
        self.compare(life)

    def park(self, life: Life) -> None:
        """Out of memory into a file, and back when it is looked at."""
        if life.oracle.marks:
            with pytest.raises(errors.SessionBusy, match="mark"):
                life.session.park()
            self.compare(life)
            return
        life.marks.clear()
        life.session.park()
        assert self.engine.stats().num_parked == 1
        life.oracle = life.oracle.restored()
        self.compare(life)
        assert self.engine.stats().num_parked == 0

    def open(self) -> None:
        if len(self.lives) == MAX_LIVES:
            return
        seed, retention = self.dice.randrange(4), self.dice.choice(RETENTIONS)
        session = self.engine.open(seed=seed, retention=retention and Retention(*retention))
        oracle = SessionOracle(*self.pools, window=WINDOW, injected=INJECTED, retention=retention)
        self.lives.append(Life(session, oracle, seed, retention))
        self.compare(self.lives[-1])

    def close(self, life: Life) -> None:
        if len(self.lives) > 2:
            self.end(life)

    def end(self, life: Life) -> None:
        life.session.close()
        life.oracle.close()
        life.marks.clear()
        self.lives = [one for one in self.lives if one is not life]

    def replace(self, life: Life) -> None:
        """End a life that is too long and begin anew in its place."""
        life.session.close()
        life.oracle.close()
        life.marks.clear()
        life.turns.clear()
        life.session = self.engine.open(
            seed=life.seed, retention=life.retention and Retention(*life.retention)
        )
        life.oracle = SessionOracle(
            *self.pools, window=WINDOW, injected=INJECTED, retention=life.retention
        )

    def refusals(self, life: Life) -> None:
        """What a session must refuse, and what that must not change."""
        session = life.session
        others = [one for one in self.lives if one is not life and one.marks]
        with paused(session):
            turn = session.append(Chunk(is_idle=True))
            for act in (session.mark, session.fork, session.token_ids):
                with pytest.raises(errors.SessionBusy, match="a turn is still open"):
                    act()
            assert turn.cancel("none", wait=False)
        turn.result(WAIT_S)
        life.oracle.undone_turn(Input(), has_begun=False)
        with pytest.raises(errors.Conflict, match="expect_tip: expected 9999, the session is at"):
            session.append(Chunk(is_idle=True), expect_tip=9999)
        with pytest.raises(errors.InvalidArgument, match=r"Chunk\.audio: expected finite"):
            session.append(Chunk(audio=np.full(10, np.nan, np.float32)))
        if others:
            with pytest.raises(errors.InvalidArgument, match="taken on another sequence"):
                session.rewind(others[0].marks[0][0])
        self.compare(life)

    # Comparing.

    def compare(self, *lives: Life) -> None:
        for life in lives:
            session, oracle = life.session, life.oracle
            assert np.array_equal(session.token_ids(), oracle.state.ids)
            info = session.info()
            shown = (
                info.position,
                info.tick,
                info.media_ms,
                info.num_waiting,
                info.epoch,
                info.is_busy,
                info.num_pages,
                None if info.evicted is None else (info.evicted.start, info.evicted.end),
            )
            assert shown == (
                len(oracle.state.ids),
                oracle.state.tick,
                200 * oracle.state.tick,
                len(oracle.state.waiting),
                oracle.epoch,
                False,
                oracle.num_pages,
                oracle.evicted,
            )
            assert session.tip == info.position
            assert len(session.transcript()) == oracle.state.tick == len(life.turns)

    def audit(self) -> None:
        """Every page of every session, counted twice."""
        store = self.model.store

        def look() -> Any:
            for life in self.lives:
                # Marks the collector took are given up when a sequence is next used.
                life.session._seat.sequence._idle_slot("audit")
            return store.audit()

        report = look() if self.engine.is_closed else self.engine._host.loop.call(look)
        assert report.num_sequences == len(self.lives)
        assert report.num_marks == sum(life.oracle.num_marks for life in self.lives)
        for pool, mine, held, shared in (
            (store.global_pool, self.pools[0], "global_pages_held", "global_pages_shared"),
            (store.sliding_pool, self.pools[1], "sliding_pages_held", "sliding_pages_shared"),
        ):
            assert getattr(report, held) == mine.num_held
            assert getattr(report, shared) == mine.num_shared
            assert pool.free_pages == pool.num_pages - mine.num_held

    def live_again(self, life: Life) -> None:
        """The turns that count, alone in a new session: the same ids, the same hash."""
        retention = life.retention and Retention(*life.retention)
        with self.engine.open(seed=life.seed, retention=retention) as session:
            for one in life.turns:
                given, _ = chunk(one.number)
                if one.ending == "cut":
                    with paused(session):
                        turn = session.append(given)
                        assert turn.cancel("input", wait=False)
                else:
                    turn = session.append(given, answer=one.ending != "quiet")
                turn.result(WAIT_S)
            assert np.array_equal(session.token_ids(), life.session.token_ids())
            assert session.info().state_hash == life.session.info().state_hash
            # What is said next goes on from the same voice.
            assert session._seat.state.to_dict() == life.session._seat.state.to_dict()


def live(num_operations: int, seed: int, folder: Path, *, speaks: bool = False) -> World:
    world = World(load_tiny(speaks=speaks), seed, folder)
    while num_operations:
        count = min(CHAPTER, num_operations)
        world.live(count)
        num_operations -= count
    report = world.model.store.audit()
    assert (report.num_sequences, report.global_pages_held, report.sliding_pages_held) == (0, 0, 0)
    assert [one for one in threading.enumerate() if one.name == "tml-engine"] == []
    return world


@pytest.mark.parametrize("seed", [1, 2])
def test_sessions_are_what_the_oracle_says(seed: int, tmp_path: Path) -> None:
    world = live(1200, seed, tmp_path)
    assert min(world.counts.values()) > 0
    assert world.num_turns > 500


def test_sessions_that_speak_are_what_the_oracle_says(tmp_path: Path) -> None:
    world = live(1000, 4, tmp_path, speaks=True)
    assert min(world.counts.values()) > 0
    assert world.num_spoken > 30


@pytest.mark.slow
def test_a_hundred_thousand_operations(tmp_path: Path) -> None:
    world = live(100_000, 3, tmp_path)
    assert sum(world.counts.values()) >= 99_000
    assert min(world.counts.values()) > 1000
