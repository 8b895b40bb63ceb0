"""Learning to speak in the training loop: the loss of sound, its noise, exact resume.

Shape suffixes: T positions, A blocks.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from byte_model import BYTE_MODEL
from tml_core import AudioChunk, Chunk, Session, load_model
from tml_core.errors import InvalidArgument, Unsupported
from tml_core.layout import MicroTurnLayout, Stream
from tml_core.media import GriffinLim, clips, mel_frames, read_audio
from tml_core.media.segments import Audio, OwnAudio, Tokens
from tml_core.model.audio_out_config import AudioOutConfig
from tml_core.model.config import ModelConfig
from tml_core.model.flow import FLOW_PREFIX, SELF_EMBED
from tml_core.model.tokenizer import load_tokenizer
from tml_core.model.weights import random_weights, save_weights
from tml_core.train import TrainConfig, Trainer, Transcript, write_shards
from tml_core.train.flow_loss import flow_seed

HEAD = AudioOutConfig(width=32, num_layers=1)
NUM_BLOCKS = 3


def _config() -> ModelConfig:
    """The byte model with two layers and a head."""
    plain = ModelConfig.from_path(BYTE_MODEL)
    assert plain.interaction is not None
    text = dataclasses.replace(
        plain.text, num_layers=2, layer_is_sliding=(True, False), layer_is_dense=(True, False)
    )
    speaking = dataclasses.replace(plain.interaction, audio_out=HEAD)
    return dataclasses.replace(plain, text=text, interaction=speaking)


def _transcript(seed: int, num_silent: int = 0) -> Transcript:
    """A few blocks, of which the first ``num_silent`` are not to be learned, among text."""
    generator = torch.Generator().manual_seed(seed)
    mel = torch.rand(NUM_BLOCKS, 4, 80, generator=generator) * 4.0 - 3.5
    bins = torch.randint(0, 16, (2, 80), generator=generator, dtype=torch.int32)
    segments: list[Any] = [Tokens([5, 6]), Audio(bins=bins), Tokens([seed % 200, 7])]
    streams = [Stream.INPUT] * 5 + [Stream.CONTROL]
    segments += [OwnAudio(mel), Tokens([8, 9])]
    streams += [Stream.INPUT] * num_silent + [Stream.AUDIO] * (NUM_BLOCKS - num_silent)
    streams += [Stream.CONTROL, Stream.TEXT]
    return Transcript.next_tokens(segments, streams)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speaking")
    config = _config()
    save_weights(folder, random_weights(config, 3, torch.float32), config)
    return folder


def _run(folder: Path, model: Path, /, **changed: dict[str, Any]) -> TrainConfig:
    if not (folder / "data").exists():
        config = ModelConfig.from_path(model)
        write_shards([_transcript(seed, seed % 3) for seed in range(7)], folder / "data", config)
        write_shards([_transcript(seed) for seed in range(20, 24)], folder / "unseen", config)
    raw: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "dtype": "bfloat16"},
        "data": {"path": str(folder / "data"), "batch_tokens": 25, "seed": 3},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2, "accumulate": 2},
        "run": {"folder": str(folder / "run"), "num_steps": 4, "save_every": 2},
        "eval": {"path": str(folder / "unseen"), "every": 2},
    }
    for table, values in changed.items():
        raw.setdefault(table, {}).update(values)
    return TrainConfig.from_dict(raw)


def _everything(trainer: Trainer) -> dict[str, Tensor]:
    state = {**trainer.model.state_dict(), **trainer._optimizer.state()}
    return {name: value.clone() for name, value in state.items()}


def _different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def _rows(folder: Path) -> list[tuple[Any, ...]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    names = ("step", "loss", "loss_by_stream", "gradient_norm", "held_out")
    return [tuple(row[name] for name in names) for row in map(json.loads, lines)]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_that_learns_to_speak_resumes_with_the_same_bits_at_any_step(
    kind: str, model: Path, tmp_path: Path
) -> None:
    changed: dict[str, Any] = {"optimizer": {"kind": kind}, "data": {"spec_augment": 0.5}}
    with Trainer(_run(tmp_path / "whole", model, **changed)) as whole:
        whole.run()
    broken_run = _run(tmp_path / "broken", model, **changed, model={"recompute": True})
    for step in range(1, 5):
        with Trainer(broken_run) as broken:
            broken.run(should_stop=lambda t=broken, end=step: t.step == end)  # type: ignore[misc]
    assert _different(_everything(broken), _everything(whole)) == []
    rows = _rows(tmp_path / "whole")
    assert _rows(tmp_path / "broken") == rows
    assert [row[0] for row in rows] == [1, 2, 3, 4]
    for _, _, by_stream, _, held_out in rows:
        assert set(by_stream) == {"text", "control", "audio"}
        assert held_out is None or held_out["loss_by_stream"]["audio"] > 0.0
    assert [row[4] is None for row in rows] == [True, False, True, False]


def test_sound_is_weighed_as_the_other_streams_are(model: Path, tmp_path: Path) -> None:
    weights = {"text": 1.0, "control": 0.5, "audio": 0.25}
    config = _run(tmp_path, model, loss=weights, model={"dtype": "float32"})
    with Trainer(config) as trainer:
        batches = trainer._next_batches()[0]
        sums = trainer._accumulate(batches)
    grads = {name: one.grad for name, one in trainer.model.named_parameters()}
    with Trainer(config) as other:
        losses, total, sound = torch.zeros(()), 0.0, []
        for index, batch in enumerate(batches):
            out = other.model.run(batch, flow_seed=flow_seed(3, 0, index))
            assert out.flow_losses is not None and len(out.flow_losses) == batch.num_blocks
            blocks = iter(range(batch.num_blocks))
            is_block_T = torch.zeros(batch.num_tokens, dtype=torch.bool)
            is_block_T[batch.own_after] = True
            for position, stream in enumerate(batch.streams.tolist()):
                block = next(blocks) if is_block_T[position] else None
                if stream == int(Stream.INPUT):
                    continue
                weight = weights[Stream(stream).name.lower()]
                total += weight
                if block is None:
                    losses = losses - weight * out.logprobs[position]
                else:
                    losses = losses + weight * out.flow_losses[block]
                    sound.append(out.flow_losses[block].item())
        (losses / total).backward()
        assert len(sound) < sum(batch.num_blocks for batch in batches)  # some are not learned
        assert sums.losses.mean() == pytest.approx(losses.item() / total, rel=1e-5)
        assert sums.losses.means()["audio"] == pytest.approx(sum(sound) / len(sound), rel=1e-6)
        for name, one in other.model.named_parameters():
            torch.testing.assert_close(one.grad, grads[name], rtol=1e-3, atol=1e-5)


def test_a_head_that_weighs_nothing_stays_as_it_is(model: Path, tmp_path: Path) -> None:
    with Trainer(_run(tmp_path, model, loss={"audio": 0.0})) as trainer:
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        metrics = trainer.train_step()
        assert set(metrics.loss_by_stream) == {"text", "control"}
        assert set(trainer.evaluate().loss_by_stream) == {"text", "control"}
        changed = _different(before, trainer.model.state_dict())
    head = {name for name in before if name.startswith(FLOW_PREFIX)}
    # What it says is heard all the same.
    assert head & set(changed) == {SELF_EMBED}


def test_a_run_may_learn_of_sound_alone(model: Path, tmp_path: Path) -> None:
    nothing = dict.fromkeys(("text", "silence", "control", "call"), 0.0)
    with Trainer(_run(tmp_path, model, loss=nothing)) as trainer:
        metrics = trainer.train_step()
        assert metrics.loss == pytest.approx(metrics.loss_by_stream["audio"])
        assert set(metrics.loss_by_stream) == {"text", "control", "audio"}
        held_out = trainer.evaluate()
        assert held_out.loss == pytest.approx(held_out.loss_by_stream["audio"])
        assert trainer.evaluate() == held_out
    nothing["audio"] = 0.0
    with pytest.raises(InvalidArgument, match=r"eval\.path: expected a position with a loss"):
        Trainer(_run(tmp_path, model, loss=nothing))


def test_noise_is_another_for_every_batch_of_every_run() -> None:
    places = [(seed, step, batch) for seed in (0, 7) for step in range(3) for batch in range(3)]
    seeds = [flow_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= one < 2**64 for one in seeds)
    assert seeds == [flow_seed(*place) for place in places]


def test_a_few_blocks_are_learned_by_heart(model: Path, tmp_path: Path) -> None:
    config = _run(
        tmp_path,
        model,
        data={"batch_tokens": 100, "shuffle": False},
        optimizer={"accumulate": 1, "weight_decay": 0.0},
        run={"num_steps": 60},
        eval={"path": ""},
    )
    with Trainer(config, [_transcript(seed) for seed in range(2)]) as trainer:
        losses = [trainer.train_step().loss_by_stream["audio"] for _ in range(60)]
    assert losses[0] > 1.2
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]


def test_a_model_without_a_head_learns_no_sound(tmp_path: Path) -> None:
    plain = _config()
    assert plain.interaction is not None
    mute = dataclasses.replace(
        plain, interaction=dataclasses.replace(plain.interaction, audio_out=None)
    )
    save_weights(tmp_path / "mute", random_weights(mute, 3, torch.float32), mute)
    config = TrainConfig.from_dict(
        {
            "model": {"path": str(tmp_path / "mute")},
            "data": {"path": "memory"},
            "run": {"folder": str(tmp_path / "run"), "num_steps": 1},
        }
    )
    with (
        Trainer(config, [_transcript(0)]) as trainer,
        pytest.raises(InvalidArgument, match=r"segments\[3\]: this model has no audio-out head"),
    ):
        trainer.train_step()


def test_sound_is_not_learned_in_a_compiled_step(model: Path, tmp_path: Path) -> None:
    match = r"model\.compile: expected false where own sound is learned.*; loss\.audio = 0 leaves"
    with pytest.raises(Unsupported, match=match):
        Trainer(_run(tmp_path, model, model={"compile": True}))
    silent = _run(tmp_path, model, model={"compile": True}, loss={"audio": 0.0})
    with Trainer(silent) as trainer:
        assert trainer.step == 0


def test_what_was_learned_is_said(tmp_path: Path) -> None:
    """A word by heart, from the loss to the sound of a session."""
    head = AudioOutConfig(width=128, num_layers=2)
    plain = _config()
    assert plain.interaction is not None
    config = dataclasses.replace(
        plain, interaction=dataclasses.replace(plain.interaction, audio_out=head)
    )
    start = tmp_path / "start"
    save_weights(start, random_weights(config, 3, torch.float32), config)
    shutil.copy(BYTE_MODEL / "tokenizer.json", start)
    layout = MicroTurnLayout(config, load_tokenizer(start))
    mel_FM = mel_frames(read_audio(clips().audio)[16000:25600])
    ids = layout.grammar.tokens
    say, silence, end = ids.say, ids.silence, ids.end_out
    blocks = mel_FM.reshape(3, 4, 4, 80)
    runs: list[list[Any]] = [[silence], *([say, *four, end] for four in blocks), [silence]]
    idle = Chunk(is_idle=True)
    transcript = Transcript.next_tokens(*layout.encode_session([(idle, run) for run in runs]))
    options = {
        "model": {"path": str(start)},
        "data": {"path": "memory", "batch_tokens": 120},
        "optimizer": {"learning_rate": 4e-3, "warmup_steps": 10, "weight_decay": 0.0},
        "run": {"folder": str(tmp_path / "run"), "num_steps": 70},
    }
    with Trainer(TrainConfig.from_dict(options), [transcript] * 3) as trainer:
        path = trainer.run()
    with Session(load_model(path, max_sequences=1)) as session:
        results = [session.append(idle).result() for _ in range(5)]
    assert [len(one.done.token_ids) for one in results] == [1, 6, 6, 6, 1]
    chunks = [e.pcm for one in results for e in one.events if isinstance(e, AudioChunk)]
    vocoder = GriffinLim()
    want_S = np.concatenate([vocoder.push(mel_FM), vocoder.flush()])
    said_FM, want_FM = mel_frames(np.concatenate(chunks)), mel_frames(want_S)
    assert said_FM.shape == want_FM.shape
    distance = np.abs(said_FM - want_FM).mean()
    assert distance < 0.3 * np.abs(want_FM - want_FM.mean(axis=0)).mean()
