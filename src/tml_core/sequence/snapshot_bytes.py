"""The bytes of a snapshot: a safetensors container whose last tensor digests all before it.

The library writes only tensors that are whole in memory; the container itself is simple: the length
of a JSON header, the header, then the tensors' bytes in its order.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Final, Self

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DIGEST_LEN",
    "BlockDigest",
    "Entry",
    "data_starts",
    "grouped",
    "read_group",
    "replacing",
    "write_safetensors",
]

DIGEST_LEN: Final = 32
_BLOCK_BYTES: Final = 4 << 20
_GROUP_LEN: Final = 256  # parts; the system takes no more than 1024 in one call

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its parts, one after the other, are its bytes."""

    name: str
    dtype: str
    shape: Shape
    parts: Iterable[NDArray[np.uint8]]
    num_bytes: int


def _head(meta: Mapping[str, str]) -> bytes:
    return json.dumps(dict(sorted(meta.items()))).encode()


def write_safetensors(file: BinaryIO, meta: Mapping[str, str], entries: list[Entry]) -> None:
    """Write header, tensors and digest."""
    header: dict[str, object] = {"__metadata__": dict(meta)}
    offset = 0
    entries_shown = [*entries, Entry("digest", "U8", (DIGEST_LEN,), (), DIGEST_LEN)]
    for entry in entries_shown:
        end = offset + entry.num_bytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    _write_group(file, [memoryview(struct.pack("<Q", len(text)) + text)])
    with BlockDigest(meta) as digest:
        for group in grouped(part.data for entry in entries for part in entry.parts):
            for part in group:
                digest.update(part)
            _write_group(file, group)
        _write_group(file, [memoryview(digest.value())])


def data_starts(file: BinaryIO) -> dict[str, int]:
    """Where in the file each tensor's bytes begin."""
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def grouped(parts: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """Parts in the order they come, some for each call of the system."""
    group: list[memoryview] = []
    num_bytes = 0
    for part in parts:
        group.append(part)
        num_bytes += len(part)
        if num_bytes >= _BLOCK_BYTES or len(group) == _GROUP_LEN:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def read_group(file: BinaryIO, start: int, group: list[memoryview]) -> int:
    """Fill the group from byte ``start`` of the file on; returns where it ended."""
    rest = [part for part in group if part]  # a model may have no layers of a kind
    while rest:
        count = os.preadv(file.fileno(), rest, start)
        if not count:
            raise OSError("it ends too early")
        start += count
        rest = _without(rest, count)
    return start


def _write_group(file: BinaryIO, group: list[memoryview]) -> None:
    rest = [part for part in group if part]
    while rest:
        rest = _without(rest, os.writev(file.fileno(), rest))


def _without(group: list[memoryview], count: int) -> list[memoryview]:
    """The group without its first ``count`` bytes."""
    for index, part in enumerate(group):
        if count < len(part):
            return [part[count:], *group[index + 1 :]]
        count -= len(part)
    return []


class BlockDigest:
    """SHA-256 of the metadata and of the SHA-256 of each 4 MB block, which threads take meanwhile.

    What `update` is given must stay as it is until `value` is called.
    """

    def __init__(self, meta: Mapping[str, str]) -> None:
        self._total = sha256(_head(meta))
        self._block: list[memoryview] = []
        self._room = _BLOCK_BYTES
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tml-digest")
        self._pending: list[Future[bytes]] = []

    def update(self, data: memoryview) -> None:
        """The next bytes, one-dimensional."""
        while data:
            part, data = data[: self._room], data[self._room :]
            self._block.append(part)
            self._room -= len(part)
            if not self._room:
                self._submit()

    def value(self) -> bytes:
        """The digest of all of it."""
        if self._block:
            self._submit()
        for one in self._pending:
            self._total.update(one.result())
        self._pending.clear()
        return self._total.digest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        self._pending.append(self._threads.submit(_digest_of, self._block))
        self._block, self._room = [], _BLOCK_BYTES


def _digest_of(parts: list[memoryview]) -> bytes:
    hasher = sha256()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


@contextmanager
def replacing(path: Path, durable: bool) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the body is done, or else is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            yield file
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if not durable:
        return
    # The new name itself must survive a crash.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
