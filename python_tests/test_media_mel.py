"""Fine mel frames: against a plain transform, streamed against whole, to dMel, refusals.

Legend: S samples, F frames, M mel channels.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media import (
    DmelConfig,
    MelConfig,
    MelState,
    MelStream,
    clips,
    dmel_bins,
    dmel_of_mel,
    mel_frames,
    read_audio,
)


@pytest.fixture(scope="module")
def talk_S() -> np.ndarray:
    return read_audio(clips().audio)[:48321]


def test_frames_are_the_log_energies_of_the_window_that_ends_with_the_hop(talk_S):
    mel_FM = mel_frames(talk_S)
    assert mel_FM.dtype == np.float32
    assert mel_FM.shape == (-(-len(talk_S) // 200), 80)
    oracle = pytest.importorskip("transformers.audio_utils", reason="needs transformers")
    filters_NM = oracle.mel_filter_bank(
        num_frequency_bins=401,
        num_mel_filters=80,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=16000,
        norm="slaney",
        mel_scale="slaney",
    )
    padded_S = np.concatenate((np.zeros(600), talk_S, np.zeros(-len(talk_S) % 200)))
    pieces_FW = np.lib.stride_tricks.sliding_window_view(padded_S, 800)[::200]
    hann_W = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(800) / 800)
    energy_FM = np.abs(np.fft.rfft(pieces_FW * hann_W)) @ filters_NM
    want_FM = np.log10(np.clip(energy_FM, 1e-4, 10**1.5))
    # Half a unit in the last place of a float32 below 4, and the order of the sums.
    assert np.abs(mel_FM - want_FM).max() < 2.5e-7


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 5000), max_size=6))
def test_any_chunking_gives_the_same_bits(cuts):
    pcm_S = np.random.default_rng(3).uniform(-1, 1, 5000).astype(np.float32)
    edges = [0, *sorted(cuts), len(pcm_S)]
    stream = MelStream()
    parts = [stream.push(pcm_S[a:b]) for a, b in pairwise(edges)]
    assert np.array_equal(np.concatenate([*parts, stream.flush()]), mel_frames(pcm_S))


def test_a_copy_and_a_restored_stream_go_on_alike(talk_S):
    stream = MelStream()
    stream.push(talk_S[:777])
    state, twin = stream.state(), stream.copy()
    want_FM = stream.push(talk_S[777:3000])
    assert np.array_equal(twin.push(talk_S[777:3000]), want_FM)
    stream.restore(state)
    assert np.array_equal(stream.push(talk_S[777:3000]), want_FM)


def test_silence_is_the_floor_and_no_sample_is_no_frame():
    assert (mel_frames(np.zeros(401, np.float32)) == np.float32(-4.0)).all()
    assert mel_frames(np.zeros(0, np.float32)).shape == (0, 80)


def test_own_sound_is_heard_as_its_dmel(talk_S):
    pcm_S = talk_S[: len(talk_S) // 800 * 800]
    own_BM, heard_BM = dmel_of_mel(mel_frames(pcm_S)), dmel_bins(pcm_S)
    assert own_BM.dtype == torch.int32
    assert own_BM.shape == heard_BM.shape
    # Quieter than that the finer frames hold silence.
    distance_N = (own_BM - heard_BM).abs()[heard_BM >= 6]
    assert len(distance_N) > 1000
    # Measured here: 83 % of the levels equal, 98.1 % within one.
    assert (distance_N == 0).float().mean() > 0.8
    assert (distance_N <= 1).float().mean() > 0.975
    assert (dmel_of_mel(np.full((4, 80), -4.0, np.float32)) == 0).all()


def test_levels_of_a_block_are_a_function_of_the_block(talk_S):
    mel_FM = mel_frames(talk_S[:8000])
    whole_BM = dmel_of_mel(mel_FM)
    parts = [dmel_of_mel(torch.from_numpy(mel_FM[i : i + 4])) for i in range(0, len(mel_FM), 4)]
    assert torch.equal(torch.cat(parts), whole_BM)
    assert dmel_of_mel(mel_FM[:0]).shape == (0, 80)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hop": 0}, r"MelConfig\.hop: expected at least 1, got 0"),
        ({"window": 810}, r"MelConfig\.window: expected an even multiple of hop = 200, at least"),
        ({"window": 200}, r"MelConfig\.window: expected an even multiple of hop = 200, at least"),
        ({"max_log10": -4.0}, r"MelConfig\.min_log10: expected less than max_log10 = -4\.0"),
    ],
)
def test_a_config_that_is_no_front_end_is_refused(fields, message):
    with pytest.raises(InvalidArgument, match=message):
        MelConfig(**fields)


def test_refusals_change_nothing(talk_S):
    stream = MelStream()
    stream.push(talk_S[:333])
    state = stream.state()
    with pytest.raises(InvalidArgument, match=r"pcm: expected samples in \[-1, 1\]"):
        stream.push(np.full(10, 2.0, np.float32))
    with pytest.raises(InvalidType, match="state: expected MelState, got int"):
        stream.restore(1)
    with pytest.raises(InvalidArgument, match=r"state\.context: expected 600 samples, got 5"):
        stream.restore(MelState(np.zeros(5, np.float32), np.zeros(0, np.float32)))
    with pytest.raises(InvalidArgument, match=r"state\.pending: expected fewer than hop = 200"):
        stream.restore(MelState(np.zeros(600, np.float32), np.zeros(200, np.float32)))
    assert stream.state() is state


def test_mel_on_another_grid_has_no_dmel():
    frames = np.zeros((4, 80), np.float32)
    with pytest.raises(InvalidArgument, match="mel: expected 80 channels at 16000 Hz"):
        dmel_of_mel(frames, MelConfig(hop=300, window=600))
    with pytest.raises(InvalidArgument, match="mel: expected 40 channels at 16000 Hz"):
        dmel_of_mel(frames, dmel=DmelConfig(num_mel_bins=40))
    with pytest.raises(InvalidArgument, match="mel_FM: expected a multiple of 4 frames, got 3"):
        dmel_of_mel(frames[:3])
    with pytest.raises(InvalidArgument, match=r"mel_FM: expected .* \[frames, 80\], got shape"):
        dmel_of_mel(frames[:, :7])
    with pytest.raises(InvalidArgument, match=r"mel_FM: expected .* got dtype float64"):
        dmel_of_mel(frames.astype(np.float64))
    with pytest.raises(InvalidArgument, match="mel_FM: expected finite values"):
        dmel_of_mel(frames * np.float32(np.nan))
