"""A session on the real nano model: turns, events, threads and asyncio, batches, notices."""

import asyncio
import dataclasses

import pytest
import torch

from session_kit import (
    CALL,
    END_CALL,
    END_OUT,
    SILENCE,
    WAIT_S,
    clip,
    nano,
    noise,
    scripted,
    spoken,
)
from tml_core import (
    Chunk,
    Engine,
    Notice,
    Retention,
    SamplingParams,
    Session,
    Silence,
    TextToken,
    ToolCall,
    TurnDone,
    errors,
)
from tml_core.engine import turn as turn_module
from tml_core.layout import MicroTurnLayout, Stream, as_chunk
from tml_core.layout.select import layout_for

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def test_the_sequence_is_what_the_layout_says() -> None:
    with Session(nano(), seed=7) as session:
        results = [session.append(one).result(WAIT_S) for one in clip(3)]
        ids = session.token_ids()
        info = session.info()
    expected: list[int] = []
    for micro_turn, result in zip(clip(3), results, strict=True):
        assert len(micro_turn.frames) == 2
        expected += [274, *[-1] * 4, *[-2] * 12, 275, *result.done.token_ids]
    assert ids.tolist() == expected
    assert info.position == len(expected)
    assert (info.tick, info.media_ms, info.epoch) == (3, 600, 0)
    assert [one.stats.num_output_tokens for one in results] == [
        len([t for t in one.done.token_ids if t != END_OUT or one.done.reason == "end"])
        for one in results
    ]


def test_a_trainer_sees_the_sequence_the_session_made() -> None:
    chunks = [*clip(3), Chunk(text="and?" * 20), noise(0, 1000), Chunk(is_idle=True)]
    with Session(nano(), seed=7, system="be brief") as session:
        results = [session.append(one).result(WAIT_S) for one in chunks]
        ids = session.token_ids().tolist()
    layout = layout_for(nano().config, nano().tokenizer)
    assert isinstance(layout, MicroTurnLayout)
    sampled = [
        # Closed at the budget or after a call, the end was not sampled.
        [*one.done.token_ids[: one.stats.num_output_tokens]]
        for one in results
    ]
    ticks = [(as_chunk(one), run) for one, run in zip(chunks, sampled, strict=True)]
    segments, streams = layout.encode_session(ticks, layout.encode_prefix("be brief"))
    assert len(streams) == len(ids)
    with nano().new_sequence() as sequence:
        (h_TD,) = nano().runner.run([nano().prepare(sequence, segments)])
        assert sequence.token_ids().tolist() == ids
    chosen = [i for i, one in enumerate(streams) if one not in (Stream.INPUT, Stream.FORCED)]
    assert [ids[i] for i in chosen] == [token for run in sampled for token in run]
    texts = torch.tensor([i for i in chosen if streams[i] == Stream.TEXT])
    logprobs = nano().backbone.logprobs(h_TD[texts - 1], torch.tensor(ids)[texts])
    # One step over all of it and hundreds of small ones: the same bits.
    assert torch.equal(logprobs, torch.cat([spoken(one.events)[1] for one in results]))


def test_stats_add_up() -> None:
    with Session(nano()) as session:
        turn = session.append(noise(0))
        result = turn.result(WAIT_S)
        stats = turn.stats
    assert stats == result.stats
    assert stats.queued_ms is not None and stats.prefill_ms is not None
    assert stats.decode_ms is not None and stats.total_ms is not None
    parts = stats.queued_ms + stats.prefill_ms + stats.decode_ms
    assert parts == pytest.approx(stats.total_ms, abs=5.0)
    assert stats.first_token_ms is not None
    assert stats.queued_ms + stats.prefill_ms <= stats.first_token_ms <= stats.total_ms
    assert stats.slack_ms == 200 - stats.total_ms
    assert stats.num_input_tokens == 6
    assert stats.num_pages == 2


def test_readers_are_independent_and_see_the_same() -> None:
    with Session(nano()) as session:
        turn = session.append(noise(1))
        iterated = list(turn)
        assert list(turn) == iterated
        assert turn.result(WAIT_S).events == tuple(iterated)
        assert turn.is_done
        assert isinstance(iterated[-1], TurnDone)
        assert not turn.cancel()


async def test_async_events_equal_sync_events() -> None:
    with Session(nano(), seed=3) as session:
        sync = [tuple(session.append(one)) for one in clip(4)]
    with Session(nano(), seed=3) as session:
        collected = []
        for one in clip(4):
            collected.append(tuple([event async for event in session.append(one)]))
        assert collected == sync
    with Session(nano(), seed=3) as session:
        awaited = [(await session.append(one)).events for one in clip(4)]
        assert awaited == sync


