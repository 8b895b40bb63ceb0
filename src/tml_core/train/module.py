"""The model a trainer differentiates; its forward has the bits of serving.

Legend: T positions of all sequences, N text positions, A blocks of own sound, D hidden size, J gate
and up rows of an MLP, I its inner width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tml_core.errors import InvalidArgument
from tml_core.model.config import ENCODER_NORM_EPS, ModelConfig
from tml_core.model.flow import SELF_EMBED, flow_weights, own_table
from tml_core.model.weights import expected_shapes, is_kept_fp32
from tml_core.ops.hmlp import HmlpWeights
from tml_core.ops.linear import linear
from tml_core.train.flow_loss import flow_loss
from tml_core.train.op_set import KERNELS, OpSet
from tml_core.train.packing import PackedBatch

__all__ = ["ModelOutput", "TrainableModel"]

# Chosen by counting visits, not by a gradient.
_BIAS = ".gate.e_score_correction_bias"


class ModelOutput(NamedTuple):
    """What one pass over a batch gives.

    ``logprobs``: of the targets, float32 [T], 0 where there is none. ``entropy``: of each
    prediction in nats, float32 [T], if asked for. ``expert_ids``: int32 [T, top_k] for each layer
    of `TrainableModel.sparse_layers`. ``flow_losses``: of the blocks of own sound, float32 [A], if
    asked for. ``loss``: minus the weighted sum of ``logprobs``, float32 [], if weights were given;
    then it alone is differentiable, not the log-probabilities.
    """

    logprobs: Tensor
    entropy: Tensor | None
    expert_ids: tuple[Tensor, ...]
    flow_losses: Tensor | None = None
    loss: Tensor | None = None


class TrainableModel(nn.Module):
    """All weights as parameters under their canonical names, and log-probabilities of targets.

    ``weights``: canonical names of ``expected_shapes(config)``, float32 or bfloat16; they become
    parameters as they are (a copy), so float32 ones are masters of a bfloat16 model. ``dtype``:
    of the model that is trained and served; the forward rounds parameters to it, but for those of
    `is_kept_fp32`, which must be float32. The routers' choice biases are buffers. ``recompute``:
    keep only the input of each layer, and run the layer again in the backward pass (the same bits
    for less memory and more time). ``ops``: what computes it.

    ``state_dict`` has the canonical names; `serving_weights` is what a backbone or `save_weights`
    takes. Forward and gradients run in the kernels on a CPU, in plain torch elsewhere.
    Raises InvalidArgument naming a tensor that is missing, unexpected, misshapen or of another
    dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        *,
        recompute: bool = False,
        ops: OpSet = KERNELS,
    ) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16):
            raise InvalidArgument(f"dtype: expected float32 or bfloat16, got {dtype}")
        self.config = config
        self.dtype = dtype
        self.recompute = recompute
        self._ops = ops
        vision = config.vision
        self._vision_layers = () if vision is None else vision.layers(config.text.hidden_size)
        shapes = expected_shapes(config)
        for name in sorted(set(shapes) ^ set(weights)):
            what = "is missing" if name in shapes else "is not part of this model"
            raise InvalidArgument(f"weights: {name} {what}")
        for name, shape in shapes.items():
            value = weights[name]
            allowed = {torch.float32} if is_kept_fp32(name) else {torch.float32, dtype}
            if tuple(value.shape) != shape or value.dtype not in allowed:
                kinds = " or ".join(sorted(str(one).removeprefix("torch.") for one in allowed))
                raise InvalidArgument(
                    f"weights: {name} must be {kinds} {list(shape)}, "
                    f"got {value.dtype} {list(value.shape)}"
                )
            _register(self, name, value.detach().clone(memory_format=torch.contiguous_format))

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers with a router, in order."""
        return tuple(i for i, dense in enumerate(self.config.text.layer_is_dense) if not dense)

    def router_bias(self, layer: int) -> Tensor:
        """float32 [E], the buffer that decides which experts ``layer`` chooses."""
        return self._layer(layer, "mlp.gate.e_score_correction_bias")

    def serving_weights(self) -> dict[str, Tensor]:
        """A copy of the weights as they are served: in ``dtype`` but for those kept in float32."""
        return {
            name: value.detach().to(torch.float32 if is_kept_fp32(name) else self.dtype, copy=True)
            for name, value in self.state_dict().items()
        }

    @overload
    def forward(self, batch: PackedBatch) -> Tensor: ...
    @overload
    def forward(
        self, batch: PackedBatch, *, with_entropy: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, batch: PackedBatch, *, with_entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities of ``batch.targets``, float32 [T]; 0 where there is no target.

        ``with_entropy`` adds the entropy of each position's prediction in nats, float32 [T], 0
        where there is no target. Differentiable in every parameter. The bits are those that
        serving computes for the same sequences, whatever else is in the batch.
        """
        out = self.run(batch, with_entropy=with_entropy)
        return out.logprobs if out.entropy is None else (out.logprobs, out.entropy)

    def run(
        self,
        batch: PackedBatch,
        *,
        with_entropy: bool = False,
        weights: Tensor | None = None,
        flow_seed: int | None = None,
    ) -> ModelOutput:
        """The forward pass with the experts it chose, which load balancing counts.

        ``weights``: float32 [T], of each target in ``loss``, which costs less to differentiate than
        the log-probabilities. Not together with ``with_entropy``.
        ``flow_seed``: of the noise and times of `flow_loss` for each block of own sound in the
        batch; another for every batch of every step. Without it these losses are left out.
        """
        if with_entropy and weights is not None:
            raise InvalidArgument("weights: expected none where the entropy is asked for")
        h_TD, expert_ids = self._decode(batch)
        head, vocab_size = self._get("lm_head.weight"), self.config.text.unpadded_vocab_size
        loss = entropy_T = None
        if weights is None:
            logprobs_T, entropy_T = self._ops.linear_logp(
                h_TD, head, batch.targets, vocab_size, with_entropy
            )
        else:
            loss, logprobs_T = self._ops.linear_nll(h_TD, head, batch.targets, weights, vocab_size)
        flow_losses_A = None if flow_seed is None else self._flow_losses(h_TD, batch, flow_seed)
        return ModelOutput(logprobs_T, entropy_T, expert_ids, flow_losses_A, loss)

    def _flow_losses(self, h_TD: Tensor, batch: PackedBatch, seed: int) -> Tensor:
        interaction = self.config.interaction
        if interaction is None or interaction.audio_out is None:
            raise InvalidArgument("flow_seed: this model has no audio-out head")
        head = interaction.audio_out
        return flow_loss(
            head,
            flow_weights(head, self._get, is_packed=False),
            h_TD.index_select(0, batch.own_after),
            batch.own_mel,
            batch.own_before,
            seed=seed,
            draw_ids=range(batch.num_blocks),
        )

    def hidden(self, batch: PackedBatch) -> Tensor:
        """What the vocabulary head takes: [T, D] in ``dtype``, after the final norm over mup."""
        return self._decode(batch)[0]

    def _decode(self, batch: PackedBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        text = self.config.text
        x_TD = self._embed(batch)
        normed_TD = self._ops.rms_norm(x_TD, self._layer(0, "input_layernorm.weight"), text.rms_eps)
        use_checkpoint = self.recompute and torch.is_grad_enabled()
        expert_ids = []
        for layer in range(text.num_layers):
            if use_checkpoint:
                x_TD, normed_TD, ids_Tk = checkpoint(
                    self._run_layer,
                    layer,
                    x_TD,
                    normed_TD,
                    batch,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x_TD, normed_TD, ids_Tk = self._run_layer(layer, x_TD, normed_TD, batch)
            if ids_Tk is not None:
                expert_ids.append(ids_Tk)
        norm_D = self._get("model.language_model.norm.weight")
        h_TD = self._ops.rms_norm(x_TD, norm_D, text.rms_eps, divisor=text.mup)
        return h_TD, tuple(expert_ids)

    def _run_layer(
        self, layer: int, x_TD: Tensor, normed_TD: Tensor, batch: PackedBatch
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The residual stream after ``layer``, its norm for the next one, and the experts chosen.

        After the last layer the residual stream stands in for its norm.
        """
        text = self.config.text
        branch_TD = self._attention(layer, normed_TD, batch)
        normed_TD, x_TD = self._ops.sconv_norm(
            branch_TD,
            x_TD,
            self._taps(layer, "attn_sconv"),
            self._layer(layer, "post_attention_layernorm.weight"),
            text.rms_eps,
            batch.cu_tokens,
        )
        if text.layer_is_dense[layer]:
            branch_TD, ids_Tk = self._dense(layer, normed_TD), None
        else:
            branch_TD, ids_Tk = self._sparse(layer, normed_TD)
        is_last = layer + 1 == text.num_layers
        normed, x_TD = self._ops.sconv_norm(
            branch_TD,
            x_TD,
            self._taps(layer, "mlp_sconv"),
            None if is_last else self._layer(layer + 1, "input_layernorm.weight"),
            text.rms_eps,
            batch.cu_tokens,
        )
        return x_TD, x_TD if normed is None else normed, ids_Tk

    def _embed(self, batch: PackedBatch) -> Tensor:
        config = self.config
        table = "model.language_model.embed_tokens."
        text_ND: Tensor = self._ops.embed(
            batch.token_ids,
            self._get(table + "weight"),
            self._get(table + "embed_norm.weight"),
            config.text.rms_eps,
        )
        parts = [text_ND]
        if config.audio is not None and len(batch.bins):
            parts.append(self._embed_levels(batch.bins, config.audio.num_levels, is_own=False))
        if self._vision_layers and len(batch.patches):
            parts.append(self._ops.hmlp(batch.patches, self._hmlp_weights()))
        if config.audio is not None and batch.num_blocks:
            parts.append(self._embed_levels(batch.own_bins, config.audio.num_levels, is_own=True))
        return text_ND if len(parts) == 1 else torch.cat(parts).index_select(0, batch.order)

    def _embed_levels(self, bins_FC: Tensor, num_levels: int, *, is_own: bool) -> Tensor:
        audio = "model.audio_tower."
        table = self._get(audio + "embed_audio_tokens.embed_audio_tokens.weight")
        if is_own:
            table = own_table(table, self._get(SELF_EMBED), num_levels)
        norm_D = self._get(audio + "norm.weight")
        x_FD: Tensor = self._ops.dmel_embed(bins_FC, table, num_levels, norm_D, ENCODER_NORM_EPS)
        return x_FD

    def _hmlp_weights(self) -> HmlpWeights:
        layers = self._vision_layers
        vision = "model.vision_tower."
        names = [f"{vision}encoder_layers.{index}." for index in range(len(layers))]
        return HmlpWeights(
            folds=tuple((layer.t_fold, layer.hw_fold) for layer in layers),
            projections=tuple(self._get(name + "projection.weight") for name in names),
            norms=tuple(
                self._get(name + "layer_norm.weight")
                for name, layer in zip(names, layers, strict=True)
                if layer.has_norm
            ),
            final_norm=self._get(vision + "final_norm.weight"),
            eps=ENCODER_NORM_EPS,
        )

    def _attention(self, layer: int, x_TD: Tensor, batch: PackedBatch) -> Tensor:
        text, is_sliding = self.config.text, self.config.text.layer_is_sliding[layer]
        parts = [self._layer(layer, f"self_attn.{part}_proj.weight") for part in "qkvr"]
        q, k, v, r = self._ops.attn_prologue(
            self._ops.linear(x_TD, torch.cat(parts)),
            text.heads(layer),
            k_conv_C4=self._taps(layer, "self_attn.k_sconv"),
            v_conv_C4=self._taps(layer, "self_attn.v_sconv"),
            q_norm_D=self._layer(layer, "self_attn.q_norm.weight"),
            k_norm_D=self._layer(layer, "self_attn.k_norm.weight"),
            eps=text.rms_eps,
            log_floor=0.0 if is_sliding else float(text.log_scaling_floor or 0),
            log_alpha=text.log_scaling_alpha,
            cu_tokens=batch.cu_tokens,
        )
        attended, _ = self._ops.session_attn(
            q,
            k,
            v,
            r,
            self._layer(layer, "self_attn.rel_logits_proj.proj"),
            cu_tokens=batch.cu_tokens,
            visible_end_T=batch.visible_end,
            window=text.window if is_sliding else 0,
        )
        out_TD: Tensor = self._ops.linear(attended, self._layer(layer, "self_attn.o_proj.weight"))
        return out_TD

    def _dense(self, layer: int, x_TD: Tensor) -> Tensor:
        """One expert for every token, weighed by the layer's scale."""
        gate_JD, up_JD, down_DI = (
            self._layer(layer, f"mlp.{part}_proj.weight") for part in ("gate", "up", "down")
        )
        scale = self._layer(layer, "mlp.global_scale").float()
        ids_T1 = torch.zeros(len(x_TD), 1, dtype=torch.int32, device=x_TD.device)
        gammas_T0 = torch.empty(len(x_TD), 0, device=x_TD.device)
        gate_up_1JD = torch.cat([gate_JD, up_JD])[None]
        y_TD: Tensor = self._ops.moe(
            x_TD, ids_T1, _repeat(scale, len(x_TD)), gammas_T0, gate_up_1JD, down_DI[None]
        )
        return y_TD

    def _sparse(self, layer: int, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The experts' sum, and who they were: int32 [T, top_k]."""
        text = self.config.text
        scale = self._layer(layer, "mlp.gate.global_scale")
        routing = self._ops.router(
            x_TD,
            self._layer(layer, "mlp.gate.weight").float(),
            self.router_bias(layer),
            top_k=text.top_k,
            # Serving rounds the product of both once.
            scale=(text.route_scale * scale.double()).float(),
        )
        gate, up, down = (
            self._layer(layer, f"mlp.shared_experts.{part}_proj") for part in ("gate", "up", "down")
        )
        y_TD: Tensor = self._ops.moe(
            x_TD,
            routing.expert_ids,
            routing.weights,
            routing.gammas,
            torch.cat(
                [self._layer(layer, "mlp.experts.gate_up_proj"), torch.cat([gate, up], dim=1)]
            ),
            torch.cat([self._layer(layer, "mlp.experts.down_proj"), down]),
        )
        return y_TD, routing.expert_ids

    def _layer(self, layer: int, name: str) -> Tensor:
        return self._get(f"model.language_model.layers.{layer}.{name}")

    def _taps(self, layer: int, name: str) -> Tensor:
        """[C, 4] of a short convolution, oldest tap first."""
        return self._layer(layer, f"{name}.conv1d.weight").squeeze(1)

    def _get(self, name: str) -> Tensor:
        """The weight ``name`` as the forward uses it."""
        node: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            node = getattr(node, part)
        value: Tensor = getattr(node, leaf)
        return value if is_kept_fp32(name) else value.to(self.dtype)


def _register(root: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` where the dots of ``name`` say."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if name.endswith(_BIAS):
        root.register_buffer(leaf, value)
    else:
        root.register_parameter(leaf, nn.Parameter(value))


def _repeat(scale_1: Tensor, count: int) -> Tensor:
    """[count, 1] of one number. A product, so that its gradient is summed in a fixed order."""
    ones_T1 = torch.ones(count, 1, dtype=scale_1.dtype, device=scale_1.device)
    return linear(ones_T1, scale_1[:, None])
