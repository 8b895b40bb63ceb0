"""What this machine can do at most, measured in the run that needs it.

A virtual machine's memory bandwidth moves with its neighbours, so the limits are sampled before
every case and the best sample of the run counts.
"""

import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tml_core import _ext
from tml_core.ops._common import huge_empty

__all__ = ["Limits", "describe"]

BUFFER_BYTES = 192 << 20  # beyond the last-level caches of the machines we know
DOT_STEPS = 100_000


@dataclass
class Limits:
    """Best of the samples so far, at torch's number of threads."""

    bytes_per_s: float = 0.0
    flops_per_s: dict[torch.dtype, float] = field(
        default_factory=lambda: {torch.bfloat16: 0.0, torch.float32: 0.0}
    )
    _buffer: torch.Tensor | None = None

    def sample(self) -> None:
        """Read the buffer three times and run the dot products twice (some 50 ms)."""
        self.read_speed()
        threads = torch.get_num_threads()
        for dtype in self.flops_per_s:
            for _ in range(2):
                start = time.perf_counter()
                flops = _ext.dot_peak(DOT_STEPS, dtype == torch.bfloat16, threads)
                speed = flops / (time.perf_counter() - start)
                self.flops_per_s[dtype] = max(self.flops_per_s[dtype], speed)

    def read_speed(self) -> float:
        """Bytes a second as of now: the best of three readings (some 15 ms)."""
        if self._buffer is None:
            self._buffer = huge_empty((BUFFER_BYTES,), torch.uint8).fill_(1)
        best = 0.0
        for _ in range(3):
            start = time.perf_counter()
            _ext.read_bytes(self._buffer, torch.get_num_threads())
            best = max(best, BUFFER_BYTES / (time.perf_counter() - start))
        self.bytes_per_s = max(self.bytes_per_s, best)
        return best

    def least_time(self, num_bytes: float, flops: float, dtype: torch.dtype) -> float:
        """Seconds below which no program can read that much or compute that much here."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s[dtype])


def describe() -> dict[str, str | int]:
    """The machine and the software a result was taken on."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "num_cpus": os.cpu_count() or 1,
        "num_threads": torch.get_num_threads(),
        "isa": _ext.isa(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }
