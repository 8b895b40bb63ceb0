"""The optimizers: what steps what, the norm's fixed order, bits that need no thread count."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tml_core import errors
from tml_core.model.config import ModelConfig
from tml_core.model.weights import load_weights
from tml_core.train import TrainableModel
from tml_core.train.config import OptimizerConfig
from tml_core.train.optimizer import Optimizer, clip_gradients, gradient_norm
from train_kit import make_checkpoint

ADAMW = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
MUON = OptimizerConfig(kind="muon", learning_rate=1e-2, weight_decay=0.1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mixed"))


def parameters_of(directory: Path) -> dict[str, nn.Parameter]:
    config = ModelConfig.from_path(directory)
    weights = load_weights(directory, config, torch.float32)
    return dict(TrainableModel(config, weights, torch.bfloat16).named_parameters())


def set_gradients(parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def copies(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in parameters.items()}


def test_adamw_is_that_of_torch(directory: Path) -> None:
    ours, theirs = parameters_of(directory), parameters_of(directory)
    optimizer = Optimizer(ours, ADAMW)
    is_decayed = [one.ndim >= 2 and "conv1d" not in name for name, one in theirs.items()]
    groups = [
        {"params": [p for p, d in zip(theirs.values(), is_decayed, strict=True) if d == wanted]}
        for wanted in (True, False)
    ]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.0  # type: ignore[assignment]
    expected = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for seed in range(3):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        optimizer.step(1e-2)
        expected.step()
    for name, one in ours.items():
        torch.testing.assert_close(one, theirs[name], rtol=1e-5, atol=1e-6)


def test_muon_steps_the_matrices_of_the_layers(directory: Path) -> None:
    parameters = parameters_of(directory)
    before = copies(parameters)
    set_gradients(parameters, 0)
    Optimizer(parameters, MUON).step(1e-2)
    prefix = "model.language_model.layers.3."
    name = prefix + "mlp.experts.gate_up_proj"
    half = before[name].shape[1] // 2
    for expert, rows in ((0, slice(0, half)), (5, slice(half, 2 * half))):
        alone = nn.Parameter(before[name][expert, rows].clone())
        grad = parameters[name].grad
        assert grad is not None
        alone.grad = grad[expert, rows].clone()
        torch.optim.Muon([alone], lr=1e-2, adjust_lr_fn="match_rms_adamw").step()
        assert torch.equal(parameters[name][expert, rows], alone)
    state = Optimizer(parameters, MUON)
    set_gradients(parameters, 1)
    state.step(1e-2)
    with_muon = {key.rpartition(".")[0].partition("[")[0] for key in state.state() if "[" in key}
    assert prefix + "self_attn.q_proj.weight" in with_muon
    assert prefix + "mlp.shared_experts.down_proj" in with_muon
    assert "model.vision_tower.encoder_layers.0.projection.weight" in with_muon
    for other in (
        prefix + "mlp.gate.weight",
        prefix + "self_attn.rel_logits_proj.proj",
        prefix + "attn_sconv.conv1d.weight",
        prefix + "input_layernorm.weight",
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    ):
        assert other not in with_muon and f"{other}.exp_avg" in state.state()


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_steps_have_the_same_bits_for_any_threads_and_after_a_restore(
    config: OptimizerConfig, directory: Path
) -> None:
    seen = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        parameters = parameters_of(directory)
        optimizer = Optimizer(parameters, config)
        for seed in range(3):
            if seed == 1 and threads == 2:  # move into another optimizer
                stored = {name: value.clone() for name, value in optimizer.state().items()}
                moved = {name: nn.Parameter(one) for name, one in copies(parameters).items()}
                parameters, optimizer = moved, Optimizer(moved, config)
                optimizer.load_state(stored)
            set_gradients(parameters, seed)
            clip_gradients(parameters.values(), 1.0)
            optimizer.step(1e-2 / (1 + seed))
        seen.append(copies(parameters))
    for other in seen[1:]:
        assert all(torch.equal(other[name], value) for name, value in seen[0].items())


def test_a_parameter_without_gradient_stays(directory: Path) -> None:
    for config in (ADAMW, MUON):
        parameters = parameters_of(directory)
        optimizer = Optimizer(parameters, config)
        set_gradients(parameters, 0)
        names = (
            "model.audio_tower.norm.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
        )
        for name in names:
            parameters[name].grad = None
        before = copies(parameters)
        optimizer.step(1e-2)
        for name in names:
            assert torch.equal(parameters[name], before[name])
            assert not any(key.startswith(name) for key in optimizer.state())


def test_a_strange_state_is_refused(directory: Path) -> None:
    optimizer = Optimizer(parameters_of(directory), ADAMW)
    with pytest.raises(errors.CheckpointError, match=r"optimizer: none.exp_avg is of no parameter"):
        optimizer.load_state({"none.exp_avg": torch.zeros(1)})
    with pytest.raises(errors.CheckpointError, match=r"lm_head.weight.exp_avg must be \[128, 64\]"):
        optimizer.load_state({"lm_head.weight.exp_avg": torch.zeros(3, 4)})


def test_the_norm_is_summed_in_a_fixed_order() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (1,), (19, 257), (8192,), (3, 8191), (64, 1025)]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    exact = math.sqrt(sum(float(one.double().square().sum()) for one in gradients))
    norms = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        norms |= {gradient_norm(gradients), gradient_norm(reversed(gradients))}
    assert len(norms) == 1 and norms.pop() == pytest.approx(exact, rel=1e-6)
    assert gradient_norm([]) == 0.0
    for bad in (math.nan, math.inf):
        assert math.isnan(gradient_norm([*gradients, torch.tensor([1.0, bad])]))


def test_clipping_scales_all_gradients_together() -> None:
    def pair() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
        made[0].grad, made[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
        return made

    for limit, expected in ((2.5, [1.5, 2.0]), (9.0, [3.0, 4.0]), (0.0, [3.0, 4.0])):
        made = pair()
        assert clip_gradients(made, limit) == 5.0
        assert [float(one.grad) for one in made[:2]] == pytest.approx(expected)  # type: ignore[arg-type]
    made = pair()
    made[0].grad = torch.tensor([math.nan])
    assert math.isnan(clip_gradients(made, 1.0)) and float(made[1].grad) == 4.0  # type: ignore[arg-type]
