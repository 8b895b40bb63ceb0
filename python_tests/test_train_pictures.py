"""Pictures in shards: JPEG of what was seen, padding to the bit, anything else as it was."""

import numpy as np
import pytest
import torch
from numpy.random import Generator, Philox

from tml_core import errors
from tml_core.data.figure import draw_scene, render
from tml_core.media.patches import image_patches
from tml_core.train.pictures import PackedPicture, pack_picture, unpack_picture


def frame(seed: int, height: int = 72, width: int = 72) -> np.ndarray:
    scene = draw_scene(Generator(Philox(key=seed)), ())
    picture = render(scene, 0.2)
    return np.tile(picture, (2, 2, 1))[:height, :width]


@pytest.mark.parametrize(("height", "width"), [(72, 72), (40, 40), (41, 79), (16, 24), (130, 90)])
def test_a_pair_of_frames_comes_back(height: int, width: int) -> None:
    patches = image_patches(frame(1, height, width), frame(2, height, width))
    packed = pack_picture(patches, 92)
    assert packed is not None and len(packed.seen) == len(patches)
    back = unpack_picture(packed, 40)
    assert back.dtype == torch.float32 and back.shape == patches.shape
    pad = image_patches(np.zeros((40, 40, 3), np.uint8))[1, 0, 0, 0]
    is_pad = patches == pad
    assert torch.equal(back == pad, is_pad)
    # Grain of eight bytes is what JPEG loses; a byte is 0.0146 here.
    assert float((back - patches)[~is_pad].abs().mean()) < 0.08
    # What came back packs again: it is what image_patches makes of some bytes.
    assert pack_picture(back, 92) is not None
    assert len(packed.jpeg) < patches.nbytes / 10 or height * width < 2000


def test_a_better_quality_is_nearer() -> None:
    patches = image_patches(frame(3), frame(4))
    errors_by_quality = []
    for quality in (50, 80, 95):
        packed = pack_picture(patches, quality)
        assert packed is not None
        errors_by_quality.append(float((unpack_picture(packed, 40) - patches).abs().mean()))
    assert errors_by_quality == sorted(errors_by_quality, reverse=True)


def test_what_is_no_picture_is_not_packed() -> None:
    patches = image_patches(frame(5))
    assert pack_picture(torch.randn(3, 2, 40, 40, 3), 92) is None
    assert pack_picture(patches[:0], 92) is None
    assert pack_picture(torch.zeros(1, 2, 20, 20, 3), 92) is None  # tiles are no whole blocks
    holed = patches.clone()
    holed[0, 0, 5, 5] = patches[1, 0, 0, 39]  # padding amid the picture
    assert pack_picture(holed, 92) is None


def test_a_broken_picture_is_named() -> None:
    packed = pack_picture(image_patches(frame(6)), 92)
    assert packed is not None
    with pytest.raises(errors.CheckpointError, match="data: a picture cannot be read"):
        unpack_picture(PackedPicture(b"no picture", packed.seen), 40)
    with pytest.raises(errors.CheckpointError, match="data: a picture cannot be read"):
        unpack_picture(PackedPicture(packed.jpeg, packed.seen[:1]), 40)
