"""Models, sequences and sessions on the device's kernels: on a device where there is one, and on
the host, for which `make test-cpp` builds ``_fibers``, the same bindings over the same kernel files
with every CUDA thread a fiber, and runs this.

There CPU tensors stand for device memory. All that is above the kernels is what a device would run:
argument order, shapes, layouts, page tables, snapshots.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from byte_model import BYTE_MODEL
from fibers_kit import ROOT, fibers
from session_kit import noise, spoken
from tml_core import Session
from tml_core.engine import host
from tml_core.engine.model import Model
from tml_core.errors import InvalidArgument, SnapshotError, Unsupported
from tml_core.media.segments import Audio, Block, Image, Tokens
from tml_core.model.backbone import Backbone
from tml_core.model.config import ModelConfig
from tml_core.model.cuda_backbone import CudaBackbone
from tml_core.model.cuda_decoder import require_shapes
from tml_core.model.cuda_graphs import Captured, StepGraphs
from tml_core.model.cuda_store import CudaKvStore, DeviceStep
from tml_core.model.kv_store import KvStore
from tml_core.model.tokenizer import load_tokenizer
from tml_core.model.weights import random_weights
from tml_core.ops import cuda
from tml_core.ops._common import huge_empty
from tml_core.ops.hmlp import HmlpWeights, hmlp
from tml_core.ops.linear import pack_weight
from tml_core.ops.lm_head import SampleRows, pack_allowed
from tml_core.sequence.store import SequenceStore

HOST = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True, params=["fibers", "device"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the kernels run."""
    if request.param == "device":
        if why := cuda.problem():
            pytest.skip(f"{why}: run `make gpu-check` on an H100 or H200")
        yield torch.device("cuda", 0)
        return
    module = fibers()
    if module is None:
        pytest.skip("needs _fibers of today's kernels: make test-cpp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_ext", module)
        # torch aligns host memory less than a device's.
        patch.setattr(cuda, "_workspace", lambda size, _: huge_empty((size,), torch.uint8))
        yield HOST


TEXT: dict[str, Any] = {
    "model_type": "inkling_text",
    "vocab_size": 96,
    "unpadded_vocab_size": 91,
    "hidden_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 64,
    "sliding_window_size": 150,
    "d_rel": 4,
    "rel_extent": 40,
    "log_scaling_n_floor": 5,
    "log_scaling_alpha": 0.1,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "route_scale": 2.0,
    "logits_mup_width_multiplier": 2.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1 << 20,
    "conv_kernel_size": 4,
    "hidden_act": "silu",
    "eos_token_id": 90,
}


def config_of(**changes: Any) -> ModelConfig:
    text = TEXT | changes
    return ModelConfig.from_dict(
        {
            "architectures": ["InklingForConditionalGeneration"],
            "model_type": "inkling_mm_model",
            "text_config": text,
            "audio_config": {
                "model_type": "inkling_audio",
                "n_mel_bins": 6,
                "mel_vocab_size": 5,
                "text_hidden_size": text["hidden_size"],
            },
            "vision_config": {
                "model_type": "inkling_vision",
                "patch_size": 12,
                "temporal_patch_size": 2,
                "num_channels": 3,
                "n_layers": 3,
                "text_hidden_size": text["hidden_size"],
            },
            "image_token_id": 88,
            "audio_token_id": 89,
        }
    )


class PoisonedStore(CudaKvStore):
    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device == HOST:
            return huge_empty(shape, dtype).fill_(float("nan"))
        return super().empty(shape, dtype).fill_(float("nan"))


class Rig:
    """The same weights on the CPU's kernels and on the device's."""

    def __init__(self, device: torch.device, num_pages: int = 12) -> None:
        self.device = device
        self.config = config_of()
        text = self.config.text
        weights = random_weights(self.config, 3, torch.bfloat16)
        self.cpu = Model(
            self.config,
            Backbone(self.config, dict(weights), torch.bfloat16),
            SequenceStore(KvStore(text, torch.bfloat16, 3, 1024, num_pages, num_pages), "rig"),
            max_step_tokens=64,
        )
        self.kv = PoisonedStore(text, 3, 1024, num_pages, num_pages, device=device)
        self.backbone = CudaBackbone(self.config, dict(weights), device)
        self.model = Model(
            self.config,
            self.backbone,
            SequenceStore(self.kv, "rig"),
            max_step_tokens=64,
        )

    def segments(self) -> list[Any]:
        generator = torch.Generator().manual_seed(1)

        def ids(count: int) -> Tensor:
            return torch.randint(5, 80, (count,), generator=generator)

        bins = torch.randint(0, 5, (4, 6), generator=generator).int()
        patches = torch.randn(3, 2, 12, 12, 3, generator=generator)
        block = Block([Image(patches=patches), Tokens(ids(2))])
        return [Tokens(ids(19)), Audio(bins=bins), block, Tokens(ids(110)), Tokens(ids(30))]


