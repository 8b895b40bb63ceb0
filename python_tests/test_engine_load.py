"""Under load: policies that keep the clock, admission, readers that stay away, and what is counted.

Decisions are driven by a cost model put in place by the test; nothing here measures time.
"""

from typing import Any

import pytest

import tml_core.engine.turn as turn_module
from byte_model import BYTE_MODEL
from session_kit import (
    END_OUT,
    SILENCE,
    WAIT_S,
    nano,
    noise,
    paused,
    scripted,
)
from tml_core import (
    Chunk,
    Engine,
    EngineStats,
    Notice,
    Retention,
    Session,
    TextToken,
    errors,
    load_model,
)
from tml_core.engine.cost_model import CostModel

pytestmark = pytest.mark.usefixtures("nothing_leaks")


class Expected(CostModel):
    """Steps are expected to take ``seconds`` whatever they really take."""

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self._seconds = list(seconds)

    def step_s(self, num_tokens: int, num_rows: int) -> float:
        del num_tokens, num_rows
        return self._seconds.pop(0) if len(self._seconds) > 1 else self._seconds[0]


def with_costs(session: Session, costs: CostModel) -> None:
    session._host.loop.costs = costs


def notices(events: tuple[Any, ...]) -> list[Any]:
    return [one for one in events if isinstance(one, Notice)]


# Policies.


@pytest.mark.parametrize("policy", ["emit_silence", "shrink_output"])
def test_an_output_whose_first_token_would_be_late_is_not_begun(policy: Any) -> None:
    with Session(nano(), seed=1, degrade=policy) as session, Session(nano(), seed=1) as alone:
        session.append(noise(0), deadline_ms=1e6).result(WAIT_S)
        alone.append(noise(0)).result(WAIT_S)
        with_costs(session, Expected(1e3))
        result = session.append(noise(1)).result(WAIT_S)
        (notice,) = notices(result.events)
        assert (notice.kind, notice.data) == ("degraded", {"policy": policy})
        assert (result.done.reason, result.done.token_ids) == ("degraded", (SILENCE,))
        assert result.stats.num_output_tokens == 0
        with_costs(session, Expected(0.0))
        answered = session.append(noise(2), deadline_ms=1e6).result(WAIT_S)
        # The same decisions one by one give the same bits.
        alone.append(noise(1), answer=False).result(WAIT_S)
        assert alone.append(noise(2)).result(WAIT_S).done.token_ids == answered.done.token_ids
        assert alone.info().state_hash == session.info().state_hash
        assert session.transcript()[1].reason == "degraded"


def test_an_output_is_closed_when_its_next_token_would_be_late() -> None:
    with Session(nano(), seed=1, degrade="shrink_output") as session:
        with_costs(session, Expected(0.0, 0.0, 0.0, 1e3))
        with scripted([104, 105, 106, 107]):
            result = session.append(noise(0), deadline_ms=1e5).result(WAIT_S)
        said = [one.token_id for one in result.events if isinstance(one, TextToken)]
        assert said == [104, 105, 106]
        (notice,) = notices(result.events)
        assert notice.data == {"policy": "shrink_output", "num_tokens": 3}
        assert result.events[-2] is notice
        assert (result.done.reason, result.done.token_ids) == ("degraded", (*said, END_OUT))
        hashed = session.append(noise(1), answer=False).result(WAIT_S)
        assert hashed.done.reason == "input"
        state = session.info().state_hash
        assert session._host.loop.stats().degraded["shrink_output"] == 1
    with Session(nano(), seed=1) as alone:
        with scripted([104, 105, 106, END_OUT]):
            alone.append(noise(0)).result(WAIT_S)
        alone.append(noise(1), answer=False).result(WAIT_S)
        assert alone.info().state_hash == state


@pytest.mark.parametrize("policy", ["none", "coalesce_input"])
def test_without_such_a_policy_a_late_turn_is_answered(policy: Any) -> None:
    with Session(nano(), degrade=policy) as session:
        with_costs(session, Expected(1e3))
        result = session.append(noise(0), deadline_ms=1e-6).result(WAIT_S)
        assert notices(result.events) == []
        assert result.done.reason != "degraded"
        assert result.stats.missed
        assert result.stats.slack_ms is not None and result.stats.slack_ms < 0
        assert session._host.loop.stats().misses == 1
        result = session.append(noise(0), deadline_ms=None).result(WAIT_S)
        assert (result.stats.slack_ms, result.stats.missed) == (None, False)


# Long inputs.


