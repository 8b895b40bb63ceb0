"""Model configuration: ``config.json`` of an Inkling checkpoint, normalised and validated.

Two spellings of the same architecture are read: the one transformers writes and the one the hub
releases use. Whatever could change the forward pass is either read, or required to have the one
value this package implements, or refused by name; a key that is missing is never guessed when the
published implementations disagree on its default.
"""

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, NoReturn

import torch

from tml_core.contract import CONV_TAPS
from tml_core.errors import CheckpointError, InvalidArgument, Unsupported

__all__ = [
    "CONTROL_TOKEN_NAMES",
    "ENCODER_NORM_EPS",
    "AudioConfig",
    "ControlTokens",
    "HmlpLayer",
    "InteractionConfig",
    "ModelConfig",
    "TextConfig",
    "VisionConfig",
    "bundled_path",
]

# The encoders' norms have a fixed epsilon in every implementation; their config keys are not read.
ENCODER_NORM_EPS: Final = 1e-6
TICK_MS: Final = 200
LAYOUT_VERSION: Final = 1

# Spelling of the control tokens of micro-turn layout v1 in a tokenizer's vocabulary.
CONTROL_TOKEN_NAMES: Final[Mapping[str, str]] = {
    "tick": "<|tick|>",
    "out": "<|out|>",
    "end_out": "<|/out|>",
    "silence": "<|silence|>",
    "say": "<|say|>",
    "call": "<|call|>",
    "end_call": "<|/call|>",
}

_REQUIRED: Final = object()
_ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    # canonical (transformers) key: other spellings seen in checkpoints
    "conv_kernel_size": ("sconv_kernel_size",),
    "dmel_max_value": ("dmel_max",),
    "dmel_min_value": ("dmel_min",),
    "logits_mup_width_multiplier": ("embedding_multiplier",),
    "max_position_embeddings": ("model_max_length",),
    "mel_vocab_size": ("codebook_size",),
    "n_layers": ("num_hidden_layers",),
    "n_mel_bins": ("num_codebooks",),
    "n_routed_experts": ("num_local_experts",),
    "num_channels": ("n_channels",),
    "sliding_window_size": ("sliding_window",),
    "text_hidden_size": ("decoder_dmodel",),
}
# Keys that never reach the forward pass: bookkeeping of the writing library, generation defaults,
# training-only values, and the multi-token-prediction heads, which are not part of the backbone.
_IGNORED_ANYWHERE: Final = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention
    architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k
    top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()
)
_IGNORED_TEXT: Final = frozenset(
    """
    attention_dropout chain_hidden_post_norm mtp_hidden_states_first mtp_local_extent
    mtp_local_layer_ids mtp_swa_head_dim mtp_swa_num_attention_heads mtp_swa_num_key_value_heads
    num_mtp_layers num_nextn_predict_layers number_of_conv_states rms_norm_eps_moe_gate
    """.split()
)
# The vision tower is an MLP; transformers still writes the sizes of a transformer there.
_IGNORED_VISION: Final = frozenset({"hidden_size", "num_attention_heads"})


