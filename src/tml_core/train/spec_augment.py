"""SpecAugment on dMel bins: what is heard is masked and tinted anew each time it is learned from.

After Park et al. 2019, without time warping, for labels keep their time. Channels are stretched as
by a longer or shorter vocal tract (Jaitly and Hinton 2013), and levels shifted and tilted as by
another microphone. A function of the seed and the place in the run, so that a resumed run hears the
same.
"""

from typing import Final

import torch
from numpy.random import Generator, Philox
from torch import Tensor

__all__ = ["spec_augment"]

_STRETCH: Final = 60  # frames that are altered alike: three seconds
_MAX_SHIFT: Final = 1  # levels
_MAX_TILT: Final = 1.5  # levels at either end of the band
_MAX_STRETCH: Final = 0.15  # of the channels' numbers
_NUM_MASKS: Final = 2
_MAX_MASK: Final = 0.12  # of the channels


def spec_augment(
    bins_FM: Tensor, num_levels: int, share: float, seed: int, step: int, batch: int
) -> Tensor:
    """``bins_FM`` int32 [F, M] altered in about ``share`` of all stretches of three seconds.

    ``num_levels``: of a bin; the lowest is what a mask leaves. ``step``, ``batch``: the place in
    the run, of which with ``seed`` everything random is a function.
    """
    num_frames, num_mel = bins_FM.shape
    if share == 0 or num_frames == 0:
        return bins_FM
    rng = Generator(Philox(key=[seed, step], counter=[0, 0, 0, batch]))
    slope_M, channel_M = torch.linspace(-1.0, 1.0, num_mel), torch.arange(num_mel)
    widest = max(1, round(num_mel * _MAX_MASK))
    altered = bins_FM.clone()
    for start in range(0, num_frames, _STRETCH):
        if rng.random() >= share:
            continue
        part_FM = altered[start : start + _STRETCH]
        shift = int(rng.integers(-_MAX_SHIFT, _MAX_SHIFT + 1))
        tilt = float(rng.uniform(-_MAX_TILT, _MAX_TILT))
        stretch = 1.0 + float(rng.uniform(-_MAX_STRETCH, _MAX_STRETCH))
        part_FM[:] = part_FM[:, (channel_M * stretch).round().long().clamp(max=num_mel - 1)]
        part_FM += torch.round(shift + tilt * slope_M).to(bins_FM.dtype)
        part_FM.clamp_(0, num_levels - 1)
        for _ in range(_NUM_MASKS):
            width = int(rng.integers(0, widest + 1))
            low = int(rng.integers(0, num_mel - width + 1))
            part_FM[:, low : low + width] = 0
    return altered