async def test_many_clients_in_one_event_loop() -> None:
    async def client(engine: Engine, seed: int) -> list[tuple[int, ...]]:
        with engine.open(seed=seed) as session:
            return [(await session.append(one)).done.token_ids for one in clip(2)]

    with Engine(nano(), max_sessions=4) as engine:
        together = await asyncio.gather(*(client(engine, seed) for seed in range(4)))
        alone = [await client(engine, seed) for seed in range(4)]
    assert together == alone
    assert len({str(one) for one in together}) == 4


async def test_a_reader_that_is_cancelled_leaves_the_turn_running() -> None:
    with Session(nano()) as session, scripted([104, SILENCE - 1], held=True) as script:
        turn = session.append(noise(0))

        async def read() -> None:
            async for _ in turn:
                pass

        task = asyncio.create_task(read())
        await asyncio.to_thread(script.reach)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        script.step()
        script.step()
        assert (await turn).done.token_ids == (104, END_OUT)


def test_sessions_in_one_batch_equal_each_alone() -> None:
    inputs = {
        seed: [noise(10 * seed + i, 3200 - 400 * seed) for i in range(4)] for seed in range(5)
    }

    def run(engine: Engine, seeds: list[int]) -> dict[int, tuple[list[int], torch.Tensor]]:
        sessions = {seed: engine.open(seed=seed, system="be brief" * seed) for seed in seeds}
        events: dict[int, tuple[list[int], torch.Tensor]] = {}
        collected: dict[int, list[object]] = {seed: [] for seed in seeds}
        for i in range(4):
            turns = {seed: sessions[seed].append(inputs[seed][i]) for seed in seeds}
            for seed, turn in turns.items():
                collected[seed] += turn.result(WAIT_S).events
        for seed in seeds:
            events[seed] = spoken(tuple(collected[seed]))  # type: ignore[arg-type]
            sessions[seed].close()
        return events

    with Engine(nano()) as engine:
        together = run(engine, list(range(5)))
        for seed in range(5):
            tokens, logprobs = run(engine, [seed])[seed]
            assert together[seed][0] == tokens
            assert torch.equal(together[seed][1], logprobs)


def test_sampling_params_are_followed() -> None:
    with Session(nano(), sampling=SamplingParams(temperature=0), seed=1) as session:
        greedy = session.append(noise(0)).result(WAIT_S).done.token_ids
    with Session(nano(), sampling=SamplingParams(top_k=1), seed=2) as session:
        assert session.append(noise(0)).result(WAIT_S).done.token_ids == greedy
    with Session(nano(), sampling=SamplingParams(top_p=1e-6), seed=2**64 - 1) as session:
        assert session.append(noise(0)).result(WAIT_S).done.token_ids == greedy
    with Session(nano(), seed=2**63) as session:
        assert session.append(noise(0)).result(WAIT_S).done.token_ids != greedy


def test_silence_text_and_a_call_over_two_ticks() -> None:
    raw = '{"name":"f"}'
    body = list(raw.encode())
    tokens = [SILENCE, 104, CALL, *body[:7], *body[7:], END_CALL]
    with Session(nano()) as session, scripted(tokens):
        silent, opened, closed = (session.append(noise(i)).result(WAIT_S) for i in range(3))
        assert [type(one) for one in silent.events] == [Silence, TurnDone]
        assert silent.stats.num_output_tokens == 1
        assert opened.text == "h"
        assert opened.done.reason == "budget"
        assert opened.tool_calls == ()
        (call,) = closed.tool_calls
        assert isinstance(call, ToolCall)
        assert (call.name, call.args, call.call_id, call.tick) == ("f", {}, "call-0", 2)
        assert closed.done.reason == "call"
        assert session.info().open_calls == (("call-0", "f"),)
        records = session.transcript()
    assert [one.is_silent for one in records] == [True, False, False]
    assert [one.text_out for one in records] == ["", "h", ""]
    assert records[2].calls == (("f", "call-0", raw),)
    assert records[0].audio_ms == 200
    assert records[0].audio_rms == pytest.approx(0.1 / 3**0.5, rel=0.1)


def test_a_result_that_comes_during_the_turn_goes_in_with_the_next() -> None:
    body = list(b'{"name":"f"}')
    script = [CALL, *body[:8], *body[8:], END_CALL, SILENCE]
    with Session(nano()) as session, scripted(script):
        session.append(noise(0)).result(WAIT_S)
        for event in session.append(noise(1)):
            if isinstance(event, ToolCall):
                session.add_tool_result(event.call_id, [1, 2])
        before = session.info().position
        session.append(Chunk(is_idle=True)).result(WAIT_S)
        ids = session.token_ids()[before:].tolist()
    body = list(b'{"call_id":"call-0","content":[1,2],"name":"f"}')
    assert ids == [274, CALL, *body, END_CALL, 275, SILENCE]


