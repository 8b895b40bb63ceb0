"""Reinforcement learning on live sessions: a tiny model learns to say the letter a.

Groups of sessions are sampled by the serving engine, scored, and the trainer moves the policy in
GRPO's manner. Trainer and sampler agree bit for bit, so the importance ratio of the first update
after sampling is exactly one; the table shows it. Run it (some seconds):
``python examples/grpo_letters.py``.
"""

import tempfile
from pathlib import Path

import torch

import tml_core as tml
from tml_core.model.config import ModelConfig
from tml_core.model.weights import load_weights
from tml_core.train import TrainableModel
from tml_core.train.config import OptimizerConfig
from tml_core.train.optimizer import Optimizer
from tml_core.train.policy import GroupSampler, group_advantages, update_policy
from train_tiny import prepare

GROUP = 16
NUM_ROUNDS = 8
PROMPTS = ("sing", "call me")


def reward(text: str) -> float:
    """The part of what was said that is an a; nothing said is worth nothing."""
    return text.count("a") / len(text) if text else 0.0


def main(folder: Path) -> None:
    prepare(folder)
    start = folder / "start"
    config = ModelConfig.from_path(start)
    model = TrainableModel(config, load_weights(start, config, torch.float32), torch.bfloat16)
    optimizer = Optimizer(dict(model.named_parameters()), OptimizerConfig(weight_decay=0.0))
    sampler = GroupSampler(model, start)
    exact = 0
    first = last = 0.0
    for round_id in range(NUM_ROUNDS):
        rollouts, advantages, rewards = [], [], []
        for index, prompt in enumerate(PROMPTS):
            chunks = [tml.Chunk(text=prompt), *[tml.Chunk(is_idle=True)] * 3]
            base = 1 + GROUP * (index + len(PROMPTS) * round_id)
            group = sampler.sample(chunks, range(base, base + GROUP))
            scores = [reward(one.text) for one in group]
            rollouts += group
            rewards += scores
            advantages += group_advantages(scores)
        updates = update_policy(model, optimizer, rollouts, advantages, rate=3e-3)
        begin, end = updates[0], updates[-1]
        is_exact = begin.smallest_ratio == begin.largest_ratio == 1.0
        exact += is_exact
        last = sum(rewards) / len(rewards)
        first = last if round_id == 0 else first
        print(
            f"round {round_id:2}: reward {last:.3f}, first ratio "
            f"[{begin.smallest_ratio!r}, {begin.largest_ratio!r}], then "
            f"[{end.smallest_ratio:.3f}, {end.largest_ratio:.3f}], {end.clipped:.0%} clipped"
        )
    print(f"reward {first:.3f} -> {last:.3f}")
    print(f"first ratio exactly 1 in {exact} of {NUM_ROUNDS} rounds")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary) / "tiny")
