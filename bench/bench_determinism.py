"""What the contract costs: one model, one step, our kernels beside torch's fastest eager ops.

Shape S-train: hidden 512, 8 layers, 16 experts of 256 top-4 + 1 shared, window 512 and one global
layer, vocabulary 8192, sequences of 1024 packed tokens, bf16 with fp32 masters, AdamW.

    OMP_NUM_THREADS=2 python -m pytest bench/bench_determinism.py -s -k PART

A training step is forward, backward, clipping and optimizer. The ablation takes our kernels and
sets one op free: torch's, with its own splits and orders, in the place of ours. A serving step is a
micro-turn, 12 tokens in and 8 decoded one by one after 1024, beside transformers; what order costs
there are its products, ours beside torch's of the same matrices. Times are medians of rounds in
which both take turns. Peaks are of processes of their own.

PART: ``same``, ``train_1024``, ``train_2048``, ``train_4096``, ``free_a`` and ``free_b`` (half of
the ops each), ``serving``, ``memory``. On two free cores each timed one takes less than 80 seconds.
"""

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from _notes import note
from eager_ops import EAGER
from peers.tml import TmlEngine, make_model
from tml_core.media.segments import Tokens
from tml_core.model.config import ModelConfig
from tml_core.model.weights import random_weights
from tml_core.ops.linear import linear, pack_weight
from tml_core.train import PackedBatch, TrainableModel, Transcript
from tml_core.train.config import OptimizerConfig
from tml_core.train.op_set import KERNELS, OpSet
from tml_core.train.optimizer import Optimizer, clip_gradients

LENGTH = 1024
OPS = {"kernels": KERNELS, "eager": EAGER}
FREED = {
    "free_a": ("linear", "linear_nll", "sconv_norm"),
    "free_b": ("moe", "session_attn", "attn_prologue", "router"),
}
NUM_IN = 12

LAYERS = 8
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": LAYERS,
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
    "layer_types": ["hybrid" if i % 6 == 5 else "hybrid_sliding" for i in range(LAYERS)],
    "mlp_layer_types": ["sparse"] * LAYERS,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "route_scale": 8.0,
    "logits_mup_width_multiplier": 1.0,
}


def config() -> ModelConfig:
    return ModelConfig.from_dict({"model_type": "inkling_text", **TEXT_CONFIG})


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
        weights = torch.full((batch.num_tokens,), 1 / batch.num_tokens)
        with torch.enable_grad():
            out = self.model.run(batch, weights=weights)
            assert out.loss is not None
            out.loss.backward()
        return out.logprobs

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


@dataclasses.dataclass(frozen=True)
class Turns:
    """``own_s``, ``peer_s``: medians on the clock. ``ratio``, ``cpu_ratio``: medians over the
    rounds of ours over the peer's, on the clock and in CPU time, which other programs disturb
    less."""

    own_s: float
    peer_s: float
    ratio: float
    cpu_ratio: float


