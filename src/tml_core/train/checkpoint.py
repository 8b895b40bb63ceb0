"""Checkpoints of a run: directories that serve as models and hold what an exact resume needs.

``step-00000100/`` has ``config.json``, ``model.safetensors`` (float32 masters under transformers'
names) and ``tokenizer.json``, which `load_model` and transformers load; ``optimizer.safetensors``;
and ``trainer.json`` with versions, the step, what the run was told and a digest of every file. It
is written aside, flushed and renamed, so a directory of that name is complete.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tml_core.contract import CONTRACT_VERSION
from tml_core.errors import CheckpointError
from tml_core.model.config import ModelConfig
from tml_core.model.weights import save_weights
from tml_core.train.files import file_digest, flush

__all__ = ["Checkpoint", "CheckpointFolder"]

_FORMAT: Final = 1
_NAME: Final = re.compile(r"step-(\d{8,})")
_PARTIAL: Final = ".partial-"
_MANIFEST: Final = "trainer.json"
_OPTIMIZER: Final = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. ``told``: what the run was told. ``progress``: where it stood."""

    path: Path
    step: int
    told: dict[str, Any]
    progress: dict[str, Any]

    def optimizer_state(self) -> dict[str, Tensor]:
        """The tensors of `Optimizer.state`."""
        return load_file(self.path / _OPTIMIZER)


class CheckpointFolder:
    """The checkpoints of one run in ``root``, which is created when the first one is saved."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def steps(self) -> list[int]:
        """Of complete checkpoints, ascending."""
        names = [path.name for path in self.root.iterdir()] if self.root.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is."""
        return self.root / f"step-{step:08}"

    def save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        config: ModelConfig,
        tokenizer: Path | None,
        optimizer_state: Mapping[str, Tensor],
        told: dict[str, Any],
        progress: dict[str, Any],
    ) -> Path:
        """Write a checkpoint; the others are not touched, whatever happens.

        Raises CheckpointError naming the newest one that is still there when it cannot be written.
        """
        final = self.path(step)
        partial = self.root / f"{_PARTIAL}{final.name}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for old in self.root.glob(f"{_PARTIAL}*"):  # of a run that was killed
                shutil.rmtree(old)
            partial.mkdir()
            save_weights(partial, weights, config)
            if tokenizer is not None:
                shutil.copyfile(tokenizer, partial / tokenizer.name)
            tensors = {name: value.contiguous() for name, value in optimizer_state.items()}
            save_file(tensors, partial / _OPTIMIZER)
            files = {file.name: file_digest(file) for file in sorted(partial.iterdir())}
            manifest = {
                "format": _FORMAT,
                "contract": CONTRACT_VERSION,
                "step": step,
                "told": told,
                "progress": progress,
                "files": files,
            }
            (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
            for file in partial.iterdir():
                flush(file)
            flush(partial)
            if final.exists():  # from the future of an older checkpoint, or damaged
                shutil.rmtree(final)
            partial.rename(final)
            flush(self.root)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = [one for one in self.steps() if one != step]
            left = f"the newest complete one is {self.path(kept[-1])}" if kept else "there is none"
            raise CheckpointError(f"save: {final} cannot be written: {error}; {left}") from error
        return final

    def load(self, step: int) -> Checkpoint:
        """Check a checkpoint. Raises CheckpointError naming a damaged file or another contract."""
        path = self.path(step)
        try:
            manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            version, contract = manifest["format"], manifest["contract"]
            if version != _FORMAT:
                raise CheckpointError(f"resume: {path} must have format {_FORMAT}, got {version}")
            if contract != CONTRACT_VERSION:
                raise CheckpointError(
                    f"resume: {path} was made under contract {contract}, "
                    f"this package computes by contract {CONTRACT_VERSION}"
                )
            for name, digest in manifest["files"].items():
                if file_digest(path / name) != digest:
                    raise CheckpointError(f"resume: {path / name} is damaged")
            return Checkpoint(path, step, manifest["told"], manifest["progress"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"resume: {path} is damaged: {error!r}") from error

    def prune(self, keep: int, best_step: int | None) -> None:
        """Remove all but the newest ``keep`` and that of ``best_step``."""
        for step in self.steps()[:-keep]:
            if step != best_step:
                shutil.rmtree(self.path(step))
