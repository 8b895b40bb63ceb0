"""Pictures to 40 x 40 patches, bit for bit as the Inkling image processor makes them.

Legend: H height, W width, C channels, P patches (row-major), T the two temporal slots, Y and X
inside a patch.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from tml_core.errors import InvalidArgument
from tml_core.media._checks import Rgb, positive_int, rgb_array

__all__ = ["PATCH_SIZE", "image_patches", "num_patches"]

PATCH_SIZE = 40

_PAD_VALUE = np.float32(-1.0)  # on the 0..255 scale, before normalisation
_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
# The processor folds the division by 255 into mean and std (in float32), so must we.
_MEAN_255 = _CLIP_MEAN * np.float32(255.0)
_STD_255 = _CLIP_STD * np.float32(255.0)


def num_patches(height: int, width: int, patch_size: int = PATCH_SIZE) -> int:
    """Patches, and so tokens, of a picture: ``ceil(height / 40) * (width // 40 + 1)``.

    The extra column stands even where the width is a multiple of the patch size; the model was
    trained with it.
    """
    size = positive_int("patch_size", patch_size)
    rows = -(-positive_int("height", height) // size)
    return rows * (positive_int("width", width) // size + 1)


def image_patches(
    rgb: Rgb | torch.Tensor,
    second: Rgb | torch.Tensor | None = None,
    *,
    patch_size: int = PATCH_SIZE,
) -> torch.Tensor:
    """Normalised patches of a picture or of a pair of video frames: float32 [P, 2, 40, 40, 3].

    ``rgb``: uint8 [H, W, 3]. ``second``: the later frame of a pair, same shape; it fills the
    second temporal slot, which for a still holds the same picture again.
    Raises InvalidArgument or InvalidType for any other shape or dtype.
    """
    first_HWC = rgb_array("rgb", rgb)
    size = positive_int("patch_size", patch_size)
    height, width = first_HWC.shape[:2]
    patches_PTYXC = np.empty((num_patches(height, width, size), 2, size, size, 3), np.float32)
    patches_PTYXC[:, 0] = _still_patches(first_HWC, size)
    if second is None:
        patches_PTYXC[:, 1] = patches_PTYXC[:, 0]
    else:
        second_HWC = rgb_array("second", second)
        if second_HWC.shape != first_HWC.shape:
            raise InvalidArgument(
                f"second: expected the shape of rgb = {list(first_HWC.shape)}, "
                f"got {list(second_HWC.shape)}"
            )
        patches_PTYXC[:, 1] = _still_patches(second_HWC, size)
    return torch.from_numpy(patches_PTYXC)


def _still_patches(rgb_HWC: Rgb, size: int) -> NDArray[np.float32]:
    height, width = rgb_HWC.shape[:2]
    rows, cols = -(-height // size), width // size + 1
    canvas = np.full((rows * size, cols * size, 3), _PAD_VALUE, np.float32)
    canvas[:height, :width] = rgb_HWC
    canvas -= _MEAN_255
    canvas /= _STD_255
    tiles = canvas.reshape(rows, size, cols, size, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(rows * cols, size, size, 3)
