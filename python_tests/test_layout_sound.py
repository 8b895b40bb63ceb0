"""Sound in output halves: the grammar, the chunks heard, what ticks hand on, transcripts.

Legend: F frames, M mel channels, S samples.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from byte_model import BYTE_MODEL
from tml_core.errors import InvalidArgument, SnapshotError, Unsupported
from tml_core.layout import (
    SOUND,
    AudioChunk,
    Chunk,
    MicroTurnLayout,
    MicroTurnState,
    Silence,
    Stream,
    TurnDone,
)
from tml_core.layout.select import layout_for
from tml_core.layout.sound import WrittenHalf, spelled
from tml_core.media import GriffinLim, OwnAudio, Tokens, clips, mel_frames, read_audio
from tml_core.model.audio_out_config import AudioOutConfig
from tml_core.model.config import ModelConfig
from tml_core.model.tokenizer import load_tokenizer
from tml_core.train import PackedBatch, Transcript

TICK, OUT, END, SILENT, SAY, CALL, END_CALL = range(274, 281)
IDLE = Chunk(is_idle=True)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    plain = ModelConfig.from_path(BYTE_MODEL)
    assert plain.interaction is not None
    head = AudioOutConfig(width=32, num_layers=1)
    speaking = dataclasses.replace(plain.interaction, audio_out=head)
    return dataclasses.replace(plain, interaction=speaking)


@pytest.fixture(scope="module")
def layout(config: ModelConfig) -> MicroTurnLayout:
    return MicroTurnLayout(config, load_tokenizer(BYTE_MODEL))


@pytest.fixture(scope="module")
def mel_FM() -> np.ndarray:
    return mel_frames(read_audio(clips().audio)[16000:28000])[:48]


def _allowed(output) -> set[int]:
    words = output.allowed().numpy().view(np.uint32)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return {int(one) for one in np.flatnonzero(bits)} & set(range(TICK, END_CALL + 1))


def _say(output, mel_FM: np.ndarray) -> list:
    events = output.accept(SAY, 0.0)
    for start in range(0, 16, 4):
        events += output.accept_sound(mel_FM[start : start + 4])
    return events


def test_sound_has_its_place_in_the_half(layout, mel_FM):
    output = layout.begin_output(MicroTurnState())
    assert _allowed(output) == {SILENT, CALL, SAY}
    output.accept(65, 0.0)
    assert _allowed(output) == {CALL, END, SAY}
    assert not output.wants_sound
    assert output.accept(SAY, 0.0) == []
    for start in range(0, 16, 4):
        assert output.wants_sound
        assert output.run_ahead() is None
        assert output.accept_sound(mel_FM[start : start + 4]) == []
    assert not output.wants_sound
    assert _allowed(output) == {CALL, END}
    (run,) = {output.run_ahead().num_text}
    assert run > 0
    with pytest.raises(InvalidArgument, match="got 65 in phase 'said'"):
        output.accept(65, 0.0)
    output.accept(CALL, 0.0)
    (done,) = output.accept(END, 0.0)
    assert done.token_ids == (65, SAY, *[SOUND] * 4, CALL, END)
    audio = [Stream.CONTROL, *[Stream.AUDIO] * 4]
    assert output.streams == [Stream.TEXT, *audio, Stream.CONTROL, Stream.CONTROL]
    # A call is open now: nothing is said.
    output = layout.begin_output(output.state)
    assert _allowed(output) == {SILENT, END_CALL}


def test_chunks_are_ticks_of_one_sound(layout, mel_FM):
    vocoder, state, heard = GriffinLim(), layout.initial_state(), []
    for tick in range(3):
        state = layout.encode_input(IDLE, state).state
        output = layout.begin_output(state, 4, vocoder)
        (chunk,) = _say(output, mel_FM[16 * tick :])
        assert isinstance(chunk, AudioChunk)
        assert (chunk.tick, chunk.t_ms, chunk.epoch) == (tick, 200 * tick, 4)
        assert (len(chunk.pcm), chunk.sample_rate) == (3200, 16000)
        heard.append(chunk.pcm)
        assert [type(one) for one in output.accept(END, 0.0)] == [TurnDone]
        state = output.state
        vocoder.push(mel_FM)  # another session's
    output = layout.begin_output(layout.encode_input(IDLE, state).state, 4, vocoder)
    silence, rest, done = output.accept(SILENT, 0.0)
    assert (type(silence), type(rest), type(done)) == (Silence, AudioChunk, TurnDone)
    assert (rest.tick, len(rest.pcm)) == (3, vocoder.delay)
    whole = GriffinLim()
    want_S = np.concatenate((whole.push(mel_FM), whole.flush()))
    assert np.array_equal(np.concatenate([*heard, rest.pcm]), want_S)
    assert output.state.voice is None
    after = layout.begin_output(layout.encode_input(IDLE, output.state).state, 4, vocoder)
    assert [type(one) for one in after.accept(SILENT, 0.0)] == [Silence, TurnDone]


def test_blocks_know_the_frame_before_them(layout, mel_FM):
    output = layout.begin_output(MicroTurnState())
    silence_M = torch.full((80,), -4.0)
    assert torch.equal(output.before_M, silence_M)
    _say(output, mel_FM)
    output.accept(END, 0.0)
    state = layout.encode_input(IDLE, output.state).state
    output = layout.begin_output(state)
    assert torch.equal(output.before_M, torch.from_numpy(mel_FM[15]))
    output.accept(SAY, 0.0)
    output.accept_sound(mel_FM[16:20])
    assert torch.equal(output.before_M, torch.from_numpy(mel_FM[19]))
    output.close_now("degraded")
    state = layout.encode_input(IDLE, output.state).state
    assert torch.equal(layout.begin_output(state).before_M, silence_M)


def test_what_is_unsent_leads_the_next_input(layout, mel_FM):
    output = layout.begin_output(MicroTurnState())
    output.accept(SAY, 0.0)
    output.accept_sound(mel_FM[:4])
    tokens, sound = output.take_unfed_segments()
    assert tokens.ids.tolist() == [SAY]
    assert sound.before is None
    output.accept_sound(mel_FM[4:8])
    (done,) = output.close_now("degraded")
    assert done.token_ids == (SAY, SOUND, SOUND, END)
    assert output.state.unsent == (SOUND, END)
    encoded = layout.encode_input(IDLE, output.state)
    sound, tokens, last = encoded.segments
    assert isinstance(sound, OwnAudio)
    assert torch.equal(sound.mel, torch.from_numpy(mel_FM[4:8])[None])
    assert torch.equal(sound.before, torch.from_numpy(mel_FM[3]))
    assert (tokens.ids.tolist(), last.ids.tolist()) == ([END, TICK], [OUT])
    assert encoded.num_tokens == 4
    assert encoded.state.voice is None


def test_a_cut_keeps_what_stands_and_is_heard_no_more(layout, mel_FM):
    vocoder = GriffinLim()
    first = layout.begin_output(MicroTurnState(), 0, vocoder)
    _say(first, mel_FM)
    first.accept(END, 0.0)
    before = layout.encode_input(IDLE, first.state).state
    output = layout.begin_output(before, 0, vocoder)
    _say(output, mel_FM[16:])
    (done,) = output.cut(3)
    assert done.reason == "cancelled"
    assert done.token_ids == (SAY, SOUND, SOUND, END)
    assert output.state.unsent == done.token_ids
    assert len(output.state.voice.unsent) == 2
    assert output.state.voice.vocoder is None
    whole = layout.begin_output(before, 0, vocoder)
    (chunk,) = _say(whole, mel_FM[16:])
    again = layout.begin_output(before, 0, vocoder)
    assert np.array_equal(_say(again, mel_FM[16:])[0].pcm, chunk.pcm)
    assert [type(one) for one in again.cut(5)] == [TurnDone]
    assert again.state.voice.vocoder is not None


@pytest.mark.parametrize("is_sent", [True, False])
def test_states_are_stored_with_their_voice(layout, mel_FM, is_sent):
    vocoder = GriffinLim()
    output = layout.begin_output(layout.initial_state(), 0, vocoder)
    _say(output, mel_FM)
    if is_sent:
        output.take_unfed()
    output.accept(END, 0.0)
    state = output.state
    stored = json.loads(json.dumps(state.to_dict()))
    restored = MicroTurnState.from_dict(stored, state.dmel)
    assert restored.unsent == state.unsent
    pcm = []
    for one in (state, restored):
        encoded = layout.encode_input(IDLE, one)
        assert len(encoded.segments) == (2 if is_sent else 4)
        following = layout.begin_output(encoded.state, 0, vocoder)
        assert torch.equal(following.before_M, torch.from_numpy(mel_FM[15]))
        pcm.append(_say(following, mel_FM[16:])[0].pcm)
    assert np.array_equal(*pcm)
    for damaged in ({"last": 3}, {**stored["voice"], "unsent": [["<i4", [1], ""]]}):
        with pytest.raises(SnapshotError, match="layout: damaged voice"):
            MicroTurnState.from_dict({**stored, "voice": damaged}, state.dmel)


def test_states_from_before_there_was_sound_are_read(layout):
    state = layout.initial_state()
    stored = state.to_dict()
    assert stored.pop("voice") is None
    assert MicroTurnState.from_dict(stored, state.dmel) == state


def test_a_session_with_sound_becomes_a_transcript(config, layout, mel_FM):
    run = layout.encode_sound(mel_FM[:20])
    assert [one if isinstance(one, int) else len(one) for one in run] == [SAY, 4, 4, 4, 4] * 2
    parts = layout.split_output(MicroTurnState(), [*layout.codec.encode("hi"), *run])
    assert [one.token_ids for one in parts] == [
        [104, 105, SAY, *[SOUND] * 4, END],
        [SAY, *[SOUND] * 4, END],
    ]
    ticks = [
        (IDLE, [104, 105, *run[:5], END]),
        (IDLE, [*run[5:], END]),
        (IDLE, [SILENT]),
        (IDLE, [*run[:5], END]),
    ]
    segments, streams = layout.encode_session(ticks)
    sounds = [one for one in segments if isinstance(one, OwnAudio)]
    assert [len(one.mel) for one in sounds] == [4, 4, 4]
    assert sounds[0].before is None
    assert torch.equal(sounds[1].before, torch.from_numpy(mel_FM[15]))
    assert sounds[2].before is None
    assert torch.equal(sounds[0].mel.reshape(16, 80), torch.from_numpy(mel_FM[:16]))
    assert (sounds[1].mel.reshape(16, 80)[4:] == -4.0).all()
    assert streams.count(Stream.AUDIO) == 12
    batch = PackedBatch.pack([Transcript.next_tokens(segments, streams)], config)
    assert batch.num_tokens == len(streams)
    assert batch.num_blocks == 12
    assert batch.streams[batch.own_after].tolist() == [int(Stream.AUDIO)] * 12
    assert (batch.targets[batch.own_after] == -100).all()
    with pytest.raises(InvalidArgument, match=r"ticks\[0\]: expected tokens that close the tick"):
        layout.encode_session([(IDLE, run[:5])])


def test_sound_where_none_belongs_is_refused(config, layout, mel_FM):
    output = layout.begin_output(MicroTurnState())
    with pytest.raises(InvalidArgument, match="mel: expected a token in phase 'start', got sound"):
        output.accept_sound(mel_FM[:4])
    output.accept(SAY, 0.0)
    with pytest.raises(InvalidArgument, match="mel: expected 4 frames, got 3"):
        output.accept_sound(mel_FM[:3])
    with pytest.raises(InvalidArgument, match=r"mel: expected .* \[frames, 80\], got shape"):
        output.accept_sound(mel_FM[:4, :40])
    with pytest.raises(InvalidArgument, match="allowed: expected to be asked for a token"):
        output.allowed()
    with pytest.raises(InvalidArgument, match="got 65 in phase 'say'"):
        output.accept(65, 0.0)
    assert output.token_ids == [SAY]
    mute = MicroTurnLayout(config, load_tokenizer(BYTE_MODEL), speaks=False)
    quiet = mute.begin_output(MicroTurnState(), 0)
    assert _allowed(quiet) == {SILENT, CALL}
    with pytest.raises(InvalidArgument, match=f"got {SAY} in phase 'start'"):
        quiet.accept(SAY, 0.0)
    with pytest.raises(InvalidArgument, match="before_M: this model has no audio-out head"):
        _ = quiet.before_M
    with pytest.raises(Unsupported, match="mel: this model has no audio-out head"):
        mute.encode_sound(mel_FM)


def test_a_layout_of_sessions_makes_its_sound_heard(config, mel_FM):
    layout = layout_for(config, load_tokenizer(BYTE_MODEL))
    heard = []
    for _ in range(2):  # halves that are open at the same time do not share a vocoder
        first, second = (layout.begin_output(layout.initial_state()) for _ in range(2))
        second.accept(SAY, 0.0)
        (chunk,) = _say(first, mel_FM)
        heard.append(chunk.pcm)
    assert np.array_equal(heard[0], heard[1])
    assert np.array_equal(heard[0], GriffinLim().push(mel_FM[:16]))
    own = GriffinLim(num_iterations=1)
    (chunk,) = _say(layout.begin_output(layout.initial_state(), 0, own), mel_FM)
    assert not np.array_equal(chunk.pcm, heard[0])


def test_an_answer_of_a_chat_has_no_sound():
    half = WrittenHalf()
    half.token_ids = [5, 6]
    (tokens,) = half.segments()
    assert tokens.ids.tolist() == [5, 6]
    assert not half.wants_sound
    assert not half.has_unfed_sound
    with pytest.raises(Unsupported, match="before_M: this layout has no sound"):
        _ = half.before_M
    for ask in (half.accept_sound, half.completed_by):
        with pytest.raises(Unsupported, match="mel: this layout has no sound"):
            ask(torch.zeros(4, 80))


def test_spelling_joins_blocks_that_follow_each_other(mel_FM):
    blocks = [OwnAudio(torch.from_numpy(mel_FM[i : i + 4].copy())[None]) for i in range(0, 12, 4)]
    first, second, third, fourth = spelled([SOUND, SOUND, 5, 6, SOUND, 7], blocks)
    assert (len(first.mel), len(third.mel)) == (2, 1)
    assert isinstance(second, Tokens)
    assert (second.ids.tolist(), fourth.ids.tolist()) == ([5, 6], [7])
    assert spelled([], []) == []