def take_turns(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> Turns:
    """After a round to warm up."""
    times = []
    for _ in range(1 + rounds):
        for run in (theirs, ours):
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            run()
            times.append((time.perf_counter() - wall_s, time.process_time() - cpu_s))
    pairs = list(zip(times[3::2], times[2::2], strict=True))
    return Turns(
        statistics.median(own[0] for own, _ in pairs),
        statistics.median(peer[0] for _, peer in pairs),
        statistics.median(own[0] / peer[0] for own, peer in pairs),
        statistics.median(own[1] / peer[1] for own, peer in pairs),
    )


@pytest.mark.parametrize(
    ("num_tokens", "rounds"),
    [
        pytest.param(1024, 7, id="train_1024"),
        pytest.param(2048, 5, id="train_2048"),
        pytest.param(4096, 2, id="train_4096"),
    ],
)
def test_training_step(num_tokens: int, rounds: int, request: pytest.FixtureRequest) -> None:
    batch = batch_of(num_tokens)
    ours, theirs = Step(KERNELS), Step(EAGER)
    turns = take_turns(lambda: ours(batch), lambda: theirs(batch), rounds)
    text = (
        f"{1e3 * turns.own_s:.0f} ms, {num_tokens / turns.own_s:.0f} tokens/s; eager "
        f"{1e3 * turns.peer_s:.0f} ms, {num_tokens / turns.peer_s:.0f} tokens/s; "
        f"{1 / turns.ratio:.2f}x, in CPU time {1 / turns.cpu_ratio:.2f}x"
    )
    noted(request, f"training step, {num_tokens} tokens", text, **dataclasses.asdict(turns))


def noted(request: pytest.FixtureRequest, case: str, text: str, **values: Any) -> None:
    note(request.config, case, lambda: (text, values))


@pytest.mark.parametrize("part", FREED)
def test_training_step_with_one_op_free(part: str, request: pytest.FixtureRequest) -> None:
    """1024 tokens: what a step of ours takes over the same step with that op of torch."""
    batch = batch_of(LENGTH)
    ours = Step(KERNELS)
    for op in FREED[part]:
        freed = Step(dataclasses.replace(KERNELS, **{op: getattr(EAGER, op)}))
        turns = take_turns(lambda: ours(batch), partial(freed, batch), 7)
        text = (
            f"the contract costs {turns.ratio - 1:+.1%} of the step, {turns.cpu_ratio - 1:+.1%} in "
            f"CPU time ({1e3 * turns.own_s:.0f} ms, with torch's {1e3 * turns.peer_s:.0f} ms)"
        )
        noted(request, f"{op} free", text, **dataclasses.asdict(turns))


def products_of(num_tokens: int) -> list[tuple[int, int, int]]:
    """(rows, outputs, inputs) of every product of a step of ``num_tokens``, experts evenly hit."""
    hidden, width, num_experts = 512, 256, 16
    heads, kv_heads, head_dim, d_rel = 8, 2, 64, 16
    visits = 4 * num_tokens
    hit = min(num_experts, visits)
    experts = [*[visits // hit] * hit, num_tokens]  # the shared one takes all
    layer = [
        (num_tokens, (heads + 2 * kv_heads) * head_dim + heads * d_rel, hidden),
        (num_tokens, hidden, heads * head_dim),
    ]
    for rows in experts:
        layer += [(rows, 2 * width, hidden), (rows, hidden, width)]
    return [*layer * LAYERS, (1, 8192, hidden)]


def test_serving_step(request: pytest.FixtureRequest) -> None:
    """A whole micro-turn beside transformers, and what its products take in order and free."""
    hf = pytest.importorskip("peers.hf", reason="the peer is transformers (extra: test)")
    weights = random_weights(config(), 0, torch.bfloat16)
    given = {name: value.clone() for name, value in weights.items()}
    model = make_model(config(), given, torch.bfloat16, num_sequences=1, num_positions=4096)
    ours = TmlEngine(model)
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> Tensor:
        return torch.randint(0, 8192, (count,), generator=generator)

    theirs = hf.HfEngine(TEXT_CONFIG, weights, torch.bfloat16)
    for engine in (ours, theirs):
        for _ in range(2):
            engine.turn(ids(512))
    turn = take_turns(lambda: ours.turn(ids(NUM_IN)), lambda: theirs.turn(ids(NUM_IN)), 15)
    products: dict[int, Turns] = {}
    for num_tokens in (NUM_IN, 1):
        shapes = products_of(num_tokens)
        matrices = [torch.randn(n, k, dtype=torch.bfloat16) for _, n, k in shapes]
        packed = [pack_weight(one) for one in matrices]
        rows = [torch.randn(m, k, dtype=torch.bfloat16) for m, _, k in shapes]

        def in_order(rows: list[Tensor] = rows, packed: list[Any] = packed) -> None:
            for x, weight in zip(rows, packed, strict=True):
                linear(x, weight)

        def free(rows: list[Tensor] = rows, matrices: list[Tensor] = matrices) -> None:
            for x, weight in zip(rows, matrices, strict=True):
                functional.linear(x, weight)

        products[num_tokens] = take_turns(in_order, free, 15)
    ordered, freed = (
        1e3 * sum(times * getattr(products[count], side) for count, times in ((NUM_IN, 1), (1, 8)))
        for side in ("own_s", "peer_s")
    )
    text = (
        f"micro-turn {1e3 * turn.own_s:.1f} ms, transformers {1e3 * turn.peer_s:.1f} ms; its "
        f"products one by one {ordered:.1f} ms in order, {freed:.1f} ms with torch's"
    )
    found = {str(count): dataclasses.asdict(one) for count, one in products.items()}
    noted(request, "serving step", text, turn=dataclasses.asdict(turn), products=found)


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
