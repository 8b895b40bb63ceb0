"""Discretised log-mel frames (dMel): PCM to level indices, whole or streamed, the same bits.

Legend: S samples, W window length, F frames, M mel channels, K widest mel filter.

Semantics are those of the Inkling feature extractor: 16 kHz mono, one frame per 50 ms hop, 100 ms
periodic Hann window that ends where the hop ends (so a frame never sees the future), magnitude
spectrum, Slaney-scale Slaney-normalised mel filters, log10, nearest of 16 evenly spaced levels.

Everything inside is float64 and computed one frame at a time with fixed shapes and no BLAS, so the
result for a frame depends on its samples alone. Levels are found by comparing the mel energy with
ten to the power of the midpoints, which needs no logarithm and sends ties to the lower level.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media._checks import Pcm, pcm_array, positive_int
from tml_core.media._mel_scale import filter_runs, mel_filters

__all__ = ["DmelConfig", "DmelState", "DmelStream", "dmel_bins"]

# The feature extractor clamps both the power spectrum and the mel energy here.
_POWER_FLOOR = 1e-10
_ENERGY_FLOOR = 1e-10


@dataclass(frozen=True)
class DmelConfig:
    """How samples become levels. ``hop`` and ``window`` are in samples, ``*_log10`` in log10 units.

    Raises InvalidArgument or InvalidType for a value that describes no valid front end.
    """

    sample_rate: int = 16000
    hop: int = 800
    window: int = 1600
    num_mel_bins: int = 80
    num_levels: int = 16
    min_log10: float = -7.0
    max_log10: float = 2.0

    def __post_init__(self) -> None:
        for field in ("sample_rate", "hop", "window", "num_mel_bins", "num_levels"):
            positive_int(f"DmelConfig.{field}", getattr(self, field))
        if self.window < self.hop:
            raise InvalidArgument(
                f"DmelConfig.window: expected at least hop = {self.hop}, got {self.window}"
            )
        if self.num_levels < 2:
            raise InvalidArgument(
                f"DmelConfig.num_levels: expected at least 2, got {self.num_levels}"
            )
        if not self.min_log10 < self.max_log10:
            raise InvalidArgument(
                "DmelConfig.min_log10: expected less than max_log10 = "
                f"{self.max_log10}, got {self.min_log10}"
            )

    @property
    def context_len(self) -> int:
        """Samples of the past that a frame sees beside its own hop."""
        return self.window - self.hop


@dataclass(frozen=True, eq=False)
class DmelState:
    """All a DmelStream remembers: two small float32 arrays, so it is cheap to keep and to store.

    ``context`` [window - hop]: the samples before the next frame's hop.
    ``pending`` [< hop]: samples of that hop that have already come.
    """

    context: Pcm
    pending: Pcm


class DmelStream:
    """Streaming dMel: the frames of any sequence of pushes equal those of one push of the whole.

    The state is replaced, never written to, so ``state()`` and ``copy()`` cost nothing.
    """

    def __init__(self, config: DmelConfig | None = None) -> None:
        self._config = DmelConfig() if config is None else config
        self._tables = _tables(self._config)
        self._state = DmelState(
            _frozen(np.zeros(self._config.context_len, np.float32)),
            _frozen(np.zeros(0, np.float32)),
        )

    @property
    def config(self) -> DmelConfig:
        """The configuration this stream was made with."""
        return self._config

    @property
    def num_pending(self) -> int:
        """Samples that wait for their hop to fill up."""
        return len(self._state.pending)

    def push(self, pcm: Pcm | torch.Tensor) -> torch.Tensor:
        """Take samples, return the frames that became complete: int32 [F, num_mel_bins].

        ``pcm``: float32 [S] in [-1, 1], any S, at the config's sample rate.
        Raises InvalidArgument or InvalidType and changes nothing if ``pcm`` is not that.
        """
        new_S = pcm_array("pcm", pcm)
        hop, window, context_len = self._config.hop, self._config.window, self._config.context_len
        buffer_S = np.concatenate((self._state.context, self._state.pending, new_S))
        num_frames = (len(buffer_S) - context_len) // hop
        bins_FM = np.empty((num_frames, self._config.num_mel_bins), np.int32)
        for frame in range(num_frames):
            start = frame * hop
            bins_FM[frame] = _frame_levels(buffer_S[start : start + window], self._tables)
        rest_S = buffer_S[num_frames * hop :]
        self._state = DmelState(
            _frozen(rest_S[:context_len].copy()), _frozen(rest_S[context_len:].copy())
        )
        return torch.from_numpy(bins_FM)

    def flush(self) -> torch.Tensor:
        """Fill the pending hop up with zeros and return its frame: int32 [0 or 1, num_mel_bins].

        The zeros count as samples of the stream: what is pushed later comes after them.
        """
        num_zeros = -self.num_pending % self._config.hop
        return self.push(np.zeros(num_zeros, np.float32))

    def state(self) -> DmelState:
        """The current state; its arrays are read-only."""
        return self._state

    def restore(self, state: DmelState) -> None:
        """Go back (or over) to ``state``, which is copied.

        Raises InvalidType or InvalidArgument if it does not fit this stream's config.
        """
        if not isinstance(state, DmelState):
            raise InvalidType(f"state: expected DmelState, got {type(state).__name__}")
        context_S = pcm_array("state.context", state.context)
        pending_S = pcm_array("state.pending", state.pending)
        if len(context_S) != self._config.context_len:
            raise InvalidArgument(
                f"state.context: expected {self._config.context_len} samples, got {len(context_S)}"
            )
        if len(pending_S) >= self._config.hop:
            raise InvalidArgument(
                f"state.pending: expected fewer than hop = {self._config.hop} samples, "
                f"got {len(pending_S)}"
            )
        self._state = DmelState(_frozen(context_S.copy()), _frozen(pending_S.copy()))

    def copy(self) -> "DmelStream":
        """A stream that goes on from here on its own."""
        twin = DmelStream(self._config)
        twin._state = self._state
        return twin


def dmel_bins(pcm_S: Pcm | torch.Tensor, config: DmelConfig | None = None) -> torch.Tensor:
    """The levels of a whole recording: int32 [F, num_mel_bins], F = ceil(S / hop).

    ``pcm_S``: float32 [S] in [-1, 1] at the config's sample rate; the last hop is filled up with
    zeros. Raises InvalidArgument or InvalidType if it is not that.
    """
    stream = DmelStream(config)
    return torch.cat((stream.push(pcm_S), stream.flush()))


class _Tables(NamedTuple):
    window_W: NDArray[np.float64]
    index_MK: NDArray[np.intp]
    weight_MK: NDArray[np.float64]
    thresholds: NDArray[np.float64]  # [num_levels - 1], mel energies at which the level changes


@lru_cache(maxsize=8)
def _tables(config: DmelConfig) -> _Tables:
    window_W = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(config.window) / config.window)
    filters_MN = mel_filters(config.sample_rate, config.window, config.num_mel_bins)
    index_MK, weight_MK = filter_runs(filters_MN)
    # Rounded to float32 first, as the processor's level centres are.
    centres = np.linspace(config.min_log10, config.max_log10, config.num_levels)
    centres = centres.astype(np.float32).astype(np.float64)
    thresholds = 10.0 ** (0.5 * (centres[1:] + centres[:-1]))
    return _Tables(window_W, index_MK, weight_MK, thresholds)


def _frame_levels(samples_W: Pcm, tables: _Tables) -> NDArray[np.intp]:
    spectrum = np.fft.rfft(samples_W * tables.window_W)
    power = spectrum.real * spectrum.real + spectrum.imag * spectrum.imag
    magnitude = np.sqrt(np.maximum(power, _POWER_FLOOR))
    energy_M = (magnitude[tables.index_MK] * tables.weight_MK).sum(axis=1)
    levels_M: NDArray[np.intp] = np.searchsorted(
        tables.thresholds, np.maximum(energy_M, _ENERGY_FLOOR), side="left"
    )
    return levels_M


def _frozen(array: Pcm) -> Pcm:
    array.flags.writeable = False
    return array
