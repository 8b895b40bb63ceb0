"""Transcripts on disk: shards of packed tensors, and an index with what they hold.

A folder has ``dataset.json`` (format, version, what the model must know, for each shard its size,
SHA-256 and the lengths of its transcripts) and ``shard-00000.safetensors``, ... Every file is
written whole or not at all; the index comes last.

Two dMel levels share a byte where there are at most 16, ids and labels have 16 bits where these are
enough, mel frames of own sound are halves (to 0.02 dB), and pictures are JPEG; patches that are no
picture of bytes are kept as they are.

Legend: N text positions, F audio frames, P patches, T positions, K pieces.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tml_core.errors import CheckpointError, InvalidArgument
from tml_core.media.segments import Audio, Block, Image, OwnAudio, Segment, Tokens
from tml_core.model.config import ModelConfig
from tml_core.train.files import file_digest, replaced_file
from tml_core.train.packing import PackedBatch, Transcript
from tml_core.train.pictures import PackedPicture, pack_picture, unpack_picture

__all__ = [
    "ShardReader",
    "shard_entry",
    "shard_name",
    "write_index",
    "write_shard",
    "write_shards",
]

_FORMAT: Final = "tml-transcripts"
_VERSION: Final = 2
_INDEX: Final = "dataset.json"
_TOKENS, _AUDIO, _PATCHES, _PICTURE, _OWN = range(5)
_PACKED_LEVELS: Final = 16  # two of them fit a byte
_MAX_OPEN: Final = 64  # shards that stay mapped


def write_shards(
    transcripts: Iterable[Transcript],
    folder: str | Path,
    config: ModelConfig,
    *,
    shard_bytes: int = 64 << 20,
    jpeg_quality: int | None = 92,
) -> int:
    """Pack transcripts of any number, one by one, into shards of about ``shard_bytes``.

    ``folder`` is created and must not hold a dataset. ``jpeg_quality``: of pictures, 1 to 95; None
    keeps their patches as they are, at thirty times the size. Returns how many were written. Raises
    InvalidArgument for a folder in use, no transcript at all, or one that the model of ``config``
    cannot take, naming it.
    """
    root = Path(folder)
    if (root / _INDEX).exists():
        raise InvalidArgument(f"folder: {root} holds a dataset already")
    root.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    shard = _Shard(config, jpeg_quality)
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
            files.append(shard.write(root / shard_name(len(files))))
            shard = _Shard(config, jpeg_quality)
    if shard.lengths:
        files.append(shard.write(root / shard_name(len(files))))
    if not files:
        raise InvalidArgument("transcripts: expected at least one, got none")
    write_index(root, config, [shard_entry(file) for file in files])
    return count


def shard_name(index: int) -> str:
    """Of shard number ``index`` in its folder."""
    return f"shard-{index:05}.safetensors"


def write_shard(
    file: Path,
    transcripts: Iterable[Transcript],
    config: ModelConfig,
    facts: Mapping[str, str],
    jpeg_quality: int | None = 92,
) -> None:
    """One shard, whole or not at all, of what the layout of ``config`` made: it is not checked.
    ``facts``: what else is known of it, for `shard_entry`."""
    shard = _Shard(config, jpeg_quality)
    for transcript in transcripts:
        shard.add(transcript)
    shard.write(file, facts)


def shard_entry(file: Path) -> dict[str, Any]:
    """What the index says of a shard that is written. Raises CheckpointError for no whole one."""
    try:
        with cast(Any, safe_open)(file, framework="pt") as opened:
            lengths = opened.get_tensor("lengths").tolist()
            facts = json.loads(opened.metadata()["shard"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"data: shard {file} cannot be read: {error}") from error
    if (facts.pop("format", None), facts.pop("version", None)) != (_FORMAT, _VERSION):
        raise CheckpointError(f"data: shard {file} must be {_FORMAT} {_VERSION}, got another")
    return {
        "name": file.name,
        "bytes": file.stat().st_size,
        "sha256": file_digest(file),
        **facts,
        "lengths": lengths,
    }


def write_index(root: Path, config: ModelConfig, entries: Sequence[Mapping[str, Any]]) -> None:
    """Make a dataset of the shards in ``root``, in this order."""
    index = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": _model_facts(config),
        "shards": entries,
    }
    with replaced_file(root / _INDEX) as file:
        file.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


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
        self._config = config
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
            self._views[name] = _ShardView(self._root / name, self._config)
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


class _Shard:
    """The tensors of transcripts to be, end to end."""

    def __init__(self, config: ModelConfig, jpeg_quality: int | None) -> None:
        self._config = config
        self._quality = jpeg_quality
        self._id_dtype = torch.int16 if config.text.vocab_size < 1 << 15 else torch.int32
        self._parts: dict[str, list[Tensor]] = {}
        self._pieces: list[tuple[int, int, int]] = []  # kind, length, block or -1
        self._num_pieces: list[int] = []
        self.lengths: list[int] = []
        self.num_bytes = 0

    def add(self, transcript: Transcript) -> None:
        before = len(self._pieces)
        for index, segment in enumerate(transcript.segments):
            is_block = isinstance(segment, Block)
            for part in segment.segments if isinstance(segment, Block) else (segment,):
                kind, length = self._add_part(part)
                self._pieces.append((kind, length, index if is_block else -1))
        self._add("targets", transcript.targets.to(self._id_dtype))
        self._add("streams", transcript.streams)
        self._num_pieces.append(len(self._pieces) - before)
        self.lengths.append(transcript.num_tokens)

    def write(self, file: Path, facts: Mapping[str, str] | None = None) -> Path:
        """To ``file``, whole or not at all."""
        tensors = {
            **{name: torch.cat(parts) for name, parts in self._parts.items()},
            "pieces": torch.tensor(self._pieces, dtype=torch.int32),
            "num_pieces": torch.tensor(self._num_pieces, dtype=torch.int32),
            "lengths": torch.tensor(self.lengths, dtype=torch.int32),
        }
        # One entry, for several are written in any order.
        told = {**(facts or {}), "format": _FORMAT, "version": _VERSION}
        metadata = {"shard": json.dumps(told, sort_keys=True)}
        with replaced_file(file) as partial:
            try:
                save_file(tensors, partial, metadata=metadata)
            except SafetensorError as error:
                raise OSError(f"data: {file} cannot be written: {error}") from error
        return file

    def _add_part(self, part: Segment) -> tuple[int, int]:
        if isinstance(part, Tokens):
            self._add("ids", torch.as_tensor(part.ids).to(self._id_dtype))
            return _TOKENS, len(part.ids)
        if isinstance(part, Audio):
            assert part.bins is not None  # a transcript has no other sound
            self._add("bins", _packed_levels(part.bins, self._config))
            return _AUDIO, len(part.bins)
        if isinstance(part, OwnAudio):
            before_M = part.before
            if before_M is None:
                before_M = part.mel.new_full((part.mel.shape[2],), torch.nan)
            self._add("own", part.mel.half())
            self._add("own_before", before_M[None].half())
            return _OWN, len(part.mel)
        assert part.patches is not None
        packed = None if self._quality is None else pack_picture(part.patches, self._quality)
        if packed is None:
            self._add("patches", part.patches.float())
            return _PATCHES, len(part.patches)
        self._add("jpeg", torch.from_numpy(np.frombuffer(packed.jpeg, np.uint8).copy()))
        self._add("jpeg_len", torch.tensor([len(packed.jpeg)], dtype=torch.int32))
        self._add("seen", torch.from_numpy(packed.seen))
        return _PICTURE, len(packed.seen)

    def _add(self, name: str, value: Tensor) -> None:
        self._parts.setdefault(name, []).append(value)
        self.num_bytes += value.nbytes


class _ShardView:
    """One mapped shard, cut into transcripts; of the data only what is asked for is read."""

    def __init__(self, file: Path, config: ModelConfig) -> None:
        self._config = config
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
        for kind in range(5):
            is_kind = pieces[:, 0] == kind
            lengths = pieces[is_kind, 1]
            self._starts[is_kind] = lengths.cumsum(0) - lengths
        is_picture = pieces[:, 0] == _PICTURE
        self._num_pictures = _ends(is_picture)  # before each piece
        self._num_own = _ends(pieces[:, 0] == _OWN)
        has_pictures = bool(is_picture.any())
        self._jpeg_ends = _ends(self._file.get_tensor("jpeg_len")) if has_pictures else []

    def transcript(self, row: int) -> Transcript:
        segments: list[Segment | Block] = []
        open_block = -1
        for index in range(self._piece_ends[row], self._piece_ends[row + 1]):
            block = self._pieces[index][2]
            part = self._part(index)
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

    def _part(self, index: int) -> Segment:
        kind, length, _ = self._pieces[index]
        start = int(self._starts[index])
        rows = slice(start, start + length)
        if kind == _TOKENS:
            return Tokens(self._rows("ids", rows).long())
        if kind == _AUDIO:
            return Audio(bins=_levels(self._rows("bins", rows), self._config))
        if kind == _PATCHES:
            return Image(patches=self._rows("patches", rows))
        if kind == _OWN:
            number = self._num_own[index]
            (before_M,) = self._rows("own_before", slice(number, number + 1)).float()
            mel = self._rows("own", rows).float()
            return OwnAudio(mel, None if before_M.isnan().any() else before_M)
        number = self._num_pictures[index]
        own = slice(self._jpeg_ends[number], self._jpeg_ends[number + 1])
        jpeg = self._rows("jpeg", own).numpy().tobytes()
        packed = PackedPicture(jpeg, self._rows("seen", rows).numpy())
        assert self._config.vision is not None  # the reader compared what the model has
        return Image(patches=unpack_picture(packed, self._config.vision.patch_size))

    def _rows(self, name: str, rows: slice) -> Tensor:
        value: Tensor = self._file.get_slice(name)[rows]
        return value


def _packed_levels(bins_FM: Tensor, config: ModelConfig) -> Tensor:
    """Uint8 [F, M / 2] or [F, M]."""
    levels_FM = bins_FM.to(torch.uint8)
    if not _has_packed_levels(config):
        return levels_FM
    return levels_FM[:, 0::2] | levels_FM[:, 1::2] << 4


def _levels(stored: Tensor, config: ModelConfig) -> Tensor:
    """Int32 [F, M]."""
    if not _has_packed_levels(config):
        return stored.int()
    return torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1).int()


def _has_packed_levels(config: ModelConfig) -> bool:
    audio = config.audio
    return audio is not None and audio.num_levels <= _PACKED_LEVELS and not audio.num_mel_bins % 2


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
