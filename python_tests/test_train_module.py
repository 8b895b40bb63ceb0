"""The trainer's model: serving's bits forward, transformers' gradients, packing and what it
refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_checkpoints import AUDIO_TOKEN_ID, IMAGE_TOKEN_ID, make_hf_model, save_hf
from tml_core import _ext, errors
from tml_core.layout import Stream
from tml_core.media.segments import Audio, Block, Image, Tokens
from tml_core.model.backbone import Backbone
from tml_core.model.config import ModelConfig
from tml_core.model.kv_store import KvStore
from tml_core.model.step_batch import StepBatch
from tml_core.model.weights import is_kept_fp32, load_weights, save_weights
from tml_core.train import PackedBatch, TrainableModel, Transcript

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a random transformers model of a shape."""
    made: dict[str, Path] = {}

    def get(shape: str) -> Path:
        if shape not in made:
            made[shape] = save_hf(make_hf_model(shape, seed=2)[0], tmp_path_factory.mktemp(shape))
        return made[shape]

    return get


def trainable(directory: Path, dtype: torch.dtype) -> TrainableModel:
    config = ModelConfig.from_path(directory)
    return TrainableModel(config, load_weights(directory, config, dtype), dtype)


def segments_of(config: ModelConfig, seed: int, num_tokens: int = 60) -> list[Any]:
    """Text, and sound and pictures where the model has them; pictures stand in a block."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> Tensor:
        return torch.randint(5, config.text.unpadded_vocab_size, (count,), generator=generator)

    pieces: list[Any] = [Tokens(ids(num_tokens))]
    if config.audio is not None and config.vision is not None:
        shape = (6, config.audio.num_mel_bins)
        bins = torch.randint(0, config.audio.num_levels, shape, generator=generator).int()
        side = config.vision.patch_size
        patches = torch.randn(5, 2, side, side, 3, generator=generator)
        pieces += [Audio(bins=bins), Block([Tokens(ids(2)), Image(patches=patches)])]
    else:
        pieces.append(Block([Tokens(ids(9))]))
    return [*pieces, Tokens(ids(num_tokens))]


def transcript(config: ModelConfig, seed: int, num_tokens: int = 60) -> Transcript:
    """Random labels for every position but each third."""
    segments = segments_of(config, seed, num_tokens)
    length = sum(count(one) for one in segments)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, config.text.unpadded_vocab_size, (length,), generator=generator)
    targets[::3] = -100
    return Transcript(segments, targets, torch.zeros(length, dtype=torch.uint8))


def count(piece: Any) -> int:
    if isinstance(piece, Block):
        return sum(count(one) for one in piece.segments)
    held = piece.ids if isinstance(piece, Tokens) else getattr(piece, "bins", None)
    return len(piece.patches if held is None else held)


def serve(config: ModelConfig, backbone: Backbone, one: Transcript) -> Tensor:
    """Log-probabilities of the targets as serving computes them, in three steps."""
    kv = KvStore(config.text, backbone.dtype, 1, 1024, 8, 8)
    kv.global_table[0, :8] = kv.sliding_table[0, :8] = torch.arange(8).int()
    embedded = backbone.embed(one.segments)
    (block,) = embedded.blocks
    parts, start = [], 0
    for end in (7, block[1], one.num_tokens):
        batch = StepBatch(1, 1024)
        inside = [(block[0] - start, block[1] - start)] if start <= block[0] < end else []
        batch.add(0, start, end - start, inside)
        parts.append(backbone.step(embedded.x_TD[start:end].clone(), batch, kv))
        start = end
    logprobs = backbone.logprobs(torch.cat(parts), one.targets.clamp(min=0))
    return torch.where(one.targets == -100, 0.0, logprobs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["text", "mixed", "paged"])
def test_forward_has_the_bits_of_serving(
    shape: str, dtype: torch.dtype, checkpoints: Callable[[str], Path]
) -> None:
    directory = checkpoints(shape)
    model = trainable(directory, dtype)
    config = model.config
    backbone = Backbone(config, load_weights(directory, config, dtype), dtype)
    transcripts = [transcript(config, seed, length) for seed, length in ((0, 60), (1, 9), (2, 130))]
    served = [serve(config, backbone, one) for one in transcripts]
    got = model(PackedBatch.pack(transcripts, config))
    assert got.dtype == torch.float32 and got.requires_grad
    assert torch.equal(got, torch.cat(served))
    # Neither the neighbours in the batch nor the gradient's bookkeeping change a bit.
    with torch.no_grad():
        assert torch.equal(model(PackedBatch.pack(transcripts[1:2], config)), served[1])


def hf_gradients(
    directory: Path, kind: type, dtype: torch.dtype, one: Transcript, vocab_size: int
) -> dict[str, Tensor]:
    """Of the sum of the targets' log-probabilities, under canonical names."""
    hf = kind.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    ids: list[int] = []
    media: dict[str, Tensor] = {}
    for piece in one.segments:
        if isinstance(piece, Tokens):
            ids += [int(token) for token in piece.ids]
        elif isinstance(piece, Audio):
            assert piece.bins is not None
            ids += [AUDIO_TOKEN_ID] * len(piece.bins)
            media["audio_input_ids"] = piece.bins[None]
        else:
            assert isinstance(piece, Image) and piece.patches is not None
            ids += [IMAGE_TOKEN_ID] * len(piece.patches)
            media["pixel_values"] = piece.patches.to(dtype)
    logits = hf(input_ids=torch.tensor([ids]), **media).logits[0].float()
    is_kept = one.targets != -100
    logp = logits[is_kept, :vocab_size].log_softmax(-1)
    logp.gather(1, one.targets[is_kept][:, None]).sum().backward()
    prefix = "model." if kind.__name__ == "InklingForCausalLM" else "model.language_model."
    return {
        name.replace(prefix, "model.language_model.", 1): value.grad.float()
        for name, value in hf.named_parameters()
    }


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients together, relative."""
    assert got.keys() == expected.keys()
    differing = sum(float((got[name].float() - expected[name]).norm() ** 2) for name in got)
    return (differing / sum(float(one.norm() ** 2) for one in expected.values())) ** 0.5


@pytest.mark.parametrize("shape", ["text", "mixed"])
def test_gradients_are_those_of_transformers(
    shape: str, checkpoints: Callable[[str], Path]
) -> None:
    directory = checkpoints(shape)
    hf, _ = make_hf_model(shape, seed=2)
    config = ModelConfig.from_path(directory)
    # transformers knows no blocks.
    pieces = [
        part
        for piece in segments_of(config, 3)
        for part in (piece.segments if isinstance(piece, Block) else [piece])
    ]
    blocked = transcript(config, 3)
    one = Transcript(pieces, blocked.targets, blocked.streams)
    vocab_size = config.text.unpadded_vocab_size
    ours, theirs = {}, {}
    for dtype in DTYPES:
        model = trainable(directory, dtype)
        model(PackedBatch.pack([one], config)).sum().backward()
        ours[dtype] = {name: one.grad for name, one in model.named_parameters()}
        assert all(one is not None for one in ours[dtype].values())
        theirs[dtype] = hf_gradients(directory, type(hf), dtype, one, vocab_size)
    exact = theirs[torch.float32]
    for name, expected in exact.items():
        # the bound the package promises; measured 1e-5 at most
        error = (ours[torch.float32][name] - expected).norm() / expected.norm()
        assert error < 1e-4, (name, float(error))
    # bf16 noise is what transformers' own bf16 gradients have; ours are measured to have less
    noise = distance(theirs[torch.bfloat16], exact)
    assert distance(ours[torch.bfloat16], exact) < noise < 0.5


def test_gradients_have_the_same_bits_for_any_threads_and_isa(
    checkpoints: Callable[[str], Path], each_isa: list[str]
) -> None:
    model = trainable(checkpoints("mixed"), torch.bfloat16)
    batch = PackedBatch.pack([transcript(model.config, seed) for seed in range(2)], model.config)
    seen: list[list[Tensor]] = []
    for isa in each_isa:
        for threads in (1, 2):
            _ext.set_isa(isa)
            torch.set_num_threads(threads)
            model.zero_grad()
            logprobs, entropy = model(batch, with_entropy=True)
            (logprobs.sum() + 0.1 * entropy.sum()).backward()
            seen.append([logprobs, entropy, *(one.grad for one in model.parameters())])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_fp32_masters_compute_as_their_bf16_roundings(checkpoints: Callable[[str], Path]) -> None:
    directory = checkpoints("mixed")
    config = ModelConfig.from_path(directory)
    masters = TrainableModel(config, load_weights(directory, config, torch.float32), torch.bfloat16)
    rounded = trainable(directory, torch.bfloat16)
    batch = PackedBatch.pack([transcript(config, 0)], config)
    logprobs = masters(batch)
    assert torch.equal(logprobs, rounded(batch))
    logprobs.sum().backward()
    assert all(one.grad.dtype == torch.float32 for one in masters.parameters())
    served = masters.serving_weights()
    expected = load_weights(directory, config, torch.bfloat16)
    assert all(torch.equal(served[name], value) for name, value in expected.items())


def test_weights_go_to_a_checkpoint_and_back(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import InklingForConditionalGeneration

    model = trainable(checkpoints("mixed"), torch.float32)
    config = model.config
    batch = PackedBatch.pack([transcript(config, 0)], config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    (-model(batch).sum()).backward()
    optimizer.step()
    save_weights(tmp_path, model.serving_weights(), config)
    again = TrainableModel(config, load_weights(tmp_path, config, torch.float32), torch.float32)
    assert torch.equal(again(batch), model(batch))
    other = trainable(checkpoints("mixed"), torch.float32)
    assert not torch.equal(other(batch), model(batch))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch), model(batch))
    hf = InklingForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    theirs = hf.state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in model.state_dict().items())


def test_a_model_is_not_made_of_other_weights(checkpoints: Callable[[str], Path]) -> None:
    config = ModelConfig.from_path(checkpoints("text"))
    weights = load_weights(checkpoints("text"), config, torch.bfloat16)
    conv = next(name for name in weights if is_kept_fp32(name))
    name = "lm_head.weight"
    for changed, match in (
        ({**weights, "extra": weights[name]}, "extra is not part of this model"),
        ({k: v for k, v in weights.items() if k != name}, "lm_head.weight is missing"),
        ({**weights, name: weights[name][:3]}, r"lm_head.weight must be .* \[96, 48\], got"),
        ({**weights, name: weights[name].double()}, "must be bfloat16 or float32 .* got torch.f"),
        ({**weights, conv: weights[conv].bfloat16()}, "must be float32 .* got torch.bfloat16"),
    ):
        with pytest.raises(errors.InvalidArgument, match=match):
            TrainableModel(config, changed, torch.bfloat16)
    with pytest.raises(errors.InvalidArgument, match="expected float32 or bfloat16, got"):
        TrainableModel(config, weights, torch.float16)


def test_a_global_scale_of_zero_stays_finite(checkpoints: Callable[[str], Path]) -> None:
    model = trainable(checkpoints("mixed"), torch.float32)
    with torch.no_grad():
        model.get_parameter("model.language_model.layers.2.mlp.gate.global_scale").zero_()
    logprobs = model(PackedBatch.pack([transcript(model.config, 0)], model.config))
    logprobs.sum().backward()
    assert all(bool(one.grad.isfinite().all()) for one in model.parameters())


def test_next_tokens_label_what_the_model_chose() -> None:
    inside = Block([Tokens([7, 8])])
    segments = [Tokens([1, 2]), Audio(bins=torch.zeros(2, 6).int()), inside, Tokens([9])]
    streams = [Stream.TEXT, Stream.TEXT, Stream.INPUT, Stream.INPUT, Stream.SILENCE]
    streams += [Stream.FORCED, Stream.CALL]
    one = Transcript.next_tokens(segments, streams)
    assert one.targets.tolist() == [2, -100, -100, 7, -100, 9, -100]
    assert one.streams.tolist() == [1, 0, 0, 2, 0, 4, 0]
    only_text = Transcript.next_tokens(segments, streams, {Stream.TEXT})
    assert only_text.targets.tolist() == [2, *[-100] * 6]
    with pytest.raises(errors.InvalidArgument, match="expected 7, one for each position, got 6"):
        Transcript.next_tokens(segments, streams[1:])
    streams[2] = Stream.TEXT
    with pytest.raises(errors.InvalidArgument, match=r"streams\[2\]: expected INPUT .* got TEXT"):
        Transcript.next_tokens(segments, streams)


def test_packing_puts_sequences_end_to_end(checkpoints: Callable[[str], Path]) -> None:
    config = ModelConfig.from_path(checkpoints("mixed"))
    bins, patches = torch.ones(2, 6).int(), torch.randn(1, 2, 4, 4, 3)
    first = [Tokens([5]), Block([Tokens([6]), Audio(bins=bins)]), Tokens([7])]
    second = [Image(patches=patches), Tokens([8, 9])]
    batch = PackedBatch.pack(
        [
            Transcript.next_tokens(first, [Stream.INPUT] * 4 + [Stream.TEXT]),
            Transcript.next_tokens(second, [Stream.INPUT, Stream.TEXT, Stream.CALL]),
        ],
        config,
    )
    assert (batch.num_tokens, batch.num_sequences, batch.num_targets) == (8, 2, 3)
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert torch.equal(batch.bins, bins) and torch.equal(batch.patches, patches)
    # Five text embeddings, then two of audio, then one of an image.
    assert batch.order.tolist() == [0, 1, 5, 6, 2, 7, 3, 4]
    assert batch.cu_tokens.tolist() == [0, 5, 8] and batch.cu_tokens.dtype == torch.int32
    assert batch.visible_end.tolist() == [0, 3, 3, 3, 4, 0, 1, 2]
    assert batch.targets.tolist() == [-100, -100, -100, 7, -100, 8, 9, -100]
    assert batch.streams.tolist() == [0, 0, 0, 1, 0, 1, 4, 0]
    assert batch.to("cpu").targets.tolist() == batch.targets.tolist()


def unlabelled(*segments: Any) -> Transcript:
    length = sum(count(one) for one in segments)
    targets = torch.full((length,), -100)
    return Transcript(segments, targets, torch.zeros(length, dtype=torch.uint8))


def labelled(label: int) -> Transcript:
    return Transcript([Tokens([1])], torch.tensor([label]), torch.zeros(1, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("transcripts", "match"),
    [
        ([], "transcripts: expected at least one, got an empty batch"),
        ([unlabelled()], r"transcripts\[0\]: expected 1 to 50 positions, got 0"),
        ([labelled(1), unlabelled(Tokens([1] * 51))], r"\[1\]: expected 1 to 50 positions, got 51"),
        ([labelled(128)], r"labels must be in \[0, 128\) or -100, got 128 to 128"),
        ([labelled(-1)], r"labels must be in \[0, 128\) or -100, got -1 to -1"),
        ([unlabelled(Tokens([128]))], r"segments\[0\]: token ids must be below 128, got 128"),
        ([unlabelled(Audio(bins=torch.full((1, 6), 5).int()))], "bins must be below 5, got 5"),
        ([unlabelled(Audio(bins=torch.zeros(1, 7).int()))], r"bins must be \[F, 6\], got \[1, 7\]"),
        ([unlabelled(Image(patches=torch.zeros(1, 2, 5, 5, 3)))], r"must be \[P, 2, 4, 4, 3\]"),
    ],
)
def test_a_batch_names_what_the_model_cannot_take(
    transcripts: list[Transcript], match: str, checkpoints: Callable[[str], Path]
) -> None:
    config = ModelConfig.from_path(checkpoints("mixed"))
    with pytest.raises(errors.InvalidArgument, match=match):
        PackedBatch.pack(transcripts, config, max_positions=50)


def test_text_models_take_text_only(checkpoints: Callable[[str], Path]) -> None:
    config = ModelConfig.from_path(checkpoints("text"))
    with pytest.raises(errors.InvalidArgument, match="this model has no audio encoder"):
        PackedBatch.pack([unlabelled(Audio(bins=torch.zeros(1, 6).int()))], config)
    with pytest.raises(errors.InvalidArgument, match="this model has no vision encoder"):
        PackedBatch.pack([unlabelled(Image(patches=torch.zeros(1, 2, 4, 4, 3)))], config)
    with pytest.raises(errors.InvalidType, match=r"transcripts\[0\]: expected Transcript, got int"):
        PackedBatch.pack([3], config)  # type: ignore[list-item]


def test_a_transcript_is_cut_already() -> None:
    none = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)
    with pytest.raises(errors.InvalidArgument, match=r"expected Audio\(bins=...\), got pcm"):
        Transcript([Audio(pcm=torch.zeros(800))], *none)
    with pytest.raises(errors.InvalidArgument, match=r"expected Image\(patches=...\), got rgb"):
        Transcript([Image(rgb=torch.zeros(4, 4, 3, dtype=torch.uint8))], *none)
    with pytest.raises(
        errors.InvalidType, match="expected Tokens, Audio, Image, OwnAudio or Block, got int"
    ):
        Transcript([3], *none)  # type: ignore[list-item]
    with pytest.raises(errors.InvalidArgument, match=r"targets: expected torch.int64 \[1\]"):
        Transcript([Tokens([1])], *none)
