import copy
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.inkling.modeling_inkling import plan_out_scales

from byte_model import BYTE_MODEL
from hf_checkpoints import SHAPES, hub_config, make_hf_model, save_hf
from tml_core.errors import CheckpointError, InvalidArgument
from tml_core.model.config import ModelConfig, VisionConfig, bundled_path

# text_config of the released Inkling-Small, as its hub file spells it.
SMALL_TEXT = {
    "model_max_length": 1048576,
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "num_hidden_layers": 42,
    "vocab_size": 201024,
    "unpadded_vocab_size": 200058,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "swa_num_attention_heads": 32,
    "swa_num_key_value_heads": 8,
    "swa_head_dim": 128,
    "sliding_window_size": 512,
    "d_rel": 16,
    "rel_extent": 1024,
    "q_bias": False,
    "o_bias": False,
    "log_scaling_n_floor": 128000,
    "log_scaling_alpha": 0.1,
    "rms_norm_eps": 1e-06,
    "use_embed_norm": True,
    "local_layer_ids": [layer for layer in range(42) if layer % 6 != 5],
    "dense_mlp_idx": 2,
    "use_sconv": True,
    "sconv_kernel_size": 4,
    "logits_mup_width_multiplier": 16.0,
    "final_logit_softcapping": None,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "shared_expert_sink": True,
    "dense_intermediate_size": 16384,
    "intermediate_size": 2048,
    "route_scale": 8.0,
    "use_gate_bias": True,
    "gate_activation": "sigmoid",
    "norm_after_topk": True,
    "use_global_scale": True,
}
SMALL_AUDIO = {
    "decoder_dmodel": 4096,
    "n_mel_bins": 80,
    "mel_vocab_size": 16,
    "bias": False,
    "dmel_min_value": -7.0,
    "dmel_max_value": 2.0,
    "use_audio_norm": True,
    "audio_mode": "dmel",
}
SMALL_VISION = {
    "vision_encoder_type": "hmlp",
    "decoder_dmodel": 4096,
    "patch_size": 40,
    "temporal_patch_size": 2,
    "n_channels": 3,
    "n_layers": 4,
    "use_vision_norm": True,
}
SMALL = {
    "architectures": ["InklingForConditionalGeneration"],
    "model_type": "inkling_mm_model",
    "eos_token_id": 200006,
    "text_config": SMALL_TEXT,
    "audio_config": SMALL_AUDIO,
    "vision_config": SMALL_VISION,
    "mtp_config": {"num_nextn_predict_layers": 8},
}
INTERACTION = {
    "version": 1,
    "tick_ms": 200,
    "tokens": {
        "tick": 90,
        "out": 91,
        "end_out": 92,
        "silence": 93,
        "say": 94,
        "call": 95,
        "end_call": 96,
    },
    "max_text_per_tick": 8,
    "max_injected_per_tick": 64,
    "audio_out": None,
}


def edited(block: str, **changes: Any) -> dict[str, Any]:
    """The Small config with keys of one block changed, or removed where the value is ``...``."""
    raw = copy.deepcopy(SMALL)
    target = raw if block == "" else raw.setdefault(block, {})
    for key, value in changes.items():
        if value is ...:
            del target[key]
        else:
            target[key] = value
    return raw


def test_config_reads_the_released_small_model() -> None:
    config = ModelConfig.from_dict(SMALL)
    text = config.text
    assert (text.num_layers, text.hidden_size, text.max_positions) == (42, 4096, 1048576)
    assert [layer for layer in range(42) if not text.layer_is_sliding[layer]] == [*range(5, 42, 6)]
    assert [layer for layer in range(42) if text.layer_is_dense[layer]] == [0, 1]
    assert (text.dense_width, text.expert_width) == (16384, 2048)
    assert (text.num_experts, text.top_k, text.num_shared) == (256, 6, 2)
    assert (text.mup, text.route_scale, text.log_scaling_floor) == (16.0, 8.0, 128000)
    assert (text.vocab_size, text.unpadded_vocab_size) == (201024, 200058)
    assert config.audio is not None and config.vision is not None
    assert (config.audio.num_mel_bins, config.audio.num_levels) == (80, 16)
    assert (config.audio.min_log10, config.audio.max_log10) == (-7.0, 2.0)
    assert config.eos_token_ids == (200006,)
    assert config.interaction is None and config.is_trained and config.init_seed is None
    folds = [(layer.t_fold, layer.hw_fold) for layer in config.vision.layers(4096)]
    widths = [(layer.in_width, layer.out_width) for layer in config.vision.layers(4096)]
    assert folds == [(1, 5), (1, 2), (1, 4), (2, 1)]
    assert widths == [(75, 128), (512, 320), (5120, 4800), (9600, 4096)]
    assert [layer.has_norm for layer in config.vision.layers(4096)] == [True, True, True, False]


