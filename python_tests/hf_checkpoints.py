"""Tiny random Inkling models of transformers, and their checkpoints on disk in both spellings.

transformers is the oracle: `make_hf_model` gives a model to compare with, `save_hf` the directory
to load. The renaming to the hub release's names is written out here a second time, independently
of the package.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import InklingForCausalLM, InklingForConditionalGeneration
from transformers.models.inkling.configuration_inkling import InklingConfig, InklingTextConfig
from transformers.utils import logging as hf_logging

# "text", "audio" and "vision" are the keyword arguments of the sub-configs; a shape without the
# last two is a text-only InklingForCausalLM.
SHAPES: dict[str, dict[str, Any]] = {
    # Text only, a dense first layer, a padded vocabulary, log scaling within the sequence, a window
    # and a relative extent shorter than it.
    "text": {
        "text": {
            "vocab_size": 96,
            "unpadded_vocab_size": 91,
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": 7,
            "d_rel": 4,
            "rel_extent": 11,
            "log_scaling_n_floor": 5,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "intermediate_size": 80,
            "moe_intermediate_size": 24,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "logits_mup_width_multiplier": 2.0,
            "eos_token_id": 90,
        }
    },
    # All modalities; the two layer kinds differ in heads, kv heads and head width; two dense
    # layers, two shared experts, mup that is not a power of two; no log scaling.
    "mixed": {
        "text": {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "swa_num_attention_heads": 6,
            "swa_num_key_value_heads": 3,
            "swa_head_dim": 16,
            "sliding_window_size": 9,
            "d_rel": 16,
            "rel_extent": 24,
            "log_scaling_n_floor": None,
            "local_layer_ids": [0, 1, 2, 3, 4],
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse", "sparse", "sparse"],
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "route_scale": 2.5,
            "logits_mup_width_multiplier": 3.0,
            "eos_token_id": 2,
        },
        "audio": {"n_mel_bins": 6, "mel_vocab_size": 5},
        "vision": {"patch_size": 4, "n_layers": 2},
    },
    # All modalities at the released encoders' interfaces: 80 x 16 dMel, 40 x 40 patches (in one
    # layer: four would be 27 million weights); heads of 64, several pages, a window across pages.
    "paged": {
        "text": {
            "vocab_size": 320,
            "unpadded_vocab_size": 300,
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 64,
            "sliding_window_size": 150,
            "d_rel": 16,
            "rel_extent": 200,
            "log_scaling_n_floor": 100,
            "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "logits_mup_width_multiplier": 1.0,
            "eos_token_id": 299,
        },
        "audio": {"n_mel_bins": 80, "mel_vocab_size": 16},
        "vision": {"patch_size": 40, "n_layers": 1},
    },
}

IMAGE_TOKEN_ID = 3
AUDIO_TOKEN_ID = 4

HfModel = InklingForCausalLM | InklingForConditionalGeneration
HfConfig = InklingConfig | InklingTextConfig

hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()


def make_hf_model(
    shape: str, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[HfModel, HfConfig]:
    """A transformers model of ``SHAPES[shape]`` in eval mode, eager attention, random throughout.

    Every norm, scale, bias and convolution is random too, so that each shows in the logits. In
    bfloat16 the tensors that transformers keeps in float32 stay so.
    """
    spec = SHAPES[shape]
    config: HfConfig
    cls: type[HfModel]
    if "audio" in spec:
        cls = InklingForConditionalGeneration
        config = InklingConfig(
            text_config=dict(spec["text"]),
            audio_config=dict(spec["audio"]),
            vision_config=dict(spec["vision"]),
            image_token_id=IMAGE_TOKEN_ID,
            audio_token_id=AUDIO_TOKEN_ID,
            eos_token_id=spec["text"]["eos_token_id"],
        )
    else:
        cls = InklingForCausalLM
        config = InklingTextConfig(**spec["text"])
    model = cls._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            mean, std = _scale(name, value)
            value.copy_(torch.randn(value.shape, generator=generator) * std + mean)
        if dtype != torch.float32:
            for name, parameter in model.named_parameters():
                if "sconv" not in name and "gate.global_scale" not in name:
                    parameter.data = parameter.data.to(dtype)
    return model.eval(), config


def save_hf(
    model: HfModel,
    directory: str | Path,
    spelling: str = "transformers",
    shards: int = 1,
    has_index: bool = True,
) -> Path:
    """Write ``config.json`` and safetensors of ``model``; returns the directory.

    ``spelling``: "transformers", or "hub" for the release's config keys and tensor names (not for
    text-only models). With several ``shards`` an index lists them unless ``has_index`` is False.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    if spelling == "hub":
        config = hub_config(model.config)
        tensors = hub_tensors(tensors)
    else:
        config = model.config.to_dict()
    (directory / "config.json").write_text(json.dumps(config, default=str))
    write_safetensors(tensors, directory, shards, has_index)
    return directory


