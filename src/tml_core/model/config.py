"""Model configuration: ``config.json`` of an Inkling checkpoint, normalised and validated.

Two spellings of the same architecture are read: the one transformers writes and the one the hub
releases use. Whatever could change the forward pass is either read, or required to have the one
value this package implements, or refused by name; a missing key on whose default the published
implementations disagree is an error, not a guess.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from tml_core.contract import CONV_TAPS
from tml_core.errors import CheckpointError, InvalidArgument
from tml_core.model.audio_out_config import (
    AudioOutConfig,
    audio_out_to_dict,
    read_audio_out,
)
from tml_core.model.config_block import (
    IGNORED_KEYS,
    IGNORED_TEXT_KEYS,
    IGNORED_VISION_KEYS,
    REQUIRED,
    Block,
    refuse,
)
from tml_core.model.hmlp_plan import HmlpLayer, plan_hmlp

__all__ = [
    "CONTROL_TOKEN_NAMES",
    "ENCODER_NORM_EPS",
    "AudioConfig",
    "AudioOutConfig",
    "ControlTokens",
    "HmlpLayer",
    "InteractionConfig",
    "ModelConfig",
    "TextConfig",
    "VisionConfig",
    "bundled_path",
]

# The encoders' norms have this epsilon in every implementation, whatever the config says.
ENCODER_NORM_EPS: Final = 1e-6

LAYOUT_VERSION: Final = 1
TICK_MS: Final = 200

# How a tokenizer spells the control tokens of micro-turn layout v1.
CONTROL_TOKEN_NAMES: Final[Mapping[str, str]] = {
    "tick": "<|tick|>",
    "out": "<|out|>",
    "end_out": "<|/out|>",
    "silence": "<|silence|>",
    "say": "<|say|>",
    "call": "<|call|>",
    "end_call": "<|/call|>",
}


@dataclass(frozen=True)
class TextConfig:
    """The decoder. Global and sliding (``swa_``) layers have their own head counts and widths.

    ``dense_width`` and ``expert_width`` are the inner widths of a dense layer's MLP and of one
    expert; ``mup`` divides the final hidden state; the query scale of global layers grows with
    ``log(position / log_scaling_floor)`` unless that is None.
    """

    vocab_size: int
    unpadded_vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    swa_num_heads: int
    swa_num_kv_heads: int
    swa_head_dim: int
    window: int
    d_rel: int
    rel_extent: int
    log_scaling_floor: int | None
    log_scaling_alpha: float
    layer_is_sliding: tuple[bool, ...]
    layer_is_dense: tuple[bool, ...]
    dense_width: int
    expert_width: int
    num_experts: int
    top_k: int
    num_shared: int
    route_scale: float
    mup: float
    rms_eps: float
    max_positions: int

    def __post_init__(self) -> None:
        for name in ("layer_is_sliding", "layer_is_dense"):
            length = len(getattr(self, name))
            if length != self.num_layers:
                refuse("TextConfig", f"{name} must have {self.num_layers} entries, got {length}")
        if not 1 <= self.unpadded_vocab_size <= self.vocab_size:
            refuse(
                "TextConfig",
                f"unpadded_vocab_size must be 1 to vocab_size = {self.vocab_size}, "
                f"got {self.unpadded_vocab_size}",
            )
        for num_heads, num_kv_heads, kind in (
            (self.num_heads, self.num_kv_heads, "global"),
            (self.swa_num_heads, self.swa_num_kv_heads, "sliding"),
        ):
            if num_heads % num_kv_heads:
                refuse(
                    "TextConfig",
                    f"{kind} layers: num_heads must be a multiple of num_kv_heads = "
                    f"{num_kv_heads}, got {num_heads}",
                )
        if not all(self.layer_is_dense) and self.top_k > self.num_experts:
            refuse(
                "TextConfig",
                f"top_k must be at most num_experts = {self.num_experts}, got {self.top_k}",
            )

    def heads(self, layer: int) -> int:
        """Query heads of ``layer``."""
        return self.swa_num_heads if self.layer_is_sliding[layer] else self.num_heads

    def kv_heads(self, layer: int) -> int:
        """Key/value heads of ``layer``."""
        return self.swa_num_kv_heads if self.layer_is_sliding[layer] else self.num_kv_heads

    def head_size(self, layer: int) -> int:
        """Width of one head of ``layer``."""
        return self.swa_head_dim if self.layer_is_sliding[layer] else self.head_dim

    def rel_len(self, layer: int) -> int:
        """Distances the relative bias of ``layer`` covers: the window, or ``rel_extent``."""
        return self.window if self.layer_is_sliding[layer] else self.rel_extent


@dataclass(frozen=True)
class AudioConfig:
    """The dMel encoder: ``num_mel_bins`` channels of ``num_levels`` levels, summed per frame."""

    num_mel_bins: int
    num_levels: int
    min_log10: float
    max_log10: float

    def __post_init__(self) -> None:
        if self.min_log10 >= self.max_log10:
            refuse(
                "AudioConfig",
                f"min_log10 must be below max_log10 = {self.max_log10}, got {self.min_log10}",
            )


@dataclass(frozen=True)
class VisionConfig:
    """The hMLP patch encoder: a ``[temporal_size, patch_size, patch_size, num_channels]`` patch
    becomes one token."""

    patch_size: int
    num_layers: int
    temporal_size: int = 2
    num_channels: int = 3

    def __post_init__(self) -> None:
        self.layers(1)

    def layers(self, hidden_size: int) -> tuple[HmlpLayer, ...]:
        """The encoder's layers; the last one projects to ``hidden_size`` and has no norm."""
        return plan_hmlp(
            self.temporal_size, self.patch_size, self.num_channels, self.num_layers, hidden_size
        )


