"""Weights of an Inkling model: names, shapes, reading and writing safetensors, random ones.

Canonical names and layouts are those of transformers' ``InklingForConditionalGeneration``. Files
may use them, those of the text-only ``InklingForCausalLM``, or the hub release's names, which
store gate and up rows of an MLP interleaved in one ``w13`` tensor.

Letters in shapes: H hidden, I inner width, E routed experts, S shared experts, V padded vocabulary.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tml_core.contract import CONV_TAPS
from tml_core.errors import CheckpointError, InvalidArgument
from tml_core.model.config import ModelConfig
from tml_core.model.flow import flow_shapes

__all__ = ["expected_shapes", "is_kept_fp32", "load_weights", "random_weights", "save_weights"]

Shape = tuple[int, ...]

_INDEX_NAME: Final = "model.safetensors.index.json"
_FLOAT_DTYPES: Final = frozenset({"F64", "F32", "F16", "BF16"})
_KEPT_FP32: Final = re.compile(
    r"sconv\.conv1d\.weight$|\.gate\.e_score_correction_bias$|\.gate\.global_scale$"
)
# Draft heads for multi-token prediction: in the main files by name, or in a file of their own.
_DRAFT: Final = re.compile(r"(model\.)?mtp\.")
_DRAFT_FILE: Final = "mtp.safetensors"
# What quantised releases store beside a weight.
_QUANTISED: Final = re.compile(r"(\.scale2?|amax|\.original_shape|_packed|_scale|_scale_inv)$")

_TEXT_ONLY: Final = re.compile(r"model\.(embed_tokens|layers|norm)\.")
_HUB_LAYER: Final = re.compile(r"model\.llm\.layers\.(\d+)\.(.+)")
_HUB_VISION: Final = re.compile(r"model\.visual\.layers\.(linear|norm)_(\d+)\.weight")
_HUB_NAMES: Final[Mapping[str, str]] = {
    "model.llm.embed.weight": "model.language_model.embed_tokens.weight",
    "model.llm.embed_norm.weight": "model.language_model.embed_tokens.embed_norm.weight",
    "model.llm.norm.weight": "model.language_model.norm.weight",
    "model.llm.unembed.weight": "lm_head.weight",
    "model.audio.encoder.weight": "model.audio_tower.embed_audio_tokens.embed_audio_tokens.weight",
    "model.audio.final_norm.weight": "model.audio_tower.norm.weight",
    "model.visual.final_norm.weight": "model.vision_tower.final_norm.weight",
}
_HUB_LAYER_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "attn_norm.weight": ("input_layernorm.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "attn_sconv.weight": ("attn_sconv.conv1d.weight",),
    "mlp_sconv.weight": ("mlp_sconv.conv1d.weight",),
    "attn.wq_du.weight": ("self_attn.q_proj.weight",),
    "attn.wk_dv.weight": ("self_attn.k_proj.weight",),
    "attn.wv_dv.weight": ("self_attn.v_proj.weight",),
    "attn.wr_du.weight": ("self_attn.r_proj.weight",),
    "attn.wo_ud.weight": ("self_attn.o_proj.weight",),
    "attn.q_norm.weight": ("self_attn.q_norm.weight",),
    "attn.k_norm.weight": ("self_attn.k_norm.weight",),
    "attn.k_sconv.weight": ("self_attn.k_sconv.conv1d.weight",),
    "attn.v_sconv.weight": ("self_attn.v_sconv.conv1d.weight",),
    "attn.rel_logits_proj.proj": ("self_attn.rel_logits_proj.proj",),
    "mlp.w13_dn.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.w2_md.weight": ("mlp.down_proj.weight",),
    "mlp.global_scale": ("mlp.global_scale",),
    "mlp.gate.weight": ("mlp.gate.weight",),
    "mlp.gate.bias": ("mlp.gate.e_score_correction_bias",),
    "mlp.gate.global_scale": ("mlp.gate.global_scale",),
    "mlp.experts.w13_weight": ("mlp.experts.gate_up_proj",),
    "mlp.experts.w2_weight": ("mlp.experts.down_proj",),
    "mlp.shared_experts.shared_w13_weight": (
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
    ),
    "mlp.shared_experts.shared_w2_weight": ("mlp.shared_experts.down_proj",),
}
# Dimension of a hub tensor along which gate and up rows alternate.
_INTERLEAVED_DIM: Final[Mapping[str, int]] = {
    "mlp.w13_dn.weight": 0,
    "mlp.experts.w13_weight": 1,
    "mlp.shared_experts.shared_w13_weight": 1,
}


def is_kept_fp32(name: str) -> bool:
    """Whether the canonical tensor ``name`` stays float32 in a bfloat16 model.

    As in transformers: the short convolutions, the router's selection bias and its global scale.
    """
    return _KEPT_FP32.search(name) is not None


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Canonical name and shape of every tensor of a model of this configuration."""
    text = config.text
    hidden = text.hidden_size
    shapes: dict[str, Shape] = {
        "model.language_model.embed_tokens.weight": (text.vocab_size, hidden),
        "model.language_model.embed_tokens.embed_norm.weight": (hidden,),
    }
    for layer in range(text.num_layers):
        prefix = f"model.language_model.layers.{layer}."
        layer_shapes = {
            "input_layernorm.weight": (hidden,),
            **_attention_shapes(config, layer),
            "attn_sconv.conv1d.weight": (hidden, 1, CONV_TAPS),
            "post_attention_layernorm.weight": (hidden,),
            **(_dense_shapes(config) if text.layer_is_dense[layer] else _moe_shapes(config)),
            "mlp_sconv.conv1d.weight": (hidden, 1, CONV_TAPS),
        }
        shapes.update({prefix + name: shape for name, shape in layer_shapes.items()})
    shapes["model.language_model.norm.weight"] = (hidden,)
    if config.audio is not None:
        rows = config.audio.num_mel_bins * config.audio.num_levels
        shapes["model.audio_tower.embed_audio_tokens.embed_audio_tokens.weight"] = (rows, hidden)
        shapes["model.audio_tower.norm.weight"] = (hidden,)
    if config.vision is not None:
        for index, layer_plan in enumerate(config.vision.layers(hidden)):
            prefix = f"model.vision_tower.encoder_layers.{index}."
            shapes[prefix + "projection.weight"] = (layer_plan.out_width, layer_plan.in_width)
            if layer_plan.has_norm:
                shapes[prefix + "layer_norm.weight"] = (layer_plan.out_width,)
        shapes["model.vision_tower.final_norm.weight"] = (hidden,)
    if config.interaction is not None and config.interaction.audio_out is not None:
        shapes.update(flow_shapes(config.interaction.audio_out, hidden))
    shapes["lm_head.weight"] = (text.vocab_size, hidden)
    return shapes


