"""A sequence in one file, and back.

The file is safetensors. Its metadata says what it belongs to (format and contract version, model
fingerprint, dtype, page length, page layout) and holds the scalars. Its tensors, in this order:

  boundaries                   int64, micro-turn starts that eviction may still stop at
  audio_context, audio_pending float32, the audio carry; absent without one
  global_pages, sliding_pages  [held pages in logical order, ...] as in KvStore, stale parts zeroed
  conv_rows                    [num_layers, 3, width]
  log                          uint8 [tip, 16], one record a position
  frame                        uint8 [H, W, 3], the frame waiting for its pair; absent without one
  note                         uint8 [N], whatever the sequence's owner keeps beside it
  digest                       uint8 [32], over the metadata and every byte of tensors before it:
                               SHA-256 of the metadata and of the SHA-256 of each 4 MB block

Pages go to and come from the file one by one, so that a long sequence is never in memory twice.
Threads digest blocks meanwhile: at the speed of a disk one alone would be the bottleneck.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tml_core.contract import CONTRACT_VERSION, PAGE_LEN
from tml_core.errors import SnapshotError, TmlError
from tml_core.media.dmel import DmelState
from tml_core.model.page_memory import PageMemory
from tml_core.sequence.page_table import PageTable, pages_for
from tml_core.sequence.snapshot_bytes import (
    DIGEST_LEN,
    BlockDigest,
    Entry,
    data_starts,
    grouped,
    read_group,
    replacing,
    write_safetensors,
)
from tml_core.sequence.store import SequenceStore, Slot
from tml_core.sequence.token_log import RECORD, TokenLog
from tml_core.sequence.values import Carry, Retention

__all__ = ["FORMAT_VERSION", "Saved", "open_snapshot", "read_note", "write_snapshot"]

FORMAT_VERSION: Final = 3

_FORMAT: Final = "tml_core.sequence"
_DTYPES: Final = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def write_snapshot(
    path: Path,
    store: SequenceStore,
    slot: Slot,
    log: TokenLog,
    *,
    seed: int,
    carry: Carry,
    retention: Retention | None,
    boundaries: list[int],
    note: bytes = b"",
    durable: bool = True,
) -> None:
    """Write the sequence of ``slot``; an existing file is replaced once the new one is complete,
    and, if ``durable``, on disk."""
    kv = store.kv
    meta = {
        **_identity(store),
        "tip": str(slot.tip),
        "global_floor": str(slot.global_.floor),
        "seed": str(seed),
        "num_sampled": str(carry.num_sampled),
        "num_noise": str(carry.num_noise),
        "clock_ms": str(carry.clock_ms),
        "state_hash": log.digest(),
    }
    if retention is not None:
        meta["retention_window"] = str(retention.window_positions)
        meta["retention_prefix"] = str(retention.pinned_prefix)
    log_bytes = log.read(0, slot.tip).view(np.uint8).reshape(-1, RECORD.itemsize)
    entries = [
        _array_entry("boundaries", torch.tensor(boundaries, dtype=torch.int64)),
        *(_array_entry(name, array) for name, array in _audio_arrays(carry).items()),
        _pages_entry("global_pages", kv.global_memory, slot.global_, slot.tip),
        _pages_entry("sliding_pages", kv.sliding_memory, slot.sliding, slot.tip),
        _array_entry("conv_rows", slot.conv),
        _array_entry("log", torch.from_numpy(log_bytes)),
    ]
    if carry.frame is not None:
        entries.append(_array_entry("frame", torch.from_numpy(carry.frame.copy())))
    entries.append(_note_entry(note))
    with replacing(path, durable) as file:
        write_safetensors(file, meta, entries)


class Saved:
    """A snapshot that has been opened and fits the store. ``tip``, ``seed``, ``carry``,
    ``retention`` and ``boundaries`` are as they were."""

    def __init__(self, file: Any, path: Path, store: SequenceStore) -> None:
        self._file = file
        self._store = store
        self._path = path
        self._what = f"restore: {path}"
        meta = dict(file.metadata() or {})
        self._meta: dict[str, str] = meta
        self._require_identity()
        self.tip = self._integer("tip", store.kv.max_positions)
        self.seed = self._integer("seed", 2**64 - 1)
        self.retention: Retention | None = None
        if "retention_window" in meta:
            self.retention = Retention(
                max(1, self._integer("retention_window")), self._integer("retention_prefix")
            )
        end = pages_for(self.tip)
        self._keep = 0 if self.retention is None else pages_for(self.retention.pinned_prefix)
        self._floor = self._integer("global_floor", max(self._keep, end))
        first_seen = max(0, self.tip - store.kv.config.window + 1)
        self._sliding_floor = first_seen // PAGE_LEN
        if self._floor < self._keep:
            self._refuse(f"global_floor {self._floor} is below the pinned prefix")
        num_global = min(self._keep, end) + max(0, end - self._floor)
        shapes: dict[str, tuple[torch.dtype, list[int | None]]] = {
            "global_pages": (store.kv.dtype, [num_global, *store.kv.global_pages.shape[1:]]),
            "sliding_pages": (
                store.kv.dtype,
                [end - self._sliding_floor, *store.kv.sliding_pages.shape[1:]],
            ),
            "conv_rows": (store.kv.dtype, [*store.kv.conv_rows.shape[1:]]),
            "log": (torch.uint8, [self.tip, RECORD.itemsize]),
            "boundaries": (torch.int64, [None]),
            "note": (torch.uint8, [None]),
            "digest": (torch.uint8, [DIGEST_LEN]),
        }
        names = list(file.keys())
        if "audio_context" in names or "audio_pending" in names:
            shapes["audio_context"] = shapes["audio_pending"] = (torch.float32, [None])
        if "frame" in names:
            shapes["frame"] = (torch.uint8, [None, None, 3])
        self._require_tensors(names, shapes)
        self.boundaries: list[int] = self._array("boundaries").tolist()
        self.carry = Carry(
            audio=self._audio("audio_context" in names),
            frame=self._array("frame").numpy() if "frame" in names else None,
            num_sampled=self._integer("num_sampled"),
            num_noise=self._integer("num_noise"),
            clock_ms=self._integer("clock_ms"),
        )
        if self.carry.frame is not None:
            self.carry.frame.flags.writeable = False

    def fill(self, slot: Slot) -> TokenLog:
        """Read the pages and rows into an empty slot; returns the log.

        Raises SnapshotError when the contents are not those that were written, PoolExhausted
        without the pages; the slot is then to be closed.
        """
        end = pages_for(self.tip)
        self._store.require_pages(
            max(0, end - self._floor) + min(self._keep, end),
            end - self._sliding_floor,
            f"restoring {self.tip} positions",
        )
        store, log_bytes = self._store, self._array("log").numpy()
        with self._path.open("rb", buffering=0) as file, BlockDigest(self._meta) as digest:
            starts = data_starts(file)
            digest.update(_raw(self._array("boundaries")).data)
            for array in _audio_arrays(self.carry).values():
                digest.update(_raw(array).data)
            for name, table, floor, memory in (
                ("global_pages", slot.global_, self._floor, store.kv.global_memory),
                ("sliding_pages", slot.sliding, self._sliding_floor, store.kv.sliding_memory),
            ):
                ids = table.adopt(table.keep, floor, end).tolist()
                left, start = iter(ids), starts[name]
                for group in grouped(memory.blank(page_id).data for page_id in ids):
                    start = read_group(file, start, group)
                    for page, page_id in zip(group, left, strict=False):
                        memory.fill(page_id, page)
                        digest.update(page)
            slot.tip = self.tip
            slot.conv.copy_(self._array("conv_rows"))
            digest.update(_raw(slot.conv).data)
            digest.update(_raw(torch.from_numpy(log_bytes)).data)
            if self.carry.frame is not None:
                digest.update(self.carry.frame.reshape(-1).data)
            digest.update(_raw(self._array("note")).data)
            if digest.value() != self._array("digest").numpy().tobytes():
                self._refuse("its contents do not match its digest: the file is damaged")
        log = TokenLog()
        log.append(log_bytes.reshape(-1).view(RECORD))
        return log

    def _require_identity(self) -> None:
        found = self._meta.get("format")
        if found != _FORMAT:
            self._refuse(f"expected a snapshot of a sequence, got format {found!r}")
        differing = [
            f"{name} is {self._meta.get(name)}, expected {value}"
            for name, value in _identity(self._store).items()
            if self._meta.get(name) != value
        ]
        if differing:
            self._refuse("; ".join(differing))

    def _require_tensors(
        self, names: list[str], shapes: Mapping[str, tuple[torch.dtype, list[int | None]]]
    ) -> None:
        if set(names) != set(shapes):
            self._refuse(f"expected the tensors {sorted(shapes)}, got {sorted(names)}")
        for name, (dtype, shape) in shapes.items():
            stored = self._file.get_slice(name)
            found = list(stored.get_shape())
            fits = len(found) == len(shape) and all(
                want is None or want == got for want, got in zip(shape, found, strict=True)
            )
            if not fits or stored.get_dtype() != _DTYPES[dtype]:
                self._refuse(
                    f"{name} must be {_DTYPES[dtype]} {['any' if n is None else n for n in shape]},"
                    f" got {stored.get_dtype()} {found}"
                )

    def _audio(self, is_there: bool) -> DmelState | None:
        if not is_there:
            return None
        state = DmelState(
            self._array("audio_context").numpy(), self._array("audio_pending").numpy()
        )
        state.context.flags.writeable = False
        state.pending.flags.writeable = False
        return state

    def _array(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def _integer(self, name: str, most: int = 2**63 - 1) -> int:
        text = self._meta.get(name, "")
        if not text.isascii() or not text.isdecimal() or int(text) > most:
            self._refuse(f"{name} must be an integer from 0 to {most}, got {text!r}")
        return int(text)

    def _refuse(self, what: str) -> None:
        raise SnapshotError(f"{self._what}: {what}")


@contextmanager
def open_snapshot(path: Path, store: SequenceStore) -> Iterator[Saved]:
    """Open a snapshot and check that it belongs to the store's model.

    Raises SnapshotError naming what differs.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield Saved(file, path, store)
    except TmlError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise SnapshotError(f"restore: {path} cannot be read: {error}") from error