def test_typed_text_over_the_budget_is_reported_and_arrives() -> None:
    with Session(nano()) as session, scripted([SILENCE] * 3):
        text = "x" * 100
        first = session.append(Chunk(text=text)).result(WAIT_S)
        (notice,) = [one for one in first.events if isinstance(one, Notice)]
        assert (notice.kind, notice.data) == ("waiting", {"num_tokens": 36})
        assert session.info().num_waiting == 36
        session.append(Chunk(is_idle=True)).result(WAIT_S)
        assert session.info().num_waiting == 0
        assert session.token_ids().tolist().count(ord("x")) == 100


def test_padding_is_reported() -> None:
    chunk = dataclasses.replace(noise(0), num_padded=160)
    with Session(nano()) as session:
        (notice,) = [one for one in session.append(chunk) if isinstance(one, Notice)]
    assert (notice.kind, notice.data["num_samples"]) == ("padded", 160)


def test_eviction_is_reported_and_instructions_stay() -> None:
    retention = Retention(window_positions=100)
    with Session(nano(), retention=retention, system="s" * 130) as session:
        kinds = []
        for i in range(30):
            events = session.append(noise(i)).result(WAIT_S).events
            kinds += [one.data for one in events if isinstance(one, Notice)]
        info = session.info()
    assert kinds and kinds[0]["start"] == 256
    assert info.evicted is not None
    # 130 ids are pinned: two pages.
    assert (info.evicted.start, info.evicted.end) == (256, kinds[-1]["end"])


def test_the_engine_waits_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module, "MAX_UNREAD", 2)
    with Session(nano()) as session, scripted([104, 105, 106, 107, END_OUT]):
        turn = session.append(noise(0))
        events = iter(turn)
        first = next(events)
        assert isinstance(first, TextToken)
        # All that is posted now is done before the next step, so the turn has had its chance.
        for _ in range(5):
            session.info()
        assert not turn.is_done
        assert [getattr(one, "text", None) for one in events] == ["i", "j", "k", None]


def test_result_times_out_and_the_turn_goes_on() -> None:
    with Session(nano()) as session, scripted([SILENCE], held=True) as script:
        turn = session.append(noise(0))
        with pytest.raises(TimeoutError, match=r"result: the turn did not end within 0\.01 s"):
            turn.result(0.01)
        script.step()
        assert turn.result(WAIT_S).done.reason == "silence"


def test_an_error_in_one_turn_ends_that_turn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = nano().prepare

    def failing(sequence: object, segments: object) -> object:
        if sequence is bad._seat.sequence:
            raise RuntimeError("broken picture")
        return prepare(sequence, segments)  # type: ignore[arg-type]

    with Engine(nano()) as engine:
        good, bad = engine.open(seed=1), engine.open(seed=2)
        monkeypatch.setattr(nano(), "prepare", failing)
        turns = [one.append(noise(0)) for one in (good, bad)]
        assert turns[0].result(WAIT_S).events
        with pytest.raises(RuntimeError, match="broken picture"):
            turns[1].result(WAIT_S)
        with pytest.raises(RuntimeError, match="broken picture"):
            list(turns[1])
        monkeypatch.undo()
        assert bad.info().position == 0
        assert not bad.is_busy
        expected = bad.append(noise(0)).result(WAIT_S).done.token_ids
    with Session(nano(), seed=2) as fresh:
        assert fresh.append(noise(0)).result(WAIT_S).done.token_ids == expected


def test_a_failing_step_is_repeated_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = nano().runner.stage

    def failing(inputs: list[object], singles: object = None) -> object:
        if any(one.sequence is bad._seat.sequence for one in inputs):  # type: ignore[attr-defined]
            raise errors.PoolExhausted("pages: none left")
        return stage(inputs, singles)  # type: ignore[arg-type]

    with Engine(nano()) as engine:
        good, bad = engine.open(seed=1), engine.open(seed=2)
        monkeypatch.setattr(nano().runner, "stage", failing)
        turns = [one.append(noise(0)) for one in (good, bad)]
        together = turns[0].result(WAIT_S).events
        with pytest.raises(errors.PoolExhausted, match="pages: none left"):
            turns[1].result(WAIT_S)
        monkeypatch.undo()
        assert bad.info().position == 0
    with Session(nano(), seed=1) as session:
        assert session.append(noise(0)).result(WAIT_S).events == together