def test_config_layer_kinds_have_their_own_sizes() -> None:
    raw = edited("text_config", swa_num_attention_heads=64, swa_num_key_value_heads=16)
    text = ModelConfig.from_dict(raw).text
    assert (text.heads(0), text.kv_heads(0), text.head_size(0), text.rel_len(0)) == (
        64,
        16,
        128,
        512,
    )
    assert (text.heads(5), text.kv_heads(5), text.head_size(5), text.rel_len(5)) == (
        32,
        8,
        128,
        1024,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        text.window = 1  # type: ignore[misc]


def test_config_spellings_agree(tmp_path: Path) -> None:
    for shape in ("mixed", "paged"):
        model, _ = make_hf_model(shape)
        ours = ModelConfig.from_path(save_hf(model, tmp_path / shape / "transformers"))
        hub = ModelConfig.from_path(save_hf(model, tmp_path / shape / "hub", spelling="hub"))
        assert ours == hub
        model.config.save_pretrained(tmp_path / shape / "saved")
        assert ModelConfig.from_path(tmp_path / shape / "saved") == ours


@pytest.mark.parametrize("shape", [*SHAPES, "bytes", "small"])
def test_config_to_dict_reads_back_here_and_in_transformers(shape: str, tmp_path: Path) -> None:
    if shape == "bytes":
        config = ModelConfig.from_path(BYTE_MODEL)
    elif shape == "small":
        config = ModelConfig.from_dict(SMALL)
    else:
        model, _ = make_hf_model(shape)
        config = ModelConfig.from_path(save_hf(model, tmp_path / "hf"))
    assert ModelConfig.from_dict(config.to_dict()) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert ModelConfig.from_dict(theirs.to_dict()) == config
    assert ModelConfig.from_dict(theirs.to_diff_dict()) == config


def test_config_transformers_reads_the_hub_spelling_as_we_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    theirs = AutoConfig.from_pretrained(tmp_path)
    ours = ModelConfig.from_dict(SMALL)
    text = theirs.text_config
    assert text.moe_intermediate_size == ours.text.expert_width
    assert text.intermediate_size == ours.text.dense_width
    assert [kind == "dense" for kind in text.mlp_layer_types] == list(ours.text.layer_is_dense)
    assert ModelConfig.from_dict(theirs.to_dict()) == ours


@pytest.mark.parametrize(
    ("block", "key", "value"),
    [
        ("", "tie_word_embeddings", True),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "sconv_kernel_size", 3),
        ("text_config", "conv_kernel_size", 5),
        ("text_config", "q_bias", True),
        ("text_config", "o_bias", True),
        ("text_config", "use_embed_norm", False),
        ("text_config", "use_sconv", False),
        ("text_config", "use_gate_bias", False),
        ("text_config", "final_logit_softcapping", 30.0),
        ("text_config", "gate_activation", "softmax"),
        ("text_config", "norm_after_topk", False),
        ("text_config", "use_global_scale", False),
        ("text_config", "use_global_scale", 1),
        ("text_config", "shared_expert_sink", False),
        ("text_config", "inference_moe_w13_interleaved", False),
        ("text_config", "tie_word_embeddings", True),
        ("text_config", "model_type", "llama"),
        ("audio_config", "audio_mode", "flow"),
        ("audio_config", "bias", True),
        ("audio_config", "use_audio_norm", False),
        ("audio_config", "decoder_dmodel", 2048),
        ("audio_config", "rms_norm_eps", 1e-5),
        ("vision_config", "vision_encoder_type", "linear"),
        ("vision_config", "temporal_patch_size", 1),
        ("vision_config", "n_channels", 4),
        ("vision_config", "use_vision_norm", False),
        ("vision_config", "decoder_dmodel", 2048),
    ],
)
def test_config_refuses_what_is_not_implemented(block: str, key: str, value: object) -> None:
    raw = edited(block, **{key: value})
    if key == "conv_kernel_size":
        del raw["text_config"]["sconv_kernel_size"]
    with pytest.raises(CheckpointError, match=r"must be .*not supported") as caught:
        ModelConfig.from_dict(raw)
    assert repr(value) in str(caught.value)
    where = f"config: {block}: " if block else "config: "
    assert str(caught.value).startswith(where)


