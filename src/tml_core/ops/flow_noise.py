"""flow_noise: normal numbers that are a function of (seed, position); what a flow starts from.

Shape suffixes: B rows, K numbers of a row.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from tml_core.errors import InvalidArgument
from tml_core.ops.philox import FLOW_STREAM, philox4x32_reference

__all__ = ["flow_noise", "flow_uniform"]

_LN2: Final = math.log(2.0)
_MASK: Final = 2**64 - 1
_ROWS: Final = 64  # at a time, whose numbers fit a cache
_UNIFORM_WORD: Final = 0xFFFFFFFF  # of a counter that no block of noise reaches


def flow_noise(
    seeds: Sequence[int], positions: Sequence[int], count: int, stream: int = FLOW_STREAM
) -> torch.Tensor:
    """Standard normal numbers, float32 [B, count]; row b is a function of its seed and position.

    Box and Muller on Philox words, in float64 sums, products, quotients and roots only, each of
    which IEEE rounds alike everywhere: the same bits on every machine.
    """
    if len(seeds) != len(positions):
        raise InvalidArgument(
            f"flow_noise: expected a position for each of {len(seeds)} seeds, got {len(positions)}"
        )
    noise_BK = np.empty((len(seeds), count), np.float32)
    index_N = np.arange(-(-count // 4), dtype=np.uint32)
    for first in range(0, len(seeds), _ROWS):
        rows = slice(first, first + _ROWS)
        words_BN4 = _words(seeds[rows], positions[rows], index_N, stream)
        # Word pairs (0, 1) and (2, 3) give two numbers each.
        uniform = (words_BN4.reshape(-1, 2).astype(np.float64) + 0.5) * 2.0**-32
        radius = np.sqrt(-2.0 * _log(uniform[:, 0]))
        cosine, sine = _turn(uniform[:, 1])
        pairs = np.stack((radius * cosine, radius * sine), axis=1)
        noise_BK[rows] = pairs.reshape(len(words_BN4), -1)[:, :count]
    return torch.from_numpy(noise_BK)


def flow_uniform(seed: int, positions: Sequence[int], stream: int) -> NDArray[np.float64]:
    """One number in (0, 1) for each position, independent of their noise: float64 [B]."""
    index = np.array([_UNIFORM_WORD], dtype=np.uint32)
    words_B = _words([seed] * len(positions), positions, index, stream)[:, 0, 0]
    uniform: NDArray[np.float64] = (words_B.astype(np.float64) + 0.5) * 2.0**-32
    return uniform


def _words(
    seeds: Sequence[int], positions: Sequence[int], index_N: NDArray[np.uint32], stream: int
) -> NDArray[np.uint32]:
    """uint32 [B, N, 4]: the blocks ``index_N`` of each (seed, position)."""
    seed_B1, position_B1 = (
        np.array([one & _MASK for one in part], np.uint64)[:, None] for part in (seeds, positions)
    )
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    counters = np.empty((len(seeds), len(index_N), 4), dtype=np.uint32)
    counters[..., 0] = index_N
    counters[..., 1] = position_B1 & low
    counters[..., 2] = position_B1 >> half
    counters[..., 3] = stream
    return philox4x32_reference(counters, (seed_B1 & low, seed_B1 >> half))


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm: 2 artanh((m - 1) / (m + 1)) of a mantissa near 1."""
    mantissa, exponent = np.frexp(x)
    is_low = mantissa < 0.7071067811865476
    mantissa = np.where(is_low, mantissa * 2.0, mantissa)
    exponent = np.where(is_low, exponent - 1, exponent)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    total = np.full_like(s, 1.0 / 23.0)
    for odd in range(21, 0, -2):
        total = total * square + 1.0 / odd
    result: NDArray[np.float64] = 2.0 * s * total + exponent * _LN2
    return result


def _turn(u: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosine and sine of u turns, an eighth of a turn ahead (which no circle notices)."""
    quarter = np.floor(4.0 * u)
    x = (4.0 * u - quarter - 0.5) * (math.pi / 2.0)
    square = x * x
    cosine, sine = np.ones_like(x), np.ones_like(x)
    for n in range(16, 0, -2):
        cosine = 1.0 - cosine * square / (n * (n - 1))
        sine = 1.0 - sine * square / (n * (n + 1))
    sine = sine * x
    cosine, sine = (
        np.where(quarter % 2.0 == 1.0, -sine, cosine),
        np.where(quarter % 2.0 == 1.0, cosine, sine),
    )
    sign = np.where(quarter >= 2.0, -1.0, 1.0)
    return cosine * sign, sine * sign
