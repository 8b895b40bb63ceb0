"""Transcripts on disk: shards of packed tensors, and an index with what they hold.

A folder has ``dataset.json`` (format, version, what the model must know, for each shard its size,
SHA-256 and the lengths of its transcripts) and ``shard-00000.safetensors``, ... Every file is
written whole or not at all; the index comes last.

Legend: N text positions, F audio frames, P patches, T positions, K pieces.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tml_core.errors import CheckpointError, InvalidArgument
from tml_core.media.segments import Audio, Block, Image, Segment, Tokens
from tml_core.model.config import ModelConfig
from tml_core.train.files import file_digest, replaced_file
from tml_core.train.packing import PackedBatch, Transcript

__all__ = ["ShardReader", "write_shards"]

_FORMAT: Final = "tml-transcripts"
_VERSION: Final = 1
_INDEX: Final = "dataset.json"
_TOKENS, _AUDIO, _IMAGE = range(3)
_MAX_OPEN: Final = 64  # shards that stay mapped


def write_shards(
    transcripts: Iterable[Transcript],
    folder: str | Path,
    config: ModelConfig,
    *,
    shard_bytes: int = 64 << 20,
) -> int:
    """Pack transcripts of any number, one by one, into shards of about ``shard_bytes``.

    ``folder`` is created and must not hold a dataset. Returns how many were written. Raises
    InvalidArgument for a folder in use, no transcript at all, or one that the model of ``config``
    cannot take, naming it.
    """
    root = Path(folder)
    if (root / _INDEX).exists():
        raise InvalidArgument(f"folder: {root} holds a dataset already")
    root.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    shard = _Shard()
    count = 0
    for transcript in transcripts:
        try:
            PackedBatch.pack([transcript], config)
        except InvalidArgument as error:
            message = str(error).replace("transcripts[0]", f"transcripts[{count}]")
            raise InvalidArgument(message) from error
        shard.add(transcript)
        count += 1
        if shard.num_bytes >= shard_bytes:
            entries.append(_write(root, len(entries), shard))
            shard = _Shard()
    if shard.lengths:
        entries.append(_write(root, len(entries), shard))
    if not entries:
        raise InvalidArgument("transcripts: expected at least one, got none")
    index = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": _model_facts(config),
        "shards": entries,
    }
    with replaced_file(root / _INDEX) as file:
        file.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return count


class ShardReader(Sequence[Transcript]):
    """The transcripts of a folder that `write_shards` made, read when they are asked for.

    ``skip_corrupt``: leave out damaged shards, whose names are in ``skipped``; otherwise one
    raises CheckpointError with its name. All shards are checked here, so that the order of
    training is known. ``lengths``: positions of each transcript. ``fingerprint``: of what is read.
    Raises CheckpointError for a folder without a dataset or of another version, InvalidArgument
    for one that was packed for a model of other sizes.
    """

    def __init__(
        self, folder: str | Path, config: ModelConfig, *, skip_corrupt: bool = False
    ) -> None:
        self._root = Path(folder)
        index = self._read_index(config)
        self.skipped: list[str] = []
        self.lengths: list[int] = []
        self._places: list[tuple[str, int]] = []
        digests = []
        for entry in index["shards"]:
            reason = self._damage(entry)
            if reason and not skip_corrupt:
                raise CheckpointError(f"data: shard {entry['name']} of {self._root} {reason}")
            if reason:
                self.skipped.append(entry["name"])
                continue
            digests.append(entry["sha256"])
            self.lengths += entry["lengths"]
            self._places += [(entry["name"], i) for i in range(len(entry["lengths"]))]
        if not self.lengths:
            raise CheckpointError(f"data: every shard of {self._root} is damaged")
        self.fingerprint = "-".join(digest[:16] for digest in digests)
        self._views: OrderedDict[str, _ShardView] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Transcript: ...
    @overload
    def __getitem__(self, index: slice) -> list[Transcript]: ...

    def __getitem__(self, index: int | slice) -> Transcript | list[Transcript]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name, row = self._places[index]
        if name not in self._views:
            if len(self._views) == _MAX_OPEN:
                self._views.popitem(last=False)
            self._views[name] = _ShardView(self._root / name)
        self._views.move_to_end(name)
        return self._views[name].transcript(row)

    def _read_index(self, config: ModelConfig) -> dict[str, Any]:
        file = self._root / _INDEX
        try:
            index = json.loads(file.read_text(encoding="utf-8"))
            kind, version = index["format"], index["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"data: {file} is no dataset index: {error!r}") from error
        if (kind, version) != (_FORMAT, _VERSION):
            raise CheckpointError(
                f"data: {file} must be {_FORMAT} {_VERSION}, got {kind!r} {version!r}"
            )
        for name, own in _model_facts(config).items():
            got = index["model"].get(name)
            if got != own:
                raise InvalidArgument(
                    f"data: {self._root} was packed for a model with {name} {got}, "
                    f"this one has {own}"
                )
        result: dict[str, Any] = index
        return result

    def _damage(self, entry: dict[str, Any]) -> str:
        """What is wrong with a shard, empty if nothing."""
        file = self._root / entry["name"]
        try:
            size = file.stat().st_size
            if size != entry["bytes"]:
                return f"is damaged: expected {entry['bytes']} bytes, got {size}"
            if file_digest(file) != entry["sha256"]:
                return "is damaged: its checksum differs"
        except OSError as error:
            return f"cannot be read: {error}"
        return ""


@dataclass
class _Shard:
    """The tensors of transcripts to be, end to end."""

    ids: list[Tensor] = field(default_factory=list)
    bins: list[Tensor] = field(default_factory=list)
    patches: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    streams: list[Tensor] = field(default_factory=list)
    pieces: list[tuple[int, int, int]] = field(default_factory=list)  # kind, length, block or -1
    num_pieces: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, transcript: Transcript) -> None:
        before = len(self.pieces)
        for index, segment in enumerate(transcript.segments):
            is_block = isinstance(segment, Block)
            for part in segment.segments if isinstance(segment, Block) else (segment,):
                self._add_part(part, index if is_block else -1)
        self.targets.append(transcript.targets.int())
        self.streams.append(transcript.streams)
        self.num_pieces.append(len(self.pieces) - before)
        self.lengths.append(transcript.num_tokens)
        self.num_bytes += 5 * transcript.num_tokens

    def _add_part(self, part: Segment, block: int) -> None:
        if isinstance(part, Tokens):
            value, kind, into = torch.as_tensor(part.ids, dtype=torch.int32), _TOKENS, self.ids
        elif isinstance(part, Audio):
            assert part.bins is not None  # a transcript has no other sound
            value, kind, into = part.bins.to(torch.uint8), _AUDIO, self.bins
        else:
            assert part.patches is not None
            value, kind, into = part.patches.float(), _IMAGE, self.patches
        into.append(value)
        self.pieces.append((kind, len(value), block))
        self.num_bytes += value.nbytes

    def tensors(self) -> dict[str, Tensor]:
        named = {"ids": self.ids, "bins": self.bins, "patches": self.patches}
        return {
            **{name: torch.cat(parts) for name, parts in named.items() if parts},
            "targets": torch.cat(self.targets),
            "streams": torch.cat(self.streams),
            "pieces": torch.tensor(self.pieces, dtype=torch.int32),
            "num_pieces": torch.tensor(self.num_pieces, dtype=torch.int32),
            "lengths": torch.tensor(self.lengths, dtype=torch.int32),
        }


def _write(root: Path, index: int, shard: _Shard) -> dict[str, Any]:
    name = f"shard-{index:05}.safetensors"
    with replaced_file(root / name) as file:
        metadata = {"format": _FORMAT, "version": str(_VERSION)}
        try:
            save_file(shard.tensors(), file, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"data: {root / name} cannot be written: {error}") from error
    file = root / name
    return {
        "name": name,
        "bytes": file.stat().st_size,
        "sha256": file_digest(file),
        "lengths": shard.lengths,
    }


class _ShardView:
    """One mapped shard, cut into transcripts; of the data only what is asked for is read."""

    def __init__(self, file: Path) -> None:
        try:
            self._file = cast(Any, safe_open)(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"data: shard {file} cannot be read: {error}") from error
        pieces = self._file.get_tensor("pieces").long()
        self._pieces: list[list[int]] = pieces.tolist()
        self._piece_ends = _ends(self._file.get_tensor("num_pieces"))
        self._ends = _ends(self._file.get_tensor("lengths"))
        # Where each piece begins among those of its kind.
        self._starts = torch.zeros(len(pieces), dtype=torch.int64)
        for kind in range(3):
            is_kind = pieces[:, 0] == kind
            lengths = pieces[is_kind, 1]
            self._starts[is_kind] = lengths.cumsum(0) - lengths

    def transcript(self, row: int) -> Transcript:
        segments: list[Segment | Block] = []
        open_block = -1
        for index in range(self._piece_ends[row], self._piece_ends[row + 1]):
            kind, length, block = self._pieces[index]
            start = int(self._starts[index])
            part = self._part(kind, slice(start, start + length))
            if block < 0:
                segments.append(part)
            elif block == open_block:
                last = segments[-1]
                assert isinstance(last, Block)
                segments[-1] = Block([*last.segments, part])
            else:
                segments.append(Block([part]))
            open_block = block
        own = slice(self._ends[row], self._ends[row + 1])
        return Transcript(segments, self._rows("targets", own).long(), self._rows("streams", own))

    def _part(self, kind: int, rows: slice) -> Segment:
        if kind == _TOKENS:
            return Tokens(self._rows("ids", rows).long())
        if kind == _AUDIO:
            return Audio(bins=self._rows("bins", rows).int())
        return Image(patches=self._rows("patches", rows))

    def _rows(self, name: str, rows: slice) -> Tensor:
        value: Tensor = self._file.get_slice(name)[rows]
        return value


def _ends(counts: Tensor) -> list[int]:
    return [0, *counts.long().cumsum(0).tolist()]


def _model_facts(config: ModelConfig) -> dict[str, int]:
    """What a transcript depends on."""
    audio, vision = config.audio, config.vision
    return {
        "vocab_size": config.text.vocab_size,
        "unpadded_vocab_size": config.text.unpadded_vocab_size,
        "num_mel_bins": audio.num_mel_bins if audio else 0,
        "num_levels": audio.num_levels if audio else 0,
        "patch_size": vision.patch_size if vision else 0,
    }
