"""Sessions that speak: blocks drawn in common steps, chunks of sound, and every way back and on.

Shape suffixes: T positions, D hidden size, A blocks.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from session_kit import CALL, END_OUT, SAY, SILENCE, WAIT_S, noise, paused, standing
from speaking_kit import heard, save_speaking, scripted, speaker, talk, tick
from tml_core import AudioChunk, Engine, Session, Silence, TextToken, TurnDone
from tml_core.engine import stepper
from tml_core.engine.cuda_model import on_cuda
from tml_core.engine.kv_budget import KvLimits
from tml_core.errors import TmlError, Unsupported
from tml_core.layout import SOUND, MicroTurnLayout
from tml_core.media import GriffinLim
from tml_core.model.weights import load_weights
from tml_core.train import PackedBatch, TrainableModel, Transcript

SPEAK = [SAY, END_OUT]
SPOKEN = (SAY, *[SOUND] * 4, END_OUT)


def end_of(session: Session) -> tuple[Any, ...]:
    """Where it stands, once the next input has brought what was unsent."""
    tick(session, 99, answer=False)
    return session.info().state_hash, session.info().position, session.transcript()


def test_a_tick_of_speech_is_heard_and_its_rest_in_the_next():
    with scripted([104, *SPEAK, SILENCE, SILENCE]) as head, talk() as session:
        turn = session.append(noise(0))
        text, chunk, done = turn
        assert isinstance(text, TextToken)
        assert isinstance(chunk, AudioChunk)
        assert isinstance(done, TurnDone)
        assert (chunk.tick, chunk.t_ms, chunk.sample_rate, len(chunk.pcm)) == (0, 0, 16000, 3200)
        assert (done.reason, done.token_ids) == ("end", (104, *SPOKEN))
        assert turn.result().stats.num_output_tokens == len(done.token_ids)
        position = session.tip
        assert session.token_ids()[-7:].tolist() == list(done.token_ids)
        silence, rest, done = tick(session, 1).events
        assert (type(silence), type(rest), type(done)) == (Silence, AudioChunk, TurnDone)
        assert (rest.tick, len(rest.pcm)) == (1, 800)
        assert [type(one) for one in tick(session, 2).events] == [Silence, TurnDone]
        said = [head.said[1, position - 5 + block] for block in range(4)]
        vocoder = GriffinLim()
        want_S = np.concatenate([vocoder.push(torch.cat(said)), vocoder.flush()])
        assert np.array_equal(np.concatenate([chunk.pcm, rest.pcm]), want_S)
        assert [one.sound_ms for one in session.transcript()] == [200, 0, 0]
        assert session.token_ids()[position - 7 : position].tolist() == [104, *SPOKEN]


def test_the_trainer_computes_what_was_said(tmp_path: Path):
    """Hidden states of the whole transcript, and from them the head, give the same blocks."""
    directory = save_speaking(tmp_path)
    script = [[104, *SPEAK], [*SPEAK], [SILENCE], [SAY, CALL, 123, END_OUT]]
    with (
        scripted([token for run in script for token in run]) as head,
        talk(system="hi") as session,
    ):
        for number in range(4):
            tick(session, number)
        position = session.tip
        state_hash = end_of(session)[0]
    layout = MicroTurnLayout(speaker().config, speaker().tokenizer)
    blocks = iter(head.said.values())
    ticks = []
    for number, run in enumerate(script):
        items = [[token, *(next(blocks).numpy() for _ in range(4))] if token == SAY else [token]
                 for token in run]  # fmt: skip
        ticks.append((noise(number), [item for part in items for item in part]))
    segments, streams = layout.encode_session(ticks, layout.encode_prefix("hi"))
    batch = PackedBatch.pack([Transcript.next_tokens(segments, streams)], speaker().config)
    assert batch.num_tokens == position
    assert batch.num_blocks == 12
    weights = load_weights(directory, speaker().config, torch.bfloat16)
    trainable = TrainableModel(speaker().config, weights, torch.bfloat16)
    h_AD = trainable.hidden(batch).detach()[batch.own_after]
    positions = (batch.own_after + 1).tolist()
    assert positions == [at for _, at in head.said]
    flow = speaker().backbone.flow
    mel_AFM = flow.draw(h_AD, batch.own_before, [1] * 12, positions)
    assert torch.equal(mel_AFM, torch.stack(list(head.said.values())))
    # And a sequence that is given the transcript is the session's.
    ticks.append((noise(99), [SILENCE]))
    segments, _ = layout.encode_session(ticks, layout.encode_prefix("hi"))
    with speaker().new_sequence() as sequence:
        sequence.extend(segments)
        with_closing = sequence.state_hash
    with speaker().new_sequence() as sequence:
        sequence.extend(segments[:-1])
        assert sequence.state_hash == state_hash != with_closing


def test_sessions_speak_together_with_the_bits_of_each_alone():
    scripts = {
        1: [*SPEAK, *SPEAK, SILENCE],
        2: [104, 105, *SPEAK, SILENCE, *SPEAK],
        3: [104, 105, 106, 107, END_OUT, *SPEAK, 104, END_OUT],
    }
    alone = {}
    for seed in scripts:
        with scripted(scripts), talk(seed=seed) as session:
            sound = [heard(tick(session, number).events) for number in range(3)]
            alone[seed] = sound, end_of(session)
    with scripted(scripts) as head, Engine(speaker(), max_sessions=3) as engine:
        sessions = {seed: engine.open(seed=seed) for seed in scripts}
        together: dict[int, list[Any]] = {seed: [] for seed in scripts}
        for number in range(3):
            turns = {seed: one.append(noise(number)) for seed, one in sessions.items()}
            for seed, turn in turns.items():
                together[seed].append(heard(turn.result().events))
        assert max(head.rows) > 1
        for seed, session in sessions.items():
            sound, end = alone[seed]
            assert all(map(np.array_equal, sound, together[seed]))
            assert end_of(session) == end


def test_a_voice_goes_on_after_every_way_back(tmp_path: Path):
    """Two ticks of one sound, with a mark, a fork, a snapshot and a pause between them."""

    def second(session: Session) -> tuple[Any, ...]:
        with scripted({session._seat.sequence.seed: [*SPEAK, SILENCE]}):
            events = tick(session, 1).events + tick(session, 2).events
            return heard(events), end_of(session)

    with scripted(SPEAK), talk() as session:
        tick(session, 0)
        start = standing(session)
        mark = session.mark()
        want_S, want_end = second(session)
        assert len(want_S) == 3200 + 800
        session.rewind(mark)
        assert standing(session) == start
        with session.fork() as child, session.fork(mark, seed=5) as other:
            for one, is_same in ((child, True), (other, False)):
                sound_S, end = second(one)
                assert np.array_equal(sound_S, want_S) == is_same
                assert (end == want_end) == is_same
        session.snapshot(tmp_path / "speaking.session")
        del mark
        with Session.restore(tmp_path / "speaking.session", speaker()) as restored:
            assert standing(restored) == start
            sound_S, end = second(restored)
            assert np.array_equal(sound_S, want_S)
            assert end == want_end
        session.park()
        sound_S, end = second(session)
        assert np.array_equal(sound_S, want_S)
        assert end == want_end


@pytest.mark.parametrize("keep", ["none", "input"])
def test_a_cancelled_utterance_leaves_nothing(keep: Any):
    with talk() as session:
        with scripted(SPEAK):
            tick(session, 0)
        before = standing(session)
        with session.fork() as same, scripted(SPEAK):
            want_S = heard(tick(same, 1).events)
        with scripted([SAY], held=True) as head:
            turn = session.append(noise(1))
            for _ in range(2):
                head.reach()
                head.step()
            head.reach()
            assert turn.cancel(keep, wait=False)
            head.step()
            result = turn.result(WAIT_S)
        assert result.done.reason == "cancelled"
        assert not len(heard(result.events))
        if keep == "none":
            assert standing(session) == before
            with scripted(SPEAK):
                assert np.array_equal(heard(tick(session, 1).events), want_S)
            return
        assert result.done.token_ids == (END_OUT,)
        assert session.token_ids()[-1] == END_OUT
        with scripted([SILENCE]):  # what was still to be heard of the tick before is not
            assert [type(one) for one in tick(session, 2).events] == [Silence, TurnDone]


def test_sound_that_was_heard_stays_when_its_turn_is_cancelled():
    def lived() -> tuple[Any, ...]:
        return heard(tick(session, 1).events), end_of(session)

    with scripted([*SPEAK, *SPEAK]), talk() as session:
        tick(session, 0)
        want_S, want_end = lived()
    with talk() as session:
        gate = threading.Event()
        with scripted([SAY, END_OUT]) as head:
            real = speaker().backbone.sample

            def wait_at_the_end(h_BD: Any, rows: Any, **named: Any) -> Any:
                if head.num_draws == 4:
                    assert gate.wait(WAIT_S)
                return real(h_BD, rows, **named)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(speaker().backbone, "sample", wait_at_the_end)
                turn = session.append(noise(0))
                chunk = next(iter(turn))
                assert isinstance(chunk, AudioChunk)
                assert turn.cancel("heard", heard_ms=150.0, wait=False)
                gate.set()
                done = turn.result(WAIT_S).done
        assert (done.reason, done.token_ids) == ("cancelled", SPOKEN)
        with scripted(SPEAK):
            sound_S, end = lived()
        assert np.array_equal(sound_S, want_S)
        assert end[:2] == want_end[:2]


def test_what_was_said_and_not_heard_is_taken_back():
    with scripted([*SPEAK, *SPEAK, SILENCE]), talk() as session:
        for number in range(3):
            tick(session, number)
        assert [one.sound_ms for one in session.transcript()] == [200, 200, 0]
        assert session.truncate(1000.0) is None
        assert session.truncate(200.0) == 1
        assert [one.sound_ms for one in session.transcript()] == [200, 0, 0]
        got = end_of(session)
    with scripted(SPEAK), talk() as session:
        tick(session, 0)
        with scripted([SAY], held=True) as head:
            turn = session.append(noise(1))
            head.reach()
            turn.cancel("input", wait=False)
            head.step()
            turn.result(WAIT_S)
        tick(session, 2, answer=False)
        assert end_of(session)[:2] == got[:2]


def test_the_rest_of_a_sound_is_heard_where_nothing_is_answered():
    with scripted([*SPEAK, *SPEAK]) as head, talk() as session:
        tick(session, 0)
        rest, done = tick(session, 1, answer=False).events
        assert (type(rest), rest.tick, len(rest.pcm)) == (AudioChunk, 1, 800)
        assert done.reason == "input"
        # The next sound begins anew.
        sound_S = heard(tick(session, 2).events)
        assert np.array_equal(sound_S, GriffinLim().push(torch.cat(list(head.said.values())[4:])))


def test_ticks_that_wait_go_in_together_behind_a_sound():
    with (
        scripted([*SPEAK, SILENCE], held=True) as head,
        talk(degrade="coalesce_input") as session,
    ):
        first = session.append(noise(0))
        head.reach()
        turns = [session.append(noise(number)) for number in (1, 2)]
        for _ in range(4):
            head.step()
        assert len(heard(first.result(WAIT_S).events)) == 3200
        (second, third) = (turn.result(WAIT_S) for turn in turns)
        assert (second.done.reason, len(heard(second.events))) == ("degraded", 800)
        assert (third.done.reason, len(heard(third.events))) == ("silence", 0)


def test_a_sound_that_would_be_late_is_left(monkeypatch: pytest.MonkeyPatch):
    with (
        scripted([SAY, SILENCE]) as head,
        talk(degrade="shrink_output") as session,
    ):
        real = head._draw

        def slow(*asked: Any) -> Any:
            monkeypatch.setattr(session._host.loop.costs, "step_s", lambda *_size: 60.0)
            return real(*asked)

        head._draw = slow
        result = tick(session, 0, deadline_ms=30_000)
        assert result.done.reason == "degraded"
        assert result.done.token_ids == (SAY, SOUND, END_OUT)
        assert not len(heard(result.events))
        monkeypatch.undo()
        head._draw = real
        silent = tick(session, 1, deadline_ms=None)
        assert [type(one) for one in silent.events] == [Silence, TurnDone]
        assert session.transcript()[0].sound_ms == 0


def test_a_head_that_fails_ends_the_turn_that_asked_for_it():
    scripts = {1: SPEAK, 2: [SAY]}
    with scripted(scripts) as head, Engine(speaker(), max_sessions=2) as engine:
        sessions = [engine.open(seed=seed) for seed in scripts]
        before = standing(sessions[1])
        # Together, then each alone: the second is to blame.
        head.faults = {0: TmlError("boom"), 2: TmlError("boom")}
        with paused(sessions[0]):
            first, second = (one.append(noise(0)) for one in sessions)
        assert len(heard(first.result(WAIT_S).events)) == 3200
        with pytest.raises(TmlError, match="boom"):
            second.result(WAIT_S)
        assert head.rows == [1] * 4
        assert standing(sessions[1]) == before


def test_a_sound_that_cannot_be_made_with_others_is_made_alone(monkeypatch: pytest.MonkeyPatch):
    scripts = {1: SPEAK, 2: SPEAK, 3: SPEAK}
    rows = []
    real = GriffinLim.push_together

    def push_together(self: GriffinLim, states: Any, mel_RFM: Any) -> Any:
        rows.append(len(states))
        if len(states) == 3:
            raise TmlError("boom")
        if rows == [3, 1, 1]:
            raise TmlError("bang")
        return real(self, states, mel_RFM)

    with scripted(scripts), Engine(speaker(), max_sessions=3) as engine:
        sessions = [engine.open(seed=seed) for seed in scripts]
        before = standing(sessions[1])
        monkeypatch.setattr(GriffinLim, "push_together", push_together)
        with paused(sessions[0]):
            turns = [one.append(noise(0)) for one in sessions]
        for turn in (turns[0], turns[2]):
            assert len(heard(turn.result(WAIT_S).events)) == 3200
        with pytest.raises(TmlError, match="bang"):
            turns[1].result(WAIT_S)
        assert rows == [3, 1, 1, 1]
        assert standing(sessions[1]) == before


def test_a_step_that_fails_behind_a_sound_is_made_good(monkeypatch: pytest.MonkeyPatch):
    script = [SAY, CALL, 123, END_OUT, SILENCE]
    with scripted(script), talk() as session:
        want = [heard(tick(session, number).events) for number in range(2)], end_of(session)
    with scripted(script) as head, talk() as session:
        real, faults = speaker().backbone.step, iter([RuntimeError("boom")])

        def step(*args: Any, **named: Any) -> Any:
            fault = next(faults, None) if head.num_draws == 4 and named else None
            if fault is not None:
                raise fault
            return real(*args, **named)

        monkeypatch.setattr(speaker().backbone, "step", step)
        sound = [heard(tick(session, number).events) for number in range(2)]
        assert next(faults, None) is None
        assert all(map(np.array_equal, sound, want[0]))
        assert end_of(session) == want[1]


def _events(session: Session, num_ticks: int) -> tuple[list[Any], np.ndarray]:
    """Tokens and sound of ticks in which the model chooses."""
    results = [tick(session, number) for number in range(num_ticks)]
    tokens = [one.done.token_ids for one in results]
    return tokens, heard([event for one in results for event in one.events])


def test_a_model_that_chooses_speaks_alike_however_its_steps_are_made(
    monkeypatch: pytest.MonkeyPatch,
):
    found = []
    for run_s in (stepper.RUN_S, 0.0):
        monkeypatch.setattr(stepper, "RUN_S", run_s)
        with talk(seed=4) as session:
            found.append((*_events(session, 12), end_of(session)))
    (tokens, sound_S, end), (other_tokens, other_S, other_end) = found
    assert tokens == other_tokens
    assert sum(SOUND in one for one in tokens) >= 2
    assert np.array_equal(sound_S, other_S)
    assert end == other_end


def test_threads_that_let_their_sessions_speak_do_not_disturb_each_other():
    seeds = range(10, 14)
    alone = {}
    for seed in seeds:
        with talk(seed=seed) as session:
            alone[seed] = (*_events(session, 5), end_of(session))
    found: dict[int, Any] = {}
    with Engine(speaker(), max_sessions=4) as engine:

        def live(seed: int) -> None:
            with engine.open(seed=seed) as session:
                found[seed] = (*_events(session, 5), end_of(session))

        threads = [threading.Thread(target=live, args=(seed,)) for seed in seeds]
        for one in threads:
            one.start()
        for one in threads:
            one.join(WAIT_S)
    for seed in seeds:
        tokens, sound_S, end = alone[seed]
        assert found[seed][0] == tokens
        assert np.array_equal(found[seed][1], sound_S)
        assert found[seed][2] == end
    assert any(SOUND in one for tokens, *_ in alone.values() for one in tokens)


def test_a_device_that_cannot_speak_refuses_a_model_that_does():
    limits = KvLimits(1, 256, None, 64)
    with pytest.raises(Unsupported, match="device: models with an audio-out head run on the CPU"):
        on_cuda(speaker().config, {}, limits, torch.device("cuda"))
