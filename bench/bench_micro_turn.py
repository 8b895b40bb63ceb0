"""A micro-turn end to end on shape S: 12 positions in one step, then 8 decoded one by one.

Ours beside transformers and llama.cpp in one process, at 1k, 8k and 32k of context, taking turns
round by round. What a peer is given, and where it differs, stands in peers/. The floor is the time
to read the bytes the turn cannot do without (weights of the experts its steps hit, attention and
head weights, K and V) at the speed memory was read right before or right after that very turn,
whichever was higher: on a shared machine it doubles and halves within seconds.
"""

import importlib
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from _machine import Limits
from _notes import note
from conftest import LIMITS, RESULTS, Result
from peers.engine import NUM_DECODED, NUM_PREFILLED, Engine, TurnTime
from peers.tml import TmlEngine, make_model, shape_s_model
from shape_s import (
    NUM_LAYERS,
    PAIR_CONFIG,
    TOP_K,
    expected_hits,
    head_bytes,
    kv_bytes,
    random_ids,
    weight_bytes_per_layer,
)
from tml_core.media.segments import Tokens
from tml_core.model.config import ModelConfig
from tml_core.model.weights import random_weights

CONTEXTS = {"1k": 1024, "8k": 8192, "32k": 32768}
ROUNDS = {"1k": 9, "8k": 7, "32k": 5}
# Between two engines: the threads of the one before may still be spinning for work.
PAUSE_S = 0.02

Times = dict[str, list[TurnTime]]


class Field:
    """The engines of this run, and how often they have had a turn."""

    def __init__(self, config: pytest.Config) -> None:
        self.ours = TmlEngine(shape_s_model())
        self.peers: list[Any] = []
        for module, engine, packages, extra in (
            ("hf", "HfEngine", ("transformers",), "test"),
            ("llama_cpp", "LlamaCppEngine", ("xllamacpp", "gguf"), "bench"),
        ):
            try:
                found = importlib.import_module(f"peers.{module}")
            except ModuleNotFoundError as error:
                if error.name not in packages:
                    raise
                text = f"no peer {engine}: {error.name} is not installed (extra: {extra})"
                note(config, "skipped", partial(_noted, text, {}))
                continue
            self.peers.append(getattr(found, engine)())
        self._num_turns = 0

    def peer(self, name: str) -> Any:
        """The peer of that name, or None."""
        return next((one for one in self.peers if one.name == name), None)

    def grow(self, context_len: int) -> list[float]:
        """Bring every context there and warm up; the experts each step of a turn hits there."""
        hits = [expected_hits(NUM_PREFILLED), *[float(TOP_K)] * NUM_DECODED]
        ids = self.next_ids()
        for engine in [self.ours, *self.peers]:
            engine.grow(context_len)
            if engine.name == "transformers":
                hits = engine.turn_with_hits(ids)
            else:
                engine.turn(ids)
        return hits

    def next_ids(self) -> torch.Tensor:
        """Input of one more turn, the same for all."""
        self._num_turns += 1
        return random_ids(NUM_PREFILLED, seed=1000 + self._num_turns)

    def close(self) -> None:
        """Release what the engines hold."""
        for engine in [self.ours, *self.peers]:
            if hasattr(engine, "close"):
                engine.close()


@pytest.fixture(scope="module")
def field(request: pytest.FixtureRequest) -> Iterator[Field]:
    found = Field(request.config)
    yield found
    found.close()


def test_model_is_transformers() -> None:
    """Same weights, same greedy tokens, on one layer of each kind in fp32: in bf16 each engine
    rounds at points of its own, and random weights blow that up into other experts."""
    hf = pytest.importorskip("peers.hf", reason="the oracle is transformers (extra: test)")
    pair = ModelConfig.from_dict(PAIR_CONFIG)
    weights = random_weights(pair, seed=4, dtype=torch.float32)
    oracle = hf.HfEngine(PAIR_CONFIG, weights, torch.float32)
    model = make_model(pair, dict(weights), torch.float32, num_sequences=1, num_positions=1024)
    engine = TmlEngine(model)
    for ids in (random_ids(600), *random_ids(3 * NUM_PREFILLED, seed=5).split(NUM_PREFILLED)):
        ours, theirs = engine.turn(ids).tokens, oracle.turn(ids).tokens
        assert ours == theirs
    ids = random_ids(5, seed=6)
    logits = engine.sequence.extend([Tokens(ids)])[-1]
    # fp32 sums of 1024 products in another order.
    torch.testing.assert_close(logits, oracle.logits(ids), rtol=1e-3, atol=1e-3)


def test_shape_s_is_transformers(field: Field) -> None:
    """In bf16 the logits of shape S point the same way, as those of other weights would not."""
    hf = field.peer("transformers")
    if hf is None:
        pytest.skip("the oracle is transformers (extra: test)")
    with field.ours.model.new_sequence() as sequence:
        for ids in random_ids(120).split(40):
            ours = sequence.extend([Tokens(ids)])[-1]
            assert torch.cosine_similarity(ours, hf.logits(ids), dim=0) > 0.8
    hf.restart()


