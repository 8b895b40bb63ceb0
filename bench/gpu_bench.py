"""The device ops beside torch's own, on a GPU: `make gpu-bench`.

    python bench/gpu_bench.py [--json PATH] [--only linear|moe|attention]

Every case is timed by replays of a CUDA graph that walks several sets of weights or pages, more
than the L2 cache holds, peers in the same run and in turns; the median of the replays counts.
Percentages are of the read bandwidth measured here, before the cases.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tml_core.contract import PAGE_LEN
from tml_core.ops import cuda
from tml_core.ops.session_attn import pack_rel_bank

attend_plain = torch.nn.functional.scaled_dot_product_attention

COLD_BYTES = 256 << 20  # walked by one graph: five times the L2 of an H100
REPLAYS = 20
MIXTURES = {  # experts, top-k, shared, hidden, width
    "30B-A3B": (128, 8, 0, 2048, 768),
    "Inkling-Small / 8": (256, 6, 2, 4096, 256),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


class Timed:
    """A graph of one call a set, replayed."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        self._count = len(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._kept = [call() for call in calls]
        self.times_us: list[float] = []

    def run(self) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        self.times_us.append(start.elapsed_time(end) * 1000 / self._count)

    @property
    def median_us(self) -> float:
        return statistics.median(self.times_us)


def race(contenders: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Median microseconds a call; contenders take turns. One that cannot run is left out, aloud."""
    timed = {}
    for name, calls in contenders.items():
        try:
            timed[name] = Timed(calls)
        except (RuntimeError, NotImplementedError) as error:
            print(f"    {name} cannot run here: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
    for _ in range(REPLAYS):
        for graph in timed.values():
            graph.run()
    return {name: graph.median_us for name, graph in timed.items()}


def read_bandwidth() -> float:
    """Bytes a second of reading 1 GiB: the best of summing it."""
    data = torch.ones(1 << 28, device="cuda", dtype=torch.float32)
    graph = Timed([lambda: data.sum()])
    for _ in range(REPLAYS):
        graph.run()
    return data.numel() * 4 / (min(graph.times_us) * 1e-6)


def linear_cases(limit: float) -> list[dict[str, Any]]:
    out = []
    for name, depth, rows in [("qkvr", 2048, 5120), ("o", 4096, 2048), ("head", 2048, 151936)]:
        num_bytes = 2 * depth * rows
        sets = max(1, min(32, COLD_BYTES // num_bytes))
        plain = [randn(rows, depth) for _ in range(sets)]
        packed = [cuda.pack_weight(w) for w in plain]
        for tokens in (1, 4, 16, 64, 256, 1024, 4096):
            x = randn(tokens, depth)
            times = race(
                {
                    "ours": [partial(cuda.linear, x, w) for w in packed],
                    "torch.mm": [partial(torch.mm, x, w.T) for w in plain],
                }
            )
            out.append(case("linear", f"{name} T={tokens}", times, num_bytes, limit))
            out[-1]["tflops"] = 2 * tokens * depth * rows / times["ours"] / 1e6
    return out


def grouped(x: Tensor, ids: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """torch._grouped_mm over tokens sorted by expert; the sum over choices in fp32."""
    order = ids.flatten().argsort(stable=True)
    experts = torch.arange(up.shape[0], device=ids.device)
    ends = (ids.flatten()[:, None] == experts).sum(0).cumsum(0).int()  # bincount would wait
    rows = x[order // ids.shape[1]]
    gate, value = torch._grouped_mm(rows, up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    out = torch._grouped_mm(torch.nn.functional.silu(gate) * value, down.transpose(1, 2), offs=ends)
    y = torch.empty_like(out)
    y[order] = out
    return y.view(x.shape[0], ids.shape[1], -1).float().sum(1).to(x.dtype)


def gathered(x: Tensor, ids: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Each (token, choice) with its own copy of the weights."""
    gate, value = (up[ids] @ x[:, None, :, None]).squeeze(-1).chunk(2, dim=-1)
    h = torch.nn.functional.silu(gate) * value
    return (down[ids] @ h.unsqueeze(-1)).squeeze(-1).float().sum(1).to(x.dtype)


def moe_cases(limit: float) -> list[dict[str, Any]]:
    out = []
    for name, (experts, top_k, shared, hidden, width) in MIXTURES.items():
        sets = 3
        plain = [
            (randn(experts + shared, 2 * width, hidden), randn(experts + shared, hidden, width))
            for _ in range(sets)
        ]
        packed = [cuda.pack_experts(up, down, shared) for up, down in plain]
        for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096):
            x = randn(tokens, hidden)
            ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices.sort().values
            weights = torch.ones(tokens, top_k, device="cuda")
            gammas = torch.ones(tokens, shared, device="cuda")
            small = ids.int()
            contenders = {
                "ours": [partial(cuda.moe, x, small, weights, gammas, e) for e in packed],
                "torch._grouped_mm": [partial(grouped, x, ids, *w) for w in plain],
            }
            if tokens <= 8:
                contenders["gather + bmm"] = [partial(gathered, x, ids, *w) for w in plain]
            hit = int(ids.unique().numel()) + shared
            times = race(contenders)
            out.append(case("moe", f"{name} T={tokens}", times, hit * 6 * hidden * width, limit))
            flops = 6 * tokens * (top_k + shared) * hidden * width
            out[-1]["tflops"] = flops / times["ours"] / 1e6
            out[-1]["experts_hit"] = hit
    return out


