"""Backbone: logits against the plain-torch reference and transformers, bits for any cut of the
sequence, and what it refuses."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_checkpoints import AUDIO_TOKEN_ID, IMAGE_TOKEN_ID, SHAPES, make_hf_model, save_hf
from tml_core import _ext, errors
from tml_core.media.segments import Audio, Block, Image, Tokens
from tml_core.model.backbone import Backbone
from tml_core.model.config import ModelConfig
from tml_core.model.kv_store import KvStore
from tml_core.model.reference import reference_logits
from tml_core.model.step_batch import StepBatch
from tml_core.model.weights import load_weights

NUM_SLOTS, NUM_PAGES = 3, 24


def load(directory: Path, dtype: torch.dtype) -> tuple[ModelConfig, Backbone]:
    config = ModelConfig.from_path(directory)
    return config, Backbone(config, load_weights(directory, config, dtype), dtype)


def store(config: ModelConfig, dtype: torch.dtype) -> KvStore:
    """A store whose slots own shuffled pages; everything unwritten holds NaN."""
    kv = KvStore(
        config.text,
        dtype,
        num_slots=NUM_SLOTS,
        max_positions=1024,
        num_global_pages=NUM_PAGES,
        num_sliding_pages=NUM_PAGES,
    )
    pages = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(0)).int()
    for slot in range(NUM_SLOTS):
        own = pages[slot * 8 : slot * 8 + 8]
        kv.global_table[slot, :8] = own
        kv.sliding_table[slot, :8] = own.flip(0)
    kv.global_pages.fill_(float("nan"))
    kv.sliding_pages.fill_(float("nan"))
    return kv


def run(
    backbone: Backbone, kv: KvStore, slot: int, x: torch.Tensor, cuts: list[int], blocks: list
) -> torch.Tensor:
    """Logits of one sequence appended in pieces that end at ``cuts``."""
    out, start = [], 0
    for end in [*cuts, x.shape[0]]:
        if end == start:
            continue
        batch = StepBatch(NUM_SLOTS, 1024)
        inside = [(a - start, b - start) for a, b in blocks if start <= a and b <= end]
        batch.add(slot, start, end - start, inside)
        h = backbone.step(x[start:end].clone(), batch, kv)
        out.append(backbone.logits(h))
        start = end
    return torch.cat(out)


def mixed_segments(config: ModelConfig, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    vocab = config.text.unpadded_vocab_size

    def ids(count: int) -> torch.Tensor:
        return torch.randint(5, vocab, (count,), generator=generator)

    segments: list = [Tokens(ids(37))]
    if config.audio is not None and config.vision is not None:
        audio, vision = config.audio, config.vision
        bins = torch.randint(
            0, audio.num_levels, (6, audio.num_mel_bins), generator=generator
        ).int()
        side = vision.patch_size
        patches = torch.randn(5, vision.temporal_size, side, side, 3, generator=generator)
        segments += [Audio(bins=bins), Tokens(ids(11)), Image(patches=patches)]
    return [*segments, Tokens(ids(150))]


@pytest.fixture(scope="module", params=list(SHAPES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    hf, _ = make_hf_model(request.param, seed=2)
    save_hf(hf, directory)
    return directory


def test_fp32_logits_equal_the_reference(checkpoint: Path) -> None:
    config, backbone = load(checkpoint, torch.float32)
    segments = mixed_segments(config)
    embedded = backbone.embed(segments)
    logits = run(backbone, store(config, torch.float32), 1, embedded.x_TD, [], [])
    expected = reference_logits(config, load_weights(checkpoint, config, torch.float32), segments)
    # the bound the package promises: 1e-4 of the logit scale
    bound = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_agree_with_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import InklingForConditionalGeneration

    hf, _ = make_hf_model("mixed", seed=5)
    save_hf(hf, tmp_path)
    hf = InklingForConditionalGeneration.from_pretrained(
        tmp_path, dtype=dtype, attn_implementation="eager"
    )
    config, backbone = load(tmp_path, dtype)
    segments = mixed_segments(config, seed=1)
    ids: list[int] = []
    for segment in segments:
        if isinstance(segment, Tokens):
            ids += list(map(int, segment.ids))
        elif isinstance(segment, Audio):
            ids += [AUDIO_TOKEN_ID] * segment.bins.shape[0]
        else:
            ids += [IMAGE_TOKEN_ID] * segment.patches.shape[0]
    with torch.no_grad():
        expected = (
            hf(
                input_ids=torch.tensor([ids]),
                audio_input_ids=segments[1].bins[None],
                pixel_values=segments[3].patches.to(dtype),
            )
            .logits[0]
            .float()
        )
    logits = run(backbone, store(config, dtype), 0, backbone.embed(segments).x_TD, [], [])
    scale = float(expected.abs().max())
    if dtype == torch.float32:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * scale)
        return
    # bf16 rounds in other places here and there: the same greedy token wherever the best logit
    # stands clear of the second by more than that noise (transformers' own bf16 and fp32 need it)
    best = expected.topk(2, dim=-1).values
    clear = (best[:, 0] - best[:, 1]) > 0.1 * scale
    assert clear.float().mean() > 0.15
    assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, 180), max_size=6), data=st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_do_not_depend_on_cuts_or_blocks_of_others(
    tiny: dict[torch.dtype, tuple[ModelConfig, Backbone]],
    dtype: torch.dtype,
    cuts: list[int],
    data: st.DataObject,
) -> None:
    config, backbone = tiny[dtype]
    x = backbone.embed(mixed_segments(config)).x_TD
    start = data.draw(st.integers(0, 170))
    blocks = [(start, start + data.draw(st.integers(1, 20)))]
    legal = sorted({c for c in cuts if not any(a < c < b for a, b in blocks)})
    whole = run(backbone, store(config, dtype), 0, x, [], blocks)
    assert torch.equal(run(backbone, store(config, dtype), 2, x, legal, blocks), whole)


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[torch.dtype, tuple[ModelConfig, Backbone]]:
    directory = tmp_path_factory.mktemp("tiny")
    hf, _ = make_hf_model("paged", seed=3)
    save_hf(hf, directory)
    return {dtype: load(directory, dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_batch_mates_threads_or_isa(
    tiny: dict[torch.dtype, tuple[ModelConfig, Backbone]], dtype: torch.dtype, each_isa: list[str]
) -> None:
    config, backbone = tiny[dtype]
    xs = [backbone.embed(mixed_segments(config, seed)).x_TD for seed in range(3)]
    alone = [run(backbone, store(config, dtype), 1, x, [], []) for x in xs]
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            kv = store(config, dtype)
            positions = [0, 0, 0]
            got: list[list[torch.Tensor]] = [[], [], []]
            sizes = [90, 1, 17] if isa != "scalar" else [199, 200, 201]
            while any(positions[s] < xs[s].shape[0] for s in range(3)):
                batch = StepBatch(NUM_SLOTS, 1024)
                order, parts = [], []
                for s in (2, 0, 1):
                    count = min(sizes[s], xs[s].shape[0] - positions[s])
                    if count:
                        batch.add(s, positions[s], count)
                        parts.append(xs[s][positions[s] : positions[s] + count])
                        order.append((s, count))
                        positions[s] += count
                logits = backbone.logits(backbone.step(torch.cat(parts), batch, kv))
                for (s, _), part in zip(
                    order, logits.split([count for _, count in order]), strict=True
                ):
                    got[s].append(part)
                sizes = [sizes[1], sizes[2] + 30, sizes[0]]
            for s in range(3):
                assert torch.equal(torch.cat(got[s]), alone[s]), (isa, threads, s)


def test_logprobs_are_the_samplers(
    tiny: dict[torch.dtype, tuple[ModelConfig, Backbone]],
) -> None:
    from tml_core.ops.lm_head import SampleRows

    config, backbone = tiny[torch.bfloat16]
    x = backbone.embed(mixed_segments(config)).x_TD
    batch = StepBatch(1, 1024)
    batch.add(0, 0, x.shape[0])
    h = backbone.step(x, batch, store(config, torch.bfloat16))
    count = h.shape[0]
    rows = SampleRows(
        torch.full((count,), 0.8),
        torch.zeros(count, dtype=torch.int32),
        torch.ones(count),
        torch.full((count,), 7),
        torch.arange(count),
    )
    tokens, logprobs = backbone.sample(h, rows)
    assert torch.equal(backbone.logprobs(h, tokens), logprobs)
    expected = backbone.logits(h).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)  # fp32 sum order


def test_results_go_where_they_are_wanted(
    tiny: dict[torch.dtype, tuple[ModelConfig, Backbone]],
) -> None:
    from tml_core.ops.lm_head import SampleRows

    config, backbone = tiny[torch.bfloat16]
    ids, width = torch.arange(5, 14), config.text.hidden_size
    rows = SampleRows(
        torch.zeros(1), torch.zeros(1).int(), torch.ones(1), torch.tensor([3]), torch.tensor([9])
    )

    def step(**out: torch.Tensor) -> torch.Tensor:
        batch = StepBatch(NUM_SLOTS, 16)
        batch.add(0, 0, len(ids))
        kv = store(config, torch.bfloat16)
        return backbone.step(backbone.embed_ids(ids).clone(), batch, kv, **out)

    x, h = (torch.full((len(ids), width), float("nan")).bfloat16() for _ in range(2))
    drawn = torch.full((1,), -1), torch.full((1,), float("nan"))
    assert backbone.embed_ids(ids, out_TD=x) is x and step(out_TD=h) is h
    assert backbone.sample(h[-1:], rows, out_B=drawn) == drawn
    assert torch.equal(x, backbone.embed_ids(ids)) and torch.equal(h, step())
    for got, expected in zip(drawn, backbone.sample(h[-1:], rows), strict=True):
        assert torch.equal(got, expected)
    narrow = torch.zeros(len(ids), width - 1).bfloat16()
    with pytest.raises(errors.InvalidArgument, match=r"embed: out must be of shape \[9, "):
        backbone.embed_ids(ids, out_TD=narrow)
    with pytest.raises(errors.InvalidArgument, match=r"decoder_step: out must be of shape \[9, "):
        step(out_TD=narrow)


def test_pictures_encoded_together_are_those_encoded_alone(
    tiny: dict[torch.dtype, tuple[ModelConfig, Backbone]],
) -> None:
    config, backbone = tiny[torch.bfloat16]
    assert config.vision is not None
    side, generator = config.vision.patch_size, torch.Generator().manual_seed(5)
    shape = config.vision.temporal_size, side, side, 3
    images = [
        Image(patches=torch.randn(count, *shape, generator=generator)) for count in (3, 1, 300)
    ]
    alone = [backbone.embed([Tokens([7]), one]).x_TD for one in images]
    backbone.encode_together(images)
    with pytest.MonkeyPatch.context() as patch:
        # Once each: a picture that comes again is encoded again.
        patch.setattr(backbone, "_hmlp", None)
        for image, expected in zip(images, alone, strict=True):
            assert torch.equal(backbone.embed([Tokens([7]), image]).x_TD, expected)
        with pytest.raises(errors.InvalidArgument, match="this model has no vision encoder"):
            backbone.embed(images[:1])
        with pytest.raises(errors.InvalidArgument, match="this model has no vision encoder"):
            backbone.encode_together(images)
    wrong = Image(patches=torch.zeros(1, 2, side + 1, side + 1, 3))
    with pytest.raises(errors.InvalidArgument, match=r"images\[1\]: patches must be \[P, 2, "):
        backbone.encode_together([images[0], wrong])
    assert torch.equal(backbone.embed([Tokens([7]), images[0]]).x_TD, alone[0])
    backbone.encode_together([])


def test_embed_refusals(tiny: dict[torch.dtype, tuple[ModelConfig, Backbone]]) -> None:
    config, backbone = tiny[torch.bfloat16]
    vocab = config.text.vocab_size
    with pytest.raises(errors.InvalidArgument, match=rf"\[0, {vocab}\), got {vocab}"):
        backbone.embed([Tokens([vocab])])
    with pytest.raises(errors.InvalidArgument, match=r"expected Audio\(bins=...\), got pcm"):
        backbone.embed([Audio(pcm=torch.zeros(800))])
    with pytest.raises(
        errors.InvalidType, match="expected Tokens, Audio, Image, OwnAudio or Block, got int"
    ):
        backbone.embed([3])  # type: ignore[list-item]
    empty = backbone.embed([])
    assert empty.num_tokens == 0 and empty.blocks == ()
    block = backbone.embed([Tokens([1]), Block([Tokens([2, 3]), Tokens([4])])])
    assert block.blocks == ((1, 4),) and block.token_ids.tolist() == [1, 2, 3, 4]


def test_a_hidden_size_without_kernels_is_refused() -> None:
    norm = torch.ones(72, dtype=torch.bfloat16)
    sizes = {"window": 8, "d_rel": 4, "eps": 1e-6, "mup": 1.0, "log_floor": 0.0, "log_alpha": 0.0}
    with pytest.raises(
        errors.InvalidArgument, match="decoder_step: hidden must be a multiple of 16, got 72"
    ):
        _ext.DecoderStep(hidden=72, final_norm=norm, **sizes)
