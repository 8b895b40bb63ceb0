"""Around a run: one trainer a folder, checkpoints of before, where it begins, data held out."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tml_core import errors
from tml_core.model.config import ModelConfig
from tml_core.train import PackedBatch, Trainer, write_shards
from train_kit import make_checkpoint, make_run, random_transcripts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("text"), "text")


CHILD = """
import sys
from pathlib import Path
from train_kit import make_run
from tml_core.train import Trainer
trainer = Trainer(make_run(Path(sys.argv[1]), Path(sys.argv[2])))
print("has it", flush=True)
sys.stdin.read()
"""


def test_a_folder_takes_one_trainer(model: Path, tmp_path: Path) -> None:
    config = make_run(tmp_path, model)
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, tmp_path, model],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        match = f"run.folder: .* is in use by another trainer, process {process.pid}"
        with pytest.raises(errors.CheckpointError, match=match):
            Trainer(config)
        process.send_signal(signal.SIGKILL)
    # A dead owner's lock is nobody's.
    with Trainer(config) as trainer:
        with pytest.raises(errors.CheckpointError, match="is in use by another trainer"):
            Trainer(config)
        trainer.train_step()
    Trainer(config)  # given back
    Trainer(config)  # and given back by what is gone


def test_a_refused_start_leaves_no_lock(model: Path, tmp_path: Path) -> None:
    config = make_run(tmp_path, model)
    with Trainer(config) as trainer:
        trainer.train_step()
        trainer.save()
    with pytest.raises(errors.CheckpointError, match=r"data.seed = 3") as caught:
        Trainer(make_run(tmp_path, model, data={"seed": 4}))
    assert Trainer(config).step == 1
    assert caught.value.__traceback__ is not None  # which still knows the one refused


def test_a_setting_younger_than_the_checkpoint_had_its_default(model: Path, tmp_path: Path) -> None:
    with Trainer(make_run(tmp_path, model)) as trainer:
        trainer.train_step()
        manifest = trainer.save() / "trainer.json"
    content = json.loads(manifest.read_text())
    for key in ("data.buffer", "data.weights", "optimizer.momentum"):
        del content["told"][key]
    del content["progress"]["place"]
    manifest.write_text(json.dumps(content))
    with Trainer(make_run(tmp_path, model)) as resumed:
        assert resumed.step == 1
    match = r"optimizer.momentum = 0.95, this run has 0.5"
    with pytest.raises(errors.CheckpointError, match=match):
        Trainer(make_run(tmp_path, model, optimizer={"momentum": 0.5}))
    content["told"]["data.future"] = 3
    manifest.write_text(json.dumps(content))
    with pytest.raises(errors.CheckpointError, match=r"data.future = 3, this run has None"):
        Trainer(make_run(tmp_path, model))


def test_a_run_begins_with_the_weights_of_another(model: Path, tmp_path: Path) -> None:
    with Trainer(make_run(tmp_path / "one", model, run={"num_steps": 2})) as one:
        path = one.run()
    with Trainer(make_run(tmp_path / "two", path)) as two:
        assert two.step == 0 and two._optimizer.state() == {}
        before = one.model.state_dict()
        for name, value in two.model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert two.model_config == one.model_config
        two.run()
    # It resumes from its own checkpoint, also when the one it began with is gone.
    (path / "model.safetensors").unlink()
    with Trainer(make_run(tmp_path / "two", path)) as resumed:
        assert resumed.step == 6


def test_data_held_out_are_evaluated_and_not_learned(model: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_path(model)
    held_out = random_transcripts(config, 5, seed=9)
    write_shards(held_out, tmp_path / "held_out", config)
    options = {"path": str(tmp_path / "held_out"), "every": 4}
    with Trainer(make_run(tmp_path / "plain", model)) as plain:
        plain.run()
    with Trainer(make_run(tmp_path / "watched", model, eval=options)) as watched:
        watched.run()
        found = watched.evaluate()
    for name, value in watched.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), name
    rows = [
        json.loads(line)
        for line in (tmp_path / "watched" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows if row["held_out"]] == [4, 6]  # and the last one
    last = rows[-1]["held_out"]
    assert last == {"loss": found.loss, "loss_by_stream": found.loss_by_stream}
    # All weights are one: the mean of the losses of all positions.
    sums, count = 0.0, 0
    for one in held_out:
        model_out = watched.model(PackedBatch.pack([one], config))
        sums -= float(model_out.detach().double().sum())
        count += int((one.targets != -100).sum())
    assert found.loss == pytest.approx(sums / count, rel=1e-6)
    watched.plot()
    assert (tmp_path / "watched" / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    # What is watched decides no bits: a run may go on with other eyes.
    with Trainer(make_run(tmp_path / "watched", model)) as blind:
        assert blind.step == 6
        with pytest.raises(errors.InvalidArgument, match=r"eval.path: expected data to evaluate"):
            blind.evaluate()


def test_evaluation_takes_the_first_batches(model: Path, tmp_path: Path) -> None:
    config = make_run(tmp_path, model)
    options = {"path": config.data.path, "num_batches": 2}
    with Trainer(make_run(tmp_path, model, eval=options)) as trainer:
        assert trainer._held_out is not None
        batches = list(trainer._held_out_batches(trainer._held_out))
        assert len(batches) == 2
        whole = random_transcripts(trainer.model_config, 9)
        ids = torch.cat([one.targets for one in whole])
        taken = torch.cat([batch.targets for batch in batches])
        assert torch.equal(taken, ids[: len(taken)])
    with pytest.raises(errors.InvalidArgument, match=r"eval.path: expected a position with a loss"):
        silent = dict.fromkeys(("text", "silence", "control", "call"), 0)
        Trainer(make_run(tmp_path, model, eval=options, loss=silent))
    with pytest.raises(errors.CheckpointError, match="no dataset index"):
        Trainer(make_run(tmp_path, model, eval={"path": "/nowhere"}))
