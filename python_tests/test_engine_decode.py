"""Steps of single tokens: they share fixed memory, keep their books late, and recover exactly."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from byte_model import BYTE_MODEL
from session_kit import (
    END_OUT,
    SILENCE,
    WAIT_S,
    nano,
    noise,
    paused,
    scripted,
    step_by_step,
)
from tml_core import Chunk, Engine, Model, Retention, SamplingParams, Session, errors, load_model
from tml_core.contract import PAGE_LEN
from tml_core.engine.sampler import RowBuffers, SampleRequest, sample_rows
from tml_core.model import backbone as backbone_module
from tml_core.model.token_loop import TokenLoop
from tml_core.ops import hmlp as hmlp_module

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def lives(engine: Engine, num_sessions: int, num_ticks: int) -> list[tuple[Any, ...]]:
    """What sessions say and where they stand, living at the same time."""
    sessions = [engine.open(seed=i, retention=Retention(256)) for i in range(num_sessions)]
    found: list[list[tuple[int, ...]]] = [[] for _ in sessions]
    for tick in range(num_ticks):
        turns = [one.append(noise(100 * i + tick)) for i, one in enumerate(sessions)]
        for ids, turn in zip(found, turns, strict=True):
            ids.append(turn.result(WAIT_S).done.token_ids)
    stands = [(ids, one.info()) for ids, one in zip(found, sessions, strict=True)]
    for one in sessions:
        one.close()
    return stands


@pytest.mark.parametrize("fails_in", [1, 2, 3, 5, 9])
def test_a_step_that_fails_once_changes_nothing(
    fails_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(nano()) as engine:
        expected = lives(engine, 3, 3)
        step, calls = nano().backbone.step, []

        def failing(x_TD: Any, batch: Any, kv: Any, **out: Any) -> Any:
            calls.append(batch.num_seqs)
            h_TD = step(x_TD, batch, kv, **out)
            # Of one alone it is known whose fault it is.
            if sum(one > 1 for one in calls) == fails_in and batch.num_seqs > 1:
                # All is written, and more than that.
                for slot in batch.slots.tolist():
                    kv.conv_rows[slot].fill_(float("nan"))
                raise RuntimeError("the step failed")
            return h_TD

        step_by_step(monkeypatch)
        monkeypatch.setattr(nano().backbone, "step", failing)
        assert lives(engine, 3, 3) == expected
        assert len(calls) > fails_in
        assert engine.stats().turns["failed"] == 0


def out_of_step(engine: Engine, num_sessions: int, num_ticks: int) -> list[tuple[Any, ...]]:
    """Every session goes on as soon as its own turn is over: inputs come in beside tokens."""
    found: list[Any] = [None] * num_sessions

    def live(number: int) -> None:
        with engine.open(seed=number) as session:
            ids = [
                session.append(noise(100 * number + tick, 800 * (1 + (number + tick) % 4)))
                .result(WAIT_S)
                .done.token_ids
                for tick in range(num_ticks)
            ]
            found[number] = ids, session.info().state_hash

    threads = [threading.Thread(target=live, args=(i,)) for i in range(num_sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("every", [0, 5, 2])
def test_inputs_beside_tokens_give_the_bits_of_sessions_alone(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every fifth, or every second, step fails once it has written everything."""
    with Engine(nano()) as engine:
        alone = []
        for number in range(4):
            with engine.open(seed=number) as session:
                ids = [
                    session.append(noise(100 * number + tick, 800 * (1 + (number + tick) % 4)))
                    .result(WAIT_S)
                    .done.token_ids
                    for tick in range(4)
                ]
                alone.append((ids, session.info().state_hash))
        step, calls, kinds = nano().backbone.step, [], set()

        def failing(x_TD: Any, batch: Any, kv: Any, **out: Any) -> Any:
            calls.append(1)
            kinds.add((batch.num_seqs > 1, batch.num_tokens > batch.num_seqs))
            h_TD = step(x_TD, batch, kv, **out)
            # Alone a turn is not tried again.
            if every and len(calls) % every == 0 and batch.num_seqs > 1:
                for slot in batch.slots.tolist():
                    kv.conv_rows[slot].fill_(float("nan"))
                raise RuntimeError("the step failed")
            return h_TD

        step_by_step(monkeypatch)
        monkeypatch.setattr(nano().backbone, "step", failing)
        assert out_of_step(engine, 4, 4) == alone
        assert (True, True) in kinds
        assert engine.stats().turns["failed"] == 0


