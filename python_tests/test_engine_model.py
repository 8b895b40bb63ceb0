"""The model's facade: the same bits whole and in pieces, raw audio, loading, refusals."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from byte_model import BYTE_MODEL
from sequence_fakes import tiny_text_config
from tml_core import _ext, errors
from tml_core.engine.model import Model, load_model, weights_fingerprint
from tml_core.media.dmel import dmel_bins
from tml_core.media.segments import Audio, Block, Image, Segment, Tokens
from tml_core.model.config import AudioConfig, ModelConfig, VisionConfig
from tml_core.model.reference import reference_logits
from tml_core.model.weights import load_weights, random_weights, save_weights
from tml_core.sequence import AUDIO_ID, IMAGE_ID, Retention, Sequence

Piece = Segment | Block
VOCAB, NUM_MELS, NUM_LEVELS, PATCH = 90, 8, 5, 4


def tiny_config() -> ModelConfig:
    text = dataclasses.replace(
        tiny_text_config(window=150),
        vocab_size=96,
        unpadded_vocab_size=VOCAB,
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        swa_num_heads=4,
        swa_num_kv_heads=1,
        swa_head_dim=32,
        d_rel=4,
        rel_extent=100,
        log_scaling_floor=100,
        layer_is_sliding=(True, False, True, False),
        layer_is_dense=(True, False, False, False),
        dense_width=64,
        expert_width=16,
        num_experts=4,
        top_k=2,
        num_shared=1,
        mup=2.0,
        max_positions=4096,
    )
    return ModelConfig(
        text=text,
        audio=AudioConfig(NUM_MELS, NUM_LEVELS, -7.0, 2.0),
        vision=VisionConfig(patch_size=PATCH, num_layers=2),
        is_trained=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    config = tiny_config()
    save_weights(directory, random_weights(config, 3, torch.float32), config)
    return directory


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Model]:
    return {
        dtype: load_model(folder, dtype=dtype, max_sequences=6, max_step_tokens=96)
        for dtype in ("bfloat16", "float32")
    }


@pytest.fixture(params=["bfloat16", "float32"])
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    return models[request.param]


@pytest.fixture(autouse=True)
def _nothing_leaks(models: dict[str, Model]) -> object:
    yield
    for model in models.values():
        report = model.store.audit()
        assert (report.num_sequences, report.global_pages_held) == (0, 0)


def atoms(seed: int, count: int = 260) -> list[Piece]:
    """Segments of one position each, and a few blocks that cannot be cut."""
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> Tokens:
        return Tokens(random.integers(0, VOCAB, length).tolist())

    def audio() -> Audio:
        bins = random.integers(0, NUM_LEVELS, (1, NUM_MELS)).astype(np.int32)
        return Audio(bins=torch.from_numpy(bins))

    def image(length: int) -> Image:
        shape = (length, 2, PATCH, PATCH, 3)
        return Image(patches=torch.randn(shape, generator=generator))

    out: list[Piece] = []
    for i in range(count):
        kind = random.integers(0, 12)
        if i == 130:
            out.append(Block([text(60), image(70), audio()]))  # longer than a step
        elif kind == 0:
            out.append(Block([text(1), image(int(random.integers(1, 6))), text(2)]))
        else:
            out.append(audio() if kind == 1 else image(1) if kind == 2 else text(1))
    return out


def in_pieces(sequence: Sequence, pieces: list[Piece], cuts: list[int]) -> Tensor:
    ends = [*sorted({cut for cut in cuts if 0 < cut < len(pieces)}), len(pieces)]
    starts = [0, *ends[:-1]]
    parts = [sequence.extend(pieces[a:b]) for a, b in zip(starts, ends, strict=True)]
    return torch.cat(parts)


# Bits.


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_cutting_gives_the_same_bits(models: dict[str, Model], data: st.DataObject) -> None:
    model = models[data.draw(st.sampled_from(["bfloat16", "float32"]))]
    pieces = atoms(data.draw(st.integers(0, 3)))
    cuts = data.draw(st.lists(st.integers(0, len(pieces)), max_size=12))
    if data.draw(st.booleans()):
        cuts += range(20, 60)
    with model.new_sequence() as sequence:
        logits = in_pieces(sequence, pieces, cuts)
        assert torch.equal(logits, model.logits(pieces))
        assert sequence.tip == len(logits)


def test_logits_equal_the_reference(folder: Path, models: dict[str, Model]) -> None:
    pieces = [p for p in atoms(0, 200) if not isinstance(p, Block)]
    logits = models["float32"].logits(pieces)
    config = ModelConfig.from_path(folder)
    expected = reference_logits(config, load_weights(folder, config, torch.float32), pieces)
    # the bound the package promises: 1e-4 of the logit scale
    bound = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=bound)


def test_batch_mates_threads_and_isa_give_the_same_bits(model: Model, each_isa: list[str]) -> None:
    lives = [atoms(seed, 140) for seed in range(3)]
    alone = [model.logits(pieces) for pieces in lives]
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            sequences = [model.new_sequence() for _ in lives]
            got: list[list[Tensor]] = [[] for _ in lives]
            sizes, done = [50, 1, 9], [0, 0, 0]
            while done != [140, 140, 140]:
                inputs = [
                    model.prepare(sequence, pieces[start : start + size])
                    for sequence, pieces, start, size in zip(
                        sequences, lives, done, sizes, strict=True
                    )
                ]
                for rows, h_TD in zip(got, model.runner.run(inputs), strict=True):
                    rows.append(model.backbone.logits(h_TD))
                done = [min(140, a + b) for a, b in zip(done, sizes, strict=True)]
                sizes = [sizes[1] + 5, sizes[2], sizes[0]]
            for rows, expected, sequence in zip(got, alone, sequences, strict=True):
                assert torch.equal(torch.cat(rows), expected), (isa, threads)
                sequence.close()


@pytest.mark.parametrize("cut", [1, 64, 128, 180, 259])
def test_rewind_fork_and_snapshot_give_the_same_bits(
    model: Model, cut: int, tmp_path: Path
) -> None:
    pieces, other = atoms(0), atoms(1)
    expected = model.logits(pieces)
    with model.new_sequence(seed=9) as sequence:
        sequence.extend(pieces[:cut])
        tip, mark = sequence.tip, sequence.mark()
        sequence.snapshot(tmp_path / "a.tml")
        detour = sequence.extend(other)
        child = sequence.fork(at=mark)
        assert torch.equal(child.extend(pieces[cut:]), expected[tip:])
        restored = model.restore_sequence(tmp_path / "a.tml")
        assert torch.equal(restored.extend(pieces[cut:]), expected[tip:])
        assert restored.state_hash == child.state_hash and restored.seed == 9
        sequence.rewind(mark)
        twin = sequence.fork()
        assert torch.equal(sequence.extend(pieces[cut:]), expected[tip:])
        assert torch.equal(twin.extend(other), detour)
        model.store.audit()
        for one in (child, restored, twin):
            one.close()


def test_endless_sequence_gives_the_same_bits_however_turns_are_cut(model: Model) -> None:
    pieces = atoms(2, 20 * 40)
    results, evictions = [], []
    for size in (20, 3):
        with model.new_sequence(retention=Retention(130, 20)) as sequence:
            rows, seen = [], []
            for turn in range(0, len(pieces), 20):
                seen.append(sequence.note_boundary())
                for start in range(turn, turn + 20, size):
                    rows.append(sequence.extend(pieces[start : min(start + size, turn + 20)]))
            assert sequence.slot.global_.num_pages < 6 < sequence.tip // 128
        results.append(torch.cat(rows))
        evictions.append(seen)
    assert torch.equal(*results)
    assert evictions[0] == evictions[1] and any(evictions[0])
    # What was dropped is really not seen any more.
    assert not torch.equal(results[0][-1], model.logits(pieces)[-1])


# Raw audio.


def pcm(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, count).astype(np.float32)


def test_raw_audio_in_halves_equals_whole(model: Model) -> None:
    sound = pcm(800 * 12)
    whole = model.logits([Audio(sound)])
    for cut in (800, 4000):
        with model.new_sequence() as sequence:
            halves = [sequence.extend([Audio(sound[:cut])]), sequence.extend([Audio(sound[cut:])])]
            assert torch.equal(torch.cat(halves), whole)
    assert model.dmel_config is not None
    assert torch.equal(whole, model.logits([Audio(bins=dmel_bins(sound, model.dmel_config))]))


def test_rest_of_raw_audio_waits_and_can_be_flushed(model: Model) -> None:
    sound = pcm(2100)
    with model.new_sequence() as sequence:
        assert len(sequence.extend([Audio(sound[:1000])])) == 1
        assert len(sequence.extend([Audio(sound[1000:1100])])) == 0
        assert sequence.carry.audio is not None and len(sequence.carry.audio.pending) == 300
        mark = sequence.mark()
        first = sequence.extend([Audio(sound[1100:])], flush_audio=True)
        assert (len(first), sequence.tip) == (2, 3)
        sequence.rewind(mark)
        assert len(sequence.carry.audio.pending) == 300
        again = [sequence.extend([Audio(sound[1100:])]), sequence.extend([], flush_audio=True)]
        assert torch.equal(torch.cat(again), first)
        assert len(sequence.extend([], flush_audio=True)) == 0
    assert model.logits([Audio(sound)]).shape == (3, VOCAB)


def test_flushed_rest_stands_after_the_last_raw_audio(model: Model) -> None:
    sound = pcm(1900)
    bins = dmel_bins(sound, model.dmel_config)
    raw = [Audio(sound[:900]), Tokens([1]), Block([Audio(sound[900:])]), Tokens([2, 3])]
    framed = [
        Audio(bins=bins[:1]),
        Tokens([1]),
        Block([Audio(bins=bins[1:2])]),
        Audio(bins=bins[2:]),
        Tokens([2, 3]),
    ]
    assert torch.equal(model.logits(raw), model.logits(framed))


def test_log_tells_audio_from_images(model: Model) -> None:
    with model.new_sequence() as sequence:
        rgb = np.zeros((5, 9, 3), np.uint8)  # two rows of three patches
        sequence.extend([Tokens([7]), Audio(pcm(1600)), Block([Image(rgb), Tokens([8])])])
        assert sequence.token_ids().tolist() == [7, *[AUDIO_ID] * 2, *[IMAGE_ID] * 6, 8]


# Failing.


def test_refused_and_failed_appends_leave_no_trace(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = atoms(0)
    expected = model.logits(pieces)
    with model.new_sequence() as sequence:
        sequence.extend(pieces[:90])
        tip, state_hash, carry = sequence.tip, sequence.state_hash, sequence.carry
        bad: list[Piece] = [Audio(pcm(900)), Tokens([1, 96])]
        with pytest.raises(errors.InvalidArgument, match=r"\[0, 96\), got 96"):
            sequence.extend(bad)
        with pytest.raises(errors.PoolExhausted, match="pass the sequence's limit of 4096"):
            sequence.extend([Audio(pcm(900)), Tokens([1] * 4096)])

        def no_memory(h_TD: Tensor) -> Tensor:
            raise MemoryError(len(h_TD))

        with monkeypatch.context() as patch:
            patch.setattr(model.backbone, "logits", no_memory)
            for count in (5, 170):  # one step, and several
                with pytest.raises(MemoryError):
                    sequence.extend([Audio(pcm(900)), *pieces[90 : 90 + count]])
        assert (sequence.tip, sequence.state_hash) == (tip, state_hash)
        assert sequence.carry is carry
        model.store.audit()
        assert torch.equal(sequence.extend(pieces[90:]), expected[tip:])


def test_segments_must_be_a_sequence_of_segments(model: Model) -> None:
    with model.new_sequence() as sequence:
        with pytest.raises(errors.InvalidType, match="expected a sequence of segments, got one T"):
            sequence.extend(Tokens([1]))  # type: ignore[arg-type]
        with pytest.raises(
            errors.InvalidType, match="expected Tokens, Audio, Image, OwnAudio or Block"
        ):
            sequence.extend([[1, 2]])  # type: ignore[list-item]
        assert sequence.extend([]).shape == (0, VOCAB)
        assert sequence.tip == 0


def test_snapshot_of_another_dtype_or_model_is_refused(
    models: dict[str, Model], folder: Path, tmp_path: Path
) -> None:
    with models["float32"].new_sequence() as sequence:
        sequence.extend([Tokens([1, 2, 3])])
        sequence.snapshot(tmp_path / "a.tml")
    with pytest.raises(errors.SnapshotError, match="dtype is float32, expected bfloat16"):
        models["bfloat16"].restore_sequence(tmp_path / "a.tml")
    config = tiny_config()
    save_weights(tmp_path / "other", random_weights(config, 4, torch.float32), config)
    other = load_model(tmp_path / "other", dtype="float32", max_sequences=1)
    with pytest.raises(errors.SnapshotError, match=r"model is \w+, expected \w+$"):
        other.restore_sequence(tmp_path / "a.tml")
    same = load_model(folder, dtype="float32", max_sequences=1)
    assert same.restore_sequence(tmp_path / "a.tml").tip == 3


def test_text_only_model_refuses_sound_and_pictures(tmp_path: Path) -> None:
    config = ModelConfig(text=tiny_config().text)
    save_weights(tmp_path, random_weights(config, 0, torch.float32), config)
    model = load_model(tmp_path, dtype="float32", max_sequences=1)
    assert model.dmel_config is None and model.is_trained
    with pytest.raises(errors.InvalidArgument, match="this model has no audio encoder"):
        model.logits([Audio(pcm(800))])
    with pytest.raises(errors.InvalidArgument, match="this model has no vision encoder"):
        model.logits([Image(np.zeros((4, 4, 3), np.uint8))])
    assert model.logits([Tokens([1, 2])]).shape == (2, VOCAB)


# Loading.


def test_model_says_what_it_is(models: dict[str, Model], folder: Path) -> None:
    model = models["bfloat16"]
    assert (model.dtype, model.device.type, model.is_trained) == (torch.bfloat16, "cpu", False)
    assert repr(model) == "Model(untrained, 4 layers of 64, bfloat16, cpu)"
    assert model.vocab_size == VOCAB and model.tokenizer is None
    assert model.config == ModelConfig.from_path(folder)
    assert load_model(folder, dtype=torch.bfloat16, device=torch.device("cpu")).fingerprint == (
        model.fingerprint
    )
    assert model.fingerprint != models["float32"].fingerprint


def test_bundled_model_loads_and_calls_itself_untrained() -> None:
    model = load_model(BYTE_MODEL, max_sequences=1, max_positions=1024)
    assert not model.is_trained and "untrained" in repr(model)
    assert model.tokenizer is not None and model.config.interaction is not None
    with model.new_sequence() as sequence:
        logits = sequence.extend([Tokens([5, 6, 7]), Audio(pcm(1600))])
        assert logits.shape == (5, model.vocab_size) and logits.dtype == torch.float32
        assert torch.isfinite(logits).all()


def test_fingerprint_sees_every_tensor_and_the_config() -> None:
    config = tiny_config()
    weights = random_weights(config, 0, torch.float32)
    base = weights_fingerprint(config, weights)
    assert base == weights_fingerprint(config, dict(reversed(weights.items())))
    for name in weights:
        changed = weights[name].clone()
        changed.view(-1)[-1] += 1
        assert weights_fingerprint(config, {**weights, name: changed}) != base
    assert weights_fingerprint(dataclasses.replace(config, image_token_id=1), weights) != base


def test_fingerprint_samples_large_tensors() -> None:
    config = tiny_config()
    large = torch.zeros(1 << 18)
    base = weights_fingerprint(config, {"w": large})
    for index in (0, (1 << 18) - 1, 1 << 19 >> 4):
        changed = large.clone()
        changed[index : index + 8192] = 1
        assert weights_fingerprint(config, {"w": changed}) != base


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"device": "cuda"}, errors.Unsupported, "device: 'cuda' asked for, .* without CUDA"),
        ({"device": "cuda:0"}, errors.Unsupported, "without CUDA"),
        (
            {"device": "meta"},
            errors.InvalidArgument,
            "expected 'cpu' or 'cuda', got 'meta'",
        ),
        ({"device": "gpu"}, errors.InvalidArgument, "expected 'cpu' or 'cuda', got 'gpu'"),
        ({"dtype": "float16"}, errors.InvalidArgument, "dtype: expected one of .* got 'float16'"),
        ({"dtype": torch.int8}, errors.InvalidArgument, "dtype: expected one of .* got torch.int8"),
        ({"dtype": 3}, errors.InvalidArgument, "dtype: expected one of"),
        ({"path": "nono"}, errors.CheckpointError, "expected 'nano' or a checkpoint .* got 'nono'"),
        ({"max_sequences": 0}, errors.InvalidArgument, "max_sequences: expected at least 1, got 0"),
        ({"max_positions": 0}, errors.InvalidArgument, "max_positions: expected at least 1"),
        ({"max_positions": 9999}, errors.InvalidArgument, "at most the model's 4096, got 9999"),
        ({"max_step_tokens": 0}, errors.InvalidArgument, "max_step_tokens: expected at least 1"),
        ({"kv_memory_bytes": 999}, errors.InvalidArgument, "8 sequences need at least .* got 999"),
    ],
)
def test_load_refusals(
    folder: Path, arguments: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        load_model(**{"path": folder, **arguments})  # type: ignore[arg-type]


def test_memory_limit_is_kept(folder: Path) -> None:
    limit = 4 << 20
    model = load_model(folder, dtype="float32", max_sequences=2, kv_memory_bytes=limit)
    kv = model.store.kv
    assert 0.9 * limit < kv.capacity_bytes <= limit
    with model.new_sequence() as first, model.new_sequence() as second:
        first.extend([Tokens([1] * 4000)])
        with pytest.raises(errors.PoolExhausted, match="global pages: appending"):
            second.extend([Tokens([1] * 4000)])
        assert second.tip == 0
    # Without a limit every sequence has room for all its positions.
    roomy = load_model(folder, dtype="float32", max_sequences=2).store.kv
    assert roomy.global_pages.shape[0] == 2 * roomy.max_pages
