"""Patches as JPEG and back: what a picture was before it was normalised, a thirtieth of the bytes.

Legend: P patches, T the two temporal slots, Y and X inside a patch, C channels.

All tiles of an image are stacked into one picture [P * T * Y, X, C]; tiles are whole JPEG blocks,
so none bleeds into the next. What is padding comes back exactly, what is seen as JPEG keeps it.
"""

import io
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tml_core.errors import CheckpointError, MissingExtra
from tml_core.media.patches import image_patches

__all__ = ["PackedPicture", "pack_picture", "unpack_picture"]


class PackedPicture(NamedTuple):
    """``jpeg``: the stack of tiles. ``seen``: uint8 [P, 2], height and width of each patch's part
    that is not padding, at its top left."""

    jpeg: bytes
    seen: NDArray[np.uint8]


class _Levels(NamedTuple):
    """``value_LC``: what image_patches makes of each byte; ``pad_C``: of padding."""

    value_LC: NDArray[np.float32]
    pad_C: NDArray[np.float32]


def pack_picture(patches: Tensor, quality: int) -> PackedPicture | None:
    """Float32 [P, 2, size, size, 3] of `image_patches`; None for patches that are no picture of
    bytes, which JPEG cannot keep. ``quality``: 1 to 95, as Pillow has it."""
    patches_PTYXC = patches.numpy()
    size = patches_PTYXC.shape[2]
    levels = _levels()
    if size % 8 or size > 255 or patches_PTYXC.shape[4] != 3 or not len(patches_PTYXC):
        return None
    edges = patches_PTYXC[:, 0, :, 0, 0], patches_PTYXC[:, 0, 0, :, 0]
    seen_PS = np.stack([(edge != levels.pad_C[0]).sum(axis=1) for edge in edges], axis=1)
    first, last = levels.value_LC[0], levels.value_LC[-1]
    scaled = (patches_PTYXC - first) * (np.float32(255.0) / (last - first))
    np.rint(scaled, out=scaled)
    np.clip(scaled, 0, 255, out=scaled)
    bytes_PTYXC = scaled.astype(np.uint8)
    if not np.array_equal(_patches(bytes_PTYXC, seen_PS), patches_PTYXC):
        return None
    out = io.BytesIO()
    stack = bytes_PTYXC.reshape(-1, size, 3)
    _pillow().fromarray(stack).save(out, "jpeg", quality=quality, subsampling=0)
    return PackedPicture(out.getvalue(), seen_PS.astype(np.uint8))


def unpack_picture(packed: PackedPicture, size: int) -> Tensor:
    """The patches again: float32 [P, 2, size, size, 3]. Raises CheckpointError for no such JPEG."""
    num_patches = len(packed.seen)
    try:
        stack = np.asarray(_pillow().open(io.BytesIO(packed.jpeg)))
        bytes_PTYXC = stack.reshape(num_patches, 2, size, size, 3)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"data: a picture cannot be read: {error}") from error
    return torch.from_numpy(_patches(bytes_PTYXC, packed.seen))


@cache
def _levels() -> _Levels:
    ramp_LC = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    # One row of 256 pixels in patches of 8; the patch after them is padding.
    tiles_PTYXC = image_patches(ramp_LC[None], patch_size=8).numpy()
    return _Levels(tiles_PTYXC[:32, 0, 0].reshape(256, 3).copy(), tiles_PTYXC[32, 0, 0, 0].copy())


def _patches(bytes_PTYXC: NDArray[np.uint8], seen_PS: NDArray[Any]) -> NDArray[np.float32]:
    """Normalised, with padding around what is seen."""
    values_LC, pad_C = _levels()
    result = np.empty(bytes_PTYXC.shape, np.float32)
    for channel in range(3):
        np.take(values_LC[:, channel], bytes_PTYXC[..., channel], out=result[..., channel])
    for patch, (height, width) in enumerate(seen_PS):
        result[patch, :, height:] = pad_C
        result[patch, :, :, width:] = pad_C
    return result


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra(
            "data: pictures need Pillow; install it with: pip install 'tml_core[train]'"
        ) from None
    return Image
