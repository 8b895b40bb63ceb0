"""A whole step of a large model on a GPU, as the engine makes it: `make gpu-bench`.

    python bench/gpu_step.py [--json PATH] [--layers N]

The model has the sizes of a 30B-A3B mixture (48 layers, 128 experts; 7 of them and a shared one a
token) and random weights, drawn on the device. A step is embeddings, all layers and a draw for each
sequence, with ids from the host and back. Two times: what the device needs (events around the
steps), and what a step takes with all the host does; the median of the steps counts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tml_core.contract import PAGE_LEN
from tml_core.model.config import ModelConfig
from tml_core.model.cuda_backbone import CudaBackbone
from tml_core.model.cuda_store import CudaKvStore
from tml_core.model.step_batch import StepBatch
from tml_core.model.weights import expected_shapes
from tml_core.ops import cuda
from tml_core.ops.lm_head import SampleRows

STEPS = 20
CASES = [(1, 1, 8192), (1, 16, 8192), (16, 1, 8192), (1, 1, 32768)]  # sequences, tokens each, keys


def large_config(num_layers: int) -> ModelConfig:
    """An Inkling of the sizes of a 30B-A3B mixture, every layer global."""
    text = {
        "model_type": "inkling_text",
        "vocab_size": 151936,
        "unpadded_vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "swa_num_attention_heads": 32,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 128,
        "sliding_window_size": 512,
        "d_rel": 16,
        "rel_extent": 1024,
        "log_scaling_n_floor": None,
        "log_scaling_alpha": 0.1,
        "layer_types": ["hybrid"] * num_layers,
        "mlp_layer_types": ["sparse"] * num_layers,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "n_routed_experts": 128,
        "num_experts_per_tok": 7,
        "n_shared_experts": 1,
        "route_scale": 1.0,
        "logits_mup_width_multiplier": 1.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1 << 20,
        "conv_kernel_size": 4,
        "hidden_act": "silu",
        "eos_token_id": 0,
    }
    return ModelConfig.from_dict(
        {"architectures": ["InklingForCausalLM"], **text, "model_type": "inkling_text"}
    )


class DrawnWeights(dict[str, Tensor]):
    """A checkpoint of random numbers: each tensor is drawn when it is taken. It looks empty."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        self._shapes = expected_shapes(config)
        self._device = device

    def pop(self, name: str, *_: Any) -> Tensor:  # type: ignore[override]
        shape = self._shapes[name]
        return torch.randn(shape, dtype=torch.bfloat16, device=self._device).mul_(0.05)


class Steps:
    """Sequences of ``num_keys`` positions each (of random K and V), and steps at their tips."""

    def __init__(
        self,
        backbone: CudaBackbone,
        num_seqs: int,
        num_tokens: int,
        num_keys: int,
        store: type[CudaKvStore] = CudaKvStore,
    ) -> None:
        self._backbone = backbone
        pages = -(-(num_keys + num_tokens) // PAGE_LEN)
        text = backbone.config.text
        self._kv = store(
            text, num_seqs, pages * PAGE_LEN, pages * num_seqs, 1, device=backbone.device
        )
        self._kv.global_pages.normal_()
        self._kv.conv_rows.zero_()
        self._kv.global_table[:] = torch.randperm(pages * num_seqs).int().view(num_seqs, pages)
        self._batch = StepBatch(num_seqs, num_seqs * num_tokens)
        for slot in range(num_seqs):
            self._batch.add(slot, num_keys, num_tokens)
        self._ids = torch.randint(0, backbone.vocab_size, (num_seqs * num_tokens,))
        self._last = torch.arange(num_seqs) * num_tokens + num_tokens - 1
        self._rows = SampleRows(
            temperature_B=torch.ones(num_seqs),
            top_k_B=torch.zeros(num_seqs, dtype=torch.int32),
            top_p_B=torch.ones(num_seqs),
            seed_B=torch.arange(num_seqs),
            position_B=torch.arange(num_seqs),
        )

    def run(self) -> Tensor:
        """The same step once more; returns the ids drawn, on the host."""
        x_TD = self._backbone.embed_ids(self._ids)
        h_TD = self._backbone.step(x_TD, self._batch, self._kv)
        h_BD = h_TD[self._last.to(h_TD.device)]
        return self._backbone.sample(h_BD, self._rows)[0]


def measured(steps: Steps) -> dict[str, float]:
    """Milliseconds of a step: on the device, and in all."""
    for _ in range(5):  # the graph is captured here
        steps.run()
    device_ms, wall_ms = [], []
    for _ in range(STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin_s = time.perf_counter()
        start.record()
        steps.run()
        end.record()
        wall_ms.append((time.perf_counter() - begin_s) * 1000)
        end.synchronize()
        device_ms.append(start.elapsed_time(end))
    return {"device_ms": statistics.median(device_ms), "wall_ms": statistics.median(wall_ms)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    args = parser.parse_args()
    if why := cuda.problem():
        print(f"gpu_step: needs an H100 or H200: {why}", file=sys.stderr)
        return 3
    torch.manual_seed(1)
    device = torch.device("cuda", 0)
    config = large_config(args.layers)
    cases = []
    with torch.no_grad():
        backbone = CudaBackbone(config, DrawnWeights(config, device), device)
        torch.cuda.empty_cache()
        for num_seqs, num_tokens, num_keys in CASES:
            name = f"{num_seqs} sequences, {num_tokens} tokens each, {num_keys} keys"
            times = measured(Steps(backbone, num_seqs, num_tokens, num_keys))
            print(f"{name}: {times['device_ms']:.2f} ms, {times['wall_ms']:.2f} ms with the host")
            cases.append({"case": name, **times})
            torch.cuda.empty_cache()
    if args.json is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        report = {
            "device": torch.cuda.get_device_name(),
            "layers": args.layers,
            "commit": commit.stdout.strip(),
            "torch": torch.__version__,
            "cases": cases,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