def test_a_step_of_single_tokens_writes_where_the_last_of_as_many_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Engine(nano()) as engine:
        expected = lives(engine, 3, 2)
    step, last, reused = nano().backbone.step, [torch.empty(0)], set()

    def noting(x_TD: Any, batch: Any, kv: Any, **out: Any) -> Any:
        if not out:
            return step(x_TD, batch, kv)  # inputs
        is_reused = out["out_TD"] is not None
        assert is_reused == (len(last[0]) == batch.num_seqs)
        assert not is_reused or out["out_TD"] is last[0]
        reused.add(is_reused)
        last[0] = step(x_TD, batch, kv, **out)
        return last[0]

    with Engine(nano()) as engine:
        step_by_step(monkeypatch)
        monkeypatch.setattr(nano().backbone, "step", noting)
        assert lives(engine, 3, 2) == expected
        assert engine.stats().turns["failed"] == 0
    assert reused == {False, True}


def test_a_row_that_cannot_be_sampled_ends_only_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(nano()) as engine:
        expected = lives(engine, 3, 2)
        sample = nano().backbone.sample

        def picky(h_BD: Any, rows: Any, **out: Any) -> Any:
            if 1 in rows.seed_B.tolist():
                raise RuntimeError("seed 1 is unlucky")
            return sample(h_BD, rows, **out)

        step_by_step(monkeypatch)
        monkeypatch.setattr(nano().backbone, "sample", picky)
        sessions = [engine.open(seed=i, retention=Retention(256)) for i in range(3)]
        for tick in range(2):
            turns = [one.append(noise(100 * i + tick)) for i, one in enumerate(sessions)]
            with pytest.raises(RuntimeError, match="seed 1 is unlucky"):
                turns[1].result(WAIT_S)
            for i in (0, 2):
                assert turns[i].result(WAIT_S).done.token_ids == expected[i][0][tick]
        assert sessions[1].info().position == 0
        assert [sessions[i].info().state_hash for i in (0, 2)] == [
            expected[i][1].state_hash for i in (0, 2)
        ]


@pytest.mark.parametrize("keep", ["none", "input"])
@pytest.mark.parametrize("first", range(0, PAGE_LEN, 37))
def test_cancels_on_either_side_of_a_page(first: int, keep: Any) -> None:
    with Session(nano(), seed=2, system="a" * (first + 1)) as session:
        base = nano().store.sliding_pool.free_pages
        for draw in range(0, 7, 3):
            before = session.info()
            with scripted([104] * 7 + [END_OUT], held=True) as script:
                turn = session.append(noise(0))
                for _ in range(draw):
                    script.reach()
                    script.step()
                script.reach()
                turn.cancel(keep, wait=False)
                script.step()
                turn.result(WAIT_S)
            after = session.info()
            if keep == "none":
                assert (after.position, after.state_hash) == (before.position, before.state_hash)
            else:
                # What was closed stands in the sequence, and goes through the model with the next.
                assert after.position == before.position + 7
                assert session.token_ids()[-1] == END_OUT
            nano().store.audit()
        if keep == "none":
            assert nano().store.sliding_pool.free_pages == base


