import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import InklingForCausalLM, InklingForConditionalGeneration

from byte_model import BYTE_MODEL
from hf_checkpoints import SHAPES, hub_tensors, make_hf_model, save_hf, write_safetensors
from tml_core.errors import CheckpointError, InvalidArgument
from tml_core.model.config import ModelConfig
from tml_core.model.weights import (
    expected_shapes,
    is_kept_fp32,
    load_weights,
    random_weights,
    save_weights,
)

MULTIMODAL = [shape for shape in SHAPES if "audio" in SHAPES[shape]]


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformers state dict under the names of the multimodal model."""
    if any(name.startswith("model.language_model.") for name in state):
        return state
    return {name.replace("model.", "model.language_model.", 1): t for name, t in state.items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name


def hf_load(config: ModelConfig, directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    cls = InklingForCausalLM if config.audio is None else InklingForConditionalGeneration
    return canonical(cls.from_pretrained(directory, dtype=dtype).state_dict())


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, ModelConfig, dict[str, Tensor]]:
    """A checkpoint directory in transformers spelling, its config, and its tensors."""
    model, _ = make_hf_model("mixed")
    directory = save_hf(model, tmp_path / "mixed")
    return directory, ModelConfig.from_path(directory), dict(model.state_dict())


@pytest.mark.parametrize("shape", SHAPES)
def test_expected_shapes_are_those_of_transformers(shape: str) -> None:
    model, hf_config = make_hf_model(shape)
    shapes = expected_shapes(ModelConfig.from_dict(hf_config.to_dict()))
    theirs = canonical(model.state_dict())
    assert shapes == {name: tuple(value.shape) for name, value in theirs.items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_load_weights_transformers_spelling(shape: str, shards: int, tmp_path: Path) -> None:
    model, _ = make_hf_model(shape)
    save_hf(model, tmp_path, shards=shards)
    config = ModelConfig.from_path(tmp_path)
    weights = load_weights(tmp_path, config, torch.float32)
    assert_same(weights, canonical(model.state_dict()))
    assert list(weights) == list(expected_shapes(config))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("shape", MULTIMODAL)
def test_load_weights_hub_spelling(shape: str, shards: int, tmp_path: Path) -> None:
    model, _ = make_hf_model(shape)
    save_hf(model, tmp_path, spelling="hub", shards=shards)
    config = ModelConfig.from_path(tmp_path)
    weights = load_weights(tmp_path, config, torch.float32)
    assert_same(weights, dict(model.state_dict()))
    # The oracle agrees that these files hold those values.
    assert_same(hf_load(config, tmp_path, torch.float32), weights)


@pytest.mark.parametrize("shape", SHAPES)
def test_load_weights_reads_what_save_pretrained_writes(shape: str, tmp_path: Path) -> None:
    model, _ = make_hf_model(shape)
    for is_hub_spelling in (True, False):
        directory = tmp_path / str(is_hub_spelling)
        model.save_pretrained(directory, save_original_format=is_hub_spelling)
        config = ModelConfig.from_path(directory)
        weights = load_weights(directory, config, torch.float32)
        assert_same(weights, canonical(model.state_dict()))
    if shape in MULTIMODAL:
        theirs = load_file(tmp_path / "True" / "model.safetensors")
        assert_same(theirs, hub_tensors(dict(model.state_dict())))


def test_load_weights_shards_without_an_index(mixed, tmp_path: Path) -> None:
    _, config, tensors = mixed
    write_safetensors(tensors, tmp_path, shards=3, has_index=False)
    assert_same(load_weights(tmp_path, config, torch.float32), tensors)


@pytest.mark.parametrize("shape", SHAPES)
def test_load_weights_keeps_in_float32_what_transformers_keeps(shape: str, tmp_path: Path) -> None:
    model, _ = make_hf_model(shape)
    save_hf(model, tmp_path)
    config = ModelConfig.from_path(tmp_path)
    weights = load_weights(tmp_path, config, torch.bfloat16)
    assert_same(weights, hf_load(config, tmp_path, torch.bfloat16))
    kept = {name.split(".", 4)[-1] for name, t in weights.items() if t.dtype == torch.float32}
    assert kept == {
        "attn_sconv.conv1d.weight",
        "mlp_sconv.conv1d.weight",
        "self_attn.k_sconv.conv1d.weight",
        "self_attn.v_sconv.conv1d.weight",
        "mlp.gate.e_score_correction_bias",
        "mlp.gate.global_scale",
    }
    assert all(is_kept_fp32(name) == (t.dtype == torch.float32) for name, t in weights.items())


def test_load_weights_of_a_bfloat16_file(tmp_path: Path) -> None:
    model, _ = make_hf_model("mixed", dtype=torch.bfloat16)
    save_hf(model, tmp_path, spelling="hub")
    config = ModelConfig.from_path(tmp_path)
    state = dict(model.state_dict())
    assert_same(load_weights(tmp_path, config, torch.bfloat16), state)
    exact = {name: value.float() for name, value in state.items()}
    assert_same(load_weights(tmp_path, config, torch.float32), exact)


@pytest.mark.parametrize("spelling", ["transformers", "hub"])
def test_load_weights_pads_an_unpadded_head(spelling: str, tmp_path: Path) -> None:
    model, _ = make_hf_model("paged")
    state = dict(model.state_dict())
    save_hf(model, tmp_path, spelling=spelling)
    config = ModelConfig.from_path(tmp_path)
    cut = {**state, "lm_head.weight": state["lm_head.weight"][:300].clone()}
    write_safetensors(hub_tensors(cut) if spelling == "hub" else cut, tmp_path)
    head = load_weights(tmp_path, config, torch.float32)["lm_head.weight"]
    assert head.shape == (320, 128)
    assert torch.equal(head[:300], state["lm_head.weight"][:300])
    assert head[300:].count_nonzero() == 0


def test_load_weights_leaves_draft_heads_aside(mixed, tmp_path: Path) -> None:
    _, config, tensors = mixed
    draft = {"model.mtp.layers.0.input_proj.weight": torch.zeros(3)}
    write_safetensors({**tensors, **draft}, tmp_path)
    assert_same(load_weights(tmp_path, config, torch.float32), tensors)

    separate = tmp_path / "separate"
    separate.mkdir()
    write_safetensors(tensors, separate, shards=2, has_index=False)
    save_file({"layers.0.input_proj.weight": torch.zeros(3)}, separate / "mtp.safetensors")
    assert_same(load_weights(separate, config, torch.float32), tensors)

    indexed = tmp_path / "indexed"
    indexed.mkdir()
    write_safetensors(tensors, indexed, shards=2)
    index_file = indexed / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"] |= dict.fromkeys(draft, "mtp.safetensors")  # listed, not downloaded
    index_file.write_text(json.dumps(index))
    assert_same(load_weights(indexed, config, torch.float32), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.language_model.layers.3.mlp.experts.down_proj": None},
            r"tensor model.language_model.layers.3.mlp.experts.down_proj is missing .*\(1 of \d+",
        ),
        (
            {"model.language_model.layers.6.input_layernorm.weight": torch.ones(64)},
            r"unexpected tensor model.language_model.layers.6.input_layernorm.weight in model.safe",
        ),
        ({"model.llm.layers.0.attn.wz.weight": torch.ones(2)}, r"unexpected tensor model.llm.lay"),
        (
            {"model.language_model.norm.weight": torch.ones(63)},
            r"model.language_model.norm.weight in model.safetensors must be \[64\], got \[63\]",
        ),
        (
            {"lm_head.weight": torch.ones(127, 64)},
            r"lm_head.weight in model.safetensors must be \[128, 64\], got \[127, 64\]",
        ),
        (
            {"model.llm.norm.weight": torch.ones(64)},
            r"model.language_model.norm.weight is stored twice",
        ),
        (
            {
                "model.language_model.layers.2.mlp.experts.gate_up_proj": None,
                "model.llm.layers.2.mlp.experts.w13_weight": torch.ones(8, 63, 64),
            },
            r"layers.2.mlp.experts.w13_weight in model.safetensors must be \[8, 64, 64\], got \[8,",
        ),
        (
            {"model.language_model.norm.weight": torch.ones(64, dtype=torch.int32)},
            r"model.language_model.norm.weight in .* is quantised \(stored as I32\)",
        ),
    ],
)
def test_load_weights_refuses_wrong_tensors(mixed, tmp_path: Path, change, message: str) -> None:
    _, config, tensors = mixed
    wrong = {name: t for name, t in {**tensors, **change}.items() if t is not None}
    write_safetensors(wrong, tmp_path)
    with pytest.raises(CheckpointError, match=rf"^load_weights: .*{message}"):
        load_weights(tmp_path, config, torch.float32)


@pytest.mark.parametrize(
    ("weight", "scales", "named"),
    [
        (
            torch.zeros(8, 64, 32, dtype=torch.uint8),
            {".scale": torch.zeros(8, 64, 4).to(torch.float8_e4m3fn), ".scale2": torch.ones(8)},
            "NVFP4 or MXFP4",
        ),
        (
            torch.zeros(8, 64, 64).to(torch.float8_e4m3fn),
            {"_scale": torch.zeros(8, 64, 2, dtype=torch.uint8)},
            "MXFP8 or FP8",
        ),
    ],
)
def test_load_weights_refuses_quantised_releases(
    mixed, tmp_path: Path, weight: Tensor, scales: dict[str, Tensor], named: str
) -> None:
    _, config, tensors = mixed
    hub = hub_tensors(tensors)
    name = "model.llm.layers.4.mlp.experts.w13_weight"
    hub[name] = weight
    hub |= {name + suffix: scale for suffix, scale in scales.items()}
    write_safetensors(hub, tmp_path)
    with pytest.raises(CheckpointError, match=rf"w13_weight\S* in .* is quantised \({named}"):
        load_weights(tmp_path, config, torch.bfloat16)


def test_load_weights_refuses_stray_scales(mixed, tmp_path: Path) -> None:
    _, config, tensors = mixed
    name = "model.llm.layers.4.mlp.experts.w13_weight.scale2"
    write_safetensors({**tensors, name: torch.ones(8)}, tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name} in .* is quantised"):
        load_weights(tmp_path, config, torch.bfloat16)


@pytest.mark.parametrize("kept", [0.6, 0.001])
def test_load_weights_names_a_truncated_file(mixed, kept: float) -> None:
    directory, config, _ = mixed
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=rf"load_weights: {file} is damaged"):
        load_weights(directory, config, torch.float32)


def test_load_weights_names_a_file_that_is_not_safetensors(mixed) -> None:
    directory, config, _ = mixed
    (directory / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or not a safetensors"):
        load_weights(directory, config, torch.float32)


def test_load_weights_names_missing_files(mixed, tmp_path: Path) -> None:
    _, config, tensors = mixed
    empty = tmp_path / "empty"
    with pytest.raises(CheckpointError, match=r"load_weights: .*empty is not a directory"):
        load_weights(empty, config, torch.float32)
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"load_weights: no .safetensors file in .*empty"):
        load_weights(empty, config, torch.float32)
    write_safetensors(tensors, tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lists model-00002-of-00003.safetensors, which is"):
        load_weights(tmp_path, config, torch.float32)
    for content in ("{", "[]", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"index.json is not a safetensors index"):
            load_weights(tmp_path, config, torch.float32)


def test_weights_refuse_other_dtypes(mixed) -> None:
    directory, config, _ = mixed
    with pytest.raises(InvalidArgument, match=r"load_weights: dtype must be .* got torch.float16"):
        load_weights(directory, config, torch.float16)
    with pytest.raises(InvalidArgument, match=r"random_weights: dtype must be .* got torch.int8"):
        random_weights(config, 0, torch.int8)


def test_random_weights_are_a_function_of_seed_and_name(mixed) -> None:
    _, config, _ = mixed
    weights = random_weights(config, 5, torch.float32)
    assert_same(random_weights(config, 5, torch.float32), weights)
    assert {name: tuple(t.shape) for name, t in weights.items()} == expected_shapes(config)
    other = random_weights(config, 6, torch.float32)
    assert all(not torch.equal(weights[name], other[name]) for name in weights)
    rounded = random_weights(config, 5, torch.bfloat16)
    for name, value in weights.items():
        dtype = torch.float32 if is_kept_fp32(name) else torch.bfloat16
        assert torch.equal(rounded[name], value.to(dtype)), name
    # Layers of one shape differ, and no tensor is constant.
    first, second = (
        weights[f"model.language_model.layers.{i}.mlp_sconv.conv1d.weight"] for i in (0, 1)
    )
    assert not torch.equal(first, second)
    assert all(value.numel() == 1 or value.std() > 0.01 for value in weights.values())


def test_random_weights_stand_in_for_a_directory_without_files(mixed, tmp_path: Path) -> None:
    _, config, tensors = mixed
    seeded = dataclasses.replace(config, init_seed=7)
    weights = load_weights(tmp_path, seeded, torch.bfloat16)
    assert_same(weights, random_weights(config, 7, torch.bfloat16))
    # Files win over the seed, even when they are not enough.
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is missing"):
        load_weights(tmp_path, seeded, torch.bfloat16)


def test_random_weights_are_the_same_on_every_machine() -> None:
    config = ModelConfig.from_path(BYTE_MODEL)
    weights = load_weights(BYTE_MODEL, config, torch.bfloat16)
    digests = {
        name: hashlib.sha256(weights[name].view(torch.int16).numpy().tobytes()).hexdigest()[:16]
        for name in ("lm_head.weight", "model.language_model.layers.3.mlp.experts.gate_up_proj")
    }
    assert digests == {
        "lm_head.weight": "fe102469de7f3e06",
        "model.language_model.layers.3.mlp.experts.gate_up_proj": "7e873dec19342a7c",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_save_weights_reads_back_here_and_in_transformers(
    shape: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    _, hf_config = make_hf_model(shape)
    config = ModelConfig.from_dict(hf_config.to_dict())
    weights = random_weights(config, 1, dtype)
    save_weights(tmp_path / "new", weights, config)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert ModelConfig.from_path(tmp_path / "new") == config
    assert_same(load_weights(tmp_path / "new", config, dtype), weights)
    assert_same(hf_load(config, tmp_path / "new", dtype), weights)
    # Saving over what was loaded from there is safe although loading maps the file.
    loaded = load_weights(tmp_path / "new", config, dtype)
    save_weights(tmp_path / "new", loaded, config)
    assert_same(load_weights(tmp_path / "new", config, dtype), weights)


def test_save_weights_refuses_other_models(mixed, tmp_path: Path) -> None:
    _, config, tensors = mixed
    partial = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
    with pytest.raises(InvalidArgument, match=r"weights: lm_head.weight is missing"):
        save_weights(tmp_path / "out", partial, config)
    with pytest.raises(InvalidArgument, match=r"weights: extra is not part of this model"):
        save_weights(tmp_path / "out", {**tensors, "extra": torch.ones(1)}, config)
    with pytest.raises(InvalidArgument, match=r"weights: lm_head.weight must be \[128, 64\], got"):
        save_weights(tmp_path / "out", {**tensors, "lm_head.weight": torch.ones(1)}, config)
    assert not (tmp_path / "out").exists()