@dataclass(frozen=True)
class TextConfig:
    """The decoder: sizes per layer kind, attention, router and head."""

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
            if len(getattr(self, name)) != self.num_layers:
                got = len(getattr(self, name))
                _refuse("text_config", f"{name} must have {self.num_layers} entries, got {got}")
        if not 1 <= self.unpadded_vocab_size <= self.vocab_size:
            _refuse(
                "text_config",
                f"unpadded_vocab_size must be 1 to vocab_size = {self.vocab_size}, "
                f"got {self.unpadded_vocab_size}",
            )
        for kind in ("", "swa_"):
            heads = getattr(self, f"{kind}num_heads")
            kv_heads = getattr(self, f"{kind}num_kv_heads")
            if heads % kv_heads:
                _refuse(
                    "text_config",
                    f"{kind}num_attention_heads must be a multiple of {kind}num_key_value_heads = "
                    f"{kv_heads}, got {heads}",
                )
        if not all(self.layer_is_dense) and self.top_k > self.num_experts:
            _refuse(
                "text_config",
                f"num_experts_per_tok must be at most n_routed_experts = {self.num_experts}, "
                f"got {self.top_k}",
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
            _refuse(
                "audio_config",
                f"dmel_min_value must be below dmel_max_value = {self.max_log10}, "
                f"got {self.min_log10}",
            )


@dataclass(frozen=True)
class HmlpLayer:
    """One layer of the patch encoder: fold ``t_fold`` x ``hw_fold`` x ``hw_fold``, project, norm."""

    t_fold: int
    hw_fold: int
    in_width: int
    out_width: int
    has_norm: bool


@dataclass(frozen=True)
class VisionConfig:
    """The hMLP patch encoder: one ``[temporal_size, patch_size, patch_size, 3]`` patch a token."""

    patch_size: int
    num_layers: int
    temporal_size: int = 2
    num_channels: int = 3

    def layers(self, hidden_size: int) -> tuple[HmlpLayer, ...]:
        """The encoder's layers, the last one projecting to ``hidden_size``."""
        scales = _hmlp_scales(
            self.temporal_size, self.patch_size, self.num_layers, self.num_channels
        )
        layers = []
        for index, (start, end) in enumerate(itertools.pairwise(scales)):
            t_fold, hw_fold = end[0] // start[0], end[1] // start[1]
            is_last = index == self.num_layers - 1
            layers.append(
                HmlpLayer(
                    t_fold=t_fold,
                    hw_fold=hw_fold,
                    in_width=start[2] * t_fold * hw_fold * hw_fold,
                    out_width=hidden_size if is_last else end[2],
                    has_norm=not is_last,
                )
            )
        return tuple(layers)


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
    """The ``interaction`` block: micro-turn layout v1 (200 ms ticks) of a model that knows ticks.

    ``max_text_per_tick`` bounds the text tokens the model may write in one tick;
    ``max_injected_per_tick`` bounds typed text, tool results and background text put in before it.
    """

    tokens: ControlTokens
    max_text_per_tick: int
    max_injected_per_tick: int
    version: int = LAYOUT_VERSION
    tick_ms: int = TICK_MS


@dataclass(frozen=True)
class ModelConfig:
    """Everything a checkpoint's ``config.json`` says that this package uses.

    ``audio`` and ``vision`` are None for a text-only checkpoint, ``interaction`` is None for a
    plain Inkling checkpoint. ``init_seed`` names the random initialisation that stands in for
    weights a directory does not hold, and ``is_trained`` is False for such a model.
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

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed ``config.json``.

        Raises `CheckpointError` naming the key and value that is missing, unknown or not
        implemented, and `Unsupported` for an audio-out block.
        """
        return _read_model(raw, "config", None)

    @classmethod
    def from_path(cls, path: str | Path) -> "ModelConfig":
        """Read ``config.json`` of a checkpoint directory.

        The dMel range may stand in ``processor_config.json`` instead, as transformers writes it.
        Raises like `from_dict`, and `CheckpointError` when a file is missing or is not JSON.
        """
        directory = Path(path)
        file = directory / "config.json"
        processor_file = directory / "processor_config.json"
        processor = _read_json(processor_file) if processor_file.is_file() else None
        return _read_model(_read_json(file), str(file), processor)

    def to_dict(self) -> dict[str, Any]:
        """The config in transformers spelling; `from_dict` and transformers read it alike."""
        text = _text_to_dict(self.text)
        eos: int | list[int] | None = list(self.eos_token_ids) or None
        if eos is not None and len(eos) == 1:
            eos = eos[0]
        text["eos_token_id"] = eos
        if self.audio is None or self.vision is None:
            out: dict[str, Any] = {"architectures": ["InklingForCausalLM"], **text}
        else:
            hidden_size = self.text.hidden_size
            out = {
                "architectures": ["InklingForConditionalGeneration"],
                "model_type": "inkling_mm_model",
                "eos_token_id": eos,
                "image_token_id": self.image_token_id,
                "audio_token_id": self.audio_token_id,
                "text_config": text,
                "audio_config": {
                    "model_type": "inkling_audio",
                    "n_mel_bins": self.audio.num_mel_bins,
                    "mel_vocab_size": self.audio.num_levels,
                    "dmel_min_value": self.audio.min_log10,
                    "dmel_max_value": self.audio.max_log10,
                    "text_hidden_size": hidden_size,
                },
                "vision_config": {
                    "model_type": "inkling_vision",
                    "patch_size": self.vision.patch_size,
                    "temporal_patch_size": self.vision.temporal_size,
                    "num_channels": self.vision.num_channels,
                    "n_layers": self.vision.num_layers,
                    "text_hidden_size": hidden_size,
                },
            }
        if self.interaction is not None:
            out["interaction"] = {**asdict(self.interaction), "audio_out": None}
        if not self.is_trained:
            out["trained"] = False
        if self.init_seed is not None:
            out["init_seed"] = self.init_seed
        return out


def bundled_path(name: str) -> Path:
    """Directory of a model that ships with the package (``nano``).

    Raises `InvalidArgument` for a name that is not bundled.
    """
    root = Path(__file__).resolve().parent.parent / "assets"
    known = sorted(entry.parent.name for entry in root.glob("*/config.json"))
    if name not in known:
        raise InvalidArgument(f"name: expected a bundled model, one of {known}, got {name!r}")
    return root / name


def _refuse(where: str, what: str) -> NoReturn:
    raise CheckpointError(f"{where}: {what}")


class _Block:
    """One JSON object being read: every key is taken once, what is left over is refused."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, Mapping):
            _refuse(where, f"expected an object, got {_show(raw)}")
        self._left: dict[str, Any] = dict(raw)
        self.where = where

    def take(self, key: str, default: object = _REQUIRED) -> Any:
        """The value under ``key`` or one of its other spellings, which must agree."""
        found = {name: self._left.pop(name) for name in self._spellings(key) if name in self._left}
        if not found:
            if default is _REQUIRED:
                self.refuse(f"{key} is missing; implementations differ on it, so it is not guessed")
            return default
        value = next(iter(found.values()))
        if any(other != value for other in found.values()):
            given = ", ".join(f"{name} = {_show(v)}" for name, v in found.items())
            self.refuse(f"two spellings of one value disagree: {given}")
        return value

    def integer(self, key: str, default: object = _REQUIRED, minimum: int = 1) -> int:
        value = self.take(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.refuse(f"{key} must be an integer of at least {minimum}, got {_show(value)}")
        return value

    def real(self, key: str, default: object = _REQUIRED, positive: bool = True) -> float:
        value = self.take(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or (positive and value <= 0):
            kind = "a positive number" if positive else "a finite number"
            self.refuse(f"{key} must be {kind}, got {_show(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            self.refuse(f"{key} must be true or false, got {_show(value)}")
        return value

    def fixed(self, key: str, expected: object, *also: object, required: bool = False) -> None:
        """Take a key of which only one meaning is implemented."""
        value = self.take(key, _REQUIRED if required else expected)
        if not any(value == allowed and _kind(value) == _kind(allowed) for allowed in (expected, *also)):
            self.refuse(f"{key} must be {_show(expected)}, got {_show(value)}: not supported")

    def names(self, key: str, length: int, allowed: Sequence[str]) -> tuple[str, ...] | None:
        """An optional list with one of ``allowed`` per layer."""
        value = self.take(key, None)
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length:
            self.refuse(f"{key} must have {length} entries, got {_show(value)}")
        for entry in value:
            if entry not in allowed:
                self.refuse(f"{key} entries must be one of {list(allowed)}, got {_show(entry)}")
        return tuple(value)

    def refuse(self, what: str) -> NoReturn:
        _refuse(self.where, what)

    def close(self, ignored: frozenset[str] = frozenset()) -> None:
        unknown = sorted(set(self._left) - ignored)
        if unknown:
            self.refuse(f"unknown key {unknown[0]} = {_show(self._left[unknown[0]])}")

    def _spellings(self, key: str) -> tuple[str, ...]:
        return (key, *_ALIASES.get(key, ()))


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"path: {file} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"path: {file} is not readable JSON: {error}") from error
    if not isinstance(raw, dict):
        _refuse(str(file), f"expected a JSON object, got {_show(raw)}")
    return raw


def _read_model(
    raw: Mapping[str, Any], source: str, processor: Mapping[str, Any] | None
) -> ModelConfig:
    top = _Block(raw, source)
    model_type = top.take("model_type", None)
    if model_type not in ("inkling_mm_model", "inkling_text"):
        architectures = top.take("architectures", None)
        top.refuse(
            "model_type must be 'inkling_mm_model' or 'inkling_text', "
            f"got {_show(model_type)} (architectures {_show(architectures)})"
        )
    top.fixed("tie_word_embeddings", False)
    for key in ("quantization_config", "quantization", "compression_config"):
        quantization = top.take(key, None)
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
            top.refuse(f"{key}: quantised weights ({method or 'unnamed'}) are not supported")
    eos = top.take("eos_token_id", None)
    image_token_id = top.take("image_token_id", None)
    audio_token_id = top.take("audio_token_id", None)
    interaction = top.take("interaction", None)
    is_trained = top.flag("trained", True)
    init_seed = None if top.take("init_seed", None) is None else raw["init_seed"]
    if init_seed is not None and (not isinstance(init_seed, int) or isinstance(init_seed, bool)):
        top.refuse(f"init_seed must be an integer, got {_show(init_seed)}")

    audio = vision = None
    if model_type == "inkling_text":
        text = _read_text(top)
    else:
        text_block = _Block(top.take("text_config"), f"{source}: text_config")
        if eos is None:
            eos = text_block.take("eos_token_id", None)
        text_block.fixed("model_type", "inkling_text", "inkling_model")
        text = _read_text(text_block)
        audio_block = _Block(top.take("audio_config"), f"{source}: audio_config")
        audio = _read_audio(audio_block, text.hidden_size, processor or {})
        vision_block = _Block(top.take("vision_config"), f"{source}: vision_config")
        vision = _read_vision(vision_block, text.hidden_size)
        # What else stands at this level (library bookkeeping, mtp_config) never reaches the forward.

    return ModelConfig(
        text=text,
        audio=audio,
        vision=vision,
        interaction=None if interaction is None else _read_interaction(interaction, source, text),
        eos_token_ids=_read_eos(eos, source),
        image_token_id=200054 if image_token_id is None else int(image_token_id),
        audio_token_id=200053 if audio_token_id is None else int(audio_token_id),
        is_trained=is_trained,
        init_seed=init_seed,
    )


def _read_text(block: _Block) -> TextConfig:
    num_layers = block.integer("num_hidden_layers")
    layer_is_sliding = _read_sliding_layers(block, num_layers)
    layer_is_dense = _read_dense_layers(block, num_layers)
    has_global, has_sliding = not all(layer_is_sliding), any(layer_is_sliding)
    has_sparse = not all(layer_is_dense)

    def needed(is_used: bool, otherwise: object) -> object:
        return _REQUIRED if is_used else otherwise

    dense_width, expert_width = _read_widths(block, any(layer_is_dense), has_sparse)
    block.fixed("conv_kernel_size", CONV_TAPS)
    block.fixed("hidden_act", "silu")
    block.fixed("gate_activation", "sigmoid")
    block.fixed("final_logit_softcapping", None)
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
    vocab_size = block.integer("vocab_size")
    unpadded = block.take("unpadded_vocab_size", None)
    floor = block.take("log_scaling_n_floor", needed(has_global, None))
    text = TextConfig(
        vocab_size=vocab_size,
        unpadded_vocab_size=vocab_size if unpadded is None else _count(block, "unpadded_vocab_size", unpadded),
        hidden_size=block.integer("hidden_size"),
        num_layers=num_layers,
        num_heads=block.integer("num_attention_heads", needed(has_global, 64)),
        num_kv_heads=block.integer("num_key_value_heads", needed(has_global, 8)),
        head_dim=block.integer("head_dim", needed(has_global, 128)),
        swa_num_heads=block.integer("swa_num_attention_heads", needed(has_sliding, 64)),
        swa_num_kv_heads=block.integer("swa_num_key_value_heads", needed(has_sliding, 16)),
        swa_head_dim=block.integer("swa_head_dim", needed(has_sliding, 128)),
        window=block.integer("sliding_window_size", 512),
        d_rel=block.integer("d_rel", 16),
        rel_extent=block.integer("rel_extent", 1024),
        log_scaling_floor=None if floor is None else _count(block, "log_scaling_n_floor", floor),
        log_scaling_alpha=block.real("log_scaling_alpha", 0.1, positive=False),
        layer_is_sliding=layer_is_sliding,
        layer_is_dense=layer_is_dense,
        dense_width=dense_width,
        expert_width=expert_width,
        num_experts=block.integer("n_routed_experts", needed(has_sparse, 256)),
        top_k=block.integer("num_experts_per_tok", needed(has_sparse, 6)),
        num_shared=block.integer("n_shared_experts", needed(has_sparse, 2)),
        route_scale=block.real("route_scale", needed(has_sparse, 8.0)),
        mup=block.real("logits_mup_width_multiplier"),
        rms_eps=block.real("rms_norm_eps", 1e-6),
        max_positions=block.integer("max_position_embeddings", 131072),
    )
    block.close(_IGNORED_ANYWHERE | _IGNORED_TEXT)
    return text


def _read_sliding_layers(block: _Block, num_layers: int) -> tuple[bool, ...]:
    kinds = block.names("layer_types", num_layers, ("hybrid_sliding", "hybrid"))
    local = block.take("local_layer_ids", None)
    if local is not None:
        if (
            not isinstance(local, Sequence)
            or not all(isinstance(i, int) and 0 <= i < num_layers for i in local)
            or len(set(local)) != len(local)
        ):
            block.refuse(
                f"local_layer_ids must be distinct layer indices below {num_layers}, got {_show(local)}"
            )
        by_ids = tuple(i in set(local) for i in range(num_layers))
        if kinds is not None and by_ids != tuple(kind == "hybrid_sliding" for kind in kinds):
            block.refuse("layer_types and local_layer_ids disagree")
        return by_ids
    if kinds is None:
        block.take("layer_types")
        raise AssertionError
    return tuple(kind == "hybrid_sliding" for kind in kinds)


def _read_dense_layers(block: _Block, num_layers: int) -> tuple[bool, ...]:
    kinds = block.names("mlp_layer_types", num_layers, ("dense", "sparse"))
    if kinds is None:
        num_dense = block.integer("dense_mlp_idx", minimum=0)
        return tuple(i < num_dense for i in range(num_layers))
    by_kind = tuple(kind == "dense" for kind in kinds)
    num_dense = block.integer("dense_mlp_idx", sum(by_kind), minimum=0)
    return by_kind