def test_without_a_page_only_the_turn_that_needs_one_fails() -> None:
    model = load_model(BYTE_MODEL, max_sequences=2, max_positions=1024)
    with Engine(model) as engine:
        with engine.open() as probe:
            used = probe.append(noise(0)).result(WAIT_S).stats.num_input_tokens
        # One stands so that its output crosses the page; the other has room.
        system = "a" * (PAGE_LEN - used - 2)
        with engine.open(system=system) as crossing, engine.open(system="b") as other:
            pool = model.store.global_pool
            spare = pool.alloc(pool.free_pages)
            try:
                with pytest.MonkeyPatch.context() as patch:
                    step_by_step(patch)
                    tokens = torch.tensor([104, 104]), torch.zeros(2)
                    patch.setattr(
                        model.backbone,
                        "sample",
                        lambda h_BD, _, **_out: (tokens[0][: len(h_BD)], tokens[1][: len(h_BD)]),
                    )
                    turns = [crossing.append(noise(0)), other.append(noise(1))]
                    with pytest.raises(errors.PoolExhausted, match="global pages: appending"):
                        turns[0].result(WAIT_S)
                    assert len(turns[1].result(WAIT_S).done.token_ids) == 9
            finally:
                pool.release(spare)
            assert crossing.info().position == len(system)
            crossing.append(noise(0)).result(WAIT_S)
            model.store.audit()