@pytest.mark.parametrize(
    ("block", "key", "named"),
    [
        ("", "text_config", "text_config"),
        ("", "audio_config", "audio_config"),
        ("", "vision_config", "vision_config"),
        ("text_config", "hidden_size", "hidden_size"),
        ("text_config", "num_hidden_layers", "num_hidden_layers"),
        ("text_config", "num_attention_heads", "num_attention_heads"),
        ("text_config", "head_dim", "head_dim"),
        ("text_config", "swa_num_key_value_heads", "swa_num_key_value_heads"),
        ("text_config", "swa_head_dim", "swa_head_dim"),
        ("text_config", "log_scaling_n_floor", "log_scaling_n_floor"),
        ("text_config", "local_layer_ids", "layer_types or local_layer_ids"),
        ("text_config", "dense_mlp_idx", "mlp_layer_types or dense_mlp_idx"),
        ("text_config", "dense_intermediate_size", "moe_intermediate_size"),
        ("text_config", "intermediate_size", "intermediate_size"),
        ("text_config", "n_routed_experts", "n_routed_experts"),
        ("text_config", "n_shared_experts", "n_shared_experts"),
        ("text_config", "route_scale", "route_scale"),
        ("text_config", "logits_mup_width_multiplier", "logits_mup_width_multiplier"),
        ("audio_config", "mel_vocab_size", "mel_vocab_size"),
        ("vision_config", "n_layers", "n_layers"),
        ("vision_config", "patch_size", "patch_size"),
        ("vision_config", "temporal_patch_size", "temporal_patch_size"),
    ],
)
def test_config_does_not_guess_what_implementations_disagree_on(
    block: str, key: str, named: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{named} is missing"):
        ModelConfig.from_dict(edited(block, **{key: ...}))


def test_config_takes_the_defaults_everybody_shares() -> None:
    raw = edited("text_config", d_rel=..., rel_extent=..., sliding_window_size=...)
    for key in ("log_scaling_alpha", "rms_norm_eps", "unpadded_vocab_size", "model_max_length"):
        del raw["text_config"][key]
    text = ModelConfig.from_dict(raw).text
    assert (text.d_rel, text.rel_extent, text.window) == (16, 1024, 512)
    assert (text.log_scaling_alpha, text.rms_eps, text.max_positions) == (0.1, 1e-6, 131072)
    assert text.unpadded_vocab_size == text.vocab_size


def test_config_sizes_that_no_layer_uses_may_be_missing() -> None:
    raw = edited("text_config", dense_mlp_idx=42, intermediate_size=16384)
    for key in ("dense_intermediate_size", "n_routed_experts", "n_shared_experts", "route_scale"):
        del raw["text_config"][key]
    assert all(ModelConfig.from_dict(raw).text.layer_is_dense)
    raw = edited("text_config", local_layer_ids=list(range(42)), head_dim=...)
    assert all(ModelConfig.from_dict(raw).text.layer_is_sliding)


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        ("text_config", {"hidden_size": 0}, r"hidden_size must be an integer of at least 1, got 0"),
        ("text_config", {"hidden_size": "big"}, r"hidden_size must be an integer .* got 'big'"),
        ("text_config", {"hidden_size": 2.5}, r"hidden_size must be an integer .* got 2.5"),
        ("text_config", {"hidden_size": True}, r"hidden_size must be an integer .* got True"),
        ("text_config", {"route_scale": float("nan")}, r"route_scale must be a positive number"),
        ("text_config", {"rms_norm_eps": 0}, r"rms_norm_eps must be a positive number, got 0"),
        ("text_config", {"num_attention_heads": 30}, r"multiple of num_kv_heads = 8, got 30"),
        ("text_config", {"num_experts_per_tok": 257}, r"at most num_experts = 256, got 257"),
        ("text_config", {"n_shared_experts": 0}, r"n_shared_experts must be an integer of at"),
        ("text_config", {"unpadded_vocab_size": 201025}, r"unpadded_vocab_size must be 1 to"),
        ("text_config", {"local_layer_ids": [42]}, r"local_layer_ids must list indices below 42"),
        ("text_config", {"layer_types": ["hybrid"]}, r"layer_types must be a list of 42 entries"),
        ("text_config", {"layer_types": ["full"] * 42}, r"layer_types entries must be one of"),
        ("text_config", {"layer_types": ["hybrid"] * 42}, r"local_layer_ids disagree"),
        ("text_config", {"mlp_layer_types": ["dense"] * 42}, r"dense_mlp_idx disagree"),
        ("text_config", {"moe_intermediate_size": 3072}, r"moe_intermediate_size = 3072, got 2048"),
        ("text_config", {"max_position_embeddings": 7}, r"spellings of one value disagree"),
        ("text_config", {"rope_theta": 1e4}, r"unknown key rope_theta = 10000.0"),
        ("audio_config", {"mel_bins": 80}, r"unknown key mel_bins = 80"),
        ("audio_config", {"dmel_min_value": 3.0}, r"min_log10 must be below max_log10 = 2.0"),
        ("audio_config", {"mel_vocab_size": 1}, r"mel_vocab_size must be an integer of at least 2"),
        ("vision_config", {"depth": 4}, r"unknown key depth = 4"),
        ("vision_config", {"patch_size": 1}, r"patch_size must be an integer of at least 2"),
        ("", {"text_config": [1]}, r"text_config: expected an object, got \[1\]"),
        ("", {"eos_token_id": "stop"}, r"eos_token_id must be an id or a list of ids, got 'stop'"),
        ("", {"trained": "no"}, r"trained must be true or false, got 'no'"),
        ("", {"init_seed": -1}, r"init_seed must be an integer of at least 0, got -1"),
        ("", {"model_type": "inkling2"}, r"model_type must be .*got 'inkling2' \(architectures"),
        ("", {"model_type": "llama"}, r"model_type must be .*got 'llama'"),
        (
            "",
            {"quantization_config": {"quant_method": "modelopt"}},
            r"quantised weights \(modelopt",
        ),
        ("", {"quantization": {"bits": 4}}, r"quantization: quantised weights \(unnamed\)"),
    ],
)
def test_config_refuses_values(block: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict(edited(block, **changes))


def test_config_ignores_bookkeeping_and_draft_heads() -> None:
    raw = edited("text_config", transformers_version="5", use_cache=True, num_mtp_layers=8)
    raw |= {"dtype": "bfloat16", "unsloth_version": "1", "auto_map": {}}
    raw["vision_config"]["hidden_size"] = 1024
    assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(SMALL)


def test_config_reads_eos_of_either_level_and_lists() -> None:
    assert ModelConfig.from_dict(edited("", eos_token_id=[1, 2])).eos_token_ids == (1, 2)
    raw = edited("", eos_token_id=...)
    assert ModelConfig.from_dict(raw).eos_token_ids == ()
    raw["text_config"]["eos_token_id"] = 9
    assert ModelConfig.from_dict(raw).eos_token_ids == (9,)


def test_config_reads_the_dmel_range_of_the_processor(tmp_path: Path) -> None:
    raw = edited("audio_config", dmel_min_value=..., dmel_max_value=...)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    audio = ModelConfig.from_path(tmp_path).audio
    assert audio is not None and (audio.min_log10, audio.max_log10) == (-7.0, 2.0)
    processor = tmp_path / "processor_config.json"
    processor.write_text(json.dumps({"dmel_min_value": -1.5, "dmel_max_value": 2.5}))
    audio = ModelConfig.from_path(tmp_path).audio
    assert audio is not None and (audio.min_log10, audio.max_log10) == (-1.5, 2.5)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(CheckpointError, match=r"dmel_min_value = -7.0 disagrees .* has -1.5"):
        ModelConfig.from_path(tmp_path)


def test_config_file_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        ModelConfig.from_path(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not readable JSON"):
        ModelConfig.from_path(tmp_path)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: expected a JSON object, got list"):
        ModelConfig.from_path(tmp_path)
    file.write_text(json.dumps(edited("text_config", hidden_act="gelu")))
    with pytest.raises(CheckpointError, match=rf"{file}: text_config: hidden_act must be 'silu'"):
        ModelConfig.from_path(tmp_path)


def test_config_reads_the_interaction_block() -> None:
    config = ModelConfig.from_dict(edited("", interaction=INTERACTION, trained=False, init_seed=3))
    assert config.interaction is not None
    assert (config.interaction.tokens.tick, config.interaction.tokens.end_call) == (90, 96)
    assert (config.interaction.max_text_per_tick, config.interaction.max_injected_per_tick) == (
        8,
        64,
    )
    assert (config.is_trained, config.init_seed) == (False, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"interaction: version must be 1, got 2"),
        ({"tick_ms": 100}, r"interaction: tick_ms must be 200, got 100"),
        ({"max_text_per_tick": 0}, r"interaction: max_text_per_tick must be an integer"),
        ({"budget": 1}, r"interaction: unknown key budget = 1"),
        ({"tokens": {**INTERACTION["tokens"], "tick": 91}}, r"tokens: ids must be distinct"),
        ({"tokens": {**INTERACTION["tokens"], "say": 200058}}, r"say must be below .* = 200058"),
        ({"tokens": {**INTERACTION["tokens"], "hum": 1}}, r"tokens: unknown key hum = 1"),
        ({"tokens": {"tick": 1}}, r"interaction.tokens: out is missing"),
    ],
)
def test_config_refuses_interaction_blocks(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict(edited("", interaction={**INTERACTION, **changes}))


def test_config_refuses_an_audio_out_head_it_does_not_know() -> None:
    raw = edited("", interaction={**INTERACTION, "audio_out": {"frames": 20}})
    with pytest.raises(CheckpointError, match=r"interaction\.audio_out: width is missing"):
        ModelConfig.from_dict(raw)


def test_config_text_only() -> None:
    model, _ = make_hf_model("text")
    config = ModelConfig.from_dict(model.config.to_dict())
    assert config.audio is None and config.vision is None
    assert (config.text.window, config.text.rel_extent, config.text.log_scaling_floor) == (7, 11, 5)
    assert config.eos_token_ids == (90,)
    with pytest.raises(CheckpointError, match=r"audio and vision must be given together"):
        dataclasses.replace(config, vision=VisionConfig(patch_size=4, num_layers=1))


def test_config_hub_helper_writes_the_release_keys() -> None:
    _, hf_config = make_hf_model("paged")
    raw = hub_config(hf_config)
    assert set(raw["text_config"]) == set(SMALL_TEXT)
    assert set(raw["audio_config"]) == set(SMALL_AUDIO)
    assert set(raw["vision_config"]) == set(SMALL_VISION)


@pytest.mark.parametrize("patch_size", [2, 4, 6, 14, 16, 20, 40])
def test_hmlp_plan_is_that_of_transformers(patch_size: int) -> None:
    for num_layers in (1, 2, 3, 4, 5, 6, 9, 24):
        scales = plan_out_scales(2, patch_size, num_layers, 3).tolist()
        layers = VisionConfig(patch_size=patch_size, num_layers=num_layers).layers(77)
        assert len(layers) == num_layers
        for i, layer in enumerate(layers):
            (t0, h0, _, c0), (t1, h1, _, c1) = scales[i], scales[i + 1]
            assert (layer.t_fold, layer.hw_fold) == (t1 // t0, h1 // h0)
            assert layer.in_width == c0 * layer.t_fold * layer.hw_fold**2
            assert layer.out_width == (77 if i == num_layers - 1 else c1)


def test_bundled_nano_is_what_its_script_writes(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "make_nano.py"
    spec = importlib.util.spec_from_file_location("make_nano", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (bundled_path("nano") / name).read_bytes()
    config = ModelConfig.from_path(bundled_path("nano"))
    assert config == module.nano_config()
    assert not config.is_trained and config.interaction is not None


def test_bundled_path_refuses_other_names() -> None:
    with pytest.raises(InvalidArgument, match=r"name: expected a bundled model, .*'nano'.*'mega'"):
        bundled_path("mega")
