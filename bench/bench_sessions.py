"""Many sessions in one engine: a paced clock, the gain from batching, and the price of moving.

Shape M10 (bench/shape_m10.py). Paced: 16 clients, each with its own clock of 200 ms, the way of
`tml-core load`. Batching: the same 16 sessions tick after tick as fast as they go, in one engine,
and in 16 engines of one session each with its own copy of the weights; the peer is timed with two
threads a kernel and with one, and the better counts. Moving: `mark`, `rewind`, `fork` of a session
of 4k positions; snapshot and restore of one whose pages fill 256 MB, over what this disk takes in
the same minute: one file written in 8 MB pieces and synced, and read back; both are read from the
disk, not from the page cache.

    python -m pytest bench/bench_sessions.py -s
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch

import shape_m10
from _notes import note
from peers.tml import make_model
from shape_s import random_ids
from tml_core.contract import PAGE_LEN
from tml_core.engine.model import Model, load_model
from tml_core.layout.chunk import Chunk, as_chunk
from tml_core.load import LoadReport, LoadSpec, run_load
from tml_core.media.clips import clips
from tml_core.media.micro_turns import micro_turns
from tml_core.model.config import ModelConfig
from tml_core.model.weights import random_weights
from tml_core.sequence.sequence import Sequence
from tml_core.sequence.token_log import records
from tml_core.session import Engine, Session

NUM_SESSIONS: Final = 16
PACED_S: Final = 20.0
NUM_TICKS: Final = 12
ROUNDS: Final = 5
MOVES: Final = 200
POSITIONS: Final = 4096
SNAPSHOT_BYTES: Final = 256 << 20
BLOCK_BYTES: Final = 8 << 20

# Much K and V for little model: eight global layers, 32 KB a position.
WIDE_CONFIG: Final[dict[str, Any]] = {
    "model_type": "inkling_text",
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 8,
    "swa_head_dim": 128,
    "layer_types": ["hybrid"] * 8,
    "sliding_window_size": 512,
    "d_rel": 4,
    "rel_extent": 64,
    "log_scaling_n_floor": None,
    "max_position_embeddings": 65_536,
    "mlp_layer_types": ["dense"] * 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_shared_experts": 1,
    "route_scale": 1.0,
    "logits_mup_width_multiplier": 1.0,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shape_m10.write(tmp_path_factory.mktemp("m10"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, max_sequences=NUM_SESSIONS + 2)


@pytest.mark.parametrize("has_video", [False, True], ids=["sound", "sound and video"])
def test_paced(
    benchmark: Any, request: pytest.FixtureRequest, model: Model, has_video: bool
) -> None:
    spec = LoadSpec(NUM_SESSIONS, PACED_S)
    found: list[LoadReport] = []

    def run() -> None:
        with Engine(model) as engine:
            found.append(run_load(engine, spec, recording(has_video)))

    benchmark.pedantic(run, rounds=1, iterations=1)
    (report,) = found
    assert report.num_ticks + report.kinds.get("left", 0) == NUM_SESSIONS * PACED_S * 5
    name = f"{NUM_SESSIONS} paced sessions, {'sound and video' if has_video else 'sound'}"
    note(request.config, name, partial(_paced_finding, report))


def test_batching_gain(benchmark: Any, request: pytest.FixtureRequest, folder: Path) -> None:
    chunks = recording(has_video=False)
    times: dict[str, list[Took]] = {"one engine": [], "16 engines": [], "16 engines, 1 thread": []}
    with ExitStack() as stack:
        together = stack.enter_context(Engine(load_model(folder, max_sequences=NUM_SESSIONS)))
        engines = [
            stack.enter_context(Engine(load_model(folder, max_sequences=1)))
            for _ in range(NUM_SESSIONS)
        ]
        batched = [together.open(seed=seed) for seed in range(NUM_SESSIONS)]
        single = [engine.open(seed=seed) for seed, engine in enumerate(engines)]
        run_ticks(batched, chunks, 2)
        run_ticks(single, chunks, 2)

        def all_ways() -> None:
            times["one engine"].append(run_ticks(batched, chunks, NUM_TICKS))
            times["16 engines"].append(run_ticks(single, chunks, NUM_TICKS))
            with num_threads(1):
                times["16 engines, 1 thread"].append(run_ticks(single, chunks, NUM_TICKS))

        benchmark.pedantic(all_ways, rounds=ROUNDS, iterations=1)
    medians = {
        name: Took(*(statistics.median(column) for column in zip(*values, strict=True)))
        for name, values in times.items()
    }
    note(request.config, "batching", partial(_batching_finding, medians))


def test_mark_rewind_fork(benchmark: Any, request: pytest.FixtureRequest, model: Model) -> None:
    times: dict[str, list[float]] = {"mark": [], "rewind": [], "fork": [], "close of a fork": []}
    with Engine(model) as engine, engine.open(seed=1) as session:
        chunks = recording(has_video=True)
        tick = 0
        while session.tip < POSITIONS:
            session.append(chunks[tick % len(chunks)]).result()
            tick += 1

        def moves() -> None:
            for _ in range(MOVES):
                mark = timed(times["mark"], session.mark)
                timed(times["rewind"], partial(session.rewind, mark))
                twin = timed(times["fork"], session.fork)
                timed(times["close of a fork"], twin.close)

        benchmark.pedantic(moves, rounds=1, iterations=1)
        tip = session.tip
    for name, values in times.items():
        note(request.config, f"{name} at {tip} positions", partial(_move_finding, values))


def test_snapshot_and_restore(
    benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    config = ModelConfig.from_dict(WIDE_CONFIG)
    wide = make_model(
        config,
        random_weights(config, seed=0, dtype=torch.bfloat16),
        torch.bfloat16,
        num_sequences=2,
        num_positions=config.text.max_positions,
    )
    times: dict[str, list[float]] = {
        "disk write": [],
        "snapshot": [],
        "disk read": [],
        "restore": [],
    }
    path, plain = tmp_path / "sequence", tmp_path / "plain"
    with wide.new_sequence() as sequence:
        page_bytes = wide.store.kv.sizes.global_page_bytes
        grow(sequence, SNAPSHOT_BYTES // page_bytes * PAGE_LEN)

        def round_trip() -> None:
            timed(times["snapshot"], partial(sequence.snapshot, path))
            timed(times["disk write"], partial(write_file, plain, path.stat().st_size))
            forget(plain)
            timed(times["disk read"], partial(read_file, plain))
            forget(path)
            timed(times["restore"], partial(wide.restore_sequence, path)).close()

        benchmark.pedantic(round_trip, rounds=ROUNDS, iterations=1, warmup_rounds=1)
        num_bytes = path.stat().st_size
    note(request.config, "snapshot and restore", partial(_disk_finding, times, num_bytes))


def recording(has_video: bool) -> list[Chunk]:
    audio, video = clips()
    return [as_chunk(one) for one in micro_turns(audio, video if has_video else None)]


class Took(NamedTuple):
    """Seconds on the clock, and of the process's CPUs: what other programs cannot take."""

    wall_s: float
    cpu_s: float


