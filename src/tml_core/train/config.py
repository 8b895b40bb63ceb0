"""What a training run is told: a TOML file, read into frozen dataclasses that refuse unknown keys.

    [model]     path, dtype, device, recompute, compile
    [data]      path, weights, batch_tokens, max_positions, seed, shuffle, buffer, spec_augment,
                skip_corrupt
    [optimizer] kind, learning_rate, ..., clip_norm, accumulate, router_bias_rate
    [loss]      the weight of each stream
    [eval]      path, every, num_batches
    [run]       folder, num_steps, save_every, keep, divergence_factor

Relative paths are relative to the file.
"""

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Self

import torch

from tml_core.errors import InvalidArgument
from tml_core.layout.state import Stream

__all__ = [
    "DataConfig",
    "EvalConfig",
    "LossConfig",
    "ModelSource",
    "OptimizerConfig",
    "RunConfig",
    "TrainConfig",
]

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_TYPE_NAMES: Final = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}

Paths = str | tuple[str, ...]
Numbers = tuple[float, ...]
_LISTS: Final[dict[Any, type]] = {Paths: str, Numbers: float}


@dataclass(frozen=True)
class ModelSource:
    """Where training begins. ``path``: "nano" or a checkpoint directory, also one of another run;
    one whose config names an ``init_seed`` needs no weights. ``dtype``: of the model that is
    trained and served; masters are float32. ``recompute``: run layers again in the backward pass
    instead of keeping their parts. ``compile``: trace the step with torch.compile. ``device``:
    "cpu", or a CUDA device, which runs the references in plain torch; the same bits after a resume
    are promised on the CPU."""

    path: str
    dtype: str = "bfloat16"
    recompute: bool = False
    compile: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise InvalidArgument(f"model.device: expected cpu or cuda, got {self.device!r}")
        if self.dtype not in _DTYPES:
            raise InvalidArgument(
                f"model.dtype: expected one of {sorted(_DTYPES)}, got {self.dtype!r}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]


@dataclass(frozen=True)
class DataConfig:
    """``path``: a folder of `write_shards`, a ``.jsonl`` of `read_sessions`, or a list of those, of
    which ``weights`` says how often each one's transcripts come in an epoch (1 each by default; of
    one below 1 every epoch takes the next part). ``batch_tokens``: positions of one packed batch,
    which a longer transcript has alone. ``max_positions``: of one transcript, 0 for the model's own
    limit. ``seed`` and the epoch decide the order; without ``shuffle`` it is the data's own.
    ``buffer``: transcripts of an endless stream that are held, shuffled and cut into batches
    together. ``spec_augment``: the share of what is heard that is masked and tinted anew each time,
    0 for none. ``skip_corrupt``: go on without a damaged shard."""

    path: Paths
    weights: Numbers = ()
    batch_tokens: int = 4096
    max_positions: int = 0
    seed: int = 0
    shuffle: bool = True
    buffer: int = 256
    spec_augment: float = 0.0
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        _at_least("data", self, batch_tokens=1, max_positions=0, seed=0, buffer=1)
        if not 0 <= self.spec_augment <= 1:
            raise InvalidArgument(f"data.spec_augment: expected 0 to 1, got {self.spec_augment}")
        if not self.paths:
            raise InvalidArgument("data.path: expected at least one path, got an empty list")
        if self.weights and len(self.weights) != len(self.paths):
            raise InvalidArgument(
                f"data.weights: expected {len(self.paths)}, one for each path, "
                f"got {len(self.weights)}"
            )
        if any(weight <= 0 for weight in self.weights):
            raise InvalidArgument(
                f"data.weights: expected numbers above 0, got {list(self.weights)}"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """All of ``path``."""
        return (self.path,) if isinstance(self.path, str) else self.path


@dataclass(frozen=True)
class OptimizerConfig:
    """``kind``: "adamw", or "muon" for the matrices inside the layers and AdamW for the rest; the
    updates of both have one scale and share ``learning_rate`` and ``weight_decay``. The rate
    rises linearly over ``warmup_steps`` and falls on a cosine to ``min_ratio`` of itself at the
    last step. ``clip_norm``: of all gradients together, 0 for none. ``accumulate``: batches of a
    step. ``router_bias_rate``: how far a step moves the choice bias of an expert."""

    kind: str = "adamw"
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    warmup_steps: int = 0
    min_ratio: float = 0.1
    clip_norm: float = 1.0
    accumulate: int = 1
    router_bias_rate: float = 0.001

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "muon"):
            raise InvalidArgument(f"optimizer.kind: expected adamw or muon, got {self.kind!r}")
        _at_least("optimizer", self, weight_decay=0, eps=0, warmup_steps=0, accumulate=1)
        _at_least("optimizer", self, clip_norm=0, router_bias_rate=0, learning_rate=0, min_ratio=0)
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidArgument(
                    f"optimizer.{name}: expected 0 to below 1, got {getattr(self, name)}"
                )

    def rate_at(self, step: int, num_steps: int) -> float:
        """The learning rate of ``step`` (from 0): a function of the step, nothing to restore."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, num_steps - 1 - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.learning_rate * (self.min_ratio + (1 - self.min_ratio) * cosine)


@dataclass(frozen=True)
class LossConfig:
    """How much the loss of one position weighs, by its stream; the loss of a step is the weighted
    mean over its positions. Positions that came from outside or were put there by the layout have
    no loss. That of a token is in nats. That of a block of own sound, ``audio``, is the squared
    error of its flow's velocity in deviations of the frames, a mean over the block's numbers: about
    2 where nothing is known. With 0 the head does not learn."""

    text: float = 1.0
    silence: float = 1.0
    control: float = 1.0
    call: float = 1.0
    audio: float = 1.0

    def __post_init__(self) -> None:
        for one in fields(self):
            _at_least("loss", self, **{one.name: 0})

    def by_stream(self) -> dict[Stream, float]:
        """The weight of every stream, 0 where it has none."""
        own = asdict(self)
        return {stream: own.get(stream.name.lower(), 0.0) for stream in Stream}


@dataclass(frozen=True)
class EvalConfig:
    """The loss on data that is not learned from, after each ``every`` steps and after the last one.
    ``path``: as in `DataConfig`, empty for none. ``num_batches``: the first so many of the data's
    own order, 0 for all; they have ``data.batch_tokens``."""

    path: Paths = ""
    every: int = 200
    num_batches: int = 0

    def __post_init__(self) -> None:
        _at_least("eval", self, every=1, num_batches=0)


@dataclass(frozen=True)
class RunConfig:
    """``folder``: takes checkpoints, ``metrics.jsonl`` and ``loss.png``, for one trainer at a time;
    a run resumes from its newest checkpoint. ``num_steps``: also the end of the cosine.
    ``save_every``: steps between checkpoints, of which the newest ``keep`` and the best one stay.
    ``divergence_factor``: training stops when the smoothed loss is above so many times its lowest,
    0 for never."""

    folder: str
    num_steps: int
    save_every: int = 500
    keep: int = 2
    divergence_factor: float = 3.0

    def __post_init__(self) -> None:
        _at_least("run", self, num_steps=1, save_every=1, keep=1, divergence_factor=0)


@dataclass(frozen=True)
class TrainConfig:
    """A whole run; what `Trainer` takes."""

    model: ModelSource
    data: DataConfig
    run: RunConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read the file. Raises InvalidArgument naming an unknown, missing or wrong key."""
        return cls.from_dict(read_toml(path), Path(path).parent)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], base: Path | None = None) -> Self:
        """The same from parsed values; paths are relative to ``base``, or taken as they are."""
        for name in raw:
            if name not in TABLES:
                raise InvalidArgument(f"config: expected tables {sorted(TABLES)}, got {name!r}")
        config = cls(
            **{name: read_table(kind, name, raw.get(name, {})) for name, kind in TABLES.items()}
        )
        return config if base is None else config._resolved(base)

    def _resolved(self, base: Path) -> Self:
        def beside(value: Paths) -> Paths:
            if isinstance(value, str):
                return str(base / value) if value else value
            return tuple(str(base / one) for one in value)

        source = self.model.path
        return replace(
            self,
            model=replace(self.model, path=source if source == "nano" else str(base / source)),
            data=replace(self.data, path=beside(self.data.path)),
            eval=replace(self.eval, path=beside(self.eval.path)),
            run=replace(self.run, folder=str(base / self.run.folder)),
        )

    def to_dict(self) -> dict[str, Any]:
        """As parsed from TOML, every default written out."""
        return asdict(self)


