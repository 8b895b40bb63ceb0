"""The decoder on a Hopper GPU: a checkpoint's layers packed once in device memory, and their step.

Shape suffixes: T tokens of the step, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tml_core.errors import Unsupported
from tml_core.model.config import TextConfig
from tml_core.model.cuda_store import CudaKvStore, DeviceStep
from tml_core.ops import cuda
from tml_core.ops.session_attn import pack_rel_bank

__all__ = ["CudaDecoder", "require_shapes"]

_PREFIX: Final = "model.language_model."
_HEAD_DIMS: Final = (64, 128)
_MAX_ROUTED: Final = 32
_DENSE_ROWS: Final = 1024


def require_shapes(config: TextConfig) -> None:
    """Raise Unsupported, naming the setting, for a decoder that the kernels have no form of."""

    def refuse(name: str, expected: str, got: object) -> None:
        raise Unsupported(f"device: {name} must be {expected} on 'cuda', got {got}")

    if config.hidden_size % 8:
        refuse("hidden_size", "a multiple of 8", config.hidden_size)
    if config.d_rel % 2:
        refuse("d_rel", "even", config.d_rel)
    if config.top_k + config.num_shared > _MAX_ROUTED:
        refuse("top_k + shared experts", f"at most {_MAX_ROUTED}", config.top_k + config.num_shared)
    for layer in range(config.num_layers):
        if config.head_size(layer) not in _HEAD_DIMS:
            refuse(f"head_dim of layer {layer}", "64 or 128", config.head_size(layer))
        if config.heads(layer) > 64 * config.kv_heads(layer):
            refuse(f"query heads of layer {layer} to a KV head", "at most 64", config.heads(layer))


@dataclass(frozen=True)
class _Layer:
    """One layer's weights on the device. ``router`` is None in a dense layer, whose one expert
    every token takes with weight ``scale``."""

    is_sliding: bool
    pool_layer: int
    num_heads: int
    num_kv_heads: int
    rel_len: int
    top_k: int
    scale: float
    attn_norm: Tensor
    qkvr: cuda.CudaWeight
    o: cuda.CudaWeight
    k_conv: Tensor
    v_conv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    rel_bank: Tensor
    attn_sconv: Tensor
    mlp_norm: Tensor
    mlp_sconv: Tensor
    experts: cuda.CudaExperts
    router: Tensor | None
    router_bias: Tensor | None


class CudaDecoder:
    """All layers and the final norm. ``weights`` (canonical names, bf16, on the host) are consumed:
    a tensor goes to ``device``, is packed there, and is dropped.

    Raises Unsupported for shapes the kernels do not have.
    """

    def __init__(
        self, config: TextConfig, weights: dict[str, Tensor], device: torch.device
    ) -> None:
        require_shapes(config)
        self.config = config
        self.device = device
        self._final_norm = weights.pop(_PREFIX + "norm.weight").to(device).contiguous()
        self._kv_width = max(
            config.kv_heads(layer) * config.head_size(layer) for layer in range(config.num_layers)
        )
        counts = [0, 0]
        self._layers: list[_Layer] = []
        for layer in range(config.num_layers):
            is_sliding = config.layer_is_sliding[layer]
            self._layers.append(self._packed(layer, counts[is_sliding], weights))
            counts[is_sliding] += 1
        # What the router would say in dense layers. It stays where it is, as graphs read it.
        self._dense = {
            layer.scale: self._dense_rows(_DENSE_ROWS, layer.scale)
            for layer in self._layers
            if layer.router is None
        }

    def step(self, x_TD: Tensor, batch: DeviceStep, kv: CudaKvStore) -> Tensor:
        """As `Decoder.step`, of tensors on the device: x_TD [T, D] is overwritten; returns h."""
        config, eps = self.config, self.config.rms_eps
        kv_width = self._kv_width
        normed_TD = cuda.rms_norm(x_TD, self._layers[0].attn_norm, eps)
        for index, layer in enumerate(self._layers):
            is_sliding = layer.is_sliding
            pages = kv.sliding_pages if is_sliding else kv.global_pages
            table = kv.device_sliding_table if is_sliding else kv.device_global_table
            q, r = cuda.attn_prologue(
                cuda.linear(normed_TD, layer.qkvr),
                layer.k_conv,
                layer.v_conv,
                layer.q_norm,
                layer.k_norm,
                eps,
                num_heads=layer.num_heads,
                num_kv_heads=layer.num_kv_heads,
                pages=pages,
                layer=layer.pool_layer,
                table=table,
                conv_rows=kv.conv_rows,
                conv_layer=index,
                k_channel=0,
                v_channel=kv_width,
                cu_tokens=batch.cu_tokens,
                slots=batch.slots,
                start_pos=batch.start_pos,
                log_floor=0.0 if is_sliding else float(config.log_scaling_floor or 0),
                log_alpha=config.log_scaling_alpha,
            )
            o_TD = cuda.session_attn(
                q,
                r,
                layer.rel_bank,
                layer.rel_len,
                pages=pages,
                layer=layer.pool_layer,
                table=table,
                cu_tokens=batch.cu_tokens,
                slots=batch.slots,
                start_pos=batch.start_pos,
                visible_end_T=batch.visible_end,
                window=config.window if is_sliding else 0,
            )
            normed_TD = self._add(
                cuda.linear(o_TD, layer.o), x_TD, layer.attn_sconv, layer.mlp_norm,
                kv, index, 2 * kv_width, batch,
            )  # fmt: skip
            if layer.router is None or layer.router_bias is None:
                ids, weights, gammas = self._dense_routing(x_TD.shape[0], layer.scale)
            else:
                ids, weights, gammas = cuda.router(
                    normed_TD, layer.router, layer.router_bias, layer.top_k, layer.scale
                )
            is_last = index + 1 == len(self._layers)
            normed_TD = self._add(
                cuda.moe(normed_TD, ids, weights, gammas, layer.experts), x_TD, layer.mlp_sconv,
                None if is_last else self._layers[index + 1].attn_norm,
                kv, index, 2 * kv_width + config.hidden_size, batch,
            )  # fmt: skip
        return cuda.rms_norm(x_TD, self._final_norm, eps, config.mup)

    def _add(
        self,
        branch_TD: Tensor,
        x_TD: Tensor,
        conv: Tensor,
        norm: Tensor | None,
        kv: CudaKvStore,
        index: int,
        channel: int,
        batch: DeviceStep,
    ) -> Tensor:
        """x += sconv(branch); returns its norm, or x itself without one."""
        normed_TD = cuda.sconv_norm(
            branch_TD, x_TD, conv, norm, self.config.rms_eps, conv_rows=kv.conv_rows,
            conv_layer=index, channel=channel, cu_tokens=batch.cu_tokens, slots=batch.slots,
        )  # fmt: skip
        return x_TD if normed_TD is None else normed_TD

    def _dense_routing(self, num_tokens: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        if num_tokens > _DENSE_ROWS:
            return self._dense_rows(num_tokens, scale)
        ids, weights, gammas = self._dense[scale]
        return ids[:num_tokens], weights[:num_tokens], gammas[:num_tokens]

    def _dense_rows(self, num_tokens: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.zeros(num_tokens, 1, dtype=torch.int32, device=self.device)
        weights = torch.full((num_tokens, 1), scale, device=self.device)
        return ids, weights, torch.empty(num_tokens, 0, device=self.device)

    def _packed(self, layer: int, pool_layer: int, weights: dict[str, Tensor]) -> _Layer:
        config, prefix = self.config, f"{_PREFIX}layers.{layer}."

        def take(name: str) -> Tensor:
            return weights.pop(prefix + name).to(self.device).contiguous()

        def taps(name: str) -> Tensor:
            return take(name).squeeze(1).float().contiguous()

        qkvr = cuda.pack_weight(
            torch.cat([take(f"self_attn.{part}_proj.weight") for part in "qkvr"])
        )
        bank = weights.pop(prefix + "self_attn.rel_logits_proj.proj")
        is_dense = config.layer_is_dense[layer]
        return _Layer(
            is_sliding=config.layer_is_sliding[layer],
            pool_layer=pool_layer,
            num_heads=config.heads(layer),
            num_kv_heads=config.kv_heads(layer),
            rel_len=config.rel_len(layer),
            top_k=1 if is_dense else config.top_k,
            attn_norm=take("input_layernorm.weight"),
            qkvr=qkvr,
            o=cuda.pack_weight(take("self_attn.o_proj.weight")),
            k_conv=taps("self_attn.k_sconv.conv1d.weight"),
            v_conv=taps("self_attn.v_sconv.conv1d.weight"),
            q_norm=take("self_attn.q_norm.weight"),
            k_norm=take("self_attn.k_norm.weight"),
            rel_bank=pack_rel_bank(bank).data.to(self.device),
            attn_sconv=taps("attn_sconv.conv1d.weight"),
            mlp_norm=take("post_attention_layernorm.weight"),
            mlp_sconv=taps("mlp_sconv.conv1d.weight"),
            experts=self._dense_experts(take) if is_dense else self._experts(take),
            router=None if is_dense else take("mlp.gate.weight").float().contiguous(),
            router_bias=None if is_dense else take("mlp.gate.e_score_correction_bias").float(),
            scale=float(take("mlp.global_scale"))
            if is_dense
            else config.route_scale * float(take("mlp.gate.global_scale")),
        )

    def _dense_experts(self, take: Callable[[str], Tensor]) -> cuda.CudaExperts:
        gate_up = torch.cat([take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")])
        return cuda.pack_experts(gate_up[None], take("mlp.down_proj.weight")[None])

    def _experts(self, take: Callable[[str], Tensor]) -> cuda.CudaExperts:
        shared = torch.cat(
            [take("mlp.shared_experts.gate_proj"), take("mlp.shared_experts.up_proj")], dim=1
        )
        gate_up = torch.cat([take("mlp.experts.gate_up_proj"), shared])
        del shared
        down = torch.cat([take("mlp.experts.down_proj"), take("mlp.shared_experts.down_proj")])
        return cuda.pack_experts(gate_up, down, self.config.num_shared)