def attention_cases(limit: float) -> list[dict[str, Any]]:
    heads, kv_heads, dim, rel_len = 32, 4, 128, 1024
    out = []
    for keys, window in [(1024, 0), (8192, 0), (32768, 0), (131072, 0), (131072, 512)]:
        num_pages = keys // PAGE_LEN
        for tokens in (1, 16, 64):
            seen = min(keys, window + tokens) if window else keys
            num_bytes = 4 * seen * kv_heads * dim
            sets = max(1, min(8, COLD_BYTES // (4 * keys * kv_heads * dim)))
            pages = [randn(num_pages, 1, kv_heads, 2, PAGE_LEN * dim) for _ in range(sets)]
            q, r = randn(tokens, heads, dim), randn(tokens, heads, 16)
            bank = pack_rel_bank(torch.randn(16, rel_len).bfloat16()).data.cuda()
            start = keys - tokens
            step = {
                "table": torch.randperm(num_pages).int().view(1, -1).cuda(),
                "cu_tokens": torch.tensor([0, tokens], dtype=torch.int32).cuda(),
                "slots": torch.zeros(1, dtype=torch.int32).cuda(),
                "start_pos": torch.tensor([start]).cuda(),
                "visible_end_T": torch.arange(start, keys).cuda(),
                "window": window,
                "layer": 0,
            }
            plain_q = q.transpose(0, 1).unsqueeze(0)
            mask = torch.arange(keys, device="cuda") <= step["visible_end_T"][:, None]
            if window:
                mask &= torch.arange(keys, device="cuda") > step["visible_end_T"][:, None] - window
            kv = [randn(2, 1, kv_heads, keys, dim) for _ in range(sets)]
            times = race(
                {
                    "ours": [
                        partial(cuda.session_attn, q, r, bank, rel_len, pages=p, **step)
                        for p in pages
                    ],
                    # Without the relative bias, on contiguous keys: less work than ours.
                    "SDPA, no bias": [
                        partial(attend_plain, plain_q, t[0], t[1], attn_mask=mask, enable_gqa=True)
                        for t in kv
                    ],
                }
            )
            name = f"S={keys} T={tokens}" + (f" window={window}" if window else "")
            out.append(case("session_attn", name, times, num_bytes, limit))
    return out


def case(
    op: str, name: str, times: dict[str, float], num_bytes: int, limit: float
) -> dict[str, Any]:
    percent = 100 * num_bytes / limit / (times["ours"] * 1e-6)
    shown = "  ".join(f"{peer} {us:.1f} us" for peer, us in times.items())
    print(f"{op:13} {name:28} {shown}  ({percent:.0f} % of read bandwidth)")
    return {"op": op, "case": name, "us": times, "bytes": num_bytes, "percent_of_read": percent}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=["linear", "moe", "attention"])
    args = parser.parse_args()
    if why := cuda.problem():
        print(f"gpu_bench: needs an H100 or H200: {why}", file=sys.stderr)
        return 3
    torch.manual_seed(1)
    limit = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: reads {limit / 1e12:.2f} TB/s")
    cases = []
    for name, run in [("linear", linear_cases), ("moe", moe_cases), ("attention", attention_cases)]:
        if args.only in (None, name):
            with torch.no_grad():
                cases += run(limit)
            torch.cuda.empty_cache()
    if args.json is not None:
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv"]
        report = {
            "device": torch.cuda.get_device_name(),
            "nvidia_smi": subprocess.run(query, capture_output=True, text=True).stdout,
            "commit": subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True
            ).stdout.strip(),
            "torch": torch.__version__,
            "read_bytes_per_s": limit,
            "cases": cases,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
