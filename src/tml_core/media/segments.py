"""Segments: the pieces a sequence is made of, checked for all that does not need a model.

Legend: T tokens, S samples, F frames, M mel channels, B blocks of 50 ms, P patches, H height,
W width.
Arrays are kept without a copy: do not write to them while the segment is in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media._checks import Pcm, Rgb, as_array, pcm_array, rgb_array

__all__ = ["Audio", "Block", "Image", "OwnAudio", "Segment", "Tokens"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Text and control tokens. ``ids``: non-negative ints; stored as an int64 tensor [T].

    Raises InvalidType for what is not integers, InvalidArgument for a wrong shape or a negative id.
    """

    ids: Sequence[int] | torch.Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _token_ids(self.ids))


@dataclass(frozen=True, eq=False)
class Audio:
    """Sound: exactly one of ``pcm`` (float32 [S] in [-1, 1], mono, the model's sample rate) and
    ``bins`` (int32 [F, M], dMel levels; stored as a tensor).

    Raises InvalidArgument for both or none, a wrong dtype or shape, values out of range.
    """

    pcm: Pcm | torch.Tensor | None = None
    bins: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.pcm is None) == (self.bins is None):
            got = "neither" if self.pcm is None else "both"
            raise InvalidArgument(f"Audio: expected exactly one of pcm and bins, got {got}")
        if self.pcm is not None:
            object.__setattr__(self, "pcm", pcm_array("Audio.pcm", self.pcm))
        else:
            object.__setattr__(self, "bins", _bins(self.bins))


@dataclass(frozen=True, eq=False)
class Image:
    """A picture or a pair of video frames: exactly one of ``rgb`` (uint8 [H, W, 3]) and ``patches``
    (float32 [P, 2, 40, 40, 3] as image_patches makes them; stored as a tensor).

    ``second``: the later frame of a pair, same shape as ``rgb``; a still has none.
    Raises InvalidArgument for both or none, a wrong dtype or shape, values that are not finite.
    """

    rgb: Rgb | torch.Tensor | None = None
    patches: torch.Tensor | None = None
    second: Rgb | torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.rgb is None) == (self.patches is None):
            got = "neither" if self.rgb is None else "both"
            raise InvalidArgument(f"Image: expected exactly one of rgb and patches, got {got}")
        if self.rgb is None:
            if self.second is not None:
                raise InvalidArgument("Image.second: expected only with rgb, got it with patches")
            object.__setattr__(self, "patches", _patches(self.patches))
            return
        rgb_HWC = rgb_array("Image.rgb", self.rgb)
        object.__setattr__(self, "rgb", rgb_HWC)
        if self.second is not None:
            second_HWC = rgb_array("Image.second", self.second)
            if second_HWC.shape != rgb_HWC.shape:
                raise InvalidArgument(
                    f"Image.second: expected the shape of rgb = {list(rgb_HWC.shape)}, "
                    f"got {list(second_HWC.shape)}"
                )
            object.__setattr__(self, "second", second_HWC)


@dataclass(frozen=True, eq=False)
class OwnAudio:
    """Sound the model made, one position for each block. ``mel``: float32 [B, F, M], log10 frames,
    at least one block. ``before``: float32 [M], the frame that was said before the first one, None
    after silence.

    Raises InvalidArgument for another dtype or shape, or values that are not finite.
    """

    mel: torch.Tensor
    before: torch.Tensor | None = None

    def __post_init__(self) -> None:
        mel_BFM = _mel("OwnAudio.mel", self.mel, 3, "[blocks, frames, mel channels]")
        object.__setattr__(self, "mel", mel_BFM)
        if self.before is not None:
            before_M = _mel("OwnAudio.before", self.before, 1, "[mel channels]")
            if before_M.shape[0] != mel_BFM.shape[2]:
                raise InvalidArgument(
                    f"OwnAudio.before: expected [{mel_BFM.shape[2]}], got {list(before_M.shape)}"
                )
            object.__setattr__(self, "before", before_M)


Segment = Tokens | Audio | Image | OwnAudio


