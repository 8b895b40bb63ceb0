"""The flow head: its noise, its bits, its gradients, its place in config and weights.

Shape suffixes: B rows, D hidden size, F frames, M mel channels, K = F * M, H hidden.
"""

import dataclasses

import numpy as np
import pytest
import torch

from byte_model import BYTE_MODEL
from tml_core.errors import CheckpointError, InvalidArgument
from tml_core.media.mel import dmel_of_mel
from tml_core.model.audio_out_config import AudioOutConfig
from tml_core.model.config import ModelConfig
from tml_core.model.flow import (
    FLOW_PREFIX,
    SELF_EMBED,
    FlowHead,
    flow_condition,
    flow_end,
    flow_shapes,
    flow_weights,
    normalise,
    own_bins,
    own_table,
    time_features,
)
from tml_core.model.weights import expected_shapes, load_weights, random_weights, save_weights
from tml_core.ops.embed import dmel_embed, dmel_embed_reference
from tml_core.ops.flow_noise import flow_noise, flow_uniform
from tml_core.ops.philox import FLOW_STREAM, philox4x32_reference
from tml_core.train.flow_loss import flow_loss

CONFIG = AudioOutConfig(width=48, num_layers=2, num_steps=4)
HIDDEN = 40


def _weights(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in flow_shapes(CONFIG, HIDDEN).items():
        value = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        weights[name] = (1.0 + 0.1 * value if name.endswith("norm.weight") else value).to(dtype)
    return weights


def _head(dtype: torch.dtype) -> FlowHead:
    weights = _weights(dtype)
    del weights[SELF_EMBED]
    head = FlowHead(CONFIG, weights)
    assert not weights
    return head


def _rows(num_rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    h_BD = torch.randn(num_rows, HIDDEN, generator=generator).to(dtype)
    return h_BD, torch.randn(num_rows, 80, generator=generator) - 2.0


def test_noise_is_box_and_muller_of_philox_words():
    seed, position = 2**63 + 5, 2**33 + 7
    counters = np.zeros((5, 4), np.uint32)
    counters[:, 0] = np.arange(5)
    counters[:, 1:] = (position & 0xFFFFFFFF, position >> 32, FLOW_STREAM)
    words = philox4x32_reference(counters, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1, 2)
    u, v = ((words + 0.5) / 2.0**32).T
    angle = 2 * np.pi * (v - 0.125)
    want = np.sqrt(-2 * np.log(u)) * np.stack((np.cos(angle), np.sin(angle)))
    got = flow_noise([seed], [position], 18)[0].numpy()
    # A unit in the last place of float32 numbers below 8.
    assert np.abs(got - want.T.reshape(-1)[:18]).max() < 5e-7


def test_noise_is_normal_and_belongs_to_its_row():
    noise_BK = flow_noise([7] * 400, range(400), 320)
    assert noise_BK.dtype == torch.float32
    values = noise_BK.double().flatten()
    # 128000 numbers: five standard errors of mean, deviation and fourth moment.
    assert abs(values.mean()) < 5 / 128000**0.5
    assert abs(values.std() - 1) < 5 / 256000**0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / 128000) ** 0.5
    assert torch.equal(flow_noise([7], [123], 320)[0], noise_BK[123])
    assert torch.equal(flow_noise([7], [123], 17)[0], noise_BK[123, :17])
    assert not torch.equal(flow_noise([8], [123], 320)[0], noise_BK[123])
    assert not torch.equal(flow_noise([7], [123], 320, stream=2)[0], noise_BK[123])
    uniform = flow_uniform(7, range(1000), 2)
    assert 0 < uniform.min() < 0.01 < 0.99 < uniform.max() < 1
    with pytest.raises(InvalidArgument, match="flow_noise: expected a position for each of 2"):
        flow_noise([1, 2], [3], 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_know_its_batch_or_the_threads(dtype):
    head, (h_BD, before_BM) = _head(dtype), _rows(19, dtype)
    seeds, positions = list(range(19)), [100 + 7 * row for row in range(19)]
    all_BFM = head.draw(h_BD, before_BM, seeds, positions)
    assert all_BFM.shape == (19, 4, 80)
    assert all_BFM.dtype == torch.float32
    assert -4.0 <= all_BFM.min() < all_BFM.max() <= 1.5
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(head.draw(h_BD, before_BM, seeds, positions), all_BFM)
            for row in (0, 7, 18):
                part = slice(row, row + 1)
                alone = head.draw(h_BD[part], before_BM[part], seeds[part], positions[part])
                assert torch.equal(alone[0], all_BFM[row])
    finally:
        torch.set_num_threads(num_threads)
    some = [3, 11, 4]
    drawn = head.draw(
        h_BD[some], before_BM[some], [seeds[i] for i in some], [positions[i] for i in some]
    )
    assert torch.equal(drawn, all_BFM[some])
    assert head.draw(h_BD[:0], before_BM[:0], [], []).shape == (0, 4, 80)


def test_a_block_depends_on_all_it_is_told():
    head, (h_BD, before_BM) = _head(torch.float32), _rows(2, torch.float32)
    one = head.draw(h_BD[:1], before_BM[:1], [1], [2])
    for other in (
        head.draw(h_BD[1:], before_BM[:1], [1], [2]),
        head.draw(h_BD[:1], before_BM[1:], [1], [2]),
        head.draw(h_BD[:1], before_BM[:1], [3], [2]),
        head.draw(h_BD[:1], before_BM[:1], [1], [3]),
    ):
        assert not torch.equal(other, one)


def test_what_a_broken_network_says_stays_in_range():
    weights = _weights(torch.float32)
    del weights[SELF_EMBED]
    weights[FLOW_PREFIX + "out_proj.weight"] *= float("nan")
    h_BD, before_BM = _rows(1, torch.float32)
    assert (FlowHead(CONFIG, weights).draw(h_BD, before_BM, [1], [2]) == -4.0).all()


def test_draw_refuses_rows_that_do_not_fit():
    head, (h_BD, before_BM) = _head(torch.float32), _rows(2, torch.float32)
    with pytest.raises(InvalidArgument, match=r"before: expected \[2, 80\], got \[1, 80\]"):
        head.draw(h_BD, before_BM[:1], [1, 2], [3, 4])
    with pytest.raises(InvalidArgument, match="seeds: expected a seed and a position for each of"):
        head.draw(h_BD, before_BM, [1], [3, 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_serving_and_training_have_the_same_bits(dtype):
    weights = _weights(dtype)
    plain = flow_weights(CONFIG, weights.__getitem__, is_packed=False)
    packed = flow_weights(CONFIG, weights.__getitem__, is_packed=True)
    h_BD, before_BM = _rows(33, dtype)
    z_BK = flow_noise([1] * 33, range(33), CONFIG.block_size)
    time_BP = time_features(np.linspace(0, 1, 33))
    before_BM = normalise(CONFIG, before_BM)
    got = [
        flow_end(one, z_BK, flow_condition(one, h_BD, before_BM), time_BP)
        for one in (plain, packed)
    ]
    assert got[0].dtype == torch.float32
    assert torch.equal(*got)


def _reference_loss(
    weights: dict[str, torch.Tensor],
    h_AD: torch.Tensor,
    mel_AFM: torch.Tensor,
    before_AM: torch.Tensor,
    noise_AK: torch.Tensor,
    time_A: torch.Tensor,
) -> torch.Tensor:
    """The whole formula again, in the dtype of its arguments."""

    def get(name: str) -> torch.Tensor:
        return weights[f"{FLOW_PREFIX}{name}.weight"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return get(name) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    gelu = torch.nn.functional.gelu
    x1 = (mel_AFM.flatten(1) + 2.2) / 0.95
    seen = torch.cat((h_AD, (before_AM + 2.2) / 0.95), 1)
    condition = gelu(norm(seen @ get("condition_proj").T, "condition_norm"))
    features = torch.cos(torch.pi * time_A[:, None] * torch.arange(16))
    z = (1 - time_A[:, None]) * noise_AK + time_A[:, None] * x1
    x = z @ get("block_proj").T + features @ get("time_proj").T
    for layer in range(CONFIG.num_layers):
        name = f"layers.{layer}."
        both = torch.cat((norm(x, name + "input_norm"), condition), 1)
        inner = gelu(norm(both @ get(name + "up_proj").T, name + "inner_norm"))
        x = x + inner @ get(name + "down_proj").T
    end = norm(x, "norm") @ get("out_proj").T
    left = (1 - time_A[:, None]).clamp(min=0.1)
    return ((end - x1) / left).square().mean(1)


def test_loss_and_gradients_are_those_of_the_formula_in_float64():
    num_blocks, seed, draw_ids = 9, 11, list(range(50, 59))
    weights = {k: v.requires_grad_() for k, v in _weights(torch.float32).items()}
    h_AD, before_AM = _rows(num_blocks, torch.float32)
    h_AD.requires_grad_()
    mel_AFM = torch.randn(num_blocks, 4, 80, generator=torch.Generator().manual_seed(2)) - 2.0
    plain = flow_weights(CONFIG, weights.__getitem__, is_packed=False)
    loss_A = flow_loss(CONFIG, plain, h_AD, mel_AFM, before_AM, seed=seed, draw_ids=draw_ids)
    loss_A.sum().backward()

    uniform_A = flow_uniform(seed, draw_ids, 2)
    time_A = torch.from_numpy((uniform_A.argsort().argsort() + uniform_A) / num_blocks)
    assert ((time_A * num_blocks).floor().sort().values == torch.arange(num_blocks)).all()
    exact = {k: v.detach().double().requires_grad_() for k, v in weights.items()}
    exact_h_AD = h_AD.detach().double().requires_grad_()
    want_A = _reference_loss(
        exact,
        exact_h_AD,
        mel_AFM.double(),
        before_AM.double(),
        flow_noise([seed] * num_blocks, draw_ids, 320, 2).double(),
        time_A,
    )
    want_A.sum().backward()
    # Sums of up to 320 products in float32 beside float64.
    torch.testing.assert_close(loss_A.double(), want_A, rtol=1e-5, atol=1e-6)
    for name in weights.keys() - {SELF_EMBED}:
        scale = exact[name].grad.abs().max()
        assert (weights[name].grad.double() - exact[name].grad).abs().max() < 2e-5 * scale, name
    scale = exact_h_AD.grad.abs().max()
    assert (h_AD.grad.double() - exact_h_AD.grad).abs().max() < 2e-5 * scale


def test_loss_refuses_what_does_not_fit_and_takes_nothing():
    plain = flow_weights(CONFIG, _weights(torch.float32).__getitem__, is_packed=False)
    h_AD, before_AM = _rows(2, torch.float32)
    mel_AFM = torch.zeros(2, 4, 80)
    with pytest.raises(InvalidArgument, match=r"mel: expected \[2, 4, 80\], got \[2, 3, 80\]"):
        flow_loss(CONFIG, plain, h_AD, mel_AFM[:, :3], before_AM, seed=1, draw_ids=[1, 2])
    with pytest.raises(InvalidArgument, match=r"before: expected \[2, 80\], got \[1, 80\]"):
        flow_loss(CONFIG, plain, h_AD, mel_AFM, before_AM[:1], seed=1, draw_ids=[1, 2])
    with pytest.raises(InvalidArgument, match="draw_ids: expected 2, got 1"):
        flow_loss(CONFIG, plain, h_AD, mel_AFM, before_AM, seed=1, draw_ids=[1])
    none_A = flow_loss(CONFIG, plain, h_AD[:0], mel_AFM[:0], before_AM[:0], seed=1, draw_ids=[])
    assert none_A.shape == (0,)


def test_a_head_learns_what_to_say():
    """Two conditions, two blocks: trained on the loss, the Euler steps lead to the right one."""
    generator = torch.Generator().manual_seed(3)
    weights = {k: v.requires_grad_() for k, v in _weights(torch.float32).items()}
    h_AD = torch.randn(2, HIDDEN, generator=generator)
    mel_AFM = torch.rand(2, 4, 80, generator=generator) * 4.0 - 3.5
    before_AM = torch.full((2, 80), -4.0)
    plain = flow_weights(CONFIG, weights.__getitem__, is_packed=False)
    optimizer = torch.optim.Adam(weights.values(), 3e-3)
    which = [row % 2 for row in range(16)]
    for step in range(100):
        loss = flow_loss(
            CONFIG,
            plain,
            h_AD[which],
            mel_AFM[which],
            before_AM[which],
            seed=step,
            draw_ids=range(16),
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    served = {k: v.detach() for k, v in weights.items() if k != SELF_EMBED}
    said_AFM = FlowHead(CONFIG, served).draw(h_AD, before_AM, [5, 6], [7, 8])
    error = (said_AFM - mel_AFM).abs().mean(dim=(1, 2))
    swapped = (said_AFM - mel_AFM.flip(0)).abs().mean(dim=(1, 2))
    assert (error < 0.25 * swapped).all()


def test_own_sound_is_embedded_as_dmel_with_a_vector_of_its_own():
    generator = torch.Generator().manual_seed(1)
    audio = ModelConfig.from_path(BYTE_MODEL).audio
    assert audio is not None
    table_VH = torch.randn(80 * 16, HIDDEN, generator=generator)
    self_H = torch.randn(HIDDEN, generator=generator, requires_grad=True)
    norm_H = torch.rand(HIDDEN, generator=generator)
    mel_BFM = torch.rand(3, 4, 80, generator=generator) * 5 - 4
    bins_BC = own_bins(CONFIG, audio, mel_BFM)
    assert bins_BC.dtype == torch.int32
    assert torch.equal(bins_BC[:, :80], dmel_of_mel(mel_BFM.reshape(12, 80)))
    assert not bins_BC[:, 80].any()
    got_BH = dmel_embed(bins_BC, own_table(table_VH, self_H, 16), 16, norm_H, 1e-6)
    got_BH.sum().backward()
    assert self_H.grad is not None
    assert self_H.grad.abs().min() > 0
    heard_BH = dmel_embed_reference(bins_BC[:, :80], table_VH, 16, torch.ones(HIDDEN), 0.0)
    rows_BC = bins_BC[:, :80].long() + 16 * torch.arange(80)
    summed_BH = table_VH[rows_BC].sum(1) + self_H.detach()
    want_BH = norm_H * summed_BH * summed_BH.square().mean(1, keepdim=True).add(1e-6).rsqrt()
    torch.testing.assert_close(got_BH.detach(), want_BH, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got_BH.detach(), norm_H * heard_BH)


def _speaking(**changes: object) -> ModelConfig:
    config = ModelConfig.from_path(BYTE_MODEL)
    assert config.interaction is not None
    head = dataclasses.replace(CONFIG, **changes)
    return dataclasses.replace(
        config, interaction=dataclasses.replace(config.interaction, audio_out=head)
    )


def test_config_and_weights_of_a_speaking_model_round_trip(tmp_path):
    config = _speaking()
    assert ModelConfig.from_dict(config.to_dict()) == config
    shapes = expected_shapes(config)
    assert shapes[SELF_EMBED] == (config.text.hidden_size,)
    assert {k: v for k, v in shapes.items() if k.startswith(FLOW_PREFIX)} == flow_shapes(
        CONFIG, config.text.hidden_size
    )
    weights = random_weights(config, 3, torch.bfloat16)
    save_weights(tmp_path, weights, config)
    loaded = load_weights(tmp_path, ModelConfig.from_path(tmp_path), torch.bfloat16)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    served = {k: v for k, v in loaded.items() if k.startswith(FLOW_PREFIX) and k != SELF_EMBED}
    h_BD = torch.randn(1, config.text.hidden_size).bfloat16()
    said = FlowHead(CONFIG, served).draw(h_BD, torch.full((1, 80), -4.0), [1], [2])
    # Speech and not noise of any other size.
    assert -4.0 < said.mean() < 0.0
    assert 0.3 < said.std() < 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": ...}, "audio_out: width is missing"),
        ({"width": 0}, "audio_out: width must be an integer of at least 1, got 0"),
        ({"num_steps": 0}, "audio_out: num_steps must be an integer of at least 1, got 0"),
        ({"num_frames": 3}, "AudioOutConfig: num_frames must divide 800, got 3"),
        ({"mel_std": -1.0}, r"audio_out: mel_std must be a positive number, got -1\.0"),
        ({"num_mel_bins": 40}, "num_mel_bins must be that of the audio encoder, .*: 80, got 40"),
        ({"steps": 5}, "audio_out: unknown key steps = 5"),
    ],
)
def test_a_block_that_describes_no_head_is_refused(changes, message):
    raw = _speaking().to_dict()
    block = raw["interaction"]["audio_out"]
    for key, value in changes.items():
        block.pop(key, None)
        if value is not ...:
            block[key] = value
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict(raw)
