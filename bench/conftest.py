"""The `measure` fixture: times a case against its peer, round by round, and prints one table.

    def test_linear(measure):
        measure("linear m1", ours, peer=theirs, num_bytes=weight_bytes, flops=2 * n * k)

The peer runs right before every timed round, so both see the same neighbours and the same cold
caches. Times are medians; the last column is the share reached of the machine's own limit
(bench/_machine.py). `pytest bench --bench-json` also writes bench/results/.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from _machine import Limits, describe

Case = Callable[[], object]

ROUND_S = 2e-3  # a round repeats a short case up to this long


@dataclass(frozen=True)
class Result:
    """One line of the table; times in seconds."""

    case: str
    time_s: float
    peer: str
    peer_s: float | None
    num_bytes: float
    flops: float
    dtype: torch.dtype
    num_rounds: int


RESULTS = pytest.StashKey[list[Result]]()
LIMITS = pytest.StashKey[Limits]()


class Measure:
    """Callable that times one case; one call a test."""

    def __init__(self, benchmark: Any, results: list[Result], limits: Limits) -> None:
        self._benchmark = benchmark
        self._results = results
        self._limits = limits

    def __call__(
        self,
        case: str,
        run: Case,
        *,
        peer: Case | None = None,
        peer_name: str = "torch",
        num_bytes: float = 0,
        flops: float = 0,
        dtype: torch.dtype = torch.bfloat16,
        rounds: int = 30,
    ) -> Result:
        """Time ``run`` and ``peer`` over ``rounds`` rounds, taking turns.

        num_bytes, flops: what the case must read and compute at least, for the share of the limit;
        both zero where there is no such limit (a call's overhead).
        """
        self._limits.sample()
        loops = repeats(run)
        peer_loops = repeats(peer) if peer is not None else 0
        peer_times: list[float] = []

        def peer_round() -> None:
            if peer is not None:
                peer_times.append(timed(peer, peer_loops))

        def our_round() -> None:
            for _ in range(loops):
                run()

        self._benchmark.pedantic(
            our_round, setup=peer_round, rounds=rounds, iterations=1, warmup_rounds=2
        )
        result = Result(
            case,
            self._benchmark.stats.stats.median / loops,
            peer_name if peer is not None else "",
            statistics.median(peer_times[2:]) if peer is not None else None,
            num_bytes,
            flops,
            dtype,
            rounds,
        )
        self._results.append(result)
        return result


def timed(run: Case, loops: int) -> float:
    """Seconds a call, over ``loops`` calls."""
    start = time.perf_counter()
    for _ in range(loops):
        run()
    return (time.perf_counter() - start) / loops


def repeats(run: Case) -> int:
    """Calls that fill a round; also the warm-up."""
    run()
    return max(1, min(10_000, int(ROUND_S / max(timed(run, 1), 1e-9))))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-json", action="store_true", help="also write bench/results/*.json")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # our table instead of the plugin's
    config.stash[RESULTS] = []
    config.stash[LIMITS] = Limits()


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Measure:
    return Measure(benchmark, request.config.stash[RESULTS], request.config.stash[LIMITS])


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, scale in (("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.2f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def limit_share(result: Result, limits: Limits) -> float | None:
    """Part of the machine's limit the case reached, 0 to 1; None where it has no such limit."""
    if result.num_bytes == 0 and result.flops == 0:
        return None
    return limits.least_time(result.num_bytes, result.flops, result.dtype) / result.time_s


def table(results: list[Result], limits: Limits) -> list[str]:
    rows = [("case", "time", "peer", "peer time", "ratio", "GB/s", "GFLOP/s", "of limit")]
    for result in results:
        share = limit_share(result, limits)
        ratio = None if result.peer_s is None else result.peer_s / result.time_s
        rows.append(
            (
                result.case,
                time_text(result.time_s),
                result.peer or "-",
                time_text(result.peer_s),
                "-" if ratio is None else f"{ratio:.2f}x",
                f"{result.num_bytes / result.time_s / 1e9:.1f}" if result.num_bytes else "-",
                f"{result.flops / result.time_s / 1e9:.0f}" if result.flops else "-",
                "-" if share is None else f"{100 * share:.0f} %",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i in (0, 2) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def as_json(results: list[Result], limits: Limits) -> dict[str, Any]:
    return {
        "machine": describe(),
        "read_gb_per_s": round(limits.bytes_per_s / 1e9, 2),
        "gflops": {str(k).split(".")[1]: round(v / 1e9) for k, v in limits.flops_per_s.items()},
        "cases": [
            {
                "case": result.case,
                "median_s": result.time_s,
                "peer": result.peer or None,
                "peer_median_s": result.peer_s,
                "num_bytes": result.num_bytes,
                "flops": result.flops,
                "rounds": result.num_rounds,
                "share_of_limit": limit_share(result, limits),
            }
            for result in results
        ],
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results, limits = config.stash[RESULTS], config.stash[LIMITS]
    if not results:
        return
    machine = describe()
    terminalreporter.section("measured")
    terminalreporter.write_line(
        f"{machine['cpu']}, {machine['num_threads']} threads, {machine['isa']}, "
        f"torch {machine['torch']}, OMP_WAIT_POLICY {machine['omp_wait_policy']}"
    )
    terminalreporter.write_line(
        f"limits of this run: read {limits.bytes_per_s / 1e9:.1f} GB/s, "
        f"bf16 {limits.flops_per_s[torch.bfloat16] / 1e9:.0f} GFLOP/s, "
        f"fp32 {limits.flops_per_s[torch.float32] / 1e9:.0f} GFLOP/s"
    )
    for line in table(results, limits):
        terminalreporter.write_line(line)
    if config.getoption("bench_json"):
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        path = folder / f"{datetime.now():%Y-%m-%d-%H%M%S}.json"
        path.write_text(json.dumps(as_json(results, limits), indent=2) + "\n")
        terminalreporter.write_line(f"written: {path}")
