"""Shared argument checks of the media floor. Legend: S samples, H height, W width, C channels."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tml_core.errors import InvalidArgument, InvalidType

Pcm = NDArray[np.float32]
Rgb = NDArray[np.uint8]


def as_array(name: str, value: object, wanted: str) -> NDArray[Any]:
    """``value`` as a numpy array without a copy; only arrays and CPU tensors are taken."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise InvalidArgument(f"{name}: expected a CPU tensor, got one on {value.device}")
        if value.dtype == torch.bfloat16:
            raise InvalidArgument(f"{name}: expected {wanted}, got bfloat16")
        return value.detach().numpy()
    raise InvalidType(f"{name}: expected {wanted}, got {type(value).__name__}")


def pcm_array(name: str, value: object) -> Pcm:
    """Checked mono samples: float32 [S], finite, in [-1, 1]."""
    wanted = "a float32 array of shape [samples]"
    pcm_S = as_array(name, value, wanted)
    if pcm_S.dtype != np.float32:
        raise InvalidArgument(f"{name}: expected {wanted}, got dtype {pcm_S.dtype}")
    if pcm_S.ndim != 1:
        raise InvalidArgument(f"{name}: expected {wanted}, got shape {list(pcm_S.shape)}")
    if pcm_S.size:
        # NaN survives min and max and fails both comparisons, so the good case is one pass each.
        low, high = float(pcm_S.min()), float(pcm_S.max())
        if not (low >= -1.0 and high <= 1.0):
            if not np.isfinite(pcm_S).all():
                raise InvalidArgument(f"{name}: expected finite samples, got NaN or infinity")
            raise InvalidArgument(
                f"{name}: expected samples in [-1, 1], got values in [{low:g}, {high:g}]"
            )
    return pcm_S


def rgb_array(name: str, value: object) -> Rgb:
    """A checked picture: uint8 [H, W, 3], H and W at least 1."""
    wanted = "a uint8 array of shape [height, width, 3]"
    rgb_HWC = as_array(name, value, wanted)
    if rgb_HWC.dtype != np.uint8:
        raise InvalidArgument(f"{name}: expected {wanted}, got dtype {rgb_HWC.dtype}")
    if rgb_HWC.ndim != 3 or rgb_HWC.shape[2] != 3 or 0 in rgb_HWC.shape:
        raise InvalidArgument(f"{name}: expected {wanted}, got shape {list(rgb_HWC.shape)}")
    return rgb_HWC


def positive_int(name: str, value: object) -> int:
    """``value`` as an int of at least 1; bools are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidType(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise InvalidArgument(f"{name}: expected at least 1, got {value}")
    return int(value)
