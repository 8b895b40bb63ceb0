"""Where a run's transcripts come from: stored ones in epochs, or a stream without end.

Both give the batches of any step again: stored ones by their number, a stream by the place of a
checkpoint, for its transcripts are numbered too.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, overload

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.model.config import ModelConfig
from tml_core.model.tokenizer import load_tokenizer
from tml_core.train.config import DataConfig
from tml_core.train.order import BatchOrder, cut, epoch_order
from tml_core.train.packing import Transcript
from tml_core.train.sessions import read_sessions
from tml_core.train.shards import ShardReader

__all__ = ["Draw", "Feed", "Place", "TranscriptSource", "open_feed"]

# Transcripts, or what makes those from number ``start`` on.
TranscriptSource = Iterable[Transcript] | Callable[[int], Iterator[Transcript]]


class Place(NamedTuple):
    """In a stream: batch ``batch`` of the buffer that begins with transcript ``first``."""

    first: int
    batch: int


class Draw(NamedTuple):
    """The transcripts of one batch. ``next_place``: that of the batch after it, in a stream."""

    epoch: int
    transcripts: list[Transcript]
    next_place: Place | None


class Feed(Protocol):
    """Batches of transcripts. ``fingerprint``: of what they are. ``skipped``: damaged shards."""

    fingerprint: str
    skipped: tuple[str, ...]

    def draws(self, num_before: int, place: Place | None) -> Iterator[Draw]:
        """Batches from number ``num_before`` on, which is at ``place`` of a stream."""
        ...


def open_feed(
    config: DataConfig, directory: Path, model: ModelConfig, data: TranscriptSource | None = None
) -> Feed:
    """The transcripts at ``config.path``, or ``data``. ``directory``: of the model's tokenizer.

    Raises InvalidArgument for data the model cannot take, CheckpointError for a damaged dataset.
    """
    longest = config.max_positions or model.text.max_positions
    if data is None:
        return _StoredFeed(
            _Joined([_open(path, config, directory, model) for path in config.paths]),
            config,
            longest,
        )
    if isinstance(data, Sequence):
        return _StoredFeed(_Joined([data]), config, longest)
    return _StreamFeed(data, config, longest)


class _Joined(Sequence[Transcript]):
    """Sources, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Transcript]]) -> None:
        self.parts = parts
        self.lengths: list[int] = []
        self._places: list[tuple[int, int]] = []
        fingerprints, skipped = [], []
        for number, part in enumerate(parts):
            if isinstance(part, ShardReader):
                self.lengths += part.lengths
                skipped += part.skipped
                fingerprints.append(part.fingerprint)
            else:
                self.lengths += [one.num_tokens for one in part]
                fingerprints.append(_fingerprint(part))
            self._places += [(number, row) for row in range(len(part))]
        self.fingerprint = "+".join(fingerprints)
        self.skipped = tuple(skipped)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Transcript: ...
    @overload
    def __getitem__(self, index: slice) -> list[Transcript]: ...

    def __getitem__(self, index: int | slice) -> Transcript | list[Transcript]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, row = self._places[index]
        return self.parts[number][row]


class _StoredFeed:
    """Transcripts that can be asked for by number."""

    def __init__(self, data: _Joined, config: DataConfig, longest: int) -> None:
        for index, length in enumerate(data.lengths):
            _require_length(index, length, longest)
        self._data = data
        self.fingerprint = data.fingerprint
        self.skipped = data.skipped
        counts = [len(part) for part in data.parts]
        self._order = BatchOrder(
            data.lengths,
            config.batch_tokens,
            config.seed,
            shuffle=config.shuffle,
            passes=list(zip(counts, config.weights or [1.0] * len(counts), strict=True)),
        )

    def draws(self, num_before: int, place: Place | None) -> Iterator[Draw]:  # noqa: ARG002
        for epoch, indices in self._order.batches(num_before):
            yield Draw(epoch, [self._data[index] for index in indices], None)


class _StreamFeed:
    """Transcripts that come one after the other, a buffer of them at a time.

    What makes them is called with the number of the first one that is needed; a plain iterable is
    gone through from its beginning.
    """

    skipped: tuple[str, ...] = ()

    def __init__(self, source: TranscriptSource, config: DataConfig, longest: int) -> None:
        if not callable(source) and not isinstance(source, Iterable):
            raise InvalidType(
                "data: expected transcripts or a function of a number that yields those from it "
                f"on, got {type(source).__name__}"
            )
        self._source = source
        self._config = config
        self._longest = longest
        self._head: list[Transcript] = []  # of an iterable that cannot be begun again
        first = next(self._begin(0), None)
        if first is None:
            raise InvalidArgument("data: expected at least one transcript, got none")
        if isinstance(source, Iterator):
            self._head = [first]
        self.fingerprint = f"stream-{_fingerprint([_checked(0, first, longest)])}"

    def draws(self, num_before: int, place: Place | None) -> Iterator[Draw]:  # noqa: ARG002
        config = self._config
        first, done = place or Place(0, 0)
        stream = self._begin(first)
        while True:
            buffer = list(itertools.islice(stream, config.buffer))
            for index, transcript in enumerate(buffer, start=first):
                _checked(index, transcript, self._longest)
            if not buffer:
                raise InvalidArgument(
                    f"data: the stream ended after {first} transcripts, before the run's last step"
                )
            if config.shuffle:
                order = epoch_order(len(buffer), config.seed, first)
                buffer = [buffer[index] for index in order]
            batches = cut(buffer, [one.num_tokens for one in buffer], config.batch_tokens)
            after = Place(first + len(buffer), 0)
            for number, batch in enumerate(batches[done:], start=done + 1):
                yield Draw(0, batch, Place(first, number) if number < len(batches) else after)
            first, done = after

    def _begin(self, start: int) -> Iterator[Transcript]:
        source = self._source
        if callable(source):
            return iter(source(start))
        return itertools.islice(itertools.chain(self._head, source), start, None)


def _open(
    path: str, config: DataConfig, directory: Path, model: ModelConfig
) -> Sequence[Transcript]:
    if path.endswith(".jsonl"):
        return read_sessions(path, model, load_tokenizer(directory))
    return ShardReader(path, model, skip_corrupt=config.skip_corrupt)


def _checked(index: int, transcript: object, longest: int) -> Transcript:
    if not isinstance(transcript, Transcript):
        raise InvalidType(
            f"transcripts[{index}]: expected Transcript, got {type(transcript).__name__}"
        )
    _require_length(index, transcript.num_tokens, longest)
    return transcript


def _require_length(index: int, length: int, longest: int) -> None:
    if not 1 <= length <= longest:
        raise InvalidArgument(
            f"transcripts[{index}]: expected 1 to {longest} positions, got {length}"
        )


def _fingerprint(transcripts: Sequence[Transcript]) -> str:
    """Of what is learned: labels and streams."""
    digest = hashlib.sha256()
    for one in transcripts:
        digest.update(one.targets.numpy().tobytes() + one.streams.numpy().tobytes())
    return digest.hexdigest()[:16]
