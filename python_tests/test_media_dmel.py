"""dMel: against the oracle's feature extractor, streamed against whole, state, refusals.

Legend: S samples, F frames, M mel channels, L levels.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media import DmelConfig, DmelState, DmelStream, clips, dmel_bins, read_audio

RATE = 16000


def _signal(name: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    t_S = np.arange(3 * RATE + 123) / RATE
    signals = {
        "speech": lambda: read_audio(clips().audio),
        "noise": lambda: rng.uniform(-1.0, 1.0, len(t_S)),
        "quiet_noise": lambda: 1e-3 * rng.standard_normal(len(t_S)),
        "silence": lambda: np.zeros(5000),
        "tone": lambda: 0.9 * np.sin(2 * np.pi * 440 * t_S),
        "chirp": lambda: 0.7 * np.sin(2 * np.pi * (50 * t_S + 1300 * t_S**2)),
        "clicks": lambda: 0.8 * (np.arange(len(t_S)) % 1111 == 0),
        "full_scale": lambda: np.sign(np.sin(2 * np.pi * 100 * t_S)),
    }
    return signals[name]().astype(np.float32)


SIGNALS = ("speech", "noise", "quiet_noise", "silence", "tone", "chirp", "clicks", "full_scale")


@pytest.fixture(scope="module")
def oracle():
    """The oracle's log-mel [F, M] and levels [F, M], in float32 as shipped or in float64."""
    extraction = pytest.importorskip(
        "transformers.models.inkling.feature_extraction_inkling", reason="needs transformers"
    )
    shipped = extraction.InklingFeatureExtractor()
    double = extraction.InklingFeatureExtractor()
    double.window = torch.hann_window(double.window_size, periodic=True, dtype=torch.float64)
    double.mel_filters = double.mel_filters.double()
    centres_L = torch.linspace(-7.0, 2.0, 16, dtype=torch.float64).to(torch.float32)

    def run(pcm_S: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        extractor = double if dtype == torch.float64 else shipped
        waveform = torch.from_numpy(pcm_S).to(dtype)[None]
        log_mel_FM = extractor._torch_extract_fbank_features(waveform)[0]
        distance_FML = (log_mel_FM.clamp(-7.0, 2.0)[..., None] - centres_L.to(dtype)).abs()
        return log_mel_FM, distance_FML.argmin(dim=-1).to(torch.int32)

    return run


@pytest.mark.parametrize("name", SIGNALS)
def test_dmel_bins_equal_the_oracle_in_float64(name, oracle):
    pcm_S = _signal(name)
    _, want_FM = oracle(pcm_S, torch.float64)
    got_FM = dmel_bins(pcm_S)
    assert got_FM.dtype == torch.int32
    assert got_FM.shape == (-(-len(pcm_S) // 800), 80)
    assert torch.equal(got_FM, want_FM)


@pytest.mark.parametrize("name", SIGNALS)
def test_dmel_bins_differ_from_the_float32_oracle_only_within_its_rounding(name, oracle):
    pcm_S = _signal(name)
    log_mel_FM, want_FM = oracle(pcm_S, torch.float32)
    exact_FM, _ = oracle(pcm_S, torch.float64)
    centres_L = torch.linspace(-7.0, 2.0, 16)
    boundaries = (centres_L[1:] + centres_L[:-1]) / 2
    to_boundary_FM = (log_mel_FM[..., None] - boundaries).abs().amin(dim=-1)
    # A float32 spectrum errs by a part of its loudest line, so a quiet channel beside a loud one
    # is off by far more than 1e-4; the oracle's own float64 run says by how much.
    rounding_FM = (log_mel_FM - exact_FM).abs() + 1e-4
    differs_FM = dmel_bins(pcm_S) != want_FM
    assert not (differs_FM & (to_boundary_FM > rounding_FM)).any()
    assert differs_FM.float().mean() < 1e-3


def test_dmel_bins_of_silence_are_the_level_of_the_magnitude_floor():
    # magnitude 1e-5 times a filter of unit area over 10 Hz lines: log10 = -6, level (7 - 6) / 0.6.
    assert torch.equal(dmel_bins(np.zeros(1600, np.float32)), torch.full((2, 80), 2).int())


@pytest.mark.parametrize(("num_samples", "num_frames"), [(0, 0), (1, 1), (800, 1), (801, 2)])
def test_dmel_bins_count_begun_hops(num_samples, num_frames):
    assert dmel_bins(np.zeros(num_samples, np.float32)).shape == (num_frames, 80)


def test_dmel_frame_ends_with_its_hop():
    pcm_S = _signal("noise")[:4000]
    changed_S = pcm_S.copy()
    changed_S[1600:] = 0.0
    before_FM, after_FM = dmel_bins(pcm_S), dmel_bins(changed_S)
    assert torch.equal(before_FM[:2], after_FM[:2])
    assert not torch.equal(before_FM[2], after_FM[2])


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 6000), max_size=12), length=st.integers(0, 6000))
def test_dmel_stream_equals_whole_for_any_chunking(cuts, length):
    pcm_S = _signal("speech")[20000 : 20000 + length]
    edges = [0, *sorted(min(cut, length) for cut in cuts), length]
    stream = DmelStream()
    parts = [stream.push(pcm_S[a:b]) for a, b in pairwise(edges)]
    assert stream.num_pending == length % 800
    assert torch.equal(torch.cat([*parts, stream.flush()]), dmel_bins(pcm_S))