def load_weights(path: str | Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read every weight of the checkpoint directory ``path`` under its canonical name.

    Takes ``model.safetensors``, shards listed in ``model.safetensors.index.json``, or whatever
    ``*.safetensors`` there are; draft heads (``model.mtp.*``, ``mtp.safetensors``) are left aside.
    A head stored without its padding rows is padded with zeros. A directory without any weights
    whose config names an ``init_seed`` gets `random_weights` of that seed.

    Returns tensors in ``dtype`` (float32 or bfloat16), except those of `is_kept_fp32`.
    Raises `CheckpointError` naming the tensor or file that is missing, unexpected, misshapen,
    damaged or quantised.
    """
    _check_dtype("load_weights", dtype)
    directory = Path(path)
    files = _weight_files(directory)
    if not files and config.init_seed is not None:
        return random_weights(config, config.init_seed, dtype)
    if not files:
        raise CheckpointError(f"load_weights: no .safetensors file in {directory}")
    shapes = expected_shapes(config)
    unpadded_head = (config.text.unpadded_vocab_size, config.text.hidden_size)
    weights: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not iterable itself)
                if _DRAFT.match(name):
                    continue
                source = _resolve(name)
                got = _check_stored(tensors, file, name, source, shapes)
                expected = source.stored_shape(shapes)
                is_head = source.targets == ("lm_head.weight",)
                if got != expected and not (is_head and got == unpadded_head):
                    raise CheckpointError(
                        f"load_weights: {name} in {file.name} must be {list(expected)}, "
                        f"got {list(got)}"
                    )
                value = tensors.get_tensor(name)
                if is_head:
                    value = _pad_rows(value, config.text.vocab_size)
                for target, part in zip(source.targets, source.split(value), strict=True):
                    if target in weights:
                        raise CheckpointError(
                            f"load_weights: {target} is stored twice, once as {name} in {file.name}"
                        )
                    weights[target] = part.to(torch.float32 if is_kept_fp32(target) else dtype)
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise CheckpointError(
            f"load_weights: tensor {missing[0]} is missing from {directory} "
            f"({len(missing)} of {len(shapes)} are)"
        )
    return {name: weights[name] for name in shapes}


def save_weights(path: str | Path, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Write ``config.json`` and ``model.safetensors`` so that transformers loads them too.

    Tensors keep their dtype. ``path`` is created; a file is replaced only once it is complete.
    Raises `InvalidArgument` naming a tensor that is missing, unexpected or misshapen.
    """
    shapes = expected_shapes(config)
    for name in sorted(set(shapes) ^ set(weights)):
        what = "is missing" if name in shapes else "is not part of this model"
        raise InvalidArgument(f"weights: {name} {what}")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise InvalidArgument(
                f"weights: {name} must be {list(shape)}, got {list(weights[name].shape)}"
            )
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    is_text_only = config.audio is None
    tensors = {
        name.replace("model.language_model.", "model.") if is_text_only else name: weights[name]
        .detach()
        .contiguous()
        for name in shapes
    }
    config_text = json.dumps(config.to_dict(), indent=2) + "\n"
    with _replacing(directory / "config.json") as file:
        file.write_text(config_text, encoding="utf-8")
    with _replacing(directory / "model.safetensors") as file:
        save_file(tensors, file, metadata={"format": "pt"})


def random_weights(config: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights at the scale of a trained model, a function of ``seed`` and name only.

    Values come from integer arithmetic on the generator's bits, so they are the same on every
    machine. Nothing is zero or one throughout, so every term of the forward pass shows.
    Returns tensors in ``dtype`` (float32 or bfloat16), except those of `is_kept_fp32`.
    """
    _check_dtype("random_weights", dtype)
    weights = {}
    for name, shape in expected_shapes(config).items():
        mean, std = _init_scale(name, shape, config)
        value = _uniform(shape, f"{seed}:{name}").mul_(std).add_(mean)
        weights[name] = value.to(torch.float32 if is_kept_fp32(name) else dtype)
    return weights


def _attention_shapes(config: ModelConfig, layer: int) -> dict[str, Shape]:
    text = config.text
    hidden, head_size = text.hidden_size, text.head_size(layer)
    q_width, kv_width = text.heads(layer) * head_size, text.kv_heads(layer) * head_size
    return {
        "self_attn.q_proj.weight": (q_width, hidden),
        "self_attn.k_proj.weight": (kv_width, hidden),
        "self_attn.v_proj.weight": (kv_width, hidden),
        "self_attn.r_proj.weight": (text.heads(layer) * text.d_rel, hidden),
        "self_attn.o_proj.weight": (hidden, q_width),
        "self_attn.k_sconv.conv1d.weight": (kv_width, 1, CONV_TAPS),
        "self_attn.v_sconv.conv1d.weight": (kv_width, 1, CONV_TAPS),
        "self_attn.q_norm.weight": (head_size,),
        "self_attn.k_norm.weight": (head_size,),
        "self_attn.rel_logits_proj.proj": (text.d_rel, text.rel_len(layer)),
    }


def _dense_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden, inner = config.text.hidden_size, config.text.dense_width
    return {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "mlp.global_scale": (1,),
    }


def _moe_shapes(config: ModelConfig) -> dict[str, Shape]:
    text = config.text
    hidden, inner = text.hidden_size, text.expert_width
    routed, shared = text.num_experts, text.num_shared
    return {
        "mlp.gate.weight": (routed + shared, hidden),
        "mlp.gate.e_score_correction_bias": (routed,),
        "mlp.gate.global_scale": (1,),
        "mlp.experts.gate_up_proj": (routed, 2 * inner, hidden),
        "mlp.experts.down_proj": (routed, hidden, inner),
        "mlp.shared_experts.gate_proj": (shared, inner, hidden),
        "mlp.shared_experts.up_proj": (shared, inner, hidden),
        "mlp.shared_experts.down_proj": (shared, hidden, inner),
    }


@dataclass(frozen=True)
class _Source:
    """How one stored tensor becomes canonical ones.

    Along ``interleaved_dim`` the stored rows alternate gate, up, gate, up, ...; they become two
    tensors, or one with the gate rows first.
    """

    targets: tuple[str, ...]
    interleaved_dim: int | None = None

    def stored_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        shape = list(shapes[self.targets[0]])
        if self.interleaved_dim is not None and len(self.targets) == 2:
            shape[self.interleaved_dim] *= 2
        return tuple(shape)

    def split(self, value: Tensor) -> tuple[Tensor, ...]:
        if self.interleaved_dim is None:
            return (value,)
        dim, shape = self.interleaved_dim, value.shape
        pairs = value.reshape(*shape[:dim], shape[dim] // 2, 2, *shape[dim + 1 :])
        gate, up = pairs.unbind(dim + 1)
        if len(self.targets) == 2:
            return gate.contiguous(), up.contiguous()
        return (torch.cat((gate, up), dim),)


def _resolve(name: str) -> _Source:
    """What the stored tensor ``name`` holds; a name of no known spelling stands for itself."""
    if name in _HUB_NAMES:
        return _Source((_HUB_NAMES[name],))
    if match := _HUB_LAYER.fullmatch(name):
        layer, tail = match.groups()
        if tail in _HUB_LAYER_NAMES:
            prefix = f"model.language_model.layers.{layer}."
            targets = tuple(prefix + target for target in _HUB_LAYER_NAMES[tail])
            return _Source(targets, _INTERLEAVED_DIM.get(tail))
    if match := _HUB_VISION.fullmatch(name):
        kind, index = match.groups()
        part = {"linear": "projection", "norm": "layer_norm"}[kind]
        return _Source((f"model.vision_tower.encoder_layers.{index}.{part}.weight",))
    if _TEXT_ONLY.match(name):
        return _Source(("model.language_model." + name.removeprefix("model."),))
    return _Source((name,))


def _check_stored(
    tensors: Any, file: Path, name: str, source: _Source, shapes: Mapping[str, Shape]
) -> Shape:
    """Refuse a stored tensor that is not one of this model's; returns its shape."""
    entry = tensors.get_slice(name)
    is_known = all(target in shapes for target in source.targets)
    if entry.get_dtype() not in _FLOAT_DTYPES or (not is_known and _QUANTISED.search(name)):
        raise CheckpointError(
            f"load_weights: {name} in {file.name} is quantised ({_quantised_format(tensors)}), "
            "which is not supported: expected float32, float16 or bfloat16 weights"
        )
    if not is_known:
        raise CheckpointError(
            f"load_weights: unexpected tensor {name} in {file.name}: the model that config.json "
            "describes has none of this name"
        )
    return tuple(entry.get_shape())


def _quantised_format(tensors: Any) -> str:
    names = list(tensors.keys())
    dtypes = {name: tensors.get_slice(name).get_dtype() for name in names}
    weight_dtypes = {dtypes[name] for name in names if name.endswith(("weight", "_packed"))}
    stored = "stored as " + ", ".join(sorted(set(dtypes.values()) - _FLOAT_DTYPES))
    if weight_dtypes & {"U8", "F4"}:
        return f"NVFP4 or MXFP4, {stored}"
    if any(dtype.startswith("F8") for dtype in weight_dtypes):
        return f"MXFP8 or FP8, {stored}"
    return stored


def _pad_rows(value: Tensor, num_rows: int) -> Tensor:
    padding = value.new_zeros(num_rows - value.shape[0], value.shape[1])
    return torch.cat((value, padding)) if len(padding) else value


def _weight_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise CheckpointError(f"load_weights: {directory} is not a directory")
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    index = directory / _INDEX_NAME
    if not index.is_file():
        return sorted(file for file in directory.glob("*.safetensors") if file.name != _DRAFT_FILE)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({file for name, file in weight_map.items() if not _DRAFT.match(name)})
        files = [directory / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"load_weights: {index} is not a safetensors index: {error!r}"
        ) from error
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"load_weights: {index.name} lists {file.name}, which is missing")
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"load_weights: {file} is damaged or not a safetensors file: {error}"
        ) from error


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A temporary path beside ``file`` that takes its place when the block succeeds."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _check_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise InvalidArgument(f"{op}: dtype must be torch.float32 or torch.bfloat16, got {dtype}")


