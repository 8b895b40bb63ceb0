"""hmlp: value against transformers and the reference, bits, refusals."""

import pytest
import torch
from transformers.models.inkling.configuration_inkling import InklingVisionConfig
from transformers.models.inkling.modeling_inkling import (
    InklingVisionEncoderLayer,
    InklingVisionModel,
)

from tml_core import _ext, errors
from tml_core.ops.hmlp import HmlpWeights, fold_timespace, hmlp, hmlp_reference
from tml_core.ops.linear import pack_weight

FOLDS = ((1, 2), (1, 4), (2, 1))  # patches of two frames of 8 x 8
WIDTHS = (3, 24, 40, 56)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_layers(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Projections, and norms with the final one last."""
    fan_in = [WIDTHS[i] * t * s * s for i, (t, s) in enumerate(FOLDS)]
    projections = [
        (draw(WIDTHS[i + 1], k, seed=i + 1) * k**-0.5).to(dtype) for i, k in enumerate(fan_in)
    ]
    norms = [(1 + 0.1 * draw(width, seed=width)).to(dtype) for width in WIDTHS[1:]]
    return projections, norms


def small_weights(dtype: torch.dtype) -> HmlpWeights:
    projections, norms = small_layers(dtype)
    packed = tuple(pack_weight(w) for w in projections)
    return HmlpWeights(FOLDS, packed, tuple(norms[:-1]), norms[-1])


@pytest.mark.parametrize(("patch_size", "num_layers", "patches"), [(8, 3, 19), (40, 4, 3)])
def test_hmlp_matches_transformers(patch_size: int, num_layers: int, patches: int) -> None:
    torch.manual_seed(0)
    config = InklingVisionConfig(
        text_hidden_size=72, patch_size=patch_size, num_hidden_layers=num_layers
    )
    model = InklingVisionModel(config).eval()
    layers = list(model.encoder_layers)
    for layer in layers[:-1]:
        torch.nn.init.uniform_(layer.layer_norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(model.final_norm.weight, 0.5, 1.5)
    x = draw(patches, 2, patch_size, patch_size, 3)
    with torch.no_grad():
        want = model(x).pooler_output[:, 0]
    weights = HmlpWeights(
        tuple((layer.t_fold, layer.hw_fold) for layer in layers),
        tuple(pack_weight(layer.projection.weight.detach()) for layer in layers),
        tuple(layer.layer_norm.weight.detach() for layer in layers[:-1]),
        model.final_norm.weight.detach(),
    )
    assert weights.patch_shape == (2, patch_size, patch_size, 3)
    # fp32 sums of up to 9600 terms in another order, normalised to about 1 after each
    torch.testing.assert_close(hmlp(x, weights), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patches", [0, 1, 19])
def test_hmlp_matches_reference(dtype: torch.dtype, patches: int) -> None:
    x = draw(patches, 2, 8, 8, 3, seed=5)
    projections, norms = small_layers(dtype)
    got = hmlp(x, small_weights(dtype))
    want = hmlp_reference(x, FOLDS, projections, norms[:-1], norms[-1])
    assert got.dtype == dtype and got.shape == (patches, 56)
    # bf16: roundings may part by one unit (2^-8) in each of the three layers
    tolerance = 1e-5 if dtype == torch.float32 else 3 * 2**-7
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hmlp_bits_do_not_depend_on_batch_threads_or_isa(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    x, weights = draw(270, 2, 8, 8, 3), small_weights(dtype)  # more than one chunk
    expected = hmlp(x, weights)
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            parts = [x[:1], x[1:20], x[20:60]]
            assert torch.equal(torch.cat([hmlp(part, weights) for part in parts]), expected[:60])
    assert torch.equal(hmlp(x, weights), expected)


@pytest.mark.parametrize(("t_fold", "hw_fold"), [(1, 1), (1, 5), (2, 2), (2, 10)])
def test_fold_timespace_orders_channels_as_transformers(t_fold: int, hw_fold: int) -> None:
    x = draw(3, 2, 20, 20, 4)
    layer = InklingVisionEncoderLayer(4, 4, t_fold, hw_fold, add_norm=False)
    assert torch.equal(fold_timespace(x, t_fold, hw_fold), layer.fold_timespace_to_depth(x))


def test_hmlp_refusals() -> None:
    weights = small_weights(torch.float32)
    with pytest.raises(
        errors.InvalidArgument,
        match=r"hmlp: patches must be \[P, 2, 8, 8, 3\], got \[5, 2, 8, 9, 3\]",
    ):
        hmlp(torch.zeros(5, 2, 8, 9, 3), weights)
    with pytest.raises(errors.InvalidArgument, match="hmlp: patches requires grad"):
        hmlp(torch.zeros(5, 2, 8, 8, 3, requires_grad=True), weights)
    with pytest.raises(errors.InvalidArgument, match="one norm fewer, got 3, 3 and 3"):
        HmlpWeights(FOLDS, weights.projections, (*weights.norms, weights.final_norm), draw(56))
    with pytest.raises(
        errors.InvalidArgument, match="hmlp: projection 2 must take 320 channels, got 80"
    ):
        HmlpWeights(
            ((1, 2), (1, 4), (2, 2)), weights.projections, weights.norms, weights.final_norm
        )
