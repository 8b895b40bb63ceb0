"""What a turn costs besides reading K and V must not grow with the session.

Time: shape S at 1k and at 64k of context, turn by turn; the 64k turn less the time to read its K
and V, over the same of the 1k turn. Host work: a tiny model over 10,000 turns behind a retention
window, with Python calls, Python memory, torch allocations and resident memory counted at turn 10
and at turn 10,000. Counts are of 32 turns in a row, after which tips stand at the same place of a
page again: 32 turns of 20 positions are five pages. A session keeps 16 bytes of log a position, in
blocks of 64 KB: one falls now and then into what Python kept.
"""

import gc
import os
import statistics
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from _machine import Limits
from _notes import note
from conftest import LIMITS
from peers.engine import NUM_DECODED, NUM_PREFILLED
from peers.tml import TmlEngine, make_model, shape_s_model
from shape_s import kv_bytes, random_ids
from tml_core.model.config import ModelConfig
from tml_core.model.weights import random_weights
from tml_core.sequence.values import Retention

SHORT, LONG = 1024, 65_536
ROUNDS = 9
FIRST_TURN, LAST_TURN = 10, 10_000
PERIOD = 32
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

TINY_CONFIG = {
    "model_type": "inkling_text",
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 32,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "sliding_window_size": 128,
    "d_rel": 4,
    "rel_extent": 64,
    "log_scaling_n_floor": None,
    "max_position_embeddings": 262_144,
    "mlp_layer_types": ["sparse", "sparse"],
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "route_scale": 1.0,
    "logits_mup_width_multiplier": 1.0,
    "bos_token_id": None,
    "eos_token_id": None,
}


class HostWork(NamedTuple):
    """Of one turn, mean over a period; ``python_bytes_kept`` and the resident set over all of it.

    ``python_calls``: of Python and built-in functions. ``python_peak_bytes``: most Python memory
    (numpy's included) a turn held beyond what it found. ``torch_allocations`` and ``torch_bytes``:
    what torch's CPU allocator was asked for; memory in huge pages is not among it, and is only
    taken when a model is made.
    """

    python_calls: float
    python_peak_bytes: float
    python_bytes_kept: int
    torch_allocations: float
    torch_bytes: float
    resident_bytes: int


def test_turn_time_over_context(benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Two sequences of one model take turns."""
    limits = request.config.stash[LIMITS]
    model = shape_s_model()
    with model.new_sequence() as short_sequence, model.new_sequence() as long_sequence:
        short, long = TmlEngine(model, short_sequence), TmlEngine(model, long_sequence)
        times: dict[int, list[float]] = {SHORT: [], LONG: []}
        short.grow(SHORT)
        long.grow(LONG)
        ids = random_ids(NUM_PREFILLED, seed=7)

        def run(engine: TmlEngine, context_len: int) -> None:
            times[context_len].append(engine.turn(ids).total_s)

        def short_turn() -> None:
            limits.sample()
            run(short, SHORT)

        benchmark.pedantic(
            lambda: run(long, LONG), setup=short_turn, rounds=ROUNDS, iterations=1, warmup_rounds=1
        )
    medians = {length: statistics.median(own[1:]) for length, own in times.items()}
    note(request.config, "growth", partial(_growth, limits, medians))


def test_host_work_over_turns(benchmark: Any, request: pytest.FixtureRequest) -> None:
    config = ModelConfig.from_dict(TINY_CONFIG)
    model = make_model(
        config,
        random_weights(config, seed=0, dtype=torch.bfloat16),
        torch.bfloat16,
        num_sequences=1,
        num_positions=config.text.max_positions,
    )
    ids = random_ids(NUM_PREFILLED) % config.text.vocab_size
    with model.new_sequence(retention=Retention(window_positions=256)) as sequence:
        engine = TmlEngine(model, sequence)

        def turn() -> None:
            sequence.note_boundary()
            engine.turn(ids)

        found: list[HostWork] = []

        def session() -> None:
            for number in (FIRST_TURN, LAST_TURN):
                while sequence.tip < number * (NUM_PREFILLED + NUM_DECODED):
                    turn()
                found.append(_host_work(turn))

        benchmark.pedantic(session, rounds=1, iterations=1)
    first, last = found
    for number, work in zip((FIRST_TURN, LAST_TURN), found, strict=True):
        text = (
            f"{work.python_calls:.1f} calls, Python memory {work.python_peak_bytes:.0f} B at most "
            f"and {work.python_bytes_kept} B kept, torch {work.torch_allocations:.1f} allocations "
            f"of {work.torch_bytes:.0f} B, {work.resident_bytes / 2**20:.1f} MB resident"
        )
        note(request.config, f"host work, turn {number}", partial(_noted, text, work._asdict()))
    # No time in it: the same turn takes the same calls and the same tensors at any age.
    assert last.python_calls <= 1.05 * first.python_calls
    assert last.torch_allocations <= first.torch_allocations
    assert last.torch_bytes <= 1.05 * first.torch_bytes


def _growth(limits: Limits, medians: dict[int, float]) -> tuple[str, dict[str, Any]]:
    # Each of the nine steps reads all K and V.
    num_steps = NUM_DECODED + 1
    read_s = {length: num_steps * kv_bytes(length) / limits.bytes_per_s for length in medians}
    rest_s = {length: medians[length] - read_s[length] for length in medians}
    ratio = rest_s[LONG] / rest_s[SHORT]
    parts = [
        f"{1e3 * medians[length]:.1f} ms less {1e3 * read_s[length]:.1f} ms to read K and V"
        for length in (LONG, SHORT)
    ]
    text = f"turn at 64k ({parts[0]}) over turn at 1k ({parts[1]}): {ratio:.3f}"
    return text, {
        "turn_1k_s": medians[SHORT],
        "turn_64k_s": medians[LONG],
        "read_1k_s": read_s[SHORT],
        "read_64k_s": read_s[LONG],
        "ratio": ratio,
    }


def _host_work(turn: Callable[[], None]) -> HostWork:
    """Count 32 turns for each of the counters: they disturb one another."""
    return HostWork(
        _python_calls(turn) / PERIOD,
        *_python_memory(turn),
        *(total / PERIOD for total in _torch_allocations(turn)),
        _resident_bytes(),
    )


def _python_calls(turn: Callable[[], None]) -> int:
    num_calls = 0

    def count(_frame: object, event: str, _arg: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for _ in range(PERIOD):
            turn()
    finally:
        sys.setprofile(None)
    return num_calls


def _python_memory(turn: Callable[[], None]) -> tuple[float, int]:
    """Mean peak of a turn over where it started; what all of them kept."""
    gc.collect()
    tracemalloc.start()
    try:
        turn()
        peaks = []
        begin, _ = tracemalloc.get_traced_memory()
        for _ in range(PERIOD):
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            turn()
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
        gc.collect()
        end, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return statistics.mean(peaks), end - begin


def _torch_allocations(turn: Callable[[], None]) -> tuple[int, int]:
    """How often torch's CPU allocator was asked, and for how many bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(PERIOD):
            turn()
    events = profiler.profiler.kineto_results.events()
    sizes = [one.nbytes() for one in events if one.name() == "[memory]" and one.nbytes() > 0]
    return len(sizes), sum(sizes)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def _noted(text: str, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return text, values
