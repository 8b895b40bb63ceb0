import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from byte_model import BYTE_MODEL
from hf_checkpoints import AUDIO_TOKEN_ID, IMAGE_TOKEN_ID, SHAPES, HfModel, make_hf_model
from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media.segments import Audio, Block, Image, Tokens
from tml_core.model.config import ModelConfig
from tml_core.model.reference import reference_hidden, reference_logits
from tml_core.model.weights import load_weights

MULTIMODAL = [shape for shape in SHAPES if "audio" in SHAPES[shape]]

Weights = dict[str, Tensor]


@functools.cache
def oracle(shape: str, dtype: torch.dtype = torch.float32) -> tuple[HfModel, ModelConfig, Weights]:
    model, hf_config = make_hf_model(shape, seed=11, dtype=dtype)
    state = dict(model.state_dict())
    if shape not in MULTIMODAL:
        state = {n.replace("model.", "model.language_model.", 1): t for n, t in state.items()}
    return model, ModelConfig.from_dict(hf_config.to_dict()), state


def some_ids(config: ModelConfig, num_tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Ids below 5 are the placeholders of the multimodal shapes.
    return torch.randint(5, config.text.unpadded_vocab_size, (num_tokens,), generator=generator)


def some_bins(config: ModelConfig, num_frames: int) -> Tensor:
    assert config.audio is not None
    generator = torch.Generator().manual_seed(1)
    shape = (num_frames, config.audio.num_mel_bins)
    levels = torch.randint(0, config.audio.num_levels, shape, generator=generator)
    return levels.to(torch.int32)


def some_patches(config: ModelConfig, num_patches: int) -> Tensor:
    assert config.vision is not None
    generator = torch.Generator().manual_seed(2)
    side = config.vision.patch_size
    return torch.randn(num_patches, 2, side, side, 3, generator=generator)


def hf_logits(model: HfModel, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(use_cache=False, **inputs).logits[0]


def assert_near(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Relative to the logit scale. Both are float32 sums of some hundred terms through a few
    layers in different orders: about 1e-6; a wrong term is at least 1e-2."""
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert torch.isfinite(got).all()
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < tolerance


@pytest.mark.parametrize("num_tokens", [1, 4, 19, 61])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_text_is_transformers(shape: str, num_tokens: int) -> None:
    model, config, weights = oracle(shape)
    ids_T = some_ids(config, num_tokens)
    got = reference_logits(config, weights, ids_T)
    assert got.shape == (num_tokens, config.text.unpadded_vocab_size)
    assert_near(got, hf_logits(model, input_ids=ids_T[None]))
    assert torch.equal(reference_logits(config, weights, ids_T.tolist()), got)
    assert torch.equal(reference_logits(config, weights, [Tokens(ids_T)]), got)


def test_reference_across_pages_is_transformers() -> None:
    # Longer than two attention units, the window of 150, the relative extent of 200, and the log
    # scaling floor of 100.
    model, config, weights = oracle("paged")
    ids_T = some_ids(config, 300)
    expected = hf_logits(model, input_ids=ids_T[None])
    assert_near(reference_logits(config, weights, ids_T), expected)


@pytest.mark.parametrize("shape", MULTIMODAL)
def test_reference_audio_and_images_are_transformers(shape: str) -> None:
    model, config, weights = oracle(shape)
    bins_FM, patches = some_bins(config, 7), some_patches(config, 6)
    head, middle, tail = some_ids(config, 22).split([9, 5, 8])
    got = reference_logits(
        config,
        weights,
        [Tokens(head), Audio(bins=bins_FM), Tokens(middle), Image(patches=patches), Tokens(tail)],
    )
    audio, image = torch.full((7,), AUDIO_TOKEN_ID), torch.full((6,), IMAGE_TOKEN_ID)
    expected = hf_logits(
        model,
        input_ids=torch.cat([head, audio, middle, image, tail])[None],
        audio_input_ids=bins_FM[None].long(),
        pixel_values=patches,
    )
    assert_near(got, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_blocks_are_transformers_with_that_mask(shape: str) -> None:
    model, config, weights = oracle(shape)
    ids_T = some_ids(config, 40)
    before, block, after = ids_T.split([11, 17, 12])
    got = reference_logits(config, weights, [Tokens(before), Block([Tokens(block)]), Tokens(after)])

    position_T = torch.arange(40)
    visible_end_T = torch.where((position_T >= 11) & (position_T < 28), 27, position_T)
    is_global_TT = position_T[None, :] <= visible_end_T[:, None]
    is_near_TT = position_T[:, None] - position_T[None, :] < config.text.window
    masks = {
        "full_attention": is_global_TT,
        "sliding_attention": is_global_TT & is_near_TT,
    }
    mask = {kind: torch.zeros(1, 1, 40, 40).masked_fill(~m, -1e30) for kind, m in masks.items()}
    mask_argument: dict[str, Any] = {**mask, "linear_attention": None}
    expected = hf_logits(model, input_ids=ids_T[None], attention_mask=mask_argument)
    assert_near(got, expected)
    assert torch.equal(reference_logits(config, weights, ids_T, visible_end_T), got)
    # The mask matters: causal logits differ inside the block and after it, not before.
    causal = reference_logits(config, weights, ids_T)
    assert_near(causal[:11], got[:11], tolerance=1e-5)
    assert ((causal - got)[11:27].abs().amax(dim=1) > 1e-3).all()


def test_reference_blocks_hold_any_segment() -> None:
    _, config, weights = oracle("mixed")
    audio, image = Audio(bins=some_bins(config, 3)), Image(patches=some_patches(config, 4))
    text = Tokens(some_ids(config, 5))
    got = reference_logits(config, weights, [text, Block([audio, image]), text])
    visible_end_T = torch.tensor([0, 1, 2, 3, 4, *[11] * 7, 12, 13, 14, 15, 16])
    expected = reference_logits(config, weights, [text, audio, image, text], visible_end_T)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_every_parameter_shows(shape: str) -> None:
    # Otherwise agreement with transformers would say little about it.
    _, config, weights = oracle(shape)
    segments: list[Any] = [Tokens(some_ids(config, 30))]
    if shape in MULTIMODAL:
        segments += [Audio(bins=some_bins(config, 30)), Image(patches=some_patches(config, 9))]
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    reference_logits(config, leaves, segments).pow(2).sum().backward()
    for name, leaf in leaves.items():
        if name.endswith("e_score_correction_bias"):
            continue  # only chooses experts, which has no gradient
        assert leaf.grad is not None and leaf.grad.abs().max() > 1e-3, name
    base = reference_logits(config, weights, segments)
    for name, value in weights.items():
        if name.endswith("e_score_correction_bias"):
            other = reference_logits(config, {**weights, name: -value}, segments)
            assert (other - base).abs().max() > 1e-3, name


def test_reference_log_scaling_acts_in_global_layers_only() -> None:
    _, config, weights = oracle("text")
    ids_T = some_ids(config, 12)
    scaled = reference_logits(config, weights, ids_T)

    def with_floor(floor: int | None, **text: Any) -> ModelConfig:
        changed = dataclasses.replace(config.text, log_scaling_floor=floor, **text)
        return dataclasses.replace(config, text=changed)

    plain = reference_logits(with_floor(None), weights, ids_T)
    # tau is 1 up to and including the position whose length is the floor, 5.
    assert_near(scaled[:5], plain[:5], tolerance=1e-5)
    assert ((scaled - plain)[5:].abs().amax(dim=1) > 1e-4).all()
    all_sliding = {"layer_is_sliding": (True,) * 4, "window": 11}
    wide = {
        name: value.repeat(1, 2)[:, :11] if name.endswith("rel_logits_proj.proj") else value
        for name, value in weights.items()
    }
    assert torch.equal(
        reference_logits(with_floor(5, **all_sliding), wide, ids_T),
        reference_logits(with_floor(None, **all_sliding), wide, ids_T),
    )


def test_reference_is_causal() -> None:
    _, config, weights = oracle("mixed")
    ids_T = some_ids(config, 30)
    changed = ids_T.clone()
    changed[20] = 5 if ids_T[20] != 5 else 6
    before, after = (reference_logits(config, weights, ids) for ids in (ids_T, changed))
    # torch's own matrix products may depend on how many rows share an expert.
    assert_near(before[:20], after[:20], tolerance=1e-5)
    assert ((before - after)[20:].abs().amax(dim=1) > 1e-3).all()


def test_reference_ties_go_to_the_lower_expert() -> None:
    _, config, weights = oracle("text")
    text = config.text
    tied = dict(weights)
    swapped = dict(weights)
    for layer in range(1, 4):
        prefix = f"model.language_model.layers.{layer}.mlp."
        # All routed experts score alike, so the first top_k are taken; the others never matter.
        tied[prefix + "gate.weight"] = weights[prefix + "gate.weight"].clone()
        tied[prefix + "gate.weight"][: text.num_experts] = 0.0
        tied[prefix + "gate.e_score_correction_bias"] = torch.zeros(text.num_experts)
        for name in ("gate.weight", "gate.e_score_correction_bias"):
            swapped[prefix + name] = tied[prefix + name]
        down = weights[prefix + "experts.down_proj"].clone()
        down[text.top_k :] = 0.0
        swapped[prefix + "experts.down_proj"] = down
    ids_T = some_ids(config, 10)
    assert torch.equal(
        reference_logits(config, tied, ids_T), reference_logits(config, swapped, ids_T)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_bfloat16_is_near_transformers(shape: str) -> None:
    model, config, weights = oracle(shape, torch.bfloat16)
    ids_T = some_ids(config, 40)
    got = reference_logits(config, weights, ids_T)
    expected = hf_logits(model, input_ids=ids_T[None]).float()
    assert got.dtype == torch.float32
    # bfloat16 has 8 bits; where a rounding flips the choice of an expert the logits of that token
    # differ altogether, hence the median over tokens.
    error_T = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert error_T.median() < 0.04


def test_reference_of_no_tokens() -> None:
    for shape in SHAPES:
        _, config, weights = oracle(shape)
        for nothing in ([], torch.empty(0, dtype=torch.int64), [Tokens([])]):
            got = reference_logits(config, weights, nothing)
            assert got.shape == (0, config.text.unpadded_vocab_size)


def test_reference_of_bundled_nano() -> None:
    config = ModelConfig.from_path(BYTE_MODEL)
    weights = load_weights(BYTE_MODEL, config, torch.bfloat16)
    segments = [
        Tokens([274]),
        Audio(bins=some_bins(config, 4)),
        Image(patches=some_patches(config, 2)),
        Tokens([275, *b"hello", 276]),
    ]
    logits = reference_logits(config, weights, segments)
    assert logits.shape == (14, 281)
    # Well separated: neither flat nor saturated.
    assert 0.5 < logits.std() < 8.0
    assert 0.01 < logits.softmax(dim=1).amax(dim=1).mean() < 0.9
    hidden = reference_hidden(config, weights, segments)
    assert hidden.shape == (14, 256) and hidden.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "segments", "error", "message"),
    [
        ("text", [1, 2, 96], InvalidArgument, r"ids: must be 0 to 95, got 1 to 96"),
        ("text", torch.tensor([-1]), InvalidArgument, r"ids: .*-1"),
        (
            "text",
            [Audio(bins=torch.zeros(2, 6, dtype=torch.int32))],
            InvalidArgument,
            r"Audio: .*no",
        ),
        ("text", [Image(patches=torch.zeros(1, 2, 4, 4, 3))], InvalidArgument, r"Image: .*has no"),
        (
            "mixed",
            [Audio(bins=torch.zeros(2, 7, dtype=torch.int32))],
            InvalidArgument,
            r"bins: must be \[F, 6\], got \[2, 7\]",
        ),
        (
            "mixed",
            [Audio(bins=torch.full((2, 6), 5, dtype=torch.int32))],
            InvalidArgument,
            r"bins: must be 0 to 4, got 5 to 5",
        ),
        (
            "mixed",
            [Image(patches=torch.zeros(1, 2, 40, 40, 3))],
            InvalidArgument,
            r"patches: must be \[P, 2, 4, 4, 3\], got \[1, 2, 40, 40, 3\]",
        ),
        ("mixed", [Audio(pcm=torch.zeros(800))], InvalidType, r"Audio with bins.* got Audio"),
        ("mixed", ["hello"], InvalidType, r"segments: expected Tokens.* got str"),
    ],
)
def test_reference_refuses(shape: str, segments: Any, error: type[Exception], message: str) -> None:
    _, config, weights = oracle(shape)
    with pytest.raises(error, match=message):
        reference_logits(config, weights, segments)


@pytest.mark.parametrize(
    ("visible_end", "message"),
    [
        ([0, 1], r"visible_end: must be \[3\], got \[2\]"),
        ([0, 0, 2], r"visible_end: must be at least the token's own position and below T"),
        ([0, 3, 2], r"visible_end: must be at least the token's own position and below T"),
    ],
)
def test_reference_refuses_visible_ends(visible_end: list[int], message: str) -> None:
    _, config, weights = oracle("text")
    with pytest.raises(InvalidArgument, match=message):
        reference_logits(config, weights, [1, 2, 3], torch.tensor(visible_end))
