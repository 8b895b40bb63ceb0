"""The training loop: exact resume after stops and kills, checkpoints, what ends a run."""

import json
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tml_core as tml
from tml_core import errors
from tml_core.model.config import ModelConfig
from tml_core.train import PackedBatch, Trainer, TrainingStopped, Transcript
from tml_core.train import checkpoint as checkpoint_module
from tml_core.train import trainer as trainer_module
from tml_core.train.checkpoint import CheckpointFolder
from train_kit import make_checkpoint, make_run, random_transcripts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mixed"))


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that later steps depend on."""
    state = trainer._optimizer.state()
    return {name: value.clone() for name, value in {**trainer.model.state_dict(), **state}.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


@pytest.mark.parametrize(
    ("kind", "shape", "num_steps"), [("adamw", "mixed", 6), ("muon", "text", 3)]
)
def test_a_run_resumes_with_the_same_bits_at_any_step(
    kind: str, shape: str, num_steps: int, tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "start", shape)
    changed: dict[str, Any] = {"optimizer": {"kind": kind}, "run": {"num_steps": num_steps}}
    whole = Trainer(make_run(tmp_path / "whole", model, **changed))
    whole.run()
    assert whole.step == num_steps
    changed["run"]["save_every"] = 100
    broken_run = make_run(tmp_path / "broken", model, **changed)
    for _ in range(num_steps):  # stop after every step
        trainer = Trainer(broken_run)
        stop_at = trainer.step + 1
        trainer.run(should_stop=lambda t=trainer, end=stop_at: t.step == end)  # type: ignore[misc]
        trainer.close()
    assert_same(everything(trainer), everything(whole))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "whole")] == [*range(1, num_steps + 1)]
    whole.plot()
    assert (tmp_path / "whole" / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    # A run that is over stays as it is.
    again = Trainer(broken_run)
    again.run()
    assert again.step == num_steps
    assert_same(everything(again), everything(whole))


def test_threads_recomputing_and_batches_alone_do_not_change_the_bits(
    model: Path, tmp_path: Path
) -> None:
    seen = []
    for threads, recompute in ((2, False), (1, False), (2, True)):
        torch.set_num_threads(threads)
        with Trainer(make_run(tmp_path, model, model={"recompute": recompute})) as trainer:
            for _ in range(2):
                trainer._accumulate(trainer._next_batches()[0])
        seen.append({name: one.grad for name, one in trainer.model.named_parameters()})
    for other in seen[1:]:
        assert_same(seen[0], other)  # type: ignore[arg-type]


CHILD = """
import sys
from pathlib import Path
from train_kit import make_run
from tml_core.train import Trainer
trainer = Trainer(make_run(Path(sys.argv[1]), Path(sys.argv[2])))
trainer.run(lambda metrics: print(metrics.step, flush=True))
"""


def child(*args: object, **named: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, args)],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **named,
    )


def test_a_killed_process_resumes_with_the_same_bits(model: Path, tmp_path: Path) -> None:
    whole = Trainer(make_run(tmp_path / "whole", model))
    whole.run()
    make_run(tmp_path / "killed", model)
    with child(tmp_path / "killed", model) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "3\n":
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    config = make_run(tmp_path / "killed", model)
    resumed = Trainer(config)
    assert resumed.step in (2, 4)
    resumed.run()
    assert_same(everything(resumed), everything(whole))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(".partial*"))


def test_a_full_disk_leaves_the_old_checkpoint(model: Path, tmp_path: Path) -> None:
    config = make_run(tmp_path, model)
    trainer = Trainer(config)
    trainer.run(should_stop=lambda: trainer.step == 2)
    trainer.close()
    before = everything(trainer)
    largest = trainer._checkpoints.path(2) / "optimizer.safetensors"
    limit = largest.stat().st_size // 2

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with child(tmp_path, model, preexec_fn=no_room) as process:
        _, stderr = process.communicate()
    assert process.returncode == 1
    assert "CheckpointError: save: " in stderr and "File too large" in stderr
    assert "the newest complete one is" in stderr and "step-00000002" in stderr
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    assert folder.steps() == [2] and not list(folder.root.glob(".partial*"))
    resumed = Trainer(config)
    assert resumed.step == 2
    assert_same(everything(resumed), before)


def test_a_failing_flush_leaves_the_old_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_run(tmp_path, model))
    trainer.train_step()

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module, "flush", fail)
        with pytest.raises(errors.CheckpointError, match=r"save: .*No space left.*; there is none"):
            trainer.save()
    path = trainer.save()
    assert trainer._checkpoints.steps() == [1] and trainer._checkpoints.load(1).path == path


def test_checkpoints_load_as_models(model: Path, tmp_path: Path) -> None:
    from transformers import InklingForConditionalGeneration

    config = make_run(tmp_path, model, run={"num_steps": 2})
    trainer = Trainer(config)
    path = trainer.run()
    weights = trainer.model.state_dict()
    theirs = InklingForConditionalGeneration.from_pretrained(path, dtype=torch.float32).state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in weights.items())
    start = InklingForConditionalGeneration.from_pretrained(model, dtype=torch.float32).state_dict()
    moved = [name for name, value in weights.items() if not torch.equal(start[name], value)]
    assert any(name.endswith("e_score_correction_bias") for name in moved)
    assert "model.vision_tower.final_norm.weight" in moved
    served = tml.load_model(path, dtype="bfloat16")
    ids = torch.arange(5, 25)
    transcript = Transcript([tml.Tokens(ids)], ids.roll(-1), torch.ones(20, dtype=torch.uint8))
    logits = served.logits([tml.Tokens(ids)])
    expected = trainer.model(PackedBatch.pack([transcript], trainer.model_config))
    got = logits.log_softmax(-1).gather(1, transcript.targets[:, None])[:, 0]
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)


def test_old_checkpoints_go_but_for_the_best(model: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_run(tmp_path, model, run={"save_every": 1, "keep": 2}))
    for step, loss in enumerate([5.0, 3.0, 4.0, 4.0, 4.0], start=1):
        trainer._progress.step, trainer._progress.smooth_loss = step, loss
        trainer.save()
    assert trainer._checkpoints.steps() == [2, 4, 5]
    assert trainer._checkpoints.load(5).progress["best_step"] == 2


def test_a_checkpoint_of_another_run_is_refused(model: Path, tmp_path: Path) -> None:
    with Trainer(make_run(tmp_path, model)) as trainer:
        trainer.train_step()
        trainer.save()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"optimizer": {"learning_rate": 0.5}}, "optimizer.learning_rate = 0.01, this run has 0.5"),
        ({"data": {"seed": 4}}, "data.seed = 3, this run has 4"),
        ({"loss": {"silence": 0.5}}, "loss.silence = 1.0, this run has 0.5"),
        ({"run": {"num_steps": 7}}, "run.num_steps = 6, this run has 7"),
        ({"model": {"dtype": "float32"}}, "model.dtype = 'bfloat16', this run has 'float32'"),
    ]
    for changed, match in changes:
        with pytest.raises(errors.CheckpointError, match=match):
            Trainer(make_run(tmp_path, model, **changed))
    # What does not decide the bits may change.
    Trainer(make_run(tmp_path, model, run={"keep": 5}, model={"recompute": True}))


def test_a_checkpoint_of_another_model_or_data_is_refused(model: Path, tmp_path: Path) -> None:
    config = make_run(tmp_path, model)
    with Trainer(config) as trainer:
        trainer.train_step()
        trainer.save()
    other = ModelConfig.from_path(model)
    transcripts = random_transcripts(other, 5, seed=1)
    with pytest.raises(errors.CheckpointError, match=r"dataset = .*, this run has"):
        Trainer(config, transcripts)
    text = make_checkpoint(tmp_path / "text", "text")
    data = random_transcripts(ModelConfig.from_path(text), 5)
    with pytest.raises(errors.CheckpointError, match=r"was made with (dataset|model) = "):
        Trainer(make_run(tmp_path, text), data)


def test_a_damaged_or_foreign_checkpoint_is_named(model: Path, tmp_path: Path) -> None:
    config = make_run(tmp_path, model)
    with Trainer(config) as trainer:
        trainer.train_step()
        path = trainer.save()
    manifest = path / "trainer.json"
    text = manifest.read_text()
    for old, new, match in (
        ('"contract": 1', '"contract": 7', "made under contract 7, this package computes by .* 1"),
        ('"format": 1', '"format": 2', "must have format 1, got 2"),
        ('"files"', '"file"', r"is damaged: KeyError\('files'\)"),
    ):
        manifest.write_text(text.replace(old, new))
        with pytest.raises(errors.CheckpointError, match=match):
            Trainer(config)
    manifest.write_text(text)
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(errors.CheckpointError, match=r"resume: .*model.safetensors is damaged"):
        Trainer(config)


def test_a_loss_that_is_no_number_stops_the_run(model: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_run(tmp_path, model))
    trainer.run(should_stop=lambda: trainer.step == 2)
    good = everything(trainer)
    with torch.no_grad():
        trainer.model.get_parameter("lm_head.weight")[7, 7] = math.nan
    with pytest.raises(TrainingStopped, match=r"step 3 is not finite; the last .*step-00000002"):
        trainer.run()
    with pytest.raises(TrainingStopped, match=r"lm_head.weight is not finite after step 2"):
        trainer.save()
    trainer.close()
    resumed = Trainer(trainer.config)
    assert resumed.step == 2
    assert_same(everything(resumed), good)


def test_a_gradient_that_is_no_number_changes_nothing(model: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_run(tmp_path, model))
    before = everything(trainer)
    parameter = trainer.model.get_parameter("lm_head.weight")
    parameter.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(
        TrainingStopped, match="the gradient of step 1 is not finite; no checkpoint"
    ):
        trainer.run()
    assert_same(everything(trainer), before)


def test_a_loss_that_runs_away_stops_the_run(model: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_run(tmp_path, model, run={"divergence_factor": 2.0}))
    trainer._progress.step = 50
    for loss in [1.0] * 20 + [3.0] * 10:
        trainer._judge(loss)
    with pytest.raises(TrainingStopped, match=r"diverged at step 50: .* 2.0 times its"):
        for _ in range(20):
            trainer._judge(3.0)
    trainer.close()
    calm = Trainer(make_run(tmp_path, model, run={"divergence_factor": 0.0}))
    calm._progress.step = 50
    for loss in [1.0] * 20 + [1e9] * 20:
        calm._judge(loss)


def test_data_is_checked_before_training(model: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"transcripts\[\d\]: expected 1 to 20 pos"):
        Trainer(make_run(tmp_path, model, data={"max_positions": 20}))
    with pytest.raises(errors.InvalidArgument, match="data: expected at least one transcript"):
        Trainer(make_run(tmp_path, model), [])
    with pytest.raises(errors.CheckpointError, match="no dataset index"):
        Trainer(make_run(tmp_path, model, data={"path": "/nowhere"}))


def test_transcripts_may_come_from_memory(model: Path, tmp_path: Path) -> None:
    transcripts = random_transcripts(ModelConfig.from_path(model), 9)
    packed = Trainer(make_run(tmp_path, model))
    given = Trainer(make_run(tmp_path, model, run={"folder": str(tmp_path / "given")}), transcripts)
    assert packed.train_step().loss == given.train_step().loss
    assert_same(everything(packed), everything(given))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device it asks for")
def test_a_device_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.Unsupported, match=r"model.device: cuda:1 is not there"):
        Trainer(make_run(tmp_path, model, model={"device": "cuda:1"}))


def test_streams_weigh_what_they_are_told(model: Path, tmp_path: Path) -> None:
    config = make_run(tmp_path, model, loss={"silence": 0.0, "control": 0.0, "call": 2.0})
    trainer = Trainer(config)
    batches = trainer._next_batches()[0]
    sums = trainer._accumulate(batches)
    grads = {name: one.grad for name, one in trainer.model.named_parameters()}
    trainer.close()
    other = Trainer(config)
    weight = {1: 1.0, 4: 2.0}
    total = sum(weight.get(s, 0.0) for b in batches for s in b.streams.tolist())
    loss = torch.zeros(())
    for batch in batches:
        weights = torch.tensor([weight.get(s, 0.0) for s in batch.streams.tolist()])
        loss = loss - (other.model(batch) * weights).sum() / total
    loss.backward()
    assert sums.losses.mean() == pytest.approx(loss.item(), rel=1e-5)
    assert list(sums.losses.means()) == ["text", "silence", "control", "call"]
    for name, one in other.model.named_parameters():
        # the same products, rounded once more on the way
        torch.testing.assert_close(one.grad, grads[name], rtol=2e-2, atol=1e-4)
    other.close()
    silent = make_run(
        tmp_path, model, loss=dict.fromkeys(("text", "silence", "control", "call"), 0)
    )
    with pytest.raises(errors.InvalidArgument, match="a position with a loss in step 0, got none"):
        Trainer(silent).train_step()


def test_the_choice_bias_follows_the_counts(model: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_run(tmp_path, model, optimizer={"router_bias_rate": 0.125}))
    layer = trainer.model.sparse_layers[0]
    before = trainer.model.router_bias(layer).clone()
    counts = [torch.tensor([9, 0, 3, 3, 3, 3, 3, 0]) for _ in trainer.model.sparse_layers]
    assert trainer._balance(counts, 0.125) == 3.0
    moved = (trainer.model.router_bias(layer) - before).tolist()
    assert moved == pytest.approx([-0.125, 0.125, 0, 0, 0, 0, 0, 0.125], abs=1e-7)
    batches = trainer._next_batches()[0]
    sums = trainer._accumulate(batches)
    num_visits = sum(batch.num_tokens for batch in batches) * trainer.model_config.text.top_k
    assert [int(one.sum()) for one in sums.expert_counts] == [num_visits] * 4


def test_a_step_compiles_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.compile
    options = []

    def traced(function: Any, **named: Any) -> Any:
        options.append(named.pop("options"))
        return real(function, backend="aot_eager", **named)

    paged = make_checkpoint(tmp_path / "paged", "paged")  # three layers are enough
    plain = Trainer(make_run(tmp_path / "plain", paged))
    monkeypatch.setattr(trainer_module.torch, "compile", traced)
    compiled = Trainer(make_run(tmp_path / "compiled", paged, model={"compile": True}))
    assert options == [{"emulate_precision_casts": True}]
    plain.train_step()  # two batches
    compiled.train_step()
    assert_same(everything(plain), everything(compiled))