def test_a_long_input_does_not_hold_up_others() -> None:
    text = "w" * 3000
    with Engine(nano()) as engine:
        engine._host.loop.costs = Expected(0.0)
        with engine.open(seed=1) as talking:
            chunks = [noise(i) for i in range(3)]
            alone = [talking.append(one).result(WAIT_S).done.token_ids for one in chunks]
        with engine.open(seed=1) as talking, paused_open(engine, text) as opening:
            results = [talking.append(one).result(WAIT_S) for one in chunks]
            opening.append(noise(5)).result(WAIT_S)
        assert [one.done.token_ids for one in results] == alone
    with Session(nano(), system=text) as reference:
        assert reference.append(noise(5)).result(WAIT_S).done.token_ids


class paused_open:
    """A session whose long instructions go in while others talk."""

    def __init__(self, engine: Engine, system: str) -> None:
        self._session = engine.open(system=system, seed=2)

    def __enter__(self) -> Session:
        return self._session

    def __exit__(self, *_: object) -> None:
        self._session.close()


def test_a_long_input_goes_in_by_pieces_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "The quick brown fox. " * 60
    sizes: list[int] = []
    run = nano().runner.run

    def counting(inputs: Any) -> Any:
        sizes.append(sum(len(one.token_ids) for one in inputs))
        return run(inputs)

    with Session(nano(), system=text, seed=4) as session:
        whole = session.append(noise(0)).result(WAIT_S).done.token_ids
        hashed = session.info().state_hash
    monkeypatch.setattr(nano().runner, "run", counting)
    monkeypatch.setattr(nano().runner, "max_step_tokens", 100)
    with Session(nano(), system=text, seed=4) as session:
        assert session.append(noise(0)).result(WAIT_S).done.token_ids == whole
        assert session.info().state_hash == hashed
    assert max(sizes) == 100
    assert len([one for one in sizes if one == 100]) > 5


def test_a_long_input_can_be_cancelled_half_way() -> None:
    words = "a" * 64  # as much as one tick takes
    with Session(nano()) as session, pytest.MonkeyPatch.context() as patch:
        session.append(noise(0)).result(WAIT_S)
        before = session.info()
        patch.setattr(nano().runner, "max_step_tokens", 16)
        run, turns = nano().runner.run, []

        def cancelling(inputs: Any) -> Any:
            if len(calls) == 2:
                turns[0].cancel("none", wait=False)
            calls.append(1)
            return run(inputs)

        calls: list[int] = []
        patch.setattr(nano().runner, "run", cancelling)
        with paused(session):
            turns.append(session.append(Chunk(text=words)))
        assert turns[0].result(WAIT_S).done.reason == "cancelled"
        assert len(calls) == 3
        after = session.info()
        assert (after.position, after.state_hash) == (before.position, before.state_hash)
        assert after.num_pages == before.num_pages


# Admission.


def test_admission_counts_what_fits_one_tick() -> None:
    with Engine(nano(), admission="capacity") as engine:
        assert engine.stats().capacity is None
        first = engine.open()
        first.append(noise(0)).result(WAIT_S)
        costs = engine._host.loop.costs = CostModel()
        for i in range(200):  # a position takes 2 ms, and there is nothing else
            costs.learn(1 + i % 16, 1, 0.002 * (1 + i % 16))
        with scripted([SILENCE]):
            first.append(noise(1)).result(WAIT_S)
        counters = engine._host.loop.counters
        counters.tick_input, counters.tick_output = 8.0, 4.0
        capacity = engine.stats().capacity
        assert capacity is not None and 6 <= capacity <= 8  # 24 ms each
        sessions = [engine.open() for _ in range(capacity - 1)]
        with pytest.raises(
            errors.Overloaded,
            match=f"engine: {capacity} sessions are open, and with one more a tick in a hundred",
        ) as caught:
            engine.open()
        assert (caught.value.reason, caught.value.retry_after_ms) == ("capacity", 1000)
        with pytest.raises(errors.Overloaded, match="engine: "):
            first.fork()
        assert engine.stats().refused == 2
        sessions[0].close()
        with engine.open():
            assert engine.num_sessions == capacity
    with pytest.raises(errors.InvalidArgument, match="admission: expected 'none' or 'capacity'"):
        Engine(nano(), admission="some")  # type: ignore[arg-type]


def test_a_slow_machine_still_admits_one_session() -> None:
    with Engine(nano(), admission="capacity") as engine:
        loop = engine._host.loop
        for _ in range(20):
            loop.costs.learn(1, 1, 10.0)
        loop.counters.note_tick(8, 4)
        with engine.open() as session:
            assert engine.stats().capacity == 0
            session.append(noise(0)).result(WAIT_S)
            with pytest.raises(errors.Overloaded, match="engine: 1 sessions are open"):
                engine.open()


