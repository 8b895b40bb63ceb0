"""Tiny runs for the trainer's tests."""

from pathlib import Path
from typing import Any

import torch

from tml_core.layout import Stream
from tml_core.media.segments import Audio, Block, Image, Tokens
from tml_core.model.config import ModelConfig
from tml_core.train import TrainConfig, Transcript, write_shards

SAMPLED = (Stream.TEXT, Stream.SILENCE, Stream.CONTROL, Stream.CALL)


def make_checkpoint(folder: Path, shape: str = "mixed") -> Path:
    """A tiny random checkpoint."""
    # Here, for programs that tests start import this module too, and transformers takes seconds.
    from hf_checkpoints import make_hf_model, save_hf

    return save_hf(make_hf_model(shape, seed=2)[0], folder)


def random_transcripts(config: ModelConfig, count: int, seed: int = 0) -> list[Transcript]:
    """Of 10 to 40 tokens, with sound, a block and a picture where the model has them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    transcripts = []
    for _ in range(count):
        num_tokens = int(draw(5, 20, 1))
        ids = draw(5, config.text.unpadded_vocab_size, num_tokens)
        segments: list[Any] = [Tokens(ids)]
        if config.audio is not None and config.vision is not None:
            bins = draw(0, config.audio.num_levels, 2, config.audio.num_mel_bins).int()
            side = config.vision.patch_size
            patches = torch.randn(3, 2, side, side, 3, generator=generator)
            block = Block([Tokens(ids[:2]), Image(patches=patches)])
            segments += [Audio(bins=bins), block, Image(patches=patches[:1])]
        segments.append(Tokens(ids))
        length = 2 * num_tokens + (8 if len(segments) > 2 else 0)
        streams = [SAMPLED[int(draw(0, 4, 1))] for _ in range(length)]
        streams[num_tokens:-num_tokens] = [Stream.INPUT] * (length - 2 * num_tokens)
        transcripts.append(Transcript.next_tokens(segments, streams))
    return transcripts


def make_run(folder: Path, checkpoint: Path, /, **changed: dict[str, Any]) -> TrainConfig:
    """Random data in ``folder``/data and a run in ``folder``/run; ``changed``: keys of tables."""
    if not (folder / "data").exists():
        config = ModelConfig.from_path(checkpoint)
        write_shards(random_transcripts(config, 9), folder / "data", config, shard_bytes=900)
    raw: dict[str, dict[str, Any]] = {
        "model": {"path": str(checkpoint), "dtype": "bfloat16"},
        "data": {"path": str(folder / "data"), "batch_tokens": 60, "seed": 3},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2, "accumulate": 2},
        "run": {"folder": str(folder / "run"), "num_steps": 6, "save_every": 2},
    }
    for table, values in changed.items():
        raw.setdefault(table, {}).update(values)
    return TrainConfig.from_dict(raw)
