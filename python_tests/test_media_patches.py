"""Patches: bit for bit against the oracle's image processor, pairs, counts, refusals."""

import importlib
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media import fit_frame, image_patches, num_patches

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _torchvision_functional() -> ModuleType:
    """The two functions of torchvision.transforms.v2.functional that the processor calls."""
    functional = ModuleType("torchvision.transforms.v2.functional")

    def pad(image, padding, fill=0, padding_mode="constant"):
        left, top, right, bottom = padding
        edges = (left, right, top, bottom)
        return torch.nn.functional.pad(image, edges, mode=padding_mode, value=float(fill))

    def normalize(image, mean, std, inplace=False):
        mean, std = (torch.as_tensor(v, dtype=image.dtype).view(-1, 1, 1) for v in (mean, std))
        return (image.sub_(mean) if inplace else image.sub(mean)).div_(std)

    functional.pad, functional.normalize = pad, normalize
    return functional


@pytest.fixture(scope="module")
def oracle():
    """The image processor's core as a function of rgb [H, W, 3]; torchvision need not be there."""
    backends = pytest.importorskip("transformers.image_processing_backends")
    functional = _torchvision_functional()
    stubs = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
    stubs["torchvision.transforms.v2"] = ModuleType("torchvision.transforms.v2")
    stubs["torchvision.transforms.v2"].functional = functional
    stubs["torchvision.transforms.v2.functional"] = functional
    with pytest.MonkeyPatch.context() as patch:
        if not hasattr(backends, "tvF"):
            patch.setattr(backends, "tvF", functional, raising=False)
            for name, module in stubs.items():
                patch.setitem(sys.modules, name, module)
        module = importlib.import_module("transformers.models.inkling.image_processing_inkling")
        processor_class = module.InklingImageProcessor
        # Past __init__, which asks for an installed torchvision; the core takes all as arguments.
        processor = processor_class.__new__(processor_class)

        def run(rgb_HWC: np.ndarray) -> torch.Tensor:
            features = processor._preprocess(
                [torch.from_numpy(rgb_HWC).permute(2, 0, 1).contiguous()],
                size=backends.SizeDict(height=40, width=40),
                do_rescale=True,
                rescale_factor=1 / 255,
                do_normalize=True,
                image_mean=CLIP_MEAN,
                image_std=CLIP_STD,
                resample=None,
                rescale_image_frac=None,
                rescale_image_max_upscaled_long_edge=2048,
                return_tensors="pt",
            )
            assert features["num_patches"].tolist() == [len(features["pixel_values"])]
            return features["pixel_values"]

        yield run


def _picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (40, 40), (39, 41), (41, 39), (119, 159), (120, 160), (37, 257), (257, 19), (80, 79)],
)
def test_image_patches_equal_the_oracle(height, width, oracle):
    rgb_HWC = _picture(height, width)
    got = image_patches(rgb_HWC)
    assert got.dtype == torch.float32
    assert got.shape == (num_patches(height, width), 2, 40, 40, 3)
    assert torch.equal(got, oracle(rgb_HWC))


def test_image_patches_equal_the_oracle_on_every_byte(oracle):
    rgb_HWC = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert torch.equal(image_patches(rgb_HWC), oracle(rgb_HWC))


def test_image_patches_put_the_second_frame_into_the_second_slot():
    first, second = _picture(50, 90), _picture(50, 90, seed=1)
    pair = image_patches(first, second)
    assert torch.equal(pair[:, 0], image_patches(first)[:, 0])
    assert torch.equal(pair[:, 1], image_patches(second)[:, 1])
    assert not torch.equal(pair[:, 0], pair[:, 1])


def test_image_patches_add_a_column_of_padding_to_a_full_width():
    patches = image_patches(_picture(40, 80))
    padding = (torch.tensor([-1.0]) - torch.tensor(CLIP_MEAN) * 255) / (
        torch.tensor(CLIP_STD) * 255
    )
    assert len(patches) == 3
    assert torch.equal(patches[2], padding.expand(2, 40, 40, 3))
    assert not (patches[:2] == padding).all(dim=-1).any()


def test_image_patches_are_row_major_and_take_strided_input():
    rgb_HWC = _picture(80, 79)
    flipped = rgb_HWC[:, ::-1]
    assert torch.equal(image_patches(flipped), image_patches(flipped.copy()))
    assert torch.equal(image_patches(rgb_HWC)[2:], image_patches(rgb_HWC[40:]))
    assert torch.equal(image_patches(torch.from_numpy(rgb_HWC)), image_patches(rgb_HWC))


def test_image_patches_of_another_size():
    patches = image_patches(_picture(20, 30), patch_size=10)
    assert patches.shape == (8, 2, 10, 10, 3) == (num_patches(20, 30, 10), 2, 10, 10, 3)


@pytest.mark.parametrize(
    ("rgb", "second", "error", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), None, InvalidArgument, "rgb: .*got dtype float32"),
        (np.zeros((4, 4), np.uint8), None, InvalidArgument, r"rgb: .*got shape \[4, 4\]"),
        (np.zeros((3, 4, 4), np.uint8), None, InvalidArgument, r"rgb: .*got shape \[3, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), None, InvalidArgument, r"rgb: .*got shape \[0, 4, 3\]"),
        ("cup.png", None, InvalidType, "rgb: expected a uint8 array.*got str"),
        (
            _picture(4, 4),
            _picture(4, 5),
            InvalidArgument,
            r"second: .*\[4, 4, 3\], got \[4, 5, 3\]",
        ),
        (_picture(4, 4), np.zeros((4, 4, 3)), InvalidArgument, "second: .*got dtype float64"),
    ],
)
def test_image_patches_refuse(rgb, second, error, message):
    with pytest.raises(error, match=message):
        image_patches(rgb, second)


@pytest.mark.parametrize(
    ("height", "width", "max_edge", "shape"),
    [
        (480, 640, 159, (119, 159, 3)),
        (640, 480, 159, (159, 119, 3)),
        (100, 120, 159, (100, 120, 3)),
        (480, 640, None, (480, 640, 3)),
        (2, 1000, 10, (1, 10, 3)),
    ],
)
def test_fit_frame_only_makes_smaller(height, width, max_edge, shape):
    rgb_HWC = np.full((height, width, 3), (10, 120, 240), np.uint8)
    fitted = fit_frame(rgb_HWC, max_edge)
    assert fitted.shape == shape
    assert fitted.dtype == np.uint8
    # An even colour stays what it is, up to the scaler's rounding.
    assert np.abs(fitted.astype(int) - [10, 120, 240]).max() <= 1
