"""
Compiled kernels of tml_core; use tml_core.ops, which checks and documents them.
"""

from typing import Annotated

import torch


CONTRACT_VERSION: int = 1

PAGE_LEN: int = 128

SEGMENT_LEN: int = 2048

CONV_TAPS: int = 4

VOCAB_BLOCK: int = 128

PANEL: int = 32

LANES: int = 16

GRAD_BLOCK: int = 512

WITH_CUDA: bool = False

def isa() -> str:
    """
    Instruction set of the CPU kernels: scalar, avx2, avx512 or avx512bf16.
    """

def set_isa(name: str) -> None: ...

def supported_isas() -> list[str]: ...

def huge_empty(num_bytes: int) -> Annotated[torch.Tensor, dict(dtype='uint8', shape=(None,))]:
    """
    uint8 [num_bytes] in zeroed huge-page memory, committed on first touch.
    """

def num_scratch_growths() -> int:
    """
    Times kernel scratch grew since the process started; a steady state adds none.
    """

class DecoderStep:
    """Every layer of the decoder over one ragged step, in one call."""

    def __init__(self, hidden: int, window: int, d_rel: int, eps: float, mup: float, log_floor: float, log_alpha: float, final_norm: object) -> None: ...

    def add_layer(self, *, is_sliding: bool, num_heads: int, num_kv_heads: int, head_dim: int, rel_len: int, num_experts: int, num_shared: int, top_k: int, width: int, scale: float, weights: dict[str, object]) -> None: ...

    def run(self, x: object, out: object, cu_tokens: object, slots: object, start_pos: object, visible_end: object, global_pages: object, sliding_pages: object, global_table: object, sliding_table: object, conv_rows: object, num_threads: int) -> None: ...

def pack_weight(w: object, packed: object, num_threads: int) -> None: ...

def linear(x: object, weight: object, out: object, num_threads: int) -> None: ...

def linear_logp(h: object, weight: object, vocab_size: int, targets: object, logprobs: object, lse: object, entropy: object | None, num_threads: int) -> None: ...

def linear_logp_bwd(h: object, weight: object, vocab_size: int, targets: object, lse: object, entropy: object | None, d_logprobs: object, d_entropy: object | None, dh: object, dw: object, num_threads: int) -> None: ...

def linear_plain(x: object, weight: object, out: object, num_threads: int) -> None: ...

def linear_dgrad(dy: object, weight: object, out: object, num_threads: int) -> None: ...

def linear_wgrad(dy: object, x: object, out: object, num_threads: int) -> None: ...

def rms_norm_bwd(dy: object, x: object, weight: object, eps: float, divisor: float, use_gelu: bool, dx_out: object, dweight_out: object, num_threads: int) -> None: ...

def embed_bwd(dy: object, ids: object, table: object, weight: object, eps: float, dtable_out: object, dweight_out: object, num_threads: int) -> None: ...

def dmel_embed_bwd(dy: object, bins: object, table: object, num_levels: int, weight: object, eps: float, dtable_out: object, dweight_out: object, num_threads: int) -> None: ...

def sconv_norm_bwd(dnormed: object | None, dresidual: object, x: object, residual: object, conv_weight: object, norm_weight: object | None, eps: float, cu_tokens: object, dx_out: object, dresidual_out: object, dconv_out: object, dnorm_out: object | None, num_threads: int) -> None: ...

def attn_prologue_packed(qkvr: object, k_conv: object, v_conv: object, q_norm: object, k_norm: object, eps: float, log_floor: float, log_alpha: float, cu_tokens: object, q_out: object, k_out: object, v_out: object, r_out: object, num_threads: int) -> None: ...

def attn_prologue_packed_bwd(dq: object, dk: object, dv: object, dr: object, qkvr: object, k_conv: object, v_conv: object, q_norm: object, k_norm: object, eps: float, log_floor: float, log_alpha: float, cu_tokens: object, dqkvr_out: object, dk_conv_out: object, dv_conv_out: object, dq_norm_out: object, dk_norm_out: object, num_threads: int) -> None: ...

def lm_head_logprobs(h: object, weight: object, vocab_size: int, targets: object, out: object, num_threads: int) -> None: ...

def lm_head_sample(h: object, weight: object, vocab_size: int, temperature: object, top_k: object, top_p: object, seed: object, position: object, allowed: object | None, tokens: object, logprobs: object, num_threads: int) -> None: ...

def router(x: object, weight: object, bias: object, expert_ids: object, weights: object, gammas: object, logits: object | None, scale: float, num_threads: int) -> None: ...

def router_bwd(x: object, weight: object, expert_ids: object, logits: object, dweights: object, dgammas: object, dlogits: object | None, dx: object, dw: object, dscale: object, scale: float, num_threads: int) -> None: ...

def read_bytes(data: object, num_threads: int) -> int:
    """
    Read uint8 [n] once (n a multiple of 8) and return the sum of its 64-bit words mod 2^64.
    """

def dot_peak(num_steps: int, bf16: bool, num_threads: int) -> float:
    """
    Run the kernels' inner step on registers; returns the floating-point operations done.
    """

def pack_experts(gate_up: object, down: object, w13: object, w2: object, num_threads: int) -> None: ...

def moe(x: object, expert_ids: object, weights: object, gammas: object, w13: object, w2: object, width: int, out: object, gate_up: object | None, num_threads: int) -> None: ...

def moe_bwd(dy: object, x: object, expert_ids: object, weights: object, gammas: object, gate_up: object, w13: object, w2: object, dx: object | None, dx_sum: object | None, dweights: object, dgammas: object, dw13: object | None, dw2: object | None, num_threads: int) -> None: ...

def session_attn(q: object, r: object, rel_bank: object, pages: object, layer: int, table: object, cu_tokens: object, slots: object, start_pos: object | None, visible_end: object | None, window: int, scale: float, rel_len: int, out: object, lse: object | None, num_threads: int) -> None: ...

def session_attn_bwd(q: object, k: object, v: object, r: object, rel_bank: object, out: object, lse: object, d_out: object, dq: object, dk: object, dv: object, dr: object, dbank: object, cu_tokens: object, slots: object, start_pos: object | None, visible_end: object | None, window: int, scale: float, num_threads: int) -> None: ...

def attn_prologue(qkvr: object, k_conv: object, v_conv: object, q_norm: object, k_norm: object, eps: float, log_floor: float, log_alpha: float, pages: object, layer: int, table: object, conv_rows: object, conv_layer: int, k_channel: int, v_channel: int, cu_tokens: object, slots: object, start_pos: object | None, q_out: object, r_out: object, num_threads: int) -> None: ...

def embed(ids: object, table: object, weight: object, eps: float, out: object, num_threads: int) -> None: ...

def dmel_embed(bins: object, table: object, num_levels: int, weight: object, eps: float, out: object, num_threads: int) -> None: ...

def rms_norm(x: object, weight: object, eps: float, divisor: float, use_gelu: bool, out: object, num_threads: int) -> None: ...

def sconv_norm(x: object, residual: object, conv_weight: object, norm_weight: object | None, eps: float, conv_rows: object, conv_layer: int, channel: int, cu_tokens: object, slots: object, out: object | None, num_threads: int) -> None: ...
