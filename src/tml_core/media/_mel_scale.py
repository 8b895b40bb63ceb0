"""Mel filters of both front ends: triangles on the Slaney scale, stored as runs of frequencies.

Legend: M mel channels, N frequencies, K widest filter.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["FilterRuns", "filter_runs", "mel_filters"]


class FilterRuns(NamedTuple):
    """Filters that are nonzero on one run of frequencies each, padded to the widest: the energy of
    channel m is ``sum_k magnitude[index[m, k]] * weight[m, k]``."""

    index_MK: NDArray[np.intp]
    weight_MK: NDArray[np.float64]


def mel_filters(sample_rate: int, window: int, num_mel_bins: int) -> NDArray[np.float64]:
    """Triangles of unit area, evenly spaced on the Slaney mel scale: [M, window // 2 + 1]."""
    top_hz = sample_rate / 2.0
    edges_hz = _mel_to_hz(np.linspace(0.0, _hz_to_mel(top_hz), num_mel_bins + 2))
    bins_hz = np.linspace(0.0, top_hz, window // 2 + 1)
    low, centre, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    rising = (bins_hz - low) / (centre - low)
    falling = (high - bins_hz) / (high - centre)
    triangles: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    return triangles * (2.0 / (high - low))


def filter_runs(filters_MN: NDArray[np.float64]) -> FilterRuns:
    """The same filters without their zeros."""
    is_used_MN = filters_MN > 0.0
    start_M = is_used_MN.argmax(axis=1)
    width = max(1, int(is_used_MN.sum(axis=1).max()))
    index_MK = np.minimum(start_M[:, None] + np.arange(width), filters_MN.shape[1] - 1)
    in_run_MK = np.arange(width) < is_used_MN.sum(axis=1)[:, None]
    weight_MK = np.where(in_run_MK, np.take_along_axis(filters_MN, index_MK, axis=1), 0.0)
    return FilterRuns(index_MK, weight_MK)


def _hz_to_mel(hz: float) -> float:
    # Linear up to 1 kHz (15 mel), logarithmic above.
    return 3.0 * hz / 200.0 if hz < 1000.0 else 15.0 + 27.0 * np.log(hz / 1000.0) / np.log(6.4)


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    bent: NDArray[np.float64] = 1000.0 * np.exp((mel - 15.0) * np.log(6.4) / 27.0)
    return np.where(mel < 15.0, 200.0 * mel / 3.0, bent)
