"""A dataset of interactions on disk: shards that several processes make, each by its number.

Shard k holds interactions k * n to (k + 1) * n of the seed, so it does not matter who makes it, nor
when: an interrupted build goes on with the shards that are missing. ``build.json`` says what the
folder is made of; ``dataset.json``, which comes last, makes it a dataset.
"""

import json
import multiprocessing as mp
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import torch

from tml_core.data.bank import SpeechBank, Split
from tml_core.data.stream import DATA_VERSION, interactions
from tml_core.data.tasks import TASKS
from tml_core.errors import CheckpointError, InvalidArgument, MediaError
from tml_core.layout.micro_turn import MicroTurnLayout
from tml_core.media.micro_turns import TICK_MS
from tml_core.model.config import ModelConfig, bundled_path
from tml_core.model.tokenizer import load_tokenizer
from tml_core.train.files import file_digest, replaced_file
from tml_core.train.shards import shard_entry, shard_name, write_index, write_shard

__all__ = ["BuildReport", "build"]

_PLAN: Final = "build.json"
_INDEX: Final = "dataset.json"


@dataclass(frozen=True)
class BuildReport:
    """What a folder holds. ``num_made``: interactions that this call made."""

    num_interactions: int
    num_made: int
    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class _Plan:
    """What the bits of a folder depend on, but for how much of it there is."""

    data_version: int
    seed: int
    split: Split
    tasks: tuple[str, ...]
    typed: float
    engines: tuple[str, ...]
    shard_len: int
    config: str
    tokenizer: str


def build(
    folder: str | Path,
    model: str | Path = "nano",
    *,
    seed: int = 0,
    split: Split = "train",
    num: int | None = None,
    hours: float | None = None,
    workers: int = 1,
    tasks: Sequence[str] | None = None,
    typed: float = 0.0,
    engines: Sequence[str] | None = None,
    cache: str | Path | None = None,
    shard_len: int = 64,
    progress: Callable[[float, float], None] | None = None,
) -> BuildReport:
    """Make, or go on making, a dataset of ``num`` interactions or of at least ``hours``.

    ``model``: "nano" or a checkpoint directory, whose config and tokenizer lay the sessions out; it
    needs no weights. ``workers``: processes; 1 works in this one. ``tasks``, ``typed``: as in
    `interactions`. ``engines``, ``cache``: as in `SpeechBank`. ``shard_len``: interactions in a
    shard. ``progress``: called with the share that is there, 0 to 1, and its seconds. The folder
    may be built again with a larger ``num`` or ``hours``: what is there stays.

    Raises InvalidArgument for a folder made of something else, naming what differs, and for what
    `interactions` does not take; MediaError when a process ends without an answer.
    """
    if (num is None) == (hours is None):
        raise InvalidArgument("num, hours: expected exactly one of them")
    for name, value in (("num", num), ("hours", hours), ("shard_len", shard_len)):
        if value is not None and not value > 0:
            raise InvalidArgument(f"{name}: expected more than 0, got {value}")
    if workers < 1:
        raise InvalidArgument(f"workers: expected at least 1, got {workers}")
    directory = bundled_path("nano") if str(model) == "nano" else Path(model)
    names = tuple(TASKS) if tasks is None else tuple(tasks)
    with SpeechBank(engines, cache) as bank:
        plan = _Plan(
            data_version=DATA_VERSION,
            seed=seed,
            split=split,
            tasks=names,
            typed=typed,
            engines=bank.versions(split),
            shard_len=shard_len,
            config=file_digest(directory / "config.json"),
            tokenizer=file_digest(directory / "tokenizer.json"),
        )
        # What it refuses, first.
        next(interactions(seed, split, bank=bank, tasks=names, num=1, typed=typed))
    root = Path(folder)
    _claim(root, plan)
    goal = _Goal(num, None if hours is None else 3600.0 * hours, shard_len)
    order = _Order(root, directory, seed, split, names, typed, engines, cache, shard_len)
    num_made = 0
    for is_new, length in _shards(order, goal, workers):
        num_made += length if is_new else 0
        if progress is not None:
            progress(goal.share, goal.seconds)
    config = ModelConfig.from_path(directory)
    entries = goal.entries()
    write_index(root, config, entries)
    return BuildReport(
        num_interactions=sum(len(entry["lengths"]) for entry in entries),
        num_made=num_made,
        seconds=sum(float(entry["seconds"]) for entry in entries),
        num_bytes=sum(entry["bytes"] for entry in entries),
    )


@dataclass(frozen=True)
class _Order:
    """What a process has to know to make any shard."""

    root: Path
    directory: Path
    seed: int
    split: Split
    tasks: tuple[str, ...]
    typed: float
    engines: Sequence[str] | None
    cache: str | Path | None
    shard_len: int


class _Goal:
    """Which shards make the dataset: the first so many, or the first that last long enough."""

    def __init__(self, num: int | None, seconds: float | None, shard_len: int) -> None:
        self._num = num
        self._seconds = seconds
        self._shard_len = shard_len
        self._done: dict[int, dict[str, Any]] = {}

    @property
    def seconds(self) -> float:
        """Of all shards that are there."""
        return sum(float(entry["seconds"]) for entry in self._done.values())

    @property
    def share(self) -> float:
        """How much of the goal is there."""
        if self._num is not None:
            return sum(len(entry["lengths"]) for entry in self._done.values()) / self._num
        assert self._seconds is not None
        return min(1.0, self.seconds / self._seconds)

    def add(self, index: int, entry: dict[str, Any]) -> None:
        """Shard ``index`` is there."""
        self._done[index] = entry

    def length(self, index: int) -> int:
        """Interactions of shard ``index``; 0 where the dataset ends before."""
        if self._num is None:
            return 0 if self._end() is not None else self._shard_len
        return max(0, min(self._shard_len, self._num - index * self._shard_len))

    def entries(self) -> list[dict[str, Any]]:
        """Of the dataset's shards, in order."""
        end = len(self._done) if self._num is not None else self._end()
        assert end is not None
        return [self._done[index] for index in range(end)]

    def _end(self) -> int | None:
        """The number of the shard after the last one, None while that is open."""
        assert self._seconds is not None
        have, index = 0.0, 0
        while have < self._seconds:
            if index not in self._done:
                return None
            have += float(self._done[index]["seconds"])
            index += 1
        return index