@dataclass(frozen=True, eq=False)
class Block:
    """Segments appended as one piece whose positions all see each other (bidirectional attention).

    ``segments``: Tokens, Audio and Image, at least one; stored as a tuple. Blocks do not nest.
    Raises InvalidType or InvalidArgument otherwise.
    """

    segments: Sequence[Segment]

    def __post_init__(self) -> None:
        if not isinstance(self.segments, (list, tuple)):
            raise InvalidType(
                f"Block.segments: expected a list or tuple, got {type(self.segments).__name__}"
            )
        if not self.segments:
            raise InvalidArgument("Block.segments: expected at least one segment, got none")
        for i, segment in enumerate(self.segments):
            if not isinstance(segment, (Tokens, Audio, Image)):
                raise InvalidType(
                    f"Block.segments[{i}]: expected Tokens, Audio or Image, "
                    f"got {type(segment).__name__}"
                )
        object.__setattr__(self, "segments", tuple(self.segments))


def _token_ids(ids: object) -> torch.Tensor:
    if isinstance(ids, (torch.Tensor, np.ndarray)):
        array = as_array("Tokens.ids", ids, "integers of shape [tokens]")
        if array.dtype.kind not in "iu":
            raise InvalidType(f"Tokens.ids: expected integers, got dtype {array.dtype}")
        if array.ndim != 1:
            raise InvalidArgument(f"Tokens.ids: expected shape [tokens], got {list(array.shape)}")
        ids_T = torch.from_numpy(array.astype(np.int64))
    elif isinstance(ids, Sequence) and not isinstance(ids, (str, bytes)):
        for i, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
                raise InvalidType(f"Tokens.ids[{i}]: expected an int, got {type(token).__name__}")
        ids_T = torch.tensor([int(token) for token in ids], dtype=torch.int64)
    else:
        raise InvalidType(
            f"Tokens.ids: expected a sequence of ints or an int64 tensor, got {type(ids).__name__}"
        )
    if ids_T.numel() and int(ids_T.min()) < 0:
        raise InvalidArgument(f"Tokens.ids: expected ids of at least 0, got {int(ids_T.min())}")
    return ids_T


def _bins(bins: object) -> torch.Tensor:
    wanted = "an int32 array of shape [frames, mel channels]"
    bins_FM = as_array("Audio.bins", bins, wanted)
    if bins_FM.dtype != np.int32:
        raise InvalidArgument(f"Audio.bins: expected {wanted}, got dtype {bins_FM.dtype}")
    if bins_FM.ndim != 2 or bins_FM.shape[1] == 0:
        raise InvalidArgument(f"Audio.bins: expected {wanted}, got shape {list(bins_FM.shape)}")
    if bins_FM.size and int(bins_FM.min()) < 0:
        raise InvalidArgument(f"Audio.bins: expected levels of at least 0, got {bins_FM.min()}")
    return torch.as_tensor(bins_FM)


def _mel(name: str, mel: object, num_dims: int, shape: str) -> torch.Tensor:
    wanted = f"a float32 array of shape {shape}"
    array = as_array(name, mel, wanted)
    if array.dtype != np.float32:
        raise InvalidArgument(f"{name}: expected {wanted}, got dtype {array.dtype}")
    if array.ndim != num_dims or 0 in array.shape:
        raise InvalidArgument(f"{name}: expected {wanted}, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise InvalidArgument(f"{name}: expected finite values, got NaN or infinity")
    return torch.as_tensor(array)


def _patches(patches: object) -> torch.Tensor:
    wanted = "a float32 array of shape [patches, 2, size, size, 3]"
    array = as_array("Image.patches", patches, wanted)
    if array.dtype != np.float32:
        raise InvalidArgument(f"Image.patches: expected {wanted}, got dtype {array.dtype}")
    shape = array.shape
    is_patches = len(shape) == 5 and shape[1] == 2 and shape[2] == shape[3] > 0 and shape[4] == 3
    if not is_patches:
        raise InvalidArgument(f"Image.patches: expected {wanted}, got shape {list(shape)}")
    if not np.isfinite(array).all():
        raise InvalidArgument("Image.patches: expected finite values, got NaN or infinity")
    return torch.as_tensor(array)