TABLES: Final[dict[str, Any]] = {
    "model": ModelSource,
    "data": DataConfig,
    "run": RunConfig,
    "optimizer": OptimizerConfig,
    "loss": LossConfig,
    "eval": EvalConfig,
}


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parse a file. Raises InvalidArgument if it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"config: {path} cannot be read: {error}") from error


def default_of(key: str) -> Any:
    """The default of ``table.key``, None where there is none or no such key."""
    table, _, name = key.partition(".")
    own = {one.name: one.default for one in fields(TABLES[table])} if table in TABLES else {}
    default = own.get(name, MISSING)
    return None if default is MISSING else default


def read_table(kind: type, table: str, raw: object) -> Any:
    """A dataclass from a parsed table. Raises InvalidArgument naming an unknown, missing or wrong
    key."""
    if not isinstance(raw, dict):
        raise InvalidArgument(f"config: {table} must be a table, got {type(raw).__name__}")
    known = {one.name: one for one in fields(kind)}
    for key in raw:
        if key not in known:
            raise InvalidArgument(f"{table}: unknown key {key!r}; expected one of {sorted(known)}")
    values = {}
    for name, one in known.items():
        if name in raw:
            values[name] = _typed(f"{table}.{name}", raw[name], one.type)
        elif one.default is MISSING:
            raise InvalidArgument(f"{table}.{name}: is missing")
    return kind(**values)


def _typed(where: str, value: object, kind: Any) -> Any:
    if kind in _LISTS and isinstance(value, list | tuple):
        return tuple(_typed(f"{where}[{i}]", one, _LISTS[kind]) for i, one in enumerate(value))
    if kind == Numbers:
        raise InvalidArgument(f"{where}: expected a list of numbers, got {value!r}")
    kind = str if kind == Paths else kind
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InvalidArgument(f"{where}: expected {_TYPE_NAMES[kind]}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidArgument(f"{where}: expected a finite number, got {value}")
    return value


def _at_least(table: str, config: object, **least: float) -> None:
    for name, low in least.items():
        if getattr(config, name) < low:
            raise InvalidArgument(
                f"{table}.{name}: expected at least {low}, got {getattr(config, name)}"
            )