def write_safetensors(
    tensors: dict[str, Tensor], directory: Path, shards: int = 1, has_index: bool = True
) -> None:
    """Write ``tensors`` as one ``model.safetensors``, or dealt out over ``shards`` files."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if has_index:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


# Keys of the text config that both spellings share.
_SAME_TEXT_KEYS = (
    *("hidden_size", "num_hidden_layers", "vocab_size", "unpadded_vocab_size", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "d_rel", "rel_extent"),
    *("swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "sliding_window_size"),
    *("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "route_scale"),
    *("log_scaling_n_floor", "log_scaling_alpha", "logits_mup_width_multiplier"),
)


def hub_config(config: HfConfig) -> dict[str, Any]:
    """The keys and values a hub release would write for ``config``."""
    text, audio, vision = config.text_config, config.audio_config, config.vision_config
    sliding = [i for i, kind in enumerate(text.layer_types) if kind == "hybrid_sliding"]
    return {
        "architectures": ["InklingForConditionalGeneration"],
        "model_type": "inkling_mm_model",
        "eos_token_id": text.eos_token_id,
        "image_token_id": config.image_token_id,
        "audio_token_id": config.audio_token_id,
        "text_config": {
            **{key: getattr(text, key) for key in _SAME_TEXT_KEYS},
            "model_max_length": text.max_position_embeddings,
            "torch_dtype": "bfloat16",
            "q_bias": False,
            "o_bias": False,
            "use_embed_norm": True,
            "local_layer_ids": sliding,
            "dense_mlp_idx": text.mlp_layer_types.count("dense"),
            "use_sconv": True,
            "sconv_kernel_size": 4,
            "final_logit_softcapping": None,
            "shared_expert_sink": True,
            "dense_intermediate_size": text.intermediate_size,
            "intermediate_size": text.moe_intermediate_size,
            "use_gate_bias": True,
            "gate_activation": "sigmoid",
            "norm_after_topk": True,
            "use_global_scale": True,
        },
        "audio_config": {
            "decoder_dmodel": text.hidden_size,
            "n_mel_bins": audio.n_mel_bins,
            "mel_vocab_size": audio.mel_vocab_size,
            "bias": False,
            "dmel_min_value": -7.0,
            "dmel_max_value": 2.0,
            "use_audio_norm": True,
            "audio_mode": "dmel",
        },
        "vision_config": {
            "vision_encoder_type": "hmlp",
            "decoder_dmodel": text.hidden_size,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "n_channels": vision.num_channels,
            "n_layers": vision.num_hidden_layers,
            "use_vision_norm": True,
        },
        "mtp_config": {"num_nextn_predict_layers": 8, "local_layer_ids": [0, 2, 4, 5, 6, 7]},
    }


def hub_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under transformers names, as a hub release stores them."""
    out = {}
    for name, value in tensors.items():
        if name.endswith(("mlp.up_proj.weight", "shared_experts.up_proj")):
            continue
        if name.endswith("mlp.gate_proj.weight"):
            value = _interleave(value, tensors[name.replace("gate_proj", "up_proj")], 0)
        elif name.endswith("shared_experts.gate_proj"):
            value = _interleave(value, tensors[name.replace("gate_proj", "up_proj")], 1)
        elif name.endswith("experts.gate_up_proj"):
            value = _interleave(*value.chunk(2, dim=1), 1)
        out[_hub_name(name)] = value
    return out


def _interleave(gate: Tensor, up: Tensor, dim: int) -> Tensor:
    return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1).contiguous()


# Replaced in this order, first match of a pair only where it stands.
_TO_HUB = (
    ("model.language_model.embed_tokens.embed_norm.", "model.llm.embed_norm."),
    ("model.language_model.embed_tokens.", "model.llm.embed."),
    ("model.language_model.", "model.llm."),
    ("lm_head.", "model.llm.unembed."),
    ("model.audio_tower.embed_audio_tokens.embed_audio_tokens.", "model.audio.encoder."),
    ("model.audio_tower.norm.", "model.audio.final_norm."),
    ("model.vision_tower.final_norm.", "model.visual.final_norm."),
    ("sconv.conv1d.weight", "sconv.weight"),
    ("input_layernorm.", "attn_norm."),
    ("post_attention_layernorm.", "mlp_norm."),
    ("self_attn.q_proj.", "attn.wq_du."),
    ("self_attn.k_proj.", "attn.wk_dv."),
    ("self_attn.v_proj.", "attn.wv_dv."),
    ("self_attn.r_proj.", "attn.wr_du."),
    ("self_attn.o_proj.", "attn.wo_ud."),
    ("self_attn.", "attn."),
    ("shared_experts.gate_proj", "shared_experts.shared_w13_weight"),
    ("shared_experts.down_proj", "shared_experts.shared_w2_weight"),
    ("mlp.experts.gate_up_proj", "mlp.experts.w13_weight"),
    ("mlp.experts.down_proj", "mlp.experts.w2_weight"),
    ("mlp.gate_proj.", "mlp.w13_dn."),
    ("mlp.down_proj.", "mlp.w2_md."),
    ("gate.e_score_correction_bias", "gate.bias"),
)


def _hub_name(name: str) -> str:
    if name.startswith("model.vision_tower.encoder_layers."):
        index, part = name.split(".")[3:5]
        kind = {"projection": "linear", "layer_norm": "norm"}[part]
        return f"model.visual.layers.{kind}_{index}.weight"
    for ours, hub in _TO_HUB:
        name = name.replace(ours, hub)
    return name


def _scale(name: str, value: Tensor) -> tuple[float, float]:
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return len(value) ** 0.25, 0.3
    if name.endswith("norm.weight"):
        return 1.0, 0.2
    if name.endswith("gate.global_scale"):
        return 0.4, 0.1
    if name.endswith("global_scale"):
        return 1.0, 0.2
    if name.endswith("e_score_correction_bias"):
        return 0.0, 0.2
    if name.endswith("conv1d.weight"):
        return 0.0, 0.3
    if name.endswith("embed_tokens.weight"):
        return 0.0, 1.0
    if name.endswith("lm_head.weight"):
        return 0.0, 8.0 / math.sqrt(value.shape[1])
    if name.endswith("rel_logits_proj.proj"):
        return 0.0, 0.5
    return 0.0, 1.0 / math.sqrt(value.shape[-1])