def _init_scale(name: str, shape: Shape, config: ModelConfig) -> tuple[float, float]:
    """Mean and standard deviation of a random tensor.

    Projections keep unit variance. Head norms make up for the 1/head_dim score scale, the router's
    global scale for ``route_scale``, and the head for ``mup``, so that each has a visible effect.
    """
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        gain = shape[0] ** 0.25
        return gain, 0.1 * gain
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith("gate.global_scale"):
        scale = 2.0 / config.text.route_scale
        return scale, 0.1 * scale
    if name.endswith("global_scale"):
        return 1.0, 0.1
    if name.endswith("e_score_correction_bias"):
        return 0.0, 0.1
    if name.endswith("conv1d.weight"):
        return 0.0, 0.2
    if name.endswith("rel_logits_proj.proj"):
        return 0.0, shape[0] ** -0.5
    if name.endswith("embed_tokens.weight"):
        return 0.0, 1.0
    if name == "lm_head.weight":
        return 0.0, 2.0 * config.text.mup * shape[1] ** -0.5
    return 0.0, shape[-1] ** -0.5


def _uniform(shape: Shape, key: str) -> Tensor:
    """Float32 values of mean 0 and deviation 1, uniformly distributed on a grid of 65536.

    Exact integers, then two correctly rounded operations: ``torch.randn`` would depend on the
    machine's vector unit, this does not.
    """
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    num_levels = 1 << 16
    value = torch.empty(shape).random_(0, num_levels, generator=generator)
    return value.sub_((num_levels - 1) / 2).div_(math.sqrt((num_levels**2 - 1) / 12))
