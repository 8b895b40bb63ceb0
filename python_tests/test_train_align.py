"""Sampler against trainer on random lives of sessions: not one bit differs, and one that does is
found."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from byte_model import BYTE_MODEL
from hf_checkpoints import make_hf_model, save_hf
from speaking_kit import save_speaking
from tml_core import cli, errors
from tml_core.cli.align import run_align
from tml_core.model.config import ModelConfig
from tml_core.model.flow import FLOW_PREFIX
from tml_core.train import align as align_module
from tml_core.train import lives
from tml_core.train.align import align
from tml_core.train.module import TrainableModel


def spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Positions at which sessions were moved by the method ``name``."""
    seen: list[int] = []
    real: Callable[..., object] = getattr(lives.Session, name)

    def call(session: lives.Session, *args: object, **named: object) -> object:
        seen.append(session.info().position)
        return real(session, *args, **named)

    monkeypatch.setattr(lives.Session, name, call)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_bit_differs_before_and_after_training(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewinds, forks = spy(monkeypatch, "rewind"), spy(monkeypatch, "fork")
    stages: dict[str, tuple[int, int]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        stages[stage] = (done, total)

    before, after = align(BYTE_MODEL, num_tokens=250, dtype=dtype, num_steps=2, progress=progress)
    for report in (before, after):
        assert report.is_aligned and report.num_differing == 0
        assert report.largest_difference == 0.0
        assert report.num_tokens >= 250 and report.num_positions > report.num_tokens
        assert report.dtype == str(dtype).removeprefix("torch.")
        assert report.sample_s > 0 and report.recompute_s > 0
    assert (before.num_steps, after.num_steps) == (0, 2)
    assert rewinds and forks
    assert list(stages) == [
        "sample",
        "recompute",
        "train",
        "sample after 2 steps",
        "recompute after 2 steps",
    ]
    assert all(done == total for done, total in stages.values())


def test_no_bit_of_what_is_said_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewinds, forks = spy(monkeypatch, "rewind"), spy(monkeypatch, "fork")
    (report,) = align(save_speaking(tmp_path), num_tokens=250)
    assert report.is_aligned
    assert report.num_differing == report.num_differing_blocks == 0
    assert report.num_blocks > 40
    assert rewinds and forks


def test_a_changed_head_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed(TrainableModel):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            with torch.no_grad():
                self.get_parameter(FLOW_PREFIX + "out_proj.weight")[5] *= 1.5

    monkeypatch.setattr(align_module, "TrainableModel", Changed)
    console = Console(record=True, width=100)
    assert not run_align(str(save_speaking(tmp_path)), 60, "bfloat16", 0, 0, console)
    text = console.export_text()
    (row,) = [line.split() for line in text.splitlines() if line.startswith("bfloat16")]
    # ..., tokens, differ, largest, blocks, differ, ...
    assert row[5] == "0" and row[7] == row[8] and int(row[7]) > 0


def test_one_changed_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed(TrainableModel):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            with torch.no_grad():
                self.get_parameter("model.language_model.norm.weight")[5] *= 1.01

    monkeypatch.setattr(align_module, "TrainableModel", Changed)
    console = Console(record=True, width=100)
    assert not run_align(BYTE_MODEL, 60, "float32", 0, 0, console)
    text = console.export_text()
    assert "they differ" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("float32")]
    # dtype, steps, sessions, positions, tokens, differ, largest, ...
    assert int(row[5]) > 30 and 0 < float(row[6]) < 0.1


@pytest.mark.parametrize(("is_aligned", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_tells(is_aligned: bool, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []

    def run(*args: object) -> bool:
        seen.append(args[:5])
        return is_aligned

    monkeypatch.setattr("tml_core.cli.align.run_align", run)
    monkeypatch.setattr(sys, "argv", ["tml-core", "align", "--tokens", "7", "--steps", "2"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    assert seen == [("nano", 7, "both", 2, 0)]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="num_tokens: expected at least 1, got 0"):
        align(num_tokens=0)
    with pytest.raises(errors.InvalidArgument, match="num_steps: expected at least 0, got -1"):
        align(num_steps=-1)
    save_hf(make_hf_model("text")[0], tmp_path)
    assert ModelConfig.from_path(tmp_path).interaction is None
    with pytest.raises(errors.Unsupported, match="expected a model of micro-turns, got a plain"):
        align(tmp_path)
    with pytest.raises(errors.InvalidArgument, match="bfloat16, float32 or both, got 'int8'"):
        run_align(BYTE_MODEL, 1, "int8", 0, 0, Console())
    with pytest.raises(errors.CheckpointError, match="does not exist"):
        align(tmp_path / "nothing")