@pytest.fixture(scope="module")
def rig(device: torch.device) -> Rig:
    return Rig(device)


@pytest.fixture(scope="module")
def whole(rig: Rig) -> Tensor:
    return rig.model.logits(rig.segments())


def test_the_model_is_the_model(rig: Rig, whole: Tensor) -> None:
    expected = rig.cpu.logits(rig.segments())
    assert whole.shape == expected.shape == (168, 91)
    # bf16 roundings that fall otherwise, through three layers; a routing near a tie moves more.
    error = (whole.cpu() - expected).abs().amax(1) / expected.abs().amax()
    assert float(error.median()) < 0.02
    assert float(error.max()) < 0.2


def test_any_cut_has_the_same_bits(rig: Rig, whole: Tensor) -> None:
    first, audio, block, more, last = rig.segments()
    with rig.model.new_sequence() as sequence, rig.model.new_sequence() as other:
        parts = [sequence.extend([first]), sequence.extend([audio, block])]
        other.extend([last])
        for start in range(0, 110, 37):
            parts.append(sequence.extend([Tokens(more.ids[start : start + 37])]))
        parts.append(sequence.extend([last]))
    assert torch.equal(torch.cat(parts), whole)


def test_forks_and_rewinds_have_the_same_bits(rig: Rig, whole: Tensor) -> None:
    *most, last = rig.segments()
    with rig.model.new_sequence() as sequence:
        sequence.extend(most)
        mark = sequence.mark()
        sequence.extend([Tokens([7] * 9)])
        with sequence.fork(mark) as fork:
            sequence.rewind(mark)
            sequence.extend([Tokens([8] * 3)])
            assert torch.equal(fork.extend([last]), whole[-30:])
        sequence.rewind(mark)
        assert torch.equal(sequence.extend([last]), whole[-30:])
    rig.model.store.audit()


def test_a_snapshot_goes_on_with_the_same_bits(rig: Rig, whole: Tensor, tmp_path: Path) -> None:
    *most, last = rig.segments()
    with rig.model.new_sequence() as sequence:
        sequence.extend(most)
        sequence.snapshot(tmp_path / "a.tml")
        sequence.extend([Tokens([3] * 20)])
    with rig.model.restore_sequence(tmp_path / "a.tml") as sequence:
        sequence.snapshot(tmp_path / "b.tml")
        assert torch.equal(sequence.extend([last]), whole[-30:])
    assert (tmp_path / "a.tml").read_bytes() == (tmp_path / "b.tml").read_bytes()
    with pytest.raises(SnapshotError, match="layout is sm_90, expected cpu"):
        rig.cpu.restore_sequence(tmp_path / "a.tml")


