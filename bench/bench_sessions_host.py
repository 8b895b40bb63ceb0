"""What a micro-turn costs beside kernels: the engine thread's work between and around them.

Nano, sessions of one engine, 200 ms of sound a tick, all ticks of a round handed over while the
engine stands still, so that they share their steps. Two kinds of tick: "listening" (the input half
alone: one step) and "talking" (eight tokens: nine steps). Kernels are the calls of encoders,
decoder and sampler; all else the thread does is host work, in wall time: measure only where nothing
else runs. A line gives the median and the least of the rounds, for one session's turn. Appending is
the caller's work (sound to mel levels, above all) and stands beside it. The last line is of turns
10 and 10,000 of one session behind a retention window.
"""

import statistics
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from _notes import note
from tml_core import Chunk, Engine, Model, Retention, Session, load_model

ROUNDS, WARM_UP = 60, 20
AIM_US = {1: 300, 16: 150}
FIRST_TURN, LAST_TURN, PERIOD = 10, 10_000, 200


class Cost(NamedTuple):
    """Of one turn of one session, in microseconds, round by round."""

    host_us: list[float]
    kernel_us: list[float]
    append_us: list[float]
    num_tokens: float


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("nano", max_sequences=16)


@pytest.mark.parametrize("kind", ["listening", "talking"])
@pytest.mark.parametrize("num_sessions", [1, 16])
def test_host_work(
    model: Model, num_sessions: int, kind: str, benchmark: Any, request: pytest.FixtureRequest
) -> None:
    chunks = _chunks()
    with Engine(model) as engine:
        sessions = [engine.open(seed=i) for i in range(num_sessions)]
        for i in range(WARM_UP):
            _tick(engine, sessions, chunks[i % len(chunks)], kind)
        found: list[tuple[float, float, float, float]] = []

        def round_() -> None:
            chunk = chunks[len(found) % len(chunks)]
            found.append(_tick(engine, sessions, chunk, kind))

        benchmark.pedantic(round_, rounds=ROUNDS, iterations=1, warmup_rounds=0)
    host, kernel, append, tokens = (list(column) for column in zip(*found, strict=True))
    cost = Cost(host, kernel, append, statistics.mean(tokens))
    note(
        request.config,
        f"host work, {num_sessions} {kind}",
        partial(_noted, cost, AIM_US[num_sessions]),
    )


def test_host_work_over_turns(model: Model, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """A turn late in a long session costs what it cost early."""
    chunks = _chunks()
    found: dict[int, float] = {}
    with Engine(model) as engine, engine.open(retention=Retention(1024)) as session:

        def live() -> None:
            for number in (FIRST_TURN, LAST_TURN):
                while session.info().tick < number:
                    session.append(chunks[0], answer=False).result()
                costs = [_tick(engine, [session], chunks[1], "listening") for _ in range(PERIOD)]
                found[number] = statistics.median(one[0] for one in costs)

        benchmark.pedantic(live, rounds=1, iterations=1)
    first, last = found[FIRST_TURN], found[LAST_TURN]
    text = f"turn {FIRST_TURN}: {first:.0f} us, turn {LAST_TURN}: {last:.0f} us, {last / first:.2f}"
    note(request.config, "host work over turns", lambda: (text, {"first": first, "last": last}))


def _tick(
    engine: Engine, sessions: Sequence[Session], chunk: Chunk, kind: str
) -> tuple[float, float, float, float]:
    """One turn of every session at once: host, kernel and append time and tokens of each."""
    before = engine.stats()
    reached, release = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        release.wait()

    engine._host.loop._post(hold)
    reached.wait()
    begin_s = time.perf_counter()
    turns = [one.append(chunk, answer=kind == "talking") for one in sessions]
    append_s = time.perf_counter() - begin_s
    release.set()
    results = [turn.result() for turn in turns]
    # The thread's last words about this round come before it looks for the next message.
    engine._host.loop.call(lambda: None)
    after = engine.stats()
    scale = 1e6 / len(sessions)
    return (
        scale * (after.host_s - before.host_s),
        scale * (after.kernel_s - before.kernel_s),
        scale * append_s,
        statistics.mean(one.stats.num_output_tokens for one in results),
    )


def _chunks() -> list[Chunk]:
    random = np.random.default_rng(0)
    return [Chunk(audio=random.uniform(-0.1, 0.1, 3200).astype(np.float32)) for _ in range(ROUNDS)]


def _noted(cost: Cost, aim_us: float) -> tuple[str, dict[str, Any]]:
    median, least = statistics.median(cost.host_us), min(cost.host_us)
    text = (
        f"{median:.0f} us a turn (least {least:.0f}, aim {aim_us}) beside "
        f"{statistics.median(cost.kernel_us):.0f} us in kernels, {cost.num_tokens:.1f} tokens; "
        f"append {statistics.median(cost.append_us):.0f} us"
    )
    return text, {
        "host_us": median,
        "least_host_us": least,
        "aim_us": aim_us,
        "kernel_us": statistics.median(cost.kernel_us),
        "append_us": statistics.median(cost.append_us),
        "tokens": cost.num_tokens,
    }