def read_note(path: Path) -> bytes:
    """The note of a snapshot, not yet checked against its digest.

    Raises SnapshotError for a file that is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            if found != _FORMAT or "note" not in file.keys():  # noqa: SIM118 (it has no __iter__)
                raise SnapshotError(
                    f"restore: {path}: expected a snapshot of a sequence, got format {found!r}"
                )
            note: bytes = file.get_tensor("note").numpy().tobytes()
            return note
    except TmlError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise SnapshotError(f"restore: {path} cannot be read: {error}") from error


def _identity(store: SequenceStore) -> dict[str, str]:
    return {
        "format": _FORMAT,
        "format_version": str(FORMAT_VERSION),
        "contract_version": str(CONTRACT_VERSION),
        "page_len": str(PAGE_LEN),
        "layout": store.kv.layout,
        "dtype": str(store.kv.dtype).removeprefix("torch."),
        "model": store.fingerprint,
    }


def _audio_arrays(carry: Carry) -> dict[str, Tensor]:
    if carry.audio is None:
        return {}
    return {
        "audio_context": torch.from_numpy(carry.audio.context.copy()),
        "audio_pending": torch.from_numpy(carry.audio.pending.copy()),
    }


def _pages_entry(name: str, memory: PageMemory, table: PageTable, tip: int) -> Entry:
    pages = memory.pages
    ids = table.ids().tolist()
    num_last = tip - (table.end - 1) * PAGE_LEN  # positions in the last page
    parts = (
        memory.read_clean(page_id, num_last) if i == len(ids) - 1 else memory.read(page_id)
        for i, page_id in enumerate(ids)
    )
    page_bytes = pages[0].numel() * pages.element_size()
    shape = (len(ids), *pages.shape[1:])
    return Entry(name, _DTYPES[pages.dtype], shape, parts, len(ids) * page_bytes)


def _array_entry(name: str, array: Tensor) -> Entry:
    raw = _raw(array)
    return Entry(name, _DTYPES[array.dtype], tuple(array.shape), (raw,), len(raw))


def _note_entry(note: bytes) -> Entry:
    return Entry("note", "U8", (len(note),), (np.frombuffer(note, np.uint8),), len(note))


def _raw(array: Tensor) -> NDArray[np.uint8]:
    if not array.numel():
        return np.empty(0, np.uint8)  # torch cannot view an empty tensor of any stride
    flat: NDArray[np.uint8] = array.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return flat