def test_six_turns_in_a_row(field: Field, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Each turn is as fast as the one before: medians of every place in the row."""
    context, row = "1k", 6
    field.grow(CONTEXTS[context])
    rows: dict[str, list[list[float]]] = {}

    def run(engine: Engine) -> None:
        engine.turn(field.next_ids())  # back from the other engines
        ids = [field.next_ids() for _ in range(row)]
        rows.setdefault(engine.name, []).append([engine.turn(one).total_s for one in ids])

    def peers_row() -> None:
        for peer in field.peers:
            run(peer)

    benchmark.pedantic(
        lambda: run(field.ours), setup=peers_row, rounds=3, iterations=1, warmup_rounds=0
    )
    for name, own in rows.items():
        medians = [statistics.median(place) for place in zip(*own, strict=True)]
        spread = (max(medians) - min(medians)) / statistics.median(medians)
        text = (
            f"{name}: {' '.join(f'{1e3 * one:.0f}' for one in medians)} ms, "
            f"spread {100 * spread:.0f} % of the median"
        )
        values = {"engine": name, "turns_s": medians, "spread": spread}
        note(request.config, f"six turns @ {context}", partial(_noted, text, values))


def _noted(text: str, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return text, values


@pytest.mark.parametrize("context", CONTEXTS)
def test_micro_turn(
    field: Field, context: str, benchmark: Any, request: pytest.FixtureRequest
) -> None:
    limits, rounds = request.config.stash[LIMITS], ROUNDS[context]
    hits = field.grow(CONTEXTS[context])
    step_bytes = _step_bytes(hits, field.ours.context_len)
    times: Times = {one.name: [] for one in [field.ours, *field.peers]}
    speeds: list[float] = []  # of memory, before and after each of our turns
    ids = field.next_ids()

    def peers_turn() -> None:
        nonlocal ids
        if speeds:
            speeds.append(limits.read_speed())
        ids = field.next_ids()
        for peer in field.peers:
            times[peer.name].append(peer.turn(ids))
            time.sleep(PAUSE_S)
        speeds.append(limits.read_speed())

    def our_turn() -> None:
        times[field.ours.name].append(field.ours.turn(ids))

    limits.sample()
    benchmark.pedantic(our_turn, setup=peers_turn, rounds=rounds, iterations=1, warmup_rounds=1)
    speeds.append(limits.read_speed())
    beside = [max(pair) for pair in zip(speeds[::2], speeds[1::2], strict=True)][1:]
    results = request.config.stash[RESULTS]
    parts = (
        ("turn 12+8", lambda turn: turn.total_s, sum(step_bytes)),
        ("prefill 12", lambda turn: turn.prefill_s, step_bytes[0]),
        ("decode 8", lambda turn: turn.decode_s, sum(step_bytes[1:])),
    )
    for part, seconds, num_bytes in parts:
        medians = {
            name: statistics.median(seconds(turn) for turn in own[1:])
            for name, own in times.items()
        }
        ours = medians.pop(field.ours.name)
        case = f"{part} @ {context}"
        for peer, peer_s in medians.items() or [("", None)]:
            results.append(Result(case, ours, peer, peer_s, num_bytes, 0.0, torch.bfloat16, rounds))
        own = [seconds(turn) for turn in times[field.ours.name][1:]]
        note(request.config, case, partial(_against_floor, limits, own, beside, num_bytes, hits))


def _against_floor(
    limits: Limits, times_s: list[float], speeds: list[float], num_bytes: float, hits: list[float]
) -> tuple[str, dict[str, Any]]:
    over = statistics.median(
        time_s * speed / num_bytes for time_s, speed in zip(times_s, speeds, strict=True)
    )
    speed, time_s = statistics.median(speeds), statistics.median(times_s)
    over_best = time_s * limits.bytes_per_s / num_bytes
    text = (
        f"{over:.2f} x the floor ({num_bytes / 1e6:.0f} MB; memory read at {speed / 1e9:.1f} GB/s "
        f"beside the turns), {100 / over:.0f} % of the bandwidth; {over_best:.2f} x at the best "
        f"this run saw, {limits.bytes_per_s / 1e9:.1f} GB/s"
    )
    values = {
        "over_floor": over,
        "over_floor_at_best": over_best,
        "bytes": num_bytes,
        "bytes_per_s": speeds,
        "times_s": times_s,
        "experts_hit": hits,
    }
    return text, values


def _step_bytes(hits: list[float], context_len: int) -> list[float]:
    """Bytes each of a turn's nine steps must read, from the experts it hits in a layer."""
    ends = [context_len + NUM_PREFILLED + i for i in range(NUM_DECODED + 1)]
    return [
        NUM_LAYERS * weight_bytes_per_layer(hit) + head_bytes() + kv_bytes(end)
        for hit, end in zip(hits, ends, strict=True)
    ]