def test_dmel_stream_sample_by_sample_and_hop_by_hop():
    pcm_S = _signal("chirp")[:2000]
    by_sample, by_hop = DmelStream(), DmelStream()
    samples_FM = torch.cat([by_sample.push(pcm_S[i : i + 1]) for i in range(2000)])
    hops_FM = torch.cat([by_hop.push(pcm_S[i : i + 800]) for i in range(0, 2000, 800)])
    assert torch.equal(samples_FM, hops_FM)
    assert torch.equal(samples_FM, dmel_bins(pcm_S)[:2])


def test_dmel_flush_puts_its_zeros_into_the_stream():
    pcm_S = _signal("noise")[:2000]
    stream = DmelStream()
    first_FM = torch.cat((stream.push(pcm_S[:1000]), stream.flush()))
    assert stream.flush().shape == (0, 80)
    padded_S = np.concatenate((pcm_S[:1000], np.zeros(600, np.float32), pcm_S[1000:]))
    second_FM = torch.cat((stream.push(pcm_S[1000:]), stream.flush()))
    assert torch.equal(torch.cat((first_FM, second_FM)), dmel_bins(padded_S))


@pytest.mark.parametrize("position", [0, 1, 799, 800, 1234])
def test_dmel_state_goes_back_and_copies_go_their_own_way(position):
    pcm_S = _signal("speech")[20000:24000]
    stream = DmelStream()
    stream.push(pcm_S[:position])
    state, twin = stream.state(), stream.copy()
    want_FM = stream.push(pcm_S[position:])
    assert torch.equal(twin.push(pcm_S[position:]), want_FM)
    stream.restore(state)
    assert torch.equal(stream.push(pcm_S[position:]), want_FM)
    elsewhere = DmelStream()
    elsewhere.restore(DmelState(state.context.copy(), state.pending.copy()))
    assert torch.equal(elsewhere.push(pcm_S[position:]), want_FM)


def test_dmel_state_is_small_read_only_and_apart_from_the_callers_arrays():
    stream = DmelStream()
    pcm_S = np.full(1000, 0.5, np.float32)
    stream.push(pcm_S)
    pcm_S[:] = 0.0
    state = stream.state()
    assert state.context.shape == (800,)
    assert state.pending.tolist() == [0.5] * 200
    assert state.context.dtype == state.pending.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        state.pending[0] = 1.0
    context_S = np.zeros(800, np.float32)
    stream.restore(DmelState(context_S, state.pending))
    context_S[:] = 1.0
    assert not stream.state().context.any()


