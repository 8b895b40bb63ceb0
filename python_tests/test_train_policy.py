"""On-policy learning: the first ratio is one, groups are compared with themselves, rewards rise."""

from pathlib import Path

import pytest
import torch

import tml_core as tml
from byte_model import BYTE_MODEL
from hf_checkpoints import make_hf_model, save_hf
from tml_core import errors
from tml_core.model.config import ModelConfig
from tml_core.model.weights import load_weights
from tml_core.ops.linear_logp import IGNORED_TARGET
from tml_core.train import TrainableModel
from tml_core.train.config import OptimizerConfig
from tml_core.train.optimizer import Optimizer
from tml_core.train.policy import GroupSampler, Rollout, group_advantages, update_policy

CHUNKS = [tml.Chunk(text="sing"), tml.Chunk(is_idle=True)]


def nano(dtype: torch.dtype) -> TrainableModel:
    directory = BYTE_MODEL
    config = ModelConfig.from_path(directory)
    return TrainableModel(config, load_weights(directory, config, torch.float32), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_ratio_is_exactly_one_before_and_after_updates(dtype: torch.dtype) -> None:
    model = nano(dtype)
    options = OptimizerConfig(weight_decay=0.0)
    optimizer = Optimizer(dict(model.named_parameters()), options)
    sampler = GroupSampler(model, BYTE_MODEL)
    for round_id in range(2):
        group = sampler.sample(CHUNKS, [1 + 3 * round_id + i for i in range(3)])
        assert len({one.text for one in group}) > 1
        for one in group:
            assert int((one.transcript.targets != IGNORED_TARGET).sum()) == len(one.logprobs)
        first, second = update_policy(model, optimizer, group, [1.0, -1.0, 0.5], rate=1e-3)
        assert first.smallest_ratio == first.largest_ratio == 1.0 and first.clipped == 0.0
        assert second.smallest_ratio < 1.0 < second.largest_ratio
        assert second.objective > first.objective and first.gradient_norm > 0


def test_a_group_is_sampled_again_with_the_same_bits() -> None:
    sampler = GroupSampler(nano(torch.bfloat16), BYTE_MODEL)
    group = sampler.sample(CHUNKS, [5, 9])
    (alone,) = sampler.sample(CHUNKS, [9])
    assert alone.text == group[1].text and torch.equal(alone.logprobs, group[1].logprobs)
    assert torch.equal(alone.transcript.targets, group[1].transcript.targets)


def test_advantages_are_relative_to_the_group() -> None:
    assert group_advantages([1.0, 3.0]) == [-1.0, 1.0]
    assert group_advantages([0.3, 0.3, 0.3]) == [0.0, 0.0, 0.0]
    assert sum(group_advantages([0.0, 0.0, 5.0, 1.0])) == pytest.approx(0.0)


def test_refusals(tmp_path: Path) -> None:
    model = nano(torch.bfloat16)
    sampler = GroupSampler(model, BYTE_MODEL)
    for seeds in ([], [1, 1], [0, 1]):
        with pytest.raises(errors.InvalidArgument, match=r"seeds: expected distinct ones from 1"):
            sampler.sample(CHUNKS, seeds)
    with pytest.raises(errors.CheckpointError, match=r"tokenizer: expected tokenizer.json in"):
        GroupSampler(model, tmp_path)
    save_hf(make_hf_model("text")[0], tmp_path / "text")
    config = ModelConfig.from_path(tmp_path / "text")
    weights = load_weights(tmp_path / "text", config, torch.float32)
    with pytest.raises(errors.CheckpointError, match="expected an interaction block"):
        GroupSampler(TrainableModel(config, weights, torch.bfloat16), BYTE_MODEL)
    rollouts: list[Rollout] = sampler.sample(CHUNKS[:1], [1])
    optimizer = Optimizer(dict(model.named_parameters()), OptimizerConfig())
    with pytest.raises(errors.InvalidArgument, match="advantages: expected 1, got 2"):
        update_policy(model, optimizer, rollouts, [1.0, 2.0], rate=1e-3)