def test_buffers_hold_what_single_rows_would() -> None:
    vocab = nano().vocab_size
    masks = [torch.full((-(-vocab // 32),), one, dtype=torch.int32) for one in (-1, 7, 12)]
    kinds = [SamplingParams(), SamplingParams(0.5, 3, 0.9), SamplingParams(temperature=0)]
    buffers = RowBuffers(4, len(masks[0]))
    random = torch.Generator().manual_seed(0)
    for _ in range(40):
        count = int(torch.randint(1, 5, (), generator=random))
        picks = torch.randint(0, 3, (count, 3), generator=random).tolist()
        requests = [
            SampleRequest(kinds[a], (0, 5, 2**64 - 3)[b], 17 * a + b, masks[c]) for a, b, c in picks
        ]
        found, expected = buffers.fill(requests), sample_rows(requests)
        for name in vars(expected):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_the_last_words_of_a_turn_count_before_it_is_seen_to_end() -> None:
    model: Model = nano()
    with Engine(model) as engine, engine.open() as session:
        with scripted([104, 105, END_OUT, SILENCE]):
            turn = session.append(noise(0))
            stats = turn.result(WAIT_S).stats
            # Tick, four frames, out, two words; what closed them waits for the next input.
            assert stats.position == session.info().position - 1 == 8
            assert session.append(noise(1)).result(WAIT_S).stats.num_input_tokens == 7
        assert engine.stats().step_tokens == 6 + 2 + 7


def test_steps_without_python_give_what_steps_with_it_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several turns that only draw tokens; in fewer calls than steps."""
    with monkeypatch.context() as patch, Engine(nano()) as engine:
        step_by_step(patch)
        expected = lives(engine, 4, 4)
    run, calls = TokenLoop.run, []

    def noting(self: TokenLoop, num_rows: int, table: Any, _limit_s: float) -> Any:
        calls.append(run(self, num_rows, table, 100.0))  # as far as they may go
        return calls[-1]

    monkeypatch.setattr(TokenLoop, "run", noting)
    with Engine(nano()) as engine:
        assert lives(engine, 4, 4) == expected
        assert engine.stats().turns["failed"] == 0
    assert sum(one.num_steps for one in calls) > 3 * len(calls)
    assert max(len(ids) for one in calls for ids, _ in one.rows) >= 6


@pytest.mark.parametrize("is_after", [False, True])
def test_a_run_that_fails_once_changes_nothing(
    is_after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(nano()) as engine:
        expected = lives(engine, 3, 3)
        run, calls, kv = TokenLoop.run, [], nano().store.kv

        def failing(self: TokenLoop, num_rows: int, table: Any, limit_s: float) -> Any:
            calls.append(num_rows)
            if len(calls) % 2:
                return run(self, num_rows, table, 0.0)
            if is_after:
                run(self, num_rows, table, limit_s)
                for slot in self.rows["slot"][:num_rows].tolist():
                    kv.conv_rows[slot].fill_(float("nan"))
            raise RuntimeError("the run failed")

        monkeypatch.setattr(TokenLoop, "run", failing)
        assert lives(engine, 3, 3) == expected
        assert len(calls) > 2 and engine.stats().turns["failed"] == 0


@pytest.mark.parametrize("keep", ["none", "input"])
def test_a_cancel_during_a_run_undoes_all_of_it(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(nano()) as engine:

        def live(cancels: bool) -> list[Any]:
            with engine.open(seed=3) as session:
                session.append(noise(0)).result(WAIT_S)
                turn = session.append(noise(1)) if cancels else None
                if turn is not None:
                    assert turn.result(WAIT_S).done.reason == "cancelled"
                elif keep == "input":
                    with paused(session):
                        turn = session.append(noise(1))
                        assert turn.cancel(keep, wait=False)
                    turn.result(WAIT_S)
                ids = session.append(noise(2)).result(WAIT_S).done.token_ids
                return [ids, session.info().state_hash]

        expected = live(False)
        run, num_calls, next_limit_s = TokenLoop.run, [0], [0.0]

        def cancelling(self: TokenLoop, num_rows: int, table: Any, _limit_s: float) -> Any:
            drawn = run(self, num_rows, table, next_limit_s[0])
            (seat,) = engine._host.loop._seats
            num_calls[0] += seat.state.tick == 1
            if num_calls[0] == 1 and seat.state.tick == 1:
                assert seat.turns[0].cancel(keep, wait=False)
            return drawn

        for limit_s in (0.0, 100.0):
            num_calls[0], next_limit_s[0] = 0, limit_s
            with monkeypatch.context() as patch:
                patch.setattr(TokenLoop, "run", cancelling)
                assert live(True) == expected
            assert num_calls[0] >= 1


def test_pictures_of_one_step_are_encoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """And give what they give alone, also beside one that cannot be encoded."""
    random = np.random.default_rng(0)
    frames = [random.integers(0, 256, (50, 60 + 40 * i, 3), np.uint8) for i in range(3)]
    chunks = [Chunk(audio=noise(i).audio, frames=[frame]) for i, frame in enumerate(frames)]
    encode, counts = hmlp_module.hmlp, []

    def counting(patches: torch.Tensor, weights: Any) -> torch.Tensor:
        counts.append(len(patches))
        if len(patches) == num_refused[0]:
            raise RuntimeError("these are too many")
        return encode(patches, weights)

    num_refused = [0]
    monkeypatch.setattr(backbone_module, "hmlp", counting)
    with Engine(nano()) as engine:
        alone = []
        for i, chunk in enumerate(chunks):
            with engine.open(seed=i) as session:
                alone.append((session.append(chunk).result(WAIT_S).events, session.info()))
        each = counts[-3:]
        for num_refused[0], expected_counts in ((0, [sum(each)]), (sum(each), [sum(each), *each])):
            sessions = [engine.open(seed=i) for i in range(3)]
            counts.clear()
            with paused(sessions[0]):
                turns = [one.append(chunk) for one, chunk in zip(sessions, chunks, strict=True)]
            for turn, session, (events, info) in zip(turns, sessions, alone, strict=True):
                assert turn.result(WAIT_S).events == events
                assert session.info() == info
                session.close()
            assert counts == expected_counts


def test_one_turn_that_has_to_be_looked_at_holds_no_other_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside one whose output may be cut short, all go step by step, with the same bits."""
    run, num_rows = TokenLoop.run, []

    def noting(self: TokenLoop, count: int, table: Any, limit_s: float) -> Any:
        num_rows.append(count)
        return run(self, count, table, limit_s)

    monkeypatch.setattr(TokenLoop, "run", noting)
    with Engine(nano()) as engine:
        found = []
        for degrade in ("none", "shrink_output"):
            sessions = [engine.open(seed=0, degrade=degrade), engine.open(seed=1)]
            num_rows.clear()
            with paused(sessions[0]):
                turns = [one.append(noise(i), deadline_ms=None) for i, one in enumerate(sessions)]
            found.append([turn.result(WAIT_S).events for turn in turns])
            assert (2 in num_rows) == (degrade == "none")
            for session in sessions:
                session.close()
        assert found[0] == found[1]