def test_the_number_of_sessions_is_bounded_without_admission() -> None:
    with Engine(nano(), max_sessions=1) as engine, engine.open():
        with pytest.raises(errors.PoolExhausted, match="engine: all 1 sessions are open"):
            engine.open()
        assert engine.stats().refused == 1


# Readers.


def test_a_reader_that_stays_away_loses_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module, "MAX_UNREAD", 2)
    monkeypatch.setattr(turn_module, "READER_PATIENCE_S", 0.0)
    with Engine(nano()) as engine, engine.open() as session, engine.open() as other:
        session.append(noise(0)).result(WAIT_S)
        position = session.tip
        with scripted([104, 105, 106, 107, END_OUT]):
            turn = session.append(noise(1))
            with pytest.raises(errors.Overloaded, match="turn: 2 events were not read") as caught:
                # Not read, only looked at: the engine goes by what was taken.
                while not turn.is_done:
                    session.info()
                list(turn)
        assert caught.value.reason == "reader"
        with pytest.raises(errors.Overloaded, match="turn: 2 events were not read"):
            turn.result(WAIT_S)
        assert session.tip == position == session.info().position
        assert not session.is_busy
        session.append(noise(1)).result(WAIT_S)
        other.append(noise(1)).result(WAIT_S)
        assert engine.stats().turns["failed"] == 1


# Counting.


def test_stats_count_and_gauges_return_to_zero() -> None:
    model = load_model(BYTE_MODEL, max_sequences=3)
    with Engine(model) as engine:
        before = engine.stats()
        assert isinstance(before, EngineStats)
        assert (before.num_sessions, before.num_turns) == (0, 0)
        assert before.global_pages_held == before.sliding_pages_held == 0
        sessions = [engine.open(seed=i, retention=Retention(512)) for i in range(3)]
        for i in range(4):
            turns = [one.append(noise(i)) for one in sessions]
            results = [one.result(WAIT_S) for one in turns]
        with paused(sessions[0]):
            cancelled = sessions[0].append(noise(9))
            assert engine.stats().num_turns == 1
            cancelled.cancel("none", wait=False)
        cancelled.result(WAIT_S)
        stats = engine.stats()
        assert stats.num_sessions == 3
        assert stats.turns == {"done": 12, "cancelled": 1, "failed": 0}
        assert stats.global_pages_held == stats.sliding_pages_held == 3
        assert stats.global_pages_free + 3 == before.global_pages_free
        assert stats.steps > 0 and stats.step_tokens > stats.steps
        assert stats.kernel_s > 0 and stats.host_s > 0 and stats.host_us_per_turn > 0
        assert max(one.stats.max_batch for one in results) <= 3
        for one in results:
            assert one.stats.delivered_ms is not None and one.stats.total_ms is not None
            assert one.stats.delivered_ms >= one.stats.total_ms
            assert one.stats.deadline_ms == 200
        for session in sessions:
            session.close()
        after = engine.stats()
        assert (after.num_sessions, after.num_turns) == (0, 0)
        assert after.global_pages_held == after.sliding_pages_held == 0
        assert after.turns == stats.turns
    assert engine.stats().num_sessions == 0


def test_recent_is_the_end_of_the_transcript() -> None:
    with Session(nano()) as session:
        assert session.recent(3) == ()
        for i in range(4):
            session.append(noise(i)).result(WAIT_S)
        for count in (0, 1, 3, 4, 9):
            assert session.recent(count) == session.transcript()[-count:] if count else True
        assert session.recent(0) == session.recent(-1) == ()
        assert [one.tick for one in session.recent(2)] == [2, 3]


def test_every_session_gives_what_it_gives_alone_under_any_schedule() -> None:
    with Engine(nano()) as engine:
        chunks = [[noise(10 * s + i) for i in range(4)] for s in range(5)]
        alone = []
        for number, own in enumerate(chunks):
            with engine.open(seed=number) as session:
                ids = [session.append(one).result(WAIT_S).done.token_ids for one in own]
                alone.append((ids, session.info().state_hash))
        sessions = [engine.open(seed=number) for number in range(5)]
        found: list[list[tuple[int, ...]]] = [[] for _ in sessions]
        for i in range(4):
            # Deadlines in another order than the appends.
            turns = [
                session.append(own[i], deadline_ms=50 + 37 * ((3 * number + i) % 5))
                for number, (session, own) in enumerate(zip(sessions, chunks, strict=True))
            ]
            for ids, turn in zip(found, turns, strict=True):
                ids.append(turn.result(WAIT_S).done.token_ids)
        hashes = [session.info().state_hash for session in sessions]
        assert list(zip(found, hashes, strict=True)) == alone
