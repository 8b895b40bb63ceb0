"""Shape S: the 1.3 B-parameter mixture-of-experts text model every end-to-end bench runs.

Vocabulary 8192, hidden 1024, 12 layers (five sliding, one global), 16 query and 4 KV heads of 64 in
both kinds, window 512, relative extent 1024, 64 experts of width 512 (top 6) and two shared, bf16,
random weights.
"""

from functools import cache

import torch
from torch import Tensor

from tml_core.model.config import ModelConfig
from tml_core.model.weights import random_weights
from tml_core.ops._common import huge_empty

NUM_LAYERS = 12
NUM_EXPERTS = 64
TOP_K = 6
VOCAB_SIZE = 8192
TEXT_CONFIG = {
    "model_type": "inkling_text",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 1024,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "swa_num_attention_heads": 16,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 64,
    "layer_types": ["hybrid_sliding" if (i + 1) % 6 else "hybrid" for i in range(NUM_LAYERS)],
    "sliding_window_size": 512,
    "d_rel": 16,
    "rel_extent": 1024,
    "log_scaling_n_floor": 128000,
    "log_scaling_alpha": 0.1,
    "max_position_embeddings": 131072,
    "mlp_layer_types": ["sparse"] * NUM_LAYERS,
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "n_shared_experts": 2,
    "route_scale": 8.0,
    "logits_mup_width_multiplier": 16.0,
    "bos_token_id": None,
    "eos_token_id": None,
}


# One layer of each kind: what a check in fp32 can afford.
PAIR_CONFIG = TEXT_CONFIG | {
    "num_hidden_layers": 2,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "mlp_layer_types": ["sparse"] * 2,
}


def config() -> ModelConfig:
    """Shape S as our loader reads it."""
    return ModelConfig.from_dict(TEXT_CONFIG)


@cache
def _weights() -> dict[str, Tensor]:
    weights = random_weights(config(), seed=0, dtype=torch.bfloat16)
    for name, value in weights.items():
        weights[name] = huge_empty(tuple(value.shape), value.dtype).copy_(value)
    return weights


def weights() -> dict[str, Tensor]:
    """Its weights under canonical names: one set in huge-page memory for the whole run, so that
    every engine that computes on torch tensors reads them at full speed. The dict is yours."""
    return dict(_weights())


def expected_hits(num_tokens: int) -> float:
    """Distinct routed experts a step of that many tokens hits if every choice is equally likely."""
    return NUM_EXPERTS * (1 - (1 - TOP_K / NUM_EXPERTS) ** num_tokens)


def weight_bytes_per_layer(num_experts_hit: float) -> float:
    """Bytes of weights one step must read in a layer when it hits that many routed experts."""
    hidden, width, heads, kv_heads, head_dim, d_rel = 1024, 512, 16, 4, 64, 16
    attention = hidden * (2 * heads * head_dim + 2 * kv_heads * head_dim + heads * d_rel)
    experts = (num_experts_hit + 2) * 3 * hidden * width
    router = (NUM_EXPERTS + 2) * hidden
    return 2.0 * (attention + experts + router)


def head_bytes() -> float:
    """Bytes of the vocabulary head."""
    return 2.0 * VOCAB_SIZE * 1024


def kv_bytes(context_len: float) -> float:
    """Bytes of K and V one step must read there: two global layers, ten of the window."""
    per_token = 2 * 4 * 64 * 2
    return per_token * (2 * context_len + 10 * min(context_len, 512))


def random_ids(count: int, seed: int = 0) -> Tensor:
    """Token ids int64 [count]."""
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed))