def run_ticks(sessions: list[Session], chunks: list[Chunk], count: int) -> Took:
    """All sessions tick ``count`` times as fast as they go."""
    start, cpu_start = time.perf_counter(), time.process_time()
    for tick in range(count):
        turns = [
            session.append(chunks[(7 * number + tick) % len(chunks)], deadline_ms=None)
            for number, session in enumerate(sessions)
        ]
        for turn in turns:
            turn.result()
    return Took(time.perf_counter() - start, time.process_time() - cpu_start)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(times: list[float], act: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = act()
    times.append(time.perf_counter() - start)
    return result


def grow(sequence: Sequence, length: int) -> None:
    """Positions without a model step; the pages are full of noise already."""
    while (missing := length - sequence.tip) > 0:
        ids = random_ids(min(missing, 512), seed=sequence.tip) % 256
        sequence.reserve(len(ids))
        sequence.commit(records(ids.numpy(), torch.zeros_like(ids).numpy(), ids))


def write_file(path: Path, num_bytes: int) -> None:
    block = memoryview(os.urandom(BLOCK_BYTES))
    with path.open("wb", buffering=0) as file:
        while num_bytes > 0:
            num_bytes -= file.write(block[:num_bytes])
        os.fsync(file.fileno())


def read_file(path: Path) -> None:
    block = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def forget(path: Path) -> None:
    """Take a file out of the page cache, so that it is read from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _paced_finding(report: LoadReport) -> tuple[str, dict[str, Any]]:
    latency = report.latency
    work = report.work
    assert latency is not None and work is not None
    text = (
        f"p50 {latency.p50:.1f}, p99 {latency.p99:.1f}, p99.9 {latency.p99_9:.1f} ms; "
        f"{report.num_missed} of {report.num_ticks} missed (below "
        f"{100 * report.miss_rate_bound:.2f} %); host {work.host_us_per_turn:.0f} us a turn"
    )
    return text, report.to_dict()


def _batching_finding(medians: dict[str, Took]) -> tuple[str, dict[str, Any]]:
    ticks = NUM_SESSIONS * NUM_TICKS
    ours = medians["one engine"]
    peers = [value for name, value in medians.items() if name != "one engine"]
    gain = min(one.wall_s for one in peers) / ours.wall_s
    cpu_gain = min(one.cpu_s for one in peers) / ours.cpu_s
    rates = ", ".join(
        f"{name} {ticks / took.wall_s:.0f} a second ({1e3 * took.cpu_s / ticks:.1f} ms of CPU each)"
        for name, took in medians.items()
    )
    text = f"session ticks: {rates}; gain {gain:.2f}x, in CPU time {cpu_gain:.2f}x"
    values = {name: took._asdict() for name, took in medians.items()}
    return text, {**values, "gain": gain, "cpu_gain": cpu_gain}


def _move_finding(times: list[float]) -> tuple[str, dict[str, Any]]:
    micros = sorted(1e6 * one for one in times)
    median, p99 = statistics.median(micros), micros[int(0.99 * len(micros))]
    return f"median {median:.0f} us, p99 {p99:.0f} us", {"median_us": median, "p99_us": p99}


def _disk_finding(times: dict[str, list[float]], num_bytes: int) -> tuple[str, dict[str, Any]]:
    speeds = {
        name: num_bytes / statistics.median(values[1:]) / 1e6 for name, values in times.items()
    }
    text = (
        f"{num_bytes >> 20} MB; snapshot {speeds['snapshot']:.0f} MB/s = "
        f"{100 * speeds['snapshot'] / speeds['disk write']:.0f} % of {speeds['disk write']:.0f}; "
        f"restore {speeds['restore']:.0f} MB/s = "
        f"{100 * speeds['restore'] / speeds['disk read']:.0f} % of {speeds['disk read']:.0f}"
    )
    return text, speeds
