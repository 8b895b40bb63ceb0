"""The decoder: packs a checkpoint's layers once and runs all of them over a ragged step.

Shape suffixes: T tokens of the step, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.errors import InvalidArgument
from tml_core.model.config import TextConfig
from tml_core.model.kv_store import KvStore
from tml_core.model.step_batch import StepBatch
from tml_core.ops._common import num_threads, refuse_grad
from tml_core.ops.linear import pack_weight
from tml_core.ops.moe import PackedExperts, pack_experts
from tml_core.ops.session_attn import pack_rel_bank

__all__ = ["Decoder"]

_PREFIX = "model.language_model."


class Decoder:
    """All layers and the final norm, in the layout the kernels stream.

    ``weights`` holds canonical names (see weights.py) and is consumed: each tensor is dropped once
    it is packed, so that two copies of a large model never stand side by side. ``handle``: the same
    for the extension.
    """

    def __init__(self, config: TextConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.handle = _ext.DecoderStep(
            hidden=config.hidden_size,
            window=config.window,
            d_rel=config.d_rel,
            eps=config.rms_eps,
            mup=config.mup,
            log_floor=float(config.log_scaling_floor or 0),
            log_alpha=config.log_scaling_alpha,
            final_norm=weights.pop(_PREFIX + "norm.weight"),
        )
        for layer in range(config.num_layers):
            self._add_layer(layer, weights)

    def step(
        self, x_TD: Tensor, batch: StepBatch, kv: KvStore, *, out_TD: Tensor | None = None
    ) -> Tensor:
        """Run the step's tokens through every layer.

        x_TD: embeddings [T, D] of the model dtype, overwritten. K, V and convolution rows of the
        batch's sequences are written in place in ``kv``. Returns h [T, D]: the final norm of the
        hidden states over mup, what the vocabulary head takes; in ``out_TD`` if given.
        """
        refuse_grad("decoder_step", x=x_TD)
        if x_TD.shape != (batch.num_tokens, self.config.hidden_size):
            raise InvalidArgument(
                f"decoder_step: x must be [{batch.num_tokens}, {self.config.hidden_size}], "
                f"got {list(x_TD.shape)}"
            )
        h_TD = torch.empty_like(x_TD) if out_TD is None else out_TD
        self.handle.run(
            x_TD,
            h_TD,
            batch.cu_tokens,
            batch.slots,
            batch.start_pos,
            batch.visible_end,
            kv.global_pages,
            kv.sliding_pages,
            kv.global_table,
            kv.sliding_table,
            kv.conv_rows,
            num_threads(),
        )
        return h_TD

    def _add_layer(self, layer: int, weights: dict[str, Tensor]) -> None:
        config, prefix = self.config, f"{_PREFIX}layers.{layer}."

        def take(name: str) -> Tensor:
            return weights.pop(prefix + name).contiguous()

        def taps(name: str) -> Tensor:
            return take(name).squeeze(1).float().contiguous()

        parts = [take(f"self_attn.{part}_proj.weight") for part in "qkvr"]
        packed: dict[str, object] = {
            "attn_norm": take("input_layernorm.weight"),
            "qkvr": pack_weight(torch.cat(parts)).data,
            "o": pack_weight(take("self_attn.o_proj.weight")).data,
            "k_conv": taps("self_attn.k_sconv.conv1d.weight"),
            "v_conv": taps("self_attn.v_sconv.conv1d.weight"),
            "q_norm": take("self_attn.q_norm.weight"),
            "k_norm": take("self_attn.k_norm.weight"),
            "rel_bank": pack_rel_bank(take("self_attn.rel_logits_proj.proj")).data,
            "attn_sconv": taps("attn_sconv.conv1d.weight"),
            "mlp_norm": take("post_attention_layernorm.weight"),
            "mlp_sconv": taps("mlp_sconv.conv1d.weight"),
        }
        del parts
        if config.layer_is_dense[layer]:
            experts, routing = self._dense(take)
        else:
            experts, routing = self._sparse(take, packed)
        packed["w13"], packed["w2"] = experts.w13, experts.w2
        self.handle.add_layer(
            is_sliding=config.layer_is_sliding[layer],
            num_heads=config.heads(layer),
            num_kv_heads=config.kv_heads(layer),
            head_dim=config.head_size(layer),
            rel_len=config.rel_len(layer),
            num_shared=experts.num_shared,
            width=experts.width,
            weights=packed,
            **routing,
        )

    def _dense(self, take: Any) -> tuple[PackedExperts, dict[str, Any]]:
        gate_up = torch.cat([take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")])
        experts = pack_experts(gate_up[None], take("mlp.down_proj.weight")[None])
        scale = float(take("mlp.global_scale"))
        return experts, {"num_experts": 1, "top_k": 1, "scale": scale}

    def _sparse(self, take: Any, packed: dict[str, object]) -> tuple[PackedExperts, dict[str, Any]]:
        config = self.config
        shared = torch.cat(
            [take("mlp.shared_experts.gate_proj"), take("mlp.shared_experts.up_proj")], dim=1
        )
        gate_up = torch.cat([take("mlp.experts.gate_up_proj"), shared])
        down = torch.cat([take("mlp.experts.down_proj"), take("mlp.shared_experts.down_proj")])
        experts = pack_experts(gate_up, down, num_shared=config.num_shared)
        packed["router"] = pack_weight(take("mlp.gate.weight").float()).data
        packed["router_bias"] = take("mlp.gate.e_score_correction_bias").float()
        scale = config.route_scale * float(take("mlp.gate.global_scale"))
        return experts, {"num_experts": config.num_experts, "top_k": config.top_k, "scale": scale}