def _claim(root: Path, plan: _Plan) -> None:
    """Make the folder this plan's. Raises InvalidArgument if it is another's."""
    file = root / _PLAN
    told = json.loads(json.dumps(asdict(plan)))
    if file.exists():
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            differ = {key for key in {*kept, *told} if kept.get(key) != told.get(key)}
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"folder: {file} is no build's: {error}") from error
        if differ:
            name = min(differ)
            raise InvalidArgument(
                f"folder: {root} was built with {name} {kept.get(name)!r}, "
                f"now it is {told.get(name)!r}"
            )
        return
    if (root / _INDEX).exists():
        raise InvalidArgument(f"folder: {root} holds a dataset that no build made")
    root.mkdir(parents=True, exist_ok=True)
    with replaced_file(file) as partial:
        partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _shards(order: _Order, goal: _Goal, workers: int) -> Iterator[tuple[bool, int]]:
    """Every shard of the goal, made where it is missing: whether it was, and its interactions."""
    index = 0
    with _Workers(order, workers) as made_by:
        while True:
            while made_by.is_free and (length := goal.length(index)):
                file = order.root / shard_name(index)
                if (entry := _kept(file, length)) is None:
                    made_by.start(index, length)
                else:
                    goal.add(index, entry)
                    yield False, length
                index += 1
            if not made_by.is_busy:
                return
            done, length = made_by.finish()
            goal.add(done, shard_entry(order.root / shard_name(done)))
            yield True, length


def _kept(file: Path, length: int) -> dict[str, Any] | None:
    """The entry of a shard that is there; None for one that is missing, damaged or shorter."""
    if not file.exists():
        return None
    with suppress(CheckpointError):
        entry = shard_entry(file)
        if len(entry["lengths"]) == length:
            return entry
    return None


class _Workers:
    """Processes that make shards; with one, this process does it itself.

    A process ends when the pipe to it does, however this one ends.
    """

    def __init__(self, order: _Order, num_workers: int) -> None:
        self._order = order
        self._running: dict[Connection, tuple[int, int]] = {}
        self._idle: list[Connection] = []
        self._processes: list[Any] = []
        self._maker: _Maker | None = None
        if num_workers == 1:
            self._maker = _Maker(order)
            self._next: tuple[int, int] | None = None
            return
        # A fork would share this process's threads and speech programs.
        context = mp.get_context("spawn")
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, pickle.dumps(order)), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._idle.append(ours)

    @property
    def is_free(self) -> bool:
        """Whether one more shard can be started."""
        return self._next is None if self._maker else bool(self._idle)

    @property
    def is_busy(self) -> bool:
        """Whether a shard is being made."""
        return self._next is not None if self._maker else bool(self._running)

    def start(self, index: int, length: int) -> None:
        """Have somebody make a shard."""
        if self._maker:
            self._next = index, length
            return
        pipe = self._idle.pop()
        self._running[pipe] = index, length
        pipe.send((index, length))

    def finish(self) -> tuple[int, int]:
        """Wait for a shard: its number and length. Raises what making it raised."""
        if self._maker:
            assert self._next is not None
            done, self._next = self._next, None
            self._maker.make(*done)
            return done
        pipe = wait(list(self._running))[0]
        assert isinstance(pipe, Connection)
        try:
            error = pipe.recv()
        except EOFError:
            raise MediaError("workers: a process has ended without an answer") from None
        done = self._running.pop(pipe)
        self._idle.append(pipe)
        if error is not None:
            raise error
        return done

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._maker:
            self._maker.close()
        for pipe in (*self._running, *self._idle):
            pipe.close()
        for process in self._processes:
            if self._running:  # nobody waits for what was begun
                process.terminate()
            process.join()


def _work(pipe: Connection, order: bytes) -> None:
    """A process: make what is asked for until nobody asks."""
    torch.set_num_threads(1)
    maker: _Maker | None = None
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            while True:
                index, length = pipe.recv()
                try:
                    maker = maker or _Maker(pickle.loads(order))
                    maker.make(index, length)
                except Exception as error:
                    pipe.send(error)
                else:
                    pipe.send(None)
        finally:
            if maker is not None:
                maker.close()


class _Maker:
    """Makes shards, with a bank of its own."""

    def __init__(self, order: _Order) -> None:
        self._order = order
        self._config = ModelConfig.from_path(order.directory)
        self._layout = MicroTurnLayout(self._config, load_tokenizer(order.directory))
        self._bank = SpeechBank(order.engines, order.cache)

    def make(self, index: int, length: int) -> None:
        """Write shard ``index``."""
        order = self._order
        made = interactions(
            order.seed,
            order.split,
            bank=self._bank,
            tasks=order.tasks,
            typed=order.typed,
            start=index * order.shard_len,
            num=length,
        )
        num_ticks, transcripts = 0, []
        for one in made:
            num_ticks += one.script.num_ticks
            transcripts.append(one.transcript(self._layout))
        facts = {"seconds": f"{num_ticks * TICK_MS / 1000:.1f}"}
        write_shard(order.root / shard_name(index), transcripts, self._config, facts)

    def close(self) -> None:
        """End the speech programs."""
        self._bank.close()