@dataclass(frozen=True)
class ControlTokens:
    """Vocabulary ids of the control tokens of micro-turn layout v1."""

    tick: int
    out: int
    end_out: int
    silence: int
    say: int
    call: int
    end_call: int


@dataclass(frozen=True)
class InteractionConfig:
    """The ``interaction`` block: micro-turn layout v1 of a model that knows 200 ms ticks.

    ``max_text_per_tick`` bounds the text tokens the model may write in one tick,
    ``max_injected_per_tick`` the typed, tool-result and background tokens put in before them.
    ``audio_out``: the head it speaks with, None where it only writes.
    """

    tokens: ControlTokens
    max_text_per_tick: int
    max_injected_per_tick: int
    version: int = LAYOUT_VERSION
    tick_ms: int = TICK_MS
    audio_out: AudioOutConfig | None = None


@dataclass(frozen=True)
class ModelConfig:
    """What this package uses of a checkpoint's ``config.json``.

    ``audio`` and ``vision`` are None for a text-only checkpoint, ``interaction`` is None for a
    plain Inkling checkpoint. ``init_seed`` names the random initialisation that stands in for
    weights the directory does not hold; ``is_trained`` is False for such a model.
    """

    text: TextConfig
    audio: AudioConfig | None = None
    vision: VisionConfig | None = None
    interaction: InteractionConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    image_token_id: int = 200054
    audio_token_id: int = 200053
    is_trained: bool = True
    init_seed: int | None = None

    def __post_init__(self) -> None:
        if (self.audio is None) != (self.vision is None):
            refuse("ModelConfig", "audio and vision must be given together or not at all")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed ``config.json``.

        Raises `CheckpointError` naming the key and value that is missing, unknown or not
        implemented.
        """
        return _read_model(raw, {}, "config")

    @classmethod
    def from_path(cls, path: str | Path) -> "ModelConfig":
        """Read ``config.json`` of the checkpoint directory ``path``.

        The dMel range may stand in ``processor_config.json`` instead, where transformers keeps it.
        Raises like `from_dict`, and `CheckpointError` when the file is missing or not JSON.
        """
        file = Path(path) / "config.json"
        processor_file = Path(path) / "processor_config.json"
        processor = _read_json(processor_file) if processor_file.is_file() else {}
        return _read_model(_read_json(file), processor, str(file))

    def to_dict(self) -> dict[str, Any]:
        """The config in transformers spelling, which `from_dict` and transformers read alike."""
        eos = self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids)
        text = {**_text_to_dict(self.text), "eos_token_id": eos or None}
        if self.audio is None or self.vision is None:
            out: dict[str, Any] = {"architectures": ["InklingForCausalLM"], **text}
        else:
            out = {
                "architectures": ["InklingForConditionalGeneration"],
                "model_type": "inkling_mm_model",
                "eos_token_id": eos or None,
                "image_token_id": self.image_token_id,
                "audio_token_id": self.audio_token_id,
                "text_config": text,
                "audio_config": {
                    "model_type": "inkling_audio",
                    "n_mel_bins": self.audio.num_mel_bins,
                    "mel_vocab_size": self.audio.num_levels,
                    "dmel_min_value": self.audio.min_log10,
                    "dmel_max_value": self.audio.max_log10,
                    "text_hidden_size": self.text.hidden_size,
                },
                "vision_config": {
                    "model_type": "inkling_vision",
                    "patch_size": self.vision.patch_size,
                    "temporal_patch_size": self.vision.temporal_size,
                    "num_channels": self.vision.num_channels,
                    "n_layers": self.vision.num_layers,
                    "text_hidden_size": self.text.hidden_size,
                },
            }
        if self.interaction is not None:
            out["interaction"] = {
                **asdict(self.interaction),
                "audio_out": audio_out_to_dict(self.interaction.audio_out),
            }
        if not self.is_trained:
            out["trained"] = False
        if self.init_seed is not None:
            out["init_seed"] = self.init_seed
        return out


def bundled_path(name: str) -> Path:
    """Directory of a model that ships with the package (``nano``).

    Raises `InvalidArgument` for any other name.
    """
    root = Path(__file__).resolve().parent.parent / "assets"
    known = sorted(file.parent.name for file in root.glob("*/config.json"))
    if name not in known:
        raise InvalidArgument(f"name: expected a bundled model, one of {known}, got {name!r}")
    return root / name


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"path: {file} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"path: {file} is not readable JSON: {error}") from error
    if not isinstance(raw, dict):
        refuse(str(file), f"expected a JSON object, got {type(raw).__name__}")
    return raw


def _read_model(raw: object, processor: Mapping[str, Any], source: str) -> ModelConfig:
    top = Block(raw, source)
    model_type = top.take("model_type", None)
    if model_type not in ("inkling_mm_model", "inkling_text"):
        architectures = top.take("architectures", None)
        top.refuse(
            "model_type must be 'inkling_mm_model' or 'inkling_text', "
            f"got {model_type!r} (architectures {architectures!r})"
        )
    for key in ("quantization_config", "quantization", "compression_config"):
        quantization = top.take(key, None)
        if quantization is not None:
            scheme = quantization.get("quant_method") if isinstance(quantization, dict) else None
            top.refuse(f"{key}: quantised weights ({scheme or 'unnamed'}) are not supported")
    top.fixed("tie_word_embeddings", False)
    interaction_raw = top.take("interaction", None)
    eos = top.take("eos_token_id", None)
    image_token_id = top.optional_integer("image_token_id", minimum=0)
    audio_token_id = top.optional_integer("audio_token_id", minimum=0)
    is_trained = top.flag("trained", True)
    init_seed = top.optional_integer("init_seed", minimum=0)

    audio = vision = None
    if model_type == "inkling_text":
        text = _read_text(top)
    else:
        text_block = Block(top.take("text_config"), f"{source}: text_config")
        text_block.fixed("model_type", "inkling_text", "inkling_model")
        if eos is None:
            eos = text_block.take("eos_token_id", None)
        text = _read_text(text_block)
        audio_block = Block(top.take("audio_config"), f"{source}: audio_config")
        audio = _read_audio(audio_block, text.hidden_size, processor)
        vision_block = Block(top.take("vision_config"), f"{source}: vision_config")
        vision = _read_vision(vision_block, text.hidden_size)
        # What else stands at this level is bookkeeping or belongs to the draft heads.
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(one) is int and one >= 0 for one in eos_ids):
        top.refuse(f"eos_token_id must be an id or a list of ids, got {eos!r}")
    interaction = None
    if interaction_raw is not None:
        block = Block(interaction_raw, f"{source}: interaction")
        num_mel_bins = None if audio is None else audio.num_mel_bins
        interaction = _read_interaction(block, text.unpadded_vocab_size, num_mel_bins)
    return ModelConfig(
        text=text,
        audio=audio,
        vision=vision,
        interaction=interaction,
        eos_token_ids=tuple(eos_ids),
        image_token_id=200054 if image_token_id is None else image_token_id,
        audio_token_id=200053 if audio_token_id is None else audio_token_id,
        is_trained=is_trained,
        init_seed=init_seed,
    )


def _read_text(block: Block) -> TextConfig:
    num_layers = block.integer("num_hidden_layers")
    layer_is_sliding = _read_sliding_layers(block, num_layers)
    layer_is_dense = _read_dense_layers(block, num_layers)
    dense_width, expert_width = _read_widths(block, layer_is_dense)
    _require_implemented(block)

    # Sizes that no layer uses fall back to what transformers would write.
    def global_size(key: str, unused: int) -> int:
        return block.integer(key, unused if all(layer_is_sliding) else REQUIRED)

    def sliding_size(key: str, unused: int) -> int:
        return block.integer(key, REQUIRED if any(layer_is_sliding) else unused)

    def sparse_size(key: str, unused: int) -> int:
        return block.integer(key, unused if all(layer_is_dense) else REQUIRED)

    vocab_size = block.integer("vocab_size")
    text = TextConfig(
        vocab_size=vocab_size,
        unpadded_vocab_size=block.optional_integer("unpadded_vocab_size") or vocab_size,
        hidden_size=block.integer("hidden_size"),
        num_layers=num_layers,
        num_heads=global_size("num_attention_heads", 64),
        num_kv_heads=global_size("num_key_value_heads", 8),
        head_dim=global_size("head_dim", 128),
        swa_num_heads=sliding_size("swa_num_attention_heads", 64),
        swa_num_kv_heads=sliding_size("swa_num_key_value_heads", 16),
        swa_head_dim=sliding_size("swa_head_dim", 128),
        window=block.integer("sliding_window_size", 512),
        d_rel=block.integer("d_rel", 16),
        rel_extent=block.integer("rel_extent", 1024),
        log_scaling_floor=block.optional_integer(
            "log_scaling_n_floor", None if all(layer_is_sliding) else REQUIRED
        ),
        log_scaling_alpha=block.real("log_scaling_alpha", 0.1, is_positive=False),
        layer_is_sliding=layer_is_sliding,
        layer_is_dense=layer_is_dense,
        dense_width=dense_width,
        expert_width=expert_width,
        num_experts=sparse_size("n_routed_experts", 256),
        top_k=sparse_size("num_experts_per_tok", 6),
        num_shared=sparse_size("n_shared_experts", 2),
        route_scale=block.real("route_scale", 8.0 if all(layer_is_dense) else REQUIRED),
        mup=block.real("logits_mup_width_multiplier"),
        rms_eps=block.real("rms_norm_eps", 1e-6),
        max_positions=block.integer("max_position_embeddings", 131072),
    )
    block.close(IGNORED_TEXT_KEYS)
    return text


def _require_implemented(block: Block) -> None:
    block.fixed("conv_kernel_size", CONV_TAPS)
    block.fixed("final_logit_softcapping", None)
    block.fixed("gate_activation", "sigmoid")
    block.fixed("hidden_act", "silu")
    for key in ("q_bias", "o_bias", "attention_bias", "tie_word_embeddings"):
        block.fixed(key, False)
    for key in (
        "inference_moe_w13_interleaved",
        "norm_after_topk",
        "shared_expert_sink",
        "use_embed_norm",
        "use_gate_bias",
        "use_global_scale",
        "use_sconv",
    ):
        block.fixed(key, True)


def _read_sliding_layers(block: Block, num_layers: int) -> tuple[bool, ...]:
    by_kind = block.kinds("layer_types", num_layers, ("hybrid_sliding", "hybrid"))
    by_index = block.indices("local_layer_ids", num_layers)
    if by_kind is not None and by_index is not None and by_kind != by_index:
        block.refuse("layer_types and local_layer_ids disagree")
    layer_is_sliding = by_index if by_kind is None else by_kind
    if layer_is_sliding is None:
        block.refuse("layer_types or local_layer_ids is missing")
    return layer_is_sliding


def _read_dense_layers(block: Block, num_layers: int) -> tuple[bool, ...]:
    by_kind = block.kinds("mlp_layer_types", num_layers, ("dense", "sparse"))
    num_dense = block.optional_integer("dense_mlp_idx", minimum=0)
    by_count = None if num_dense is None else tuple(i < num_dense for i in range(num_layers))
    if by_kind is not None and by_count is not None and by_kind != by_count:
        block.refuse("mlp_layer_types and dense_mlp_idx disagree")
    layer_is_dense = by_count if by_kind is None else by_kind
    if layer_is_dense is None:
        block.refuse("mlp_layer_types or dense_mlp_idx is missing")
    return layer_is_dense


def _read_widths(block: Block, layer_is_dense: tuple[bool, ...]) -> tuple[int, int]:
    dense = block.optional_integer("dense_intermediate_size")
    expert = block.optional_integer("moe_intermediate_size")
    if dense is not None:
        # Beside dense_intermediate_size, intermediate_size is the width of one expert.
        inner = block.integer("intermediate_size")
        if expert is not None and expert != inner:
            block.refuse(
                "beside dense_intermediate_size, intermediate_size is the expert width and must "
                f"equal moe_intermediate_size = {expert}, got {inner}"
            )
        return dense, inner
    dense = block.integer("intermediate_size", REQUIRED if any(layer_is_dense) else 24576)
    if expert is None:
        if not all(layer_is_dense):
            block.take("moe_intermediate_size")
        expert = 3072
    return dense, expert


def _read_audio(block: Block, hidden_size: int, processor: Mapping[str, Any]) -> AudioConfig:
    block.fixed("model_type", "inkling_audio", "inkling_audio_model")
    block.fixed("audio_mode", "dmel")
    block.fixed("bias", False)
    block.fixed("use_audio_norm", True)
    block.fixed("rms_norm_eps", ENCODER_NORM_EPS)
    block.fixed("text_hidden_size", hidden_size)
    block.fixed("hidden_size", hidden_size)
    # transformers keeps the range in the processor, whose default is the released models' range.
    low, high = processor.get("dmel_min_value", -7.0), processor.get("dmel_max_value", 2.0)
    audio = AudioConfig(
        num_mel_bins=block.integer("n_mel_bins", 80),
        num_levels=block.integer("mel_vocab_size", minimum=2),
        min_log10=block.real("dmel_min_value", low, is_positive=False),
        max_log10=block.real("dmel_max_value", high, is_positive=False),
    )
    for key, value in (("dmel_min_value", audio.min_log10), ("dmel_max_value", audio.max_log10)):
        if processor.get(key, value) != value:
            block.refuse(
                f"{key} = {value} disagrees with processor_config.json, which has {processor[key]}"
            )
    block.close(IGNORED_KEYS)
    return audio


def _read_vision(block: Block, hidden_size: int) -> VisionConfig:
    block.fixed("model_type", "inkling_vision", "inkling_vision_model")
    block.fixed("vision_encoder_type", "hmlp")
    block.fixed("use_vision_norm", True)
    block.fixed("rms_norm_eps", ENCODER_NORM_EPS)
    block.fixed("num_channels", 3)
    block.fixed("temporal_patch_size", 2, is_required=True)
    block.fixed("text_hidden_size", hidden_size)
    vision = VisionConfig(
        patch_size=block.integer("patch_size", minimum=2), num_layers=block.integer("n_layers")
    )
    block.close(IGNORED_VISION_KEYS)
    return vision


def _read_interaction(block: Block, num_ids: int, num_mel_bins: int | None) -> InteractionConfig:
    block.fixed("version", LAYOUT_VERSION, is_required=True)
    block.fixed("tick_ms", TICK_MS)
    audio_out = read_audio_out(
        block.take("audio_out", None), f"{block.where}.audio_out", num_mel_bins
    )
    tokens_block = Block(block.take("tokens"), f"{block.where}.tokens")
    ids: dict[str, int] = {}
    for field in fields(ControlTokens):
        ids[field.name] = tokens_block.integer(field.name, minimum=0)
        if ids[field.name] >= num_ids:
            tokens_block.refuse(
                f"{field.name} must be below unpadded_vocab_size = {num_ids}, got {ids[field.name]}"
            )
    tokens_block.close()
    if len(set(ids.values())) != len(ids):
        tokens_block.refuse(f"ids must be distinct, got {ids}")
    interaction = InteractionConfig(
        tokens=ControlTokens(**ids),
        max_text_per_tick=block.integer("max_text_per_tick"),
        max_injected_per_tick=block.integer("max_injected_per_tick", minimum=0),
        audio_out=audio_out,
    )
    block.close()
    return interaction


def _text_to_dict(text: TextConfig) -> dict[str, Any]:
    return {
        "model_type": "inkling_text",
        "vocab_size": text.vocab_size,
        "unpadded_vocab_size": text.unpadded_vocab_size,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "swa_num_attention_heads": text.swa_num_heads,
        "swa_num_key_value_heads": text.swa_num_kv_heads,
        "swa_head_dim": text.swa_head_dim,
        "sliding_window_size": text.window,
        "d_rel": text.d_rel,
        "rel_extent": text.rel_extent,
        "log_scaling_n_floor": text.log_scaling_floor,
        "log_scaling_alpha": text.log_scaling_alpha,
        "layer_types": ["hybrid_sliding" if one else "hybrid" for one in text.layer_is_sliding],
        "mlp_layer_types": ["dense" if one else "sparse" for one in text.layer_is_dense],
        "intermediate_size": text.dense_width,
        "moe_intermediate_size": text.expert_width,
        "n_routed_experts": text.num_experts,
        "num_experts_per_tok": text.top_k,
        "n_shared_experts": text.num_shared,
        "route_scale": text.route_scale,
        "logits_mup_width_multiplier": text.mup,
        "rms_norm_eps": text.rms_eps,
        "max_position_embeddings": text.max_positions,
        "conv_kernel_size": CONV_TAPS,
        "hidden_act": "silu",
        "bos_token_id": None,
    }
