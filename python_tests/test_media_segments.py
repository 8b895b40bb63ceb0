"""Segments: what they hold, what they refuse."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media import Audio, Block, Image, Tokens, dmel_bins, image_patches

PCM = np.zeros(1600, np.float32)
RGB = np.zeros((41, 40, 3), np.uint8)


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3], np.int32),
        torch.tensor([1, 2, 3]),
        [np.int64(1), 2, 3],
    ],
)
def test_tokens_hold_int64(ids):
    tokens = Tokens(ids)
    assert tokens.ids.dtype == torch.int64
    assert tokens.ids.tolist() == [1, 2, 3]


def test_tokens_may_be_none_and_do_not_follow_the_callers_tensor():
    assert Tokens([]).ids.shape == (0,)
    ids = torch.tensor([5, 6])
    tokens = Tokens(ids)
    ids[0] = 9
    assert tokens.ids.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1, -2], InvalidArgument, "Tokens.ids: expected ids of at least 0, got -2"),
        ([1, 2.0], InvalidType, r"Tokens.ids\[1\]: expected an int, got float"),
        ([True], InvalidType, r"Tokens.ids\[0\]: expected an int, got bool"),
        (torch.zeros(3), InvalidType, "Tokens.ids: expected integers, got dtype float32"),
        (torch.zeros(1, 3, dtype=torch.int64), InvalidArgument, r"Tokens.ids: .*got \[1, 3\]"),
        ("hello", InvalidType, "Tokens.ids: expected a sequence of ints.*got str"),
        (7, InvalidType, "Tokens.ids: expected a sequence of ints.*got int"),
    ],
)
def test_tokens_refuse(ids, error, message):
    with pytest.raises(error, match=message):
        Tokens(ids)


def test_audio_holds_pcm_or_bins():
    assert Audio(PCM).pcm is PCM
    assert Audio(torch.from_numpy(PCM)).pcm.dtype == np.float32
    bins_FM = dmel_bins(PCM)
    assert torch.equal(Audio(bins=bins_FM).bins, bins_FM)
    assert torch.equal(Audio(bins=bins_FM.numpy()).bins, bins_FM)
    assert Audio(bins=bins_FM).pcm is None


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, InvalidArgument, "Audio: expected exactly one of pcm and bins, got neither"),
        ({"pcm": PCM, "bins": torch.zeros(1, 80).int()}, InvalidArgument, "Audio: .*got both"),
        ({"pcm": PCM * np.nan}, InvalidArgument, "Audio.pcm: expected finite samples"),
        ({"pcm": PCM + 2}, InvalidArgument, r"Audio.pcm: expected samples in \[-1, 1\]"),
        ({"pcm": PCM.astype(np.int16)}, InvalidArgument, "Audio.pcm: .*got dtype int16"),
        ({"pcm": PCM[None]}, InvalidArgument, r"Audio.pcm: .*got shape \[1, 1600\]"),
        ({"bins": torch.zeros(1, 80)}, InvalidArgument, "Audio.bins: .*got dtype float32"),
        ({"bins": torch.zeros(80).int()}, InvalidArgument, r"Audio.bins: .*got shape \[80\]"),
        ({"bins": torch.zeros(1, 80).int() - 1}, InvalidArgument, "Audio.bins: .*at least 0"),
        ({"pcm": [0.0]}, InvalidType, "Audio.pcm: .*got list"),
    ],
)
def test_audio_refuses(fields, error, message):
    with pytest.raises(error, match=message):
        Audio(**fields)


def test_image_holds_rgb_or_patches():
    image = Image(RGB, second=RGB)
    assert image.rgb is RGB
    assert image.second is RGB
    patches = image_patches(RGB)
    assert torch.equal(Image(patches=patches).patches, patches)
    assert torch.equal(Image(patches=patches.numpy()).patches, patches)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, InvalidArgument, "Image: expected exactly one of rgb and patches, got neither"),
        ({"rgb": RGB, "patches": image_patches(RGB)}, InvalidArgument, "Image: .*got both"),
        ({"rgb": RGB[0]}, InvalidArgument, r"Image.rgb: .*got shape \[40, 3\]"),
        ({"rgb": RGB / 255}, InvalidArgument, "Image.rgb: .*got dtype float64"),
        ({"rgb": RGB, "second": RGB[1:]}, InvalidArgument, r"Image.second: .*got \[40, 40, 3\]"),
        ({"patches": image_patches(RGB), "second": RGB}, InvalidArgument, "Image.second: .*patch"),
        ({"patches": image_patches(RGB)[0]}, InvalidArgument, r"Image.patches: .*\[2, 40, 40, 3\]"),
        ({"patches": image_patches(RGB).double()}, InvalidArgument, "Image.patches: .*float64"),
        ({"patches": image_patches(RGB) * torch.nan}, InvalidArgument, "Image.patches: .*finite"),
    ],
)
def test_image_refuses(fields, error, message):
    with pytest.raises(error, match=message):
        Image(**fields)


def test_block_keeps_its_segments_as_a_tuple():
    segments = [Tokens([1]), Audio(PCM), Image(RGB)]
    block = Block(segments)
    segments.clear()
    assert [type(segment) for segment in block.segments] == [Tokens, Audio, Image]


@pytest.mark.parametrize(
    ("segments", "error", "message"),
    [
        ([], InvalidArgument, "Block.segments: expected at least one segment, got none"),
        (Tokens([1]), InvalidType, "Block.segments: expected a list or tuple, got Tokens"),
        ([Tokens([1]), 3], InvalidType, r"Block.segments\[1\]: expected .*got int"),
        ([Block([Tokens([1])])], InvalidType, r"Block.segments\[0\]: expected .*got Block"),
    ],
)
def test_block_refuses(segments, error, message):
    with pytest.raises(error, match=message):
        Block(segments)


@pytest.mark.parametrize(
    ("segment", "field"),
    [
        (Tokens([1]), "ids"),
        (Audio(PCM), "pcm"),
        (Image(RGB), "rgb"),
        (Block([Tokens([1])]), "segments"),
    ],
)
def test_segments_are_frozen(segment, field):
    with pytest.raises(FrozenInstanceError):
        setattr(segment, field, None)
