"""Random lives of sessions: whatever was done, undone and branched, only what counts remains."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from session_kit import WAIT_S, assert_nothing_left, engine_threads, nano, noise, paused
from tml_core import Chunk, Engine, Session, SessionMark


@dataclass
class Life:
    """A session and the turns that count: (chunk number, whether its output was dropped)."""

    session: Session
    seed: int
    turns: list[tuple[int, bool]] = field(default_factory=list)
    marks: list[tuple[SessionMark, int]] = field(default_factory=list)


def chunk(number: int) -> Chunk:
    """Sound of many lengths, text over the budget, or nothing."""
    kind = number % 4
    if kind == 0:
        return Chunk(is_idle=True)
    if kind == 1:
        return Chunk(text=f"typed {number} " * (number % 9 + 1))
    return noise(number, 1 + 977 * number % 3200)


def replayed(life: Life) -> tuple[list[int], str, int]:
    """What counts, done again in a session of its own."""
    with Session(nano(), seed=life.seed) as session:
        for number, is_dropped in life.turns:
            if is_dropped:
                with paused(session):
                    turn = session.append(chunk(number))
                    assert turn.cancel("input", wait=False)
            else:
                turn = session.append(chunk(number))
            turn.result(WAIT_S)
        return session.token_ids().tolist(), session.info().state_hash, session.info().tick


def act(life: Life, lives: list[Life], engine: Engine, dice: random.Random, path: Path) -> None:
    session = life.session
    match dice.choice(["append"] * 4 + ["cancel", "undo", "mark", "rewind", "fork", "restore"]):
        case "append":
            number = dice.randrange(1000)
            session.append(chunk(number)).result(WAIT_S)
            life.turns.append((number, False))
        case "cancel":
            number = dice.randrange(1000)
            is_dropped = session.append(chunk(number)).cancel("input")
            life.turns.append((number, is_dropped))
        case "undo":
            number = dice.randrange(1000)
            if not session.append(chunk(number)).cancel("none"):
                life.turns.append((number, False))
        case "mark":
            life.marks.append((session.mark(), len(life.turns)))
        case "rewind" if life.marks:
            index = dice.randrange(len(life.marks))
            mark, num_turns = life.marks[index]
            session.rewind(mark)
            del life.turns[num_turns:], life.marks[index + 1 :]
        case "fork" if len(lives) < 4:
            lives.append(Life(session.fork(), life.seed, list(life.turns)))
        case "restore":
            session.snapshot(path)
            session.close()
            life.session, life.marks = engine.restore(path), []


@pytest.mark.parametrize("seed", range(5))
def test_only_what_counts_remains(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    with Engine(nano(), max_sessions=5) as engine:
        lives = [Life(engine.open(seed=one), one) for one in range(2)]
        for _ in range(50):
            act(dice.choice(lives), lives, engine, dice, tmp_path / "s.tml")
        nano().store.audit()
        ends = [
            (
                one.session.token_ids().tolist(),
                one.session.info().state_hash,
                one.session.info().tick,
            )
            for one in lives
        ]
    assert engine_threads() == []
    assert_nothing_left()
    for life, end in zip(lives, ends, strict=True):
        assert replayed(life) == end