@pytest.mark.parametrize(
    ("pcm", "error", "message"),
    [
        (np.array([0.0, np.nan], np.float32), InvalidArgument, "pcm: expected finite samples"),
        (np.array([np.inf], np.float32), InvalidArgument, "pcm: expected finite samples"),
        (np.array([-np.inf, 0], np.float32), InvalidArgument, "pcm: expected finite samples"),
        (np.array([0.0, 1.5], np.float32), InvalidArgument, r"in \[-1, 1\], got .* \[0, 1.5\]"),
        (np.zeros(4), InvalidArgument, "pcm: expected a float32 array.*got dtype float64"),
        (np.zeros(4, np.int16), InvalidArgument, "pcm: expected.*got dtype int16"),
        (np.zeros((2, 4), np.float32), InvalidArgument, r"pcm: expected.*got shape \[2, 4\]"),
        (np.float32(0.0), InvalidType, "pcm: expected.*got float32"),
        ([0.0, 0.1], InvalidType, "pcm: expected a float32 array.*got list"),
        (torch.zeros(3, dtype=torch.bfloat16), InvalidArgument, "pcm: expected.*got bfloat16"),
    ],
)
def test_dmel_refuses_bad_samples_and_changes_nothing(pcm, error, message):
    stream = DmelStream()
    stream.push(np.full(900, 0.25, np.float32))
    state = stream.state()
    with pytest.raises(error, match=message):
        stream.push(pcm)
    assert stream.state() is state


def test_dmel_takes_a_tensor():
    pcm_S = _signal("noise")[:1600]
    assert torch.equal(dmel_bins(torch.from_numpy(pcm_S)), dmel_bins(pcm_S))


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ((np.zeros(800, np.float32),), InvalidType, "state: expected DmelState, got tuple"),
        (
            DmelState(np.zeros(799, np.float32), np.zeros(0, np.float32)),
            InvalidArgument,
            "state.context: expected 800 samples, got 799",
        ),
        (
            DmelState(np.zeros(800, np.float32), np.zeros(800, np.float32)),
            InvalidArgument,
            "state.pending: expected fewer than hop = 800 samples, got 800",
        ),
        (
            DmelState(np.full(800, np.nan, np.float32), np.zeros(0, np.float32)),
            InvalidArgument,
            "state.context: expected finite samples",
        ),
    ],
)
def test_dmel_refuses_a_state_that_does_not_fit(state, error, message):
    with pytest.raises(error, match=message):
        DmelStream().restore(state)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"hop": 0}, InvalidArgument, "DmelConfig.hop: expected at least 1, got 0"),
        ({"window": 799}, InvalidArgument, "DmelConfig.window: expected at least hop = 800"),
        ({"num_levels": 1}, InvalidArgument, "DmelConfig.num_levels: expected at least 2, got 1"),
        ({"min_log10": 2.0}, InvalidArgument, "DmelConfig.min_log10: expected less than max"),
        ({"sample_rate": 16e3}, InvalidType, "DmelConfig.sample_rate: expected an int, got float"),
    ],
)
def test_dmel_config_refuses_nonsense(fields, error, message):
    with pytest.raises(error, match=message):
        DmelConfig(**fields)


@pytest.mark.parametrize(
    "config",
    [
        DmelConfig(num_mel_bins=4, num_levels=8),
        DmelConfig(hop=160, window=400, num_mel_bins=128),  # some filters are empty
        DmelConfig(hop=400, window=400, num_levels=2),
    ],
)
def test_dmel_other_configs_stream_as_they_run_whole(config):
    pcm_S = _signal("speech")[20000:22222]
    stream = DmelStream(config)
    parts = [stream.push(pcm_S[i : i + 333]) for i in range(0, len(pcm_S), 333)]
    bins_FM = dmel_bins(pcm_S, config)
    assert torch.equal(torch.cat([*parts, stream.flush()]), bins_FM)
    assert bins_FM.shape == (-(-len(pcm_S) // config.hop), config.num_mel_bins)
    assert 0 <= int(bins_FM.min()) < int(bins_FM.max()) < config.num_levels
