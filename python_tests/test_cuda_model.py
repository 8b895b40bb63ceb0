"""What a model takes of a device, and what is said when it does not fit: known without one."""

import pytest
import torch

from tml_core.engine import cuda_model
from tml_core.engine.cuda_model import device_plan, on_cuda, require_cuda
from tml_core.engine.kv_budget import KvLimits, kv_budget, least_bytes
from tml_core.errors import InvalidArgument, OutOfDeviceMemory, Unsupported
from tml_core.model.config import ModelConfig, bundled_path
from tml_core.model.kv_store import kv_sizes
from tml_core.model.weights import expected_shapes, random_weights
from tml_core.ops import cuda

DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_path(bundled_path("nano"))


def limits(
    max_sequences: int = 8,
    max_positions: int | None = 4096,
    kv_memory_bytes: int | None = None,
    max_step_tokens: int = 512,
) -> KvLimits:
    return KvLimits(max_sequences, max_positions, kv_memory_bytes, max_step_tokens)


def test_a_plan_counts_what_is_packed(config: ModelConfig) -> None:
    plan = device_plan(config, limits(), 1 << 30)
    parameters = sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())
    # Blocks of 64 x 64 are padded, convolutions and norms are float32.
    assert 2 * parameters < plan.weights < 3 * parameters
    assert plan.fits
    assert plan.for_kv == plan.free - plan.weights - plan.step
    assert plan.least_kv == least_bytes(config.text, torch.bfloat16, limits())


def test_more_sequences_and_longer_steps_take_more(config: ModelConfig) -> None:
    plan = device_plan(config, limits(), 1 << 30)
    assert device_plan(config, limits(max_sequences=9), 1 << 30).least_kv > plan.least_kv
    assert device_plan(config, limits(max_step_tokens=600), 1 << 30).step > plan.step


def test_a_budget_is_spent_on_pages(config: ModelConfig) -> None:
    text, sizes = config.text, kv_sizes(config.text, torch.bfloat16)
    least = least_bytes(text, torch.bfloat16, limits(2))
    budget = kv_budget(text, torch.bfloat16, limits(2), least)
    assert (budget.positions, budget.num_global_pages) == (4096, 1)
    more = kv_budget(text, torch.bfloat16, limits(2), least + 12 * sizes.global_page_bytes)
    assert more.num_global_pages > 1
    assert kv_budget(text, torch.bfloat16, limits(2), 1 << 40).num_global_pages == 2 * 32
    with pytest.raises(
        InvalidArgument, match=f"2 sequences need at least {least}, got {least - 1}"
    ):
        kv_budget(text, torch.bfloat16, limits(2), least - 1)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"max_sequences": 0}, "max_sequences: expected at least 1, got 0"),
        ({"max_step_tokens": 0}, "max_step_tokens: expected at least 1, got 0"),
        ({"max_positions": 1 << 40}, "max_positions: expected at most the model's"),
    ],
)
def test_limits_out_of_range_are_named(
    config: ModelConfig, wrong: dict[str, int], match: str
) -> None:
    with pytest.raises(InvalidArgument, match=match):
        limits(**wrong).check(config.text)


def refusal(
    monkeypatch: pytest.MonkeyPatch, config: ModelConfig, asked: KvLimits, free_bytes: int
) -> str:
    monkeypatch.setattr(cuda_model, "_free_bytes", lambda _: free_bytes)
    weights = random_weights(config, 0, torch.bfloat16)
    count = len(weights)
    with pytest.raises(OutOfDeviceMemory, match="device: the model does not fit cuda:0") as error:
        on_cuda(config, weights, asked, DEVICE)
    assert len(weights) == count  # nothing was brought there
    return str(error.value)


def test_what_would_fit_is_said(monkeypatch: pytest.MonkeyPatch, config: ModelConfig) -> None:
    plan = device_plan(config, limits(), 0)
    too_small = refusal(monkeypatch, config, limits(), plan.weights)
    assert "a smaller model would, or a device with more memory" in too_small
    assert "of weights" in too_small and "GB free" in too_small

    three = least_bytes(config.text, torch.bfloat16, limits(3))
    free = plan.weights + plan.packing + plan.step + three
    asked = limits(10_000)
    said = refusal(monkeypatch, config, asked, free)
    fitting = int(said.split("max_sequences=")[1].split(" ")[0])
    assert device_plan(config, asked._replace(max_sequences=fitting), free).fits
    assert not device_plan(config, asked._replace(max_sequences=fitting + 1), free).fits

    said = refusal(monkeypatch, config, limits(2, kv_memory_bytes=1 << 40), free)
    left = int(said.split("kv_memory_bytes=")[1].split(" ")[0])
    assert device_plan(config, limits(2, kv_memory_bytes=left), free).fits


def test_another_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "require", lambda _: None)
    with pytest.raises(Unsupported, match=r"models on 'cuda' are bfloat16, got torch\.float32"):
        require_cuda(torch.device("cuda"), torch.float32)
    assert require_cuda(torch.device("cuda"), torch.bfloat16) == DEVICE
    assert require_cuda(torch.device("cuda:1"), torch.bfloat16).index == 1
