"""What the contract costs: one model, one step, our kernels beside torch's fastest eager ops.

Shape S-train: hidden 512, 8 layers, 16 experts of 256 top-4 + 1 shared, window 512 and one global
layer, vocabulary 8192, 4096 packed tokens (4 sequences), bf16 with fp32 masters, AdamW.

    OMP_NUM_THREADS=2 python -m pytest bench/bench_determinism.py -s

A step is forward, backward, clipping and optimizer. The ablation takes our kernels and sets one op
free: torch's, with its own splits and orders, in the place of ours. A serving step is a forward of
one sequence of 1024 tokens without gradients. Peaks are of processes of their own
(`python bench_determinism.py kernels 4096`).
"""

import dataclasses
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from _notes import note
from eager_ops import EAGER
from tml_core.media.segments import Tokens
from tml_core.model.config import ModelConfig
from tml_core.model.weights import random_weights
from tml_core.train import PackedBatch, TrainableModel, Transcript
from tml_core.train.config import OptimizerConfig
from tml_core.train.op_set import KERNELS, OpSet
from tml_core.train.optimizer import Optimizer, clip_gradients

LENGTH = 1024
OPS = {"kernels": KERNELS, "eager": EAGER}
FREED = ("linear", "moe", "session_attn", "linear_logp", "attn_prologue", "sconv_norm", "router")


def config() -> ModelConfig:
    layers = 8
    return ModelConfig.from_dict(
        {
            "model_type": "inkling_text",
            "vocab_size": 8192,
            "hidden_size": 512,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "swa_num_attention_heads": 8,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 64,
            "sliding_window_size": 512,
            "d_rel": 16,
            "rel_extent": 1024,
            "log_scaling_n_floor": 128000,
            "log_scaling_alpha": 0.1,
            "layer_types": ["hybrid" if i % 6 == 5 else "hybrid_sliding" for i in range(layers)],
            "mlp_layer_types": ["sparse"] * layers,
            "intermediate_size": 1024,
            "moe_intermediate_size": 256,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "route_scale": 8.0,
            "logits_mup_width_multiplier": 1.0,
        }
    )


def batch_of(num_tokens: int) -> PackedBatch:
    """Sequences of 1024 random tokens, each position a target."""
    generator = torch.Generator().manual_seed(0)
    transcripts = []
    for _ in range(num_tokens // LENGTH):
        ids = torch.randint(0, 8192, (LENGTH,), generator=generator)
        streams = torch.ones(LENGTH, dtype=torch.uint8)
        transcripts.append(Transcript([Tokens(ids)], ids.roll(-1), streams))
    return PackedBatch.pack(transcripts, config())


class Step:
    """A model with its optimizer."""

    def __init__(self, ops: OpSet, dtype: torch.dtype = torch.bfloat16) -> None:
        weights = random_weights(config(), 0, torch.float32)
        self.model = TrainableModel(config(), weights, dtype, ops=ops)
        named = dict(self.model.named_parameters())
        self.optimizer = Optimizer(named, OptimizerConfig())

    def forward_backward(self, batch: PackedBatch) -> Tensor:
        with torch.enable_grad():
            logprobs = self.model(batch)
            logprobs.backward(torch.full_like(logprobs, -1 / len(logprobs)))
        return logprobs.detach()

    def __call__(self, batch: PackedBatch) -> None:
        self.forward_backward(batch)
        clip_gradients(self.model.parameters(), 1.0)
        self.optimizer.step(1e-4)
        self.model.zero_grad(set_to_none=True)


def test_both_compute_the_same_model() -> None:
    """In fp32: in bf16 each rounds at points of its own, and other experts are chosen."""
    batch = batch_of(LENGTH)
    steps = {name: Step(ops, torch.float32) for name, ops in OPS.items()}
    found = {name: step.forward_backward(batch) for name, step in steps.items()}
    torch.testing.assert_close(found["kernels"], found["eager"], rtol=1e-4, atol=1e-3)
    grads = [
        torch.cat([one.grad.flatten() for one in step.model.parameters()])
        for step in steps.values()
    ]
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 1e-3


@pytest.mark.parametrize("num_tokens", [1024, 2048, 4096])
def test_training_step(num_tokens: int, measure: Any, request: pytest.FixtureRequest) -> None:
    batch = batch_of(num_tokens)
    ours, theirs = Step(KERNELS), Step(EAGER)
    result = measure(
        f"training step S-train {num_tokens} tokens",
        lambda: ours(batch),
        peer=lambda: theirs(batch),
        peer_name="torch eager",
        rounds=5,
    )
    speed = num_tokens / result.time_s
    note(
        request.config,
        f"training step {num_tokens}",
        lambda: (
            f"{speed:.0f} tokens/s, eager {num_tokens / result.peer_s:.0f}, "
            f"{result.peer_s / result.time_s:.2f}x",
            {"tokens_per_s": speed, "eager_tokens_per_s": num_tokens / result.peer_s},
        ),
    )


@pytest.mark.parametrize("op", FREED)
def test_training_step_with_one_op_free(
    op: str, measure: Any, request: pytest.FixtureRequest
) -> None:
    batch = batch_of(4096)
    ours = Step(KERNELS)
    freed = Step(dataclasses.replace(KERNELS, **{op: getattr(EAGER, op)}))
    result = measure(
        f"training step S-train, {op} free",
        lambda: ours(batch),
        peer=lambda: freed(batch),
        peer_name=f"torch's {op}",
        rounds=3,
    )
    cost = result.time_s / result.peer_s - 1

    def finding() -> tuple[str, dict[str, Any]]:
        return f"the contract costs {cost:+.1%} of the step", {"cost": cost}

    note(request.config, f"{op} free", finding)


def test_serving_step(measure: Any) -> None:
    batch = batch_of(LENGTH)
    ours, theirs = Step(KERNELS).model, Step(EAGER).model

    def run(model: TrainableModel) -> Callable[[], object]:
        return lambda: model(batch)

    measure(
        f"serving step S-train {LENGTH} tokens",
        run(ours),
        peer=run(theirs),
        peer_name="torch eager",
        rounds=10,
    )


def test_peak_memory(request: pytest.FixtureRequest) -> None:
    def peak(*args: object) -> dict[str, float]:
        command = [sys.executable, __file__, *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        values: dict[str, float] = json.loads(done.stdout)
        return values

    found = {f"{ops} {tokens}": peak(ops, tokens) for ops in OPS for tokens in (1024, 2048, 4096)}
    assert all(one["peak_mb"] > one["before_mb"] for one in found.values())

    def finding() -> tuple[str, dict[str, Any]]:
        ratio = found["kernels 4096"]["peak_mb"] / found["eager 4096"]["peak_mb"]
        lines = [f"{name}: {one['peak_mb']:.0f} MB" for name, one in found.items()]
        return f"peak {ratio:.2f} of eager's at 4096 tokens ({', '.join(lines)})", found

    note(request.config, "peak memory", finding)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main(ops: str, num_tokens: int) -> None:
    """Print the resident megabytes before the first step and the peak of two steps."""
    step, batch = Step(OPS[ops]), batch_of(num_tokens)
    before = _resident_mb()
    for _ in range(2):
        step(batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"before_mb": before, "peak_mb": peak}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
