"""Fine log-mel frames, what a model speaks in: from PCM whole or streamed, and to the dMel grid.

Legend: S samples, W window length, F frames, B blocks of 50 ms, M mel channels.

One frame per 12.5 ms hop, from a 50 ms periodic Hann window that ends where the hop ends (a frame
never sees the future), magnitude spectrum, the same filters as dMel, log10. Everything inside is
float64, one frame at a time with fixed shapes and no BLAS, so that the bits of a frame depend on
its samples alone.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media._checks import Pcm, as_array, pcm_array, positive_int
from tml_core.media._mel_scale import FilterRuns, filter_runs, mel_filters
from tml_core.media.dmel import DmelConfig

__all__ = [
    "Mel",
    "MelConfig",
    "MelState",
    "MelStream",
    "dmel_of_mel",
    "mel_array",
    "mel_energy",
    "mel_frames",
]

Mel = NDArray[np.float32]

# The power of a dMel channel over the weighted power of the fine frames under its window, for
# speech: 8/3 for noise and 4/3 for a tone would be exact.
_DMEL_GAIN: Final = 2.36


@dataclass(frozen=True)
class MelConfig:
    """How samples become mel frames. ``hop`` and ``window`` are in samples; energies are kept
    within ``min_log10`` (less is silence) and ``max_log10`` (more than full scale), in log10 units
    of dMel.

    Raises InvalidArgument or InvalidType for a value that describes no valid front end.
    """

    sample_rate: int = 16000
    hop: int = 200
    window: int = 800
    num_mel_bins: int = 80
    min_log10: float = -4.0
    max_log10: float = 1.5

    def __post_init__(self) -> None:
        for field in ("sample_rate", "hop", "window", "num_mel_bins"):
            positive_int(f"MelConfig.{field}", getattr(self, field))
        if self.window % self.hop or self.window < 2 * self.hop or self.window % 2:
            raise InvalidArgument(
                f"MelConfig.window: expected an even multiple of hop = {self.hop}, at least two "
                f"of them, got {self.window}"
            )
        if not self.min_log10 < self.max_log10:
            raise InvalidArgument(
                f"MelConfig.min_log10: expected less than max_log10 = {self.max_log10}, "
                f"got {self.min_log10}"
            )

    @property
    def context_len(self) -> int:
        """Samples of the past that a frame sees beside its own hop."""
        return self.window - self.hop


@dataclass(frozen=True, eq=False)
class MelState:
    """All a MelStream remembers: the samples before the next frame's hop, float32
    [window - hop], and those of that hop that have come, float32 [< hop]."""

    context: Pcm
    pending: Pcm


class MelStream:
    """Streaming mel: the frames of any sequence of pushes equal those of one push of the whole.

    The state is replaced, never written to, so ``state()`` and ``copy()`` cost nothing.
    """

    def __init__(self, config: MelConfig | None = None) -> None:
        self._config = MelConfig() if config is None else config
        self._tables = _tables(self._config)
        self._state = MelState(
            np.zeros(self._config.context_len, np.float32), np.zeros(0, np.float32)
        )

    @property
    def config(self) -> MelConfig:
        """The configuration this stream was made with."""
        return self._config

    def push(self, pcm: Pcm | torch.Tensor) -> Mel:
        """Take samples, return the frames that became complete: float32 [F, num_mel_bins].

        ``pcm``: float32 [S] in [-1, 1], any S, at the config's sample rate.
        Raises InvalidArgument or InvalidType and changes nothing if ``pcm`` is not that.
        """
        new_S = pcm_array("pcm", pcm)
        hop, window = self._config.hop, self._config.window
        buffer_S = np.concatenate((self._state.context, self._state.pending, new_S))
        num_frames = (len(buffer_S) - self._config.context_len) // hop
        mel_FM = np.empty((num_frames, self._config.num_mel_bins), np.float32)
        for frame in range(num_frames):
            start = frame * hop
            mel_FM[frame] = self._tables.frame(buffer_S[start : start + window])
        rest_S = buffer_S[num_frames * hop :]
        context_len = self._config.context_len
        self._state = MelState(rest_S[:context_len].copy(), rest_S[context_len:].copy())
        return mel_FM

    def flush(self) -> Mel:
        """Fill the pending hop up with zeros and return its frame: float32 [0 or 1, M]."""
        num_zeros = -len(self._state.pending) % self._config.hop
        return self.push(np.zeros(num_zeros, np.float32))

    def state(self) -> MelState:
        """The current state; not to be written."""
        return self._state

    def restore(self, state: MelState) -> None:
        """Go back (or over) to ``state``.

        Raises InvalidType or InvalidArgument if it does not fit this stream's config.
        """
        if not isinstance(state, MelState):
            raise InvalidType(f"state: expected MelState, got {type(state).__name__}")
        if len(pcm_array("state.context", state.context)) != self._config.context_len:
            raise InvalidArgument(
                f"state.context: expected {self._config.context_len} samples, "
                f"got {len(state.context)}"
            )
        if len(pcm_array("state.pending", state.pending)) >= self._config.hop:
            raise InvalidArgument(
                f"state.pending: expected fewer than hop = {self._config.hop} samples, "
                f"got {len(state.pending)}"
            )
        self._state = state

    def copy(self) -> "MelStream":
        """A stream that goes on from here on its own."""
        twin = MelStream(self._config)
        twin._state = self._state
        return twin


def mel_frames(pcm_S: Pcm | torch.Tensor, config: MelConfig | None = None) -> Mel:
    """The frames of a whole recording: float32 [F, num_mel_bins], F = ceil(S / hop).

    ``pcm_S``: float32 [S] in [-1, 1] at the config's sample rate; the last hop is filled up with
    zeros. Raises InvalidArgument or InvalidType if it is not that.
    """
    stream = MelStream(config)
    return np.concatenate((stream.push(pcm_S), stream.flush()))


def dmel_of_mel(
    mel_FM: Mel | torch.Tensor, mel: MelConfig | None = None, dmel: DmelConfig | None = None
) -> torch.Tensor:
    """What a model hears of its own sound: levels int32 [B, M] of B blocks of mel frames.

    ``mel_FM``: float32 [F, M] log10 frames, F a multiple of the frames in one dMel hop. A block's
    levels are a function of the block alone, so nothing has to be carried: its frames' powers,
    weighed as the dMel window weighs their centres. That stands for the whole window, whose other
    half lies in the block before and has little weight; levels are 12 dB apart.
    Raises InvalidArgument if the two grids have other channels, or no common hop.
    """
    mel, dmel = mel or MelConfig(), dmel or DmelConfig()
    fits = mel.num_mel_bins == dmel.num_mel_bins and mel.sample_rate == dmel.sample_rate
    if not fits or dmel.hop % mel.hop:
        raise InvalidArgument(
            f"mel: expected {dmel.num_mel_bins} channels at {dmel.sample_rate} Hz and a hop that "
            f"divides {dmel.hop}, got {mel.num_mel_bins} at {mel.sample_rate} Hz and {mel.hop}"
        )
    frames_FM = mel_array("mel_FM", mel_FM, mel)
    per_block = dmel.hop // mel.hop
    if len(frames_FM) % per_block:
        raise InvalidArgument(
            f"mel_FM: expected a multiple of {per_block} frames, got {len(frames_FM)}"
        )
    weights_K, thresholds_L = _block_weights(mel, dmel)
    levels_BM = np.empty((len(frames_FM) // per_block, mel.num_mel_bins), np.int32)
    for block in range(len(levels_BM)):
        part_KM = frames_FM[block * per_block : (block + 1) * per_block].astype(np.float64)
        amplitude_KM = mel_energy(part_KM, mel)
        energy_M = np.sqrt((amplitude_KM * amplitude_KM * weights_K[:, None]).sum(axis=0))
        levels_BM[block] = np.searchsorted(thresholds_L, energy_M, side="left")
    return torch.from_numpy(levels_BM)


def mel_energy(log_FM: NDArray[np.float64], config: MelConfig) -> NDArray[np.float64]:
    """Energies of log10 frames, less the floor, so that silence has none."""
    bounded_FM = np.clip(log_FM, config.min_log10, config.max_log10)
    energy_FM: NDArray[np.float64] = 10.0**bounded_FM - 10.0**config.min_log10
    return energy_FM


def mel_array(name: str, value: object, config: MelConfig) -> Mel:
    """Checked mel frames: float32 [F, M], finite. Raises InvalidArgument or InvalidType."""
    wanted = f"a float32 array of shape [frames, {config.num_mel_bins}]"
    mel_FM = as_array(name, value, wanted)
    if mel_FM.dtype != np.float32:
        raise InvalidArgument(f"{name}: expected {wanted}, got dtype {mel_FM.dtype}")
    if mel_FM.ndim != 2 or mel_FM.shape[1] != config.num_mel_bins:
        raise InvalidArgument(f"{name}: expected {wanted}, got shape {list(mel_FM.shape)}")
    if not np.isfinite(mel_FM).all():
        raise InvalidArgument(f"{name}: expected finite values, got NaN or infinity")
    return mel_FM


class _Tables(NamedTuple):
    window_W: NDArray[np.float64]
    runs: FilterRuns
    floor: float
    ceiling: float

    def frame(self, samples_W: Pcm) -> NDArray[np.float64]:
        spectrum = np.fft.rfft(samples_W * self.window_W)
        magnitude = np.sqrt(spectrum.real * spectrum.real + spectrum.imag * spectrum.imag)
        energy_M = (magnitude[self.runs.index_MK] * self.runs.weight_MK).sum(axis=1)
        log_M: NDArray[np.float64] = np.log10(np.clip(energy_M, self.floor, self.ceiling))
        return log_M


@lru_cache(maxsize=8)
def _tables(config: MelConfig) -> _Tables:
    window_W = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(config.window) / config.window)
    filters_MN = mel_filters(config.sample_rate, config.window, config.num_mel_bins)
    runs = filter_runs(filters_MN)
    return _Tables(window_W, runs, 10.0**config.min_log10, 10.0**config.max_log10)


@lru_cache(maxsize=8)
def _block_weights(
    mel: MelConfig, dmel: DmelConfig
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of a block's frames, and the energies at which a dMel level changes."""
    per_block = dmel.hop // mel.hop
    # Samples before the end of the block at which each frame's window has its centre.
    centre_K = (per_block - 1 - np.arange(per_block)) * mel.hop + mel.window // 2
    hann_K = 0.5 - 0.5 * np.cos(2.0 * np.pi * centre_K / dmel.window)
    # All frames of a steady sound under the dMel window would have this weight.
    steady = 0.375 * dmel.window / mel.hop
    weights_K = hann_K**2 * (steady / (hann_K**2).sum()) * _DMEL_GAIN
    centres_L = np.linspace(dmel.min_log10, dmel.max_log10, dmel.num_levels)
    centres_L = centres_L.astype(np.float32).astype(np.float64)
    return weights_K, 10.0 ** (0.5 * (centres_L[1:] + centres_L[:-1]))
