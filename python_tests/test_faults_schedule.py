"""Whatever the scheduler decides, a session's bits are those of the session alone, given what was
decided: which steps it shared, how its input was cut, what a deadline cost it."""

import random
from dataclasses import dataclass
from typing import Any

import pytest

from faults_kit import WAIT_S, bits, clean_engine, noise
from session_kit import paused
from tml_core import Chunk, Engine, Notice, Session, Turn
from tml_core.engine.job import Job

POLICIES = ("none", "emit_silence", "shrink_output", "coalesce_input")
DEADLINES_MS = (None, 200.0, 20.0, 4.0, 1.0)

pytestmark = pytest.mark.usefixtures("nothing_leaks_of_faults")


@dataclass(frozen=True)
class Decided:
    """A turn as it went: its input, how it ended, how many tokens were drawn for it."""

    number: int
    reason: str
    num_drawn: int
    token_ids: tuple[int, ...]


def chunk(number: int) -> Chunk:
    """Sound, or more text than goes into a tick."""
    return Chunk(text=f"{number} " * 9) if number % 5 == 0 else noise(number, 200 + number % 3000)


def busy_life(engine: Engine, dice: random.Random) -> list[tuple[Session, list[Decided]]]:
    """Six sessions under three policies and all deadlines, in no order."""
    sessions = [
        engine.open(seed=seed, degrade=POLICIES[seed % 4])  # type: ignore[arg-type]
        for seed in range(6)
    ]
    decided: list[list[Decided]] = [[] for _ in sessions]
    for _ in range(25):
        turns: list[tuple[int, int, Turn]] = []
        with paused(sessions[0]):
            for index in dice.sample(range(6), dice.randint(1, 6)):
                # Several at once where they may wait.
                for _ in range(dice.randint(1, 3) if index % 4 == 3 else 1):
                    number, deadline_ms = dice.randrange(1000), dice.choice(DEADLINES_MS)
                    turn = sessions[index].append(chunk(number), deadline_ms=deadline_ms)
                    turns.append((index, number, turn))
        for index, number, turn in turns:
            result = turn.result(WAIT_S)
            done = result.done
            is_reported = any(
                isinstance(one, Notice) and one.kind == "degraded" for one in result.events
            )
            assert is_reported == (done.reason == "degraded")
            num_drawn = result.stats.num_output_tokens
            decided[index].append(Decided(number, done.reason, num_drawn, done.token_ids))
    return list(zip(sessions, decided, strict=True))


def lived_again(engine: Engine, seed: int, turns: list[Decided]) -> tuple[str, list[int]]:
    """The same decisions for a session that is alone and has all the time there is."""
    with (
        pytest.MonkeyPatch.context() as patch,
        engine.open(seed=seed, degrade="shrink_output") as session,
    ):
        stop_at = [0]

        def would_miss(self: Job, policy: str, *_: Any) -> bool:
            num_drawn = self.turn.clock.num_output_tokens
            return policy == "shrink_output" and 0 < stop_at[0] <= num_drawn

        patch.setattr(Job, "_would_miss", would_miss)
        for one in turns:
            is_silenced = one.reason == "degraded" and not one.num_drawn
            stop_at[0] = one.num_drawn if one.reason == "degraded" else 0
            turn = session.append(chunk(one.number), deadline_ms=None, answer=not is_silenced)
            done = turn.result(WAIT_S).done
            assert done.token_ids == one.token_ids
        return bits(session)


@pytest.mark.parametrize("seed", range(3))
def test_bits_under_every_decision(seed: int) -> None:
    with clean_engine() as engine:
        lives = busy_life(engine, random.Random(seed))
        found = [bits(session) for session, _ in lives]
        num_degraded = sum(one.reason == "degraded" for _, turns in lives for one in turns)
        assert sum(engine.stats().degraded.values()) == num_degraded
        for session, _ in lives:
            session.close()
        reasons = {one.reason for _, turns in lives for one in turns}
        assert "degraded" in reasons and len(reasons) > 1
        for number, ((_, turns), went) in enumerate(zip(lives, found, strict=True)):
            assert lived_again(engine, number, turns) == went