def test_stale_keys_do_not_reach_a_file(device: torch.device) -> None:
    pages = torch.randn(3, 2, 1, 2, 128 * 64).bfloat16().to(device)
    target = torch.zeros(4, 2, 1, 2, 128 * 64, dtype=torch.bfloat16, device=device)
    ids = torch.tensor([2, 0], dtype=torch.int32, device=device)
    to = torch.tensor([1, 3], dtype=torch.int32, device=device)
    cuda.copy_pages(pages, target, source_ids=ids, target_ids=to, last_len=45)
    assert torch.equal(target[1], pages[2])
    # [core tiles of keys, of channels, keys, channels]
    keys = target[3].view(2, 2, 16, 8, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(4, 128, 64)
    want = pages[0].view(2, 2, 16, 8, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(4, 128, 64)
    assert torch.equal(keys[:, :45], want[:, :45])
    assert not keys[:, 45:].any()
    assert not target[0].any() and not target[2].any()
    with pytest.raises(InvalidArgument, match="target must be 3 pages like source, got 4"):
        cuda.copy_pages(pages, target)
    with pytest.raises(InvalidArgument, match=r"last_len must be in \[1, 128\], got 0"):
        cuda.copy_pages(pages, target[:3], last_len=0)


def test_hmlp_is_the_op(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.2).bfloat16()

    folds = ((1, 2), (2, 3))
    plain = [randn(20, 12), randn(24, 360)]
    norms, final = (randn(20) + 1,), randn(24) + 1
    patches = torch.randn(5, 2, 6, 6, 3, generator=generator)
    ours = cuda.CudaHmlp(
        folds,
        tuple(cuda.pack_weight(w.to(device)) for w in plain),
        tuple(norm.to(device) for norm in norms),
        final.to(device),
    )
    theirs = HmlpWeights(folds, tuple(pack_weight(w) for w in plain), norms, final)
    assert ours.patch_shape == theirs.patch_shape == (2, 6, 6, 3)
    got = cuda.hmlp(patches.to(device), ours)
    torch.testing.assert_close(got.cpu(), hmlp(patches, theirs), rtol=2**-5, atol=2**-5)
    assert torch.equal(cuda.hmlp(patches[3:4].to(device), ours), got[3:4])
    with pytest.raises(InvalidArgument, match=r"cuda_hmlp: patches must be \[P, 2, 6, 6, 3\]"):
        cuda.hmlp(patches[:, :1].to(device), ours)


def test_draws_are_of_the_logits(rig: Rig) -> None:
    with rig.model.new_sequence() as sequence:
        (h_TD,) = rig.model.runner.run([rig.model.prepare(sequence, rig.segments()[:1])])
    logits = rig.backbone.logits(h_TD).cpu()
    allowed = np.ones((19, 91), np.bool_)
    allowed[0, int(logits[0].argmax())] = False
    rows = SampleRows(
        temperature_B=torch.zeros(19),
        top_k_B=torch.zeros(19, dtype=torch.int32),
        top_p_B=torch.ones(19),
        seed_B=torch.arange(19),
        position_B=torch.arange(19),
        allowed_BW=pack_allowed(torch.from_numpy(allowed)),
    )
    tokens, logprobs = rig.backbone.sample(h_TD, rows)
    assert torch.equal(tokens[1:], logits[1:].argmax(1))
    assert tokens[0] == logits[0].topk(2).indices[1]
    assert torch.equal(rig.backbone.logprobs(h_TD, tokens).cpu(), logprobs)
    out = torch.zeros(19, dtype=torch.int64), torch.zeros(19)
    assert rig.backbone.sample(h_TD, rows, out_B=out)[0] is out[0]
    assert torch.equal(out[1], logprobs)


def talking_model(device: torch.device) -> Model:
    """Two layers of the model that spells bytes."""
    raw = json.loads((BYTE_MODEL / "config.json").read_text())
    raw["text_config"] |= {
        "num_hidden_layers": 2,
        "layer_types": ["hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse"],
    }
    raw["interaction"]["max_text_per_tick"] = 3
    config = ModelConfig.from_dict(raw)
    weights = random_weights(config, 5, torch.bfloat16)
    kv = PoisonedStore(config.text, 3, 2048, 16, 16, device=device)
    backbone = CudaBackbone(config, weights, device)
    tokenizer = load_tokenizer(BYTE_MODEL)
    return Model(config, backbone, SequenceStore(kv, "talking"), tokenizer=tokenizer)


def test_sessions_live_on_it_and_do_not_see_each_other(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_warm_up", lambda *_: None)  # a picture takes fibers minutes
    model = talking_model(device)

    def heard(session: Session, seed: int) -> tuple[list[int], list[float]]:
        tokens, logprobs = spoken(tuple(session.append(noise(seed), deadline_ms=None)))
        return tokens, logprobs.tolist()

    with Session(model, seed=1) as session:
        alone = [heard(session, 1), heard(session, 2)]
        ids = session.token_ids().tolist()
    assert any(tokens for tokens, _ in alone)
    with Session(model, seed=1) as session, Session(model, seed=2) as other:
        turns = []
        for seed in (1, 2):
            turns.append(session.append(noise(seed), deadline_ms=None))
            beside = tuple(other.append(noise(7), deadline_ms=None))
            assert beside
        assert session.token_ids().tolist() == ids
    for turn, (tokens, logprobs) in zip(turns, alone, strict=True):
        got, of = spoken(tuple(turn))
        assert (got, of.tolist()) == (tokens, logprobs)
    model.store.audit()


class Recorder:
    """Stands for CUDA graphs: a replay does the step again, into the memory of the first."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.num_captures = self.num_replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> Captured:
        self.num_captures += 1
        h_TD = torch.empty(0, dtype=self.dtype, device=self.device)

        def replay() -> None:
            self.num_replays += 1
            h_TD.set_(run())

        return Captured(replay, h_TD)


def test_replayed_steps_have_the_same_bits(rig: Rig) -> None:
    recorder = Recorder(torch.bfloat16, rig.device)
    weights = random_weights(rig.config, 3, torch.bfloat16)
    graphed = CudaBackbone(rig.config, weights, rig.device, capture=recorder)
    kv = PoisonedStore(rig.config.text, 3, 1024, 12, 12, device=rig.device)
    model = Model(rig.config, graphed, SequenceStore(kv, "rig"), max_step_tokens=64)
    ids = [5, 9, 11, 60, 33, 8, 12]
    with rig.model.new_sequence() as sequence:
        expected = sequence.extend([Tokens(ids)])
    with model.new_sequence() as other, model.new_sequence() as sequence:
        other.extend([Tokens([1, 2])])
        got = [sequence.extend([Tokens([token_id])]) for token_id in ids]
    assert (recorder.num_captures, recorder.num_replays) == (1, 5)
    assert torch.equal(torch.cat(got), expected)


def test_tokens_one_by_one_have_the_same_bits(rig: Rig, whole: Tensor) -> None:
    """On a device: replays of a graph, once a step has come twice."""
    ids = rig.segments()[0].ids[:6].tolist()
    with rig.model.new_sequence() as sequence:
        parts = [sequence.extend([Tokens([token_id])]) for token_id in ids]
    assert torch.equal(torch.cat(parts), whole[:6])


def test_graphs_are_few_and_of_steps_that_come_again() -> None:
    recorder = Recorder(torch.float32, HOST)
    graphs = StepGraphs(
        lambda x_TD, batch: x_TD * 2 + len(batch.slots), recorder, max_tokens=4, max_graphs=2
    )

    def step(num_seqs: int, num_tokens: int) -> None:
        slots = torch.zeros(num_seqs, dtype=torch.int32)
        batch = DeviceStep(slots, slots, slots, slots)
        x_TD = torch.full((num_tokens, 3), float(num_tokens))
        assert (graphs.step(x_TD, batch) == 2 * num_tokens + num_seqs).all()

    for _ in range(3):
        step(1, 1)
        step(1, 5)  # too long
    assert (graphs.num_graphs, recorder.num_replays) == (1, 1)
    for _ in range(3):
        step(2, 2)
    step(1, 1)
    for _ in range(3):
        step(1, 3)  # takes the place of (2, 2)
    assert (graphs.num_graphs, recorder.num_captures) == (2, 3)
    step(1, 1)
    step(2, 2)
    assert recorder.num_captures == 3


def test_the_bench_makes_steps(device: torch.device) -> None:
    spec = importlib.util.spec_from_file_location("gpu_step", ROOT / "bench" / "gpu_step.py")
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    assert bench.large_config(48).text.num_layers == 48
    config = config_of(layer_types=["hybrid"] * 3, mlp_layer_types=["sparse"] * 3)
    backbone = CudaBackbone(config, bench.DrawnWeights(config, device), device)
    steps = bench.Steps(backbone, 2, 1, 5, store=PoisonedStore)
    ids = steps.run()
    assert ids.shape == (2,)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 91


def test_what_the_host_knows_is_refused(rig: Rig) -> None:
    backbone = rig.backbone
    with pytest.raises(InvalidArgument, match=r"embed: ids\[1\] must be in \[0, 96\), got 96"):
        backbone.embed([Tokens([1, 96])])
    with pytest.raises(InvalidArgument, match=r"bins must be in \[0, 5\), got 0 to 5"):
        backbone.embed([Audio(bins=torch.tensor([[0, 1, 2, 3, 4, 5]]).int())])
    with pytest.raises(InvalidArgument, match=r"bins must be \[F, 6\], got \[1, 2\]"):
        backbone.embed([Audio(bins=torch.tensor([[0, 1]]).int())])
    with pytest.raises(InvalidArgument, match=r"targets\[0\] must be in \[0, 91\), got 91"):
        h_TD = torch.zeros(1, 80, dtype=torch.bfloat16, device=rig.device)
        backbone.logprobs(h_TD, torch.tensor([91]))
    with pytest.raises(InvalidArgument, match=r"cuda_hmlp: patches must be \[P, 2, 12, 12, 3\]"):
        backbone.embed([Image(patches=torch.zeros(1, 2, 9, 9, 3))])
    with rig.cpu.new_sequence() as sequence:
        step_input = rig.cpu.prepare(sequence, [Tokens([1])])
        with pytest.raises(InvalidArgument, match="step: kv must be a CudaKvStore on"):
            backbone.step(step_input.x_TD, rig.cpu.runner._batch, rig.cpu.store.kv)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ({"hidden_size": 60}, "hidden_size must be a multiple of 8 on 'cuda', got 60"),
        ({"d_rel": 3}, "d_rel must be even on 'cuda', got 3"),
        ({"head_dim": 32}, "head_dim of layer 1 must be 64 or 128 on 'cuda', got 32"),
    ],
)
def test_shapes_without_kernels_are_named(text: dict[str, Any], match: str) -> None:
    with pytest.raises(Unsupported, match=match):
        require_shapes(config_of(**text).text)
