"""Learning to speak: own sound in transcripts, batches, shards and the trainer's model.

Shape suffixes: T positions, A blocks, K frames of a block, M mel channels, D hidden size.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from byte_model import BYTE_MODEL
from tml_core.engine.model import load_model
from tml_core.errors import InvalidArgument, InvalidType
from tml_core.layout import Stream
from tml_core.media.segments import Audio, Block, OwnAudio, Tokens
from tml_core.model.audio_out_config import AudioOutConfig
from tml_core.model.config import ModelConfig
from tml_core.model.flow import FLOW_PREFIX, SELF_EMBED, FlowHead, own_bins
from tml_core.model.weights import random_weights, save_weights
from tml_core.train import PackedBatch, ShardReader, TrainableModel, Transcript, write_shards

HEAD = AudioOutConfig(width=32, num_layers=1)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    plain = ModelConfig.from_path(BYTE_MODEL)
    assert plain.interaction is not None
    speaking = dataclasses.replace(plain.interaction, audio_out=HEAD)
    return dataclasses.replace(plain, interaction=speaking)


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> TrainableModel:
    return TrainableModel(config, random_weights(config, 3, torch.float32), torch.bfloat16)


def _mel(seed: int, num_blocks: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_blocks, 4, 80, generator=generator) * 4.0 - 3.5


def _transcript(seed: int = 0, before: torch.Tensor | None = None) -> Transcript:
    segments: list[Any] = [
        Tokens([5, 6]),
        OwnAudio(_mel(seed, 3), before),
        Tokens([7]),
        Audio(bins=torch.full((2, 80), 3, dtype=torch.int32)),
        OwnAudio(_mel(seed + 1, 1)),
        Tokens([8, 9]),
    ]
    streams = [Stream.INPUT, Stream.CONTROL, *[Stream.AUDIO] * 3, Stream.CONTROL]
    streams += [Stream.INPUT, Stream.INPUT, Stream.AUDIO, Stream.TEXT, Stream.INPUT]
    return Transcript.next_tokens(segments, streams)


def test_a_block_is_the_target_of_the_position_before_it():
    transcript = _transcript()
    assert transcript.num_tokens == 11
    assert transcript.targets.tolist() == [6, -100, -100, -100, 7, *[-100] * 3, 8, -100, -100]
    audio_T = transcript.streams == int(Stream.AUDIO)
    assert audio_T.nonzero()[:, 0].tolist() == [1, 2, 3, 7]


@pytest.mark.parametrize(
    ("stream", "position"), [(Stream.AUDIO, 1), (Stream.TEXT, 2), (Stream.AUDIO, 6)]
)
def test_streams_that_are_not_those_of_the_segments_are_refused(stream, position):
    segments = _transcript().segments
    streams = [Stream.INPUT] * 11
    streams[position] = stream
    match = rf"streams\[{position}\]: expected INPUT at .* own sound only, got {stream.name}"
    with pytest.raises(InvalidArgument, match=match):
        Transcript.next_tokens(segments, streams)


def test_a_batch_knows_what_was_said_and_when(config):
    before_M = _mel(9, 1)[0, 0]
    batch = PackedBatch.pack([_transcript(0), _transcript(4, before_M)], config)
    assert batch.num_blocks == 8
    assert batch.num_targets == 6
    assert batch.own_after.tolist() == [1, 2, 3, 7, 12, 13, 14, 18]
    mel_AKM = torch.cat([_mel(seed, count) for seed, count in ((0, 3), (1, 1), (4, 3), (5, 1))])
    assert torch.equal(batch.own_mel, mel_AKM)
    assert config.audio is not None
    assert torch.equal(batch.own_bins, own_bins(HEAD, config.audio, mel_AKM))
    silence_M = torch.full((80,), -4.0)
    firsts = {0: silence_M, 3: silence_M, 4: before_M, 7: silence_M}
    for block in range(8):
        want_M = firsts.get(block, mel_AKM[block - 1, -1])
        assert torch.equal(batch.own_before[block], want_M)
    # Where each embedding stands: 10 text positions, 4 of audio, then the blocks.
    assert batch.order[[2, 3, 4, 8]].tolist() == [14, 15, 16, 17]
    assert batch.to("cpu").num_blocks == 8


def test_what_was_said_is_heard_by_the_model_and_by_no_other_sequence(config, model):
    def logprobs(*transcripts: Transcript) -> torch.Tensor:
        return model(PackedBatch.pack(transcripts, config)).detach()

    first, second = _transcript(0), _transcript(4)
    both_T = logprobs(first, second)
    assert torch.equal(both_T, torch.cat((logprobs(first), logprobs(second))))
    other = Transcript(
        [first.segments[0], OwnAudio(_mel(8, 3)), *first.segments[2:]],
        first.targets,
        first.streams,
    )
    changed_T = logprobs(other)
    assert torch.equal(changed_T[:1], both_T[:1])
    assert not torch.equal(changed_T[4:5], both_T[4:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_serving_hears_what_was_said_as_the_trainer_does(config, dtype, tmp_path: Path):
    weights = random_weights(config, 3, dtype)
    save_weights(tmp_path, weights, config)
    shutil.copy(BYTE_MODEL / "tokenizer.json", tmp_path)
    trainable = TrainableModel(config, weights, dtype)
    transcript = _transcript()
    hidden_TD = trainable.hidden(PackedBatch.pack([transcript], config)).detach()
    model = load_model(tmp_path, dtype=str(dtype).removeprefix("torch."), max_sequences=2)
    whole_TV = model.logits(transcript.segments)
    assert torch.equal(model.backbone.logits(hidden_TD), whole_TV)
    sequence = model.new_sequence()
    parts = [sequence.extend([part]) for part in transcript.segments[:1]]
    for block in range(3):
        before_M = None if block == 0 else _mel(0, 3)[block - 1, -1]
        parts.append(sequence.extend([OwnAudio(_mel(0, 3)[block : block + 1], before_M)]))
    parts += [sequence.extend([part]) for part in transcript.segments[2:]]
    assert torch.equal(torch.cat(parts), whole_TV)
    sequence.close()
    # The head that is served draws what the trained one would.
    head = {
        name: value
        for name, value in trainable.serving_weights().items()
        if name.startswith(FLOW_PREFIX) and name != SELF_EMBED
    }
    assert model.backbone.flow is not None
    asked = hidden_TD[1:2], torch.full((1, 80), -4.0), [5], [2]
    assert torch.equal(model.backbone.flow.draw(*asked), FlowHead(HEAD, head).draw(*asked))


def test_a_model_that_cannot_speak_has_heard_nothing_of_its_own():
    with pytest.raises(InvalidArgument, match="segments: this model has no audio-out head"):
        load_model(BYTE_MODEL, max_sequences=1).logits([Tokens([5]), OwnAudio(_mel(0, 1))])


def test_own_sound_is_not_heard_as_the_users(config, model):
    own = Transcript.next_tokens(
        [Tokens([5]), OwnAudio(_mel(0, 2)), Tokens([6])],
        [Stream.INPUT, Stream.AUDIO, Stream.AUDIO, Stream.TEXT],
    )
    assert config.audio is not None
    bins = own_bins(HEAD, config.audio, _mel(0, 2))[:, :80].contiguous()
    users = Transcript([Tokens([5]), Audio(bins=bins), Tokens([6])], own.targets, own.streams)
    got = [model(PackedBatch.pack([one], config))[2].item() for one in (own, users)]
    assert got[0] != got[1]


def test_the_loss_of_sound_reaches_every_weight_that_makes_it(config, model):
    model.zero_grad()
    batch = PackedBatch.pack([_transcript(0), _transcript(4)], config)
    out = model.run(batch, flow_seed=17)
    assert out.flow_losses is not None
    assert out.flow_losses.shape == (8,)
    assert out.flow_losses.dtype == torch.float32
    assert torch.equal(model.run(batch, flow_seed=17).flow_losses, out.flow_losses)
    assert not torch.equal(model.run(batch, flow_seed=18).flow_losses, out.flow_losses)
    assert model.run(batch).flow_losses is None
    out.flow_losses.mean().backward()
    parameters = dict(model.named_parameters())
    for name in parameters:
        if name.startswith(FLOW_PREFIX):
            grad = parameters[name].grad
            assert grad is not None, name
            assert grad.isfinite().all(), name
            assert grad.abs().max() > 0, name
    # Through the hidden states, and through what the model heard itself say.
    for name in (SELF_EMBED, "model.language_model.layers.0.self_attn.q_proj.weight"):
        assert parameters[name].grad.abs().max() > 0
    model.zero_grad()


def test_a_model_that_cannot_speak_refuses_sound():
    mute = ModelConfig.from_path(BYTE_MODEL)
    with pytest.raises(InvalidArgument, match=r"segments\[1\]: this model has no audio-out head"):
        PackedBatch.pack([_transcript()], mute)
    trainable = TrainableModel(mute, random_weights(mute, 3, torch.float32), torch.float32)
    silent = Transcript.next_tokens([Tokens([5, 6])], [Stream.INPUT, Stream.TEXT])
    with pytest.raises(InvalidArgument, match="flow_seed: this model has no audio-out head"):
        trainable.run(PackedBatch.pack([silent], mute), flow_seed=1)


def test_sound_that_does_not_fit_is_refused(config):
    first = Transcript.next_tokens([OwnAudio(_mel(0, 1)), Tokens([5])], [Stream.INPUT] * 2)
    with pytest.raises(InvalidArgument, match=r"segments\[0\]: own sound must follow something"):
        PackedBatch.pack([first], config)
    coarse = Transcript.next_tokens(
        [Tokens([5]), OwnAudio(_mel(0, 1)[:, :2])], [Stream.INPUT, Stream.AUDIO]
    )
    with pytest.raises(InvalidArgument, match=r"own sound must be \[A, 4, 80\], got \[1, 2, 80\]"):
        PackedBatch.pack([coarse], config)
    with pytest.raises(InvalidArgument, match=r"OwnAudio\.mel: expected .* got shape \[4, 80\]"):
        OwnAudio(_mel(0, 1)[0])
    with pytest.raises(InvalidArgument, match=r"OwnAudio\.mel: expected .* got shape \[0, 4, 80\]"):
        OwnAudio(_mel(0, 1)[:0])
    with pytest.raises(InvalidArgument, match=r"OwnAudio\.mel: expected finite values"):
        OwnAudio(_mel(0, 1) * torch.nan)
    with pytest.raises(InvalidArgument, match=r"OwnAudio\.mel: expected .* got dtype float64"):
        OwnAudio(_mel(0, 1).double())
    with pytest.raises(InvalidArgument, match=r"OwnAudio\.before: expected \[80\], got \[7\]"):
        OwnAudio(_mel(0, 1), torch.zeros(7))
    with pytest.raises(InvalidType, match=r"OwnAudio\.mel: expected .* got list"):
        OwnAudio([1.0])
    with pytest.raises(InvalidType, match=r"Block\.segments\[0\]: expected Tokens, Audio or Image"):
        Block([OwnAudio(_mel(0, 1))])


def test_shards_keep_what_was_said(config, tmp_path: Path):
    before_M = _mel(9, 1)[0, 0]
    written = [_transcript(0), _transcript(4, before_M), _transcript(6)]
    write_shards(written, tmp_path / "data", config)
    reader = ShardReader(tmp_path / "data", config)
    for index, one in enumerate(written):
        want, got = (PackedBatch.pack([each], config) for each in (one, reader[index]))
        for name in ("token_ids", "bins", "order", "own_after", "targets", "streams"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        # Halves below 4 are 2^-9 apart.
        torch.testing.assert_close(got.own_mel, want.own_mel, rtol=0, atol=2**-10)
        torch.testing.assert_close(got.own_before, want.own_before, rtol=0, atol=2**-10)
