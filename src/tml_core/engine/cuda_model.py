"""A model on a Hopper GPU: what of it fits, and what would."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import Tensor

from tml_core.contract import SEGMENT_LEN
from tml_core.engine.kv_budget import KvBudget, KvLimits, kv_budget, least_bytes
from tml_core.errors import OutOfDeviceMemory, Unsupported
from tml_core.model.config import ModelConfig
from tml_core.model.cuda_backbone import CudaBackbone
from tml_core.model.cuda_decoder import require_shapes
from tml_core.model.cuda_store import CudaKvStore
from tml_core.model.kv_store import kv_sizes
from tml_core.model.weights import expected_shapes
from tml_core.ops import cuda

__all__ = ["DevicePlan", "device_plan", "on_cuda", "require_cuda"]

_DTYPE: Final = torch.bfloat16
_BLOCK: Final = 64  # rows and columns of a packed block
# Attention of few tokens shares a tile's segments among blocks, each with its partial result
# (csrc/cuda/session_attn.cu), as long as two tiles find room on 132 multiprocessors.
_ATTN_TILES: Final = 66
_ATTN_THREADS: Final = 128
_SLACK_BYTES: Final = 256 << 20  # what the allocator rounds up, and the runtime's own


@dataclass(frozen=True)
class DevicePlan:
    """What a model takes of a device, in bytes.

    ``weights``, packed; ``packing``: beside them while one is packed; ``step``: of a step of
    ``max_step_tokens``; ``least_kv``: the fewest pages that the sequences need; ``asked_kv``: what
    they are to have, 0 for what is left.
    """

    free: int
    weights: int
    packing: int
    step: int
    least_kv: int
    asked_kv: int

    @property
    def for_kv(self) -> int:
        """What is left for sequences."""
        return max(0, self.free - self.weights - self.step)

    @property
    def fits(self) -> bool:
        kv = max(self.least_kv, self.asked_kv)
        return self.holds_weights and kv <= self.for_kv

    @property
    def holds_weights(self) -> bool:
        return self.weights + max(self.packing, self.step) <= self.free

    def __str__(self) -> str:
        return (
            f"{_size(self.weights)} of weights, {_size(self.packing)} more while they are packed, "
            f"{_size(self.step)} for a step and at least "
            f"{_size(max(self.least_kv, self.asked_kv))} for sequences, of {_size(self.free)} free"
        )


def device_plan(config: ModelConfig, limits: KvLimits, free_bytes: int) -> DevicePlan:
    """What a model of this configuration takes of ``free_bytes``."""
    text = config.text
    sizes = [_packed_bytes(shape) for shape in expected_shapes(config).values()]
    q_width = max(text.heads(layer) * text.head_size(layer) for layer in range(text.num_layers))
    routed = (text.top_k + text.num_shared) * (3 * text.expert_width + text.hidden_size)
    a_token = 4 * text.unpadded_vocab_size + 16 * text.hidden_size + 12 * q_width + 4 * routed
    segments = -(-limits.check(text) // SEGMENT_LEN)
    head_dim = max(text.head_size(layer) for layer in range(text.num_layers))
    partials = _ATTN_TILES * segments * _ATTN_THREADS * 4 * (head_dim // 2 + 4)
    return DevicePlan(
        free=free_bytes,
        weights=sum(sizes),
        packing=2 * max(sizes),
        step=limits.max_step_tokens * a_token + partials + _SLACK_BYTES,
        least_kv=least_bytes(text, _DTYPE, limits),
        asked_kv=limits.kv_memory_bytes or 0,
    )


def require_cuda(device: torch.device, dtype: torch.dtype) -> torch.device:
    """The device with its index. Raises Unsupported, saying why, for one that models cannot run on,
    and for another dtype than bfloat16."""
    index = torch.device(device).index or 0
    cuda.require(index)
    if dtype != _DTYPE:
        raise Unsupported(f"dtype: models on 'cuda' are bfloat16, got {dtype}; use device='cpu'")
    return torch.device("cuda", index)


def on_cuda(
    config: ModelConfig, weights: dict[str, Tensor], limits: KvLimits, device: torch.device
) -> tuple[CudaBackbone, CudaKvStore]:
    """Bring the weights, which are consumed, to the device, and make room for sequences.

    Raises OutOfDeviceMemory with what would fit, before anything is brought there if that can be
    known, and Unsupported for shapes the kernels do not have and for models that speak.
    """
    if config.interaction is not None and config.interaction.audio_out is not None:
        raise Unsupported(
            "device: models with an audio-out head run on the CPU alone; use device='cpu'"
        )
    require_shapes(config.text)
    plan = device_plan(config, limits, _free_bytes(device))
    if not plan.fits:
        raise OutOfDeviceMemory(_advice(config, limits, plan, device))
    with _told(config, limits, plan, device):
        backbone = CudaBackbone(config, weights, device)
        torch.cuda.empty_cache()  # what packing left behind
        budget = _budget(config, limits, _free_bytes(device) - plan.step)
        kv = CudaKvStore(config.text, limits.max_sequences, *budget, device=device)
    return backbone, kv


def _budget(config: ModelConfig, limits: KvLimits, free_bytes: int) -> KvBudget:
    asked = limits.kv_memory_bytes
    least = least_bytes(config.text, _DTYPE, limits)
    return kv_budget(
        config.text, _DTYPE, limits, asked or max(least, free_bytes - free_bytes // 20)
    )


@contextmanager
def _told(
    config: ModelConfig, limits: KvLimits, plan: DevicePlan, device: torch.device
) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(_advice(config, limits, plan, device)) from error


def _advice(config: ModelConfig, limits: KvLimits, plan: DevicePlan, device: torch.device) -> str:
    """What is too large, and what would fit."""
    needed = f"device: the model does not fit {device}: {plan}"
    if not plan.holds_weights:
        return f"{needed}; a smaller model would, or a device with more memory"
    one = least_bytes(config.text, _DTYPE, limits._replace(max_sequences=1))
    a_page = kv_sizes(config.text, _DTYPE).global_page_bytes
    each = one - a_page
    most = (plan.for_kv - a_page) // max(1, each)
    if most < 1:
        return f"{needed}; fewer max_step_tokens than {limits.max_step_tokens} would"
    if plan.asked_kv > plan.for_kv >= plan.least_kv:
        return f"{needed}; kv_memory_bytes={plan.for_kv} would"
    return f"{needed}; max_sequences={most} would"


def _free_bytes(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return free


def _packed_bytes(shape: tuple[int, ...]) -> int:
    if len(shape) < 2 or shape[-1] < 8:  # norms, biases, taps
        return 4 * prod(shape)
    *outer, rows, columns = shape
    return 2 * prod(outer) * _padded(rows) * _padded(columns)


def _padded(n: int) -> int:
    return -(-n // _BLOCK) * _BLOCK


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
