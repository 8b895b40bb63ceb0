"""Philox4x32-10 in numpy: the spec of the counter-based random numbers the kernels draw.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FLOW_STREAM",
    "FLOW_TRAIN_STREAM",
    "VOCABULARY_STREAM",
    "gumbel_reference",
    "philox4x32_reference",
]

# Last counter word: of draws over the vocabulary, of the noise a flow head starts from, of the
# noise and times it is trained with.
VOCABULARY_STREAM = 0
FLOW_STREAM = 1
FLOW_TRAIN_STREAM = 2

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32_reference(
    counters: NDArray[np.uint32],
    key: tuple[int, int] | tuple[NDArray[np.uint64], NDArray[np.uint64]],
) -> NDArray[np.uint32]:
    """128 random bits, uint32 [..., 4], for each counter uint32 [..., 4] under one 64-bit key, or
    its own: the low and high words [...]."""
    c = np.moveaxis(counters.astype(np.uint64), -1, 0)
    k0, k1 = (np.asarray(one, np.uint64) for one in key)
    for _ in range(10):
        a, b = _MULTIPLIERS[0] * c[0], _MULTIPLIERS[1] * c[2]
        c = np.stack(
            [
                (b >> _HALF) ^ c[1] ^ k0,
                b & _LOW,
                (a >> _HALF) ^ c[3] ^ k1,
                a & _LOW,
            ]
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.moveaxis(c, 0, -1).astype(np.uint32)


def gumbel_reference(seed: int, position: int, num_ids: int) -> NDArray[np.float64]:
    """Gumbel noise of vocabulary ids 0 to ``num_ids`` - 1 at a position of a seeded stream.

    Id n takes word n % 4 of the block of counter (n // 4, position, stream) under the key seed;
    with u = (bits + 1/2) / 2^32 its noise is -log(-log u), here in float64.
    """
    blocks = -(-num_ids // 4)
    counters = np.zeros((blocks, 4), dtype=np.uint32)
    counters[:, 0] = np.arange(blocks)
    counters[:, 1] = position & 0xFFFFFFFF
    counters[:, 2] = position >> 32 & 0xFFFFFFFF
    counters[:, 3] = VOCABULARY_STREAM
    words = philox4x32_reference(counters, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    uniform = (words.reshape(-1)[:num_ids].astype(np.float64) + 0.5) * 2.0**-32
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise
