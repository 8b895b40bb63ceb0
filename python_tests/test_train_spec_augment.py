"""What is learned from is altered within its bounds, the same again, and by default not at all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from byte_model import BYTE_MODEL
from tml_core.errors import InvalidArgument
from tml_core.layout.state import Stream
from tml_core.media.segments import Audio, Tokens
from tml_core.train.config import DataConfig, ModelSource, RunConfig, TrainConfig
from tml_core.train.module import ModelOutput
from tml_core.train.packing import PackedBatch, Transcript
from tml_core.train.spec_augment import spec_augment
from tml_core.train.trainer import Trainer

BINS = torch.randint(
    2, 14, (300, 80), generator=torch.Generator().manual_seed(3), dtype=torch.int32
)


def test_a_share_of_the_stretches_is_altered_within_bounds() -> None:
    before = BINS.clone()
    altered = spec_augment(BINS, 16, 1.0, 5, 7, 0)
    assert torch.equal(BINS, before)
    assert altered.dtype == torch.int32 and altered.shape == BINS.shape
    assert int(altered.min()) == 0 and int(altered.max()) <= 15
    for start in range(0, 300, 60):
        stretch = altered[start : start + 60]
        assert int((stretch == 0).all(dim=0).sum()) <= 20  # whole channels are masked, or none
    steady = (torch.arange(80, dtype=torch.int32) // 8 + 4).repeat(60, 1)
    for step in range(50):
        heard = spec_augment(steady, 16, 1.0, 5, step, 0)
        assert len(heard.unique(dim=0)) == 1  # the same at all times
        # A stretch by 12 channels, a shift of 1, a tilt of 1.5, rounded.
        kept = heard[0] > 0
        assert int((heard[0] - steady[0])[kept].abs().max()) <= 5
    half = spec_augment(BINS.repeat(40, 1), 16, 0.5, 5, 7, 0)
    num_altered = sum(
        not torch.equal(half[start : start + 60], BINS.repeat(40, 1)[start : start + 60])
        for start in range(0, len(half), 60)
    )
    assert 70 <= num_altered <= 130  # of 200


def test_it_is_a_function_of_the_place_in_the_run() -> None:
    one = spec_augment(BINS, 16, 1.0, 5, 7, 0)
    assert torch.equal(one, spec_augment(BINS, 16, 1.0, 5, 7, 0))
    for other in ((6, 7, 0), (5, 8, 0), (5, 7, 1)):
        assert not torch.equal(one, spec_augment(BINS, 16, 1.0, *other))


def test_a_run_hears_it_altered_anew_in_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[torch.Tensor] = []

    def half_a_second(_start: int) -> Iterator[Transcript]:
        while True:
            segments = [Audio(bins=BINS[:10]), Tokens([275, 277])]
            yield Transcript.next_tokens(segments, [*[Stream.INPUT] * 11, Stream.SILENCE])

    config = TrainConfig(
        ModelSource(str(BYTE_MODEL)),
        DataConfig("unused", batch_tokens=24, buffer=2, spec_augment=1.0),
        RunConfig(str(tmp_path / "run"), num_steps=2),
    )
    with Trainer(config, half_a_second) as trainer:
        run = trainer.model.run

        def listen(batch: PackedBatch, **options: Any) -> ModelOutput:
            heard.append(batch.bins)
            return run(batch, **options)

        monkeypatch.setattr(trainer, "_run_model", listen)
        trainer.run()
    plain = torch.cat([BINS[:10], BINS[:10]])
    assert len(heard) == 2 and not torch.equal(heard[0], heard[1])
    assert all(not torch.equal(bins, plain) and bins.shape == plain.shape for bins in heard)


def test_nothing_is_altered_unless_asked_for() -> None:
    assert spec_augment(BINS, 16, 0.0, 5, 7, 0) is BINS
    assert spec_augment(BINS[:0], 16, 1.0, 5, 7, 0).shape == (0, 80)
    assert DataConfig("x").spec_augment == 0.0
    with pytest.raises(InvalidArgument, match=r"data.spec_augment: expected 0 to 1, got 1.5"):
        DataConfig("x", spec_augment=1.5)
