"""Sequences' memory on a Hopper GPU, and how a step's batch reaches it.

Which page belongs to whom is decided on the host, in the same tables as for the CPU; the device
has a copy, which `StepUpload` brings up to date for the sequences of a step.

Legend: B sequences of the step, T tokens of the step.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tml_core.contract import PAGE_LEN
from tml_core.model.config import TextConfig
from tml_core.model.kv_store import KvStore
from tml_core.model.page_memory import Bytes, PageMemory
from tml_core.model.step_batch import StepBatch
from tml_core.ops import cuda

__all__ = ["CudaKvStore", "CudaPageMemory", "DeviceStep", "StepUpload"]


class CudaPageMemory(PageMemory):
    """Pages in device memory: bytes come and go in copies."""

    def __init__(self, pages: Tensor) -> None:
        self.pages = pages  # and no bytes: the host cannot reach them

    def copy(self, source: int, target: int) -> None:
        """Page ``target`` becomes what page ``source`` is, in the order of the stream."""
        pages = self.pages
        cuda.copy_pages(pages[source : source + 1], pages[target : target + 1])

    def read(self, page_id: int) -> Bytes:
        """A copy of a page's bytes; waits for the steps before it."""
        return _host_bytes(self.pages[page_id])

    def read_clean(self, page_id: int, num_positions: int) -> Bytes:
        """`read` with everything past the first ``num_positions`` positions zeroed."""
        page = self.pages[page_id : page_id + 1]
        clean = torch.empty_like(page)
        cuda.copy_pages(page, clean, last_len=num_positions)
        return _host_bytes(clean)

    def blank(self, page_id: int) -> Bytes:
        """Host memory of a page's size; `fill` brings it to the device."""
        page = self.pages[page_id]
        return np.empty(page.numel() * page.element_size(), np.uint8)

    def fill(self, page_id: int, page: memoryview) -> None:
        """The page holds what was put into the memory that `blank` gave for it."""
        target = self.pages[page_id]
        if target.numel():
            source = torch.frombuffer(page, dtype=target.dtype).view(target.shape)
            target.copy_(source)


class CudaKvStore(KvStore):
    """`KvStore` with pages and convolution rows on ``device``, in the layout of its kernels.

    The tables stay on the host; ``device_global_table`` and ``device_sliding_table`` are what the
    kernels read; ``upload`` brings a batch to the device. Raises what torch raises when the
    device's memory is too small.
    """

    layout: ClassVar[str] = "sm_90"

    def __init__(
        self,
        config: TextConfig,
        num_slots: int,
        max_positions: int,
        num_global_pages: int,
        num_sliding_pages: int,
        *,
        device: torch.device,
    ) -> None:
        self.device = device
        super().__init__(
            config, torch.bfloat16, num_slots, max_positions, num_global_pages, num_sliding_pages
        )
        self.device_global_table = self.global_table.to(device, copy=True)
        self.device_sliding_table = self.sliding_table.to(device, copy=True)
        self.upload = StepUpload(self, 512)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Device memory with anything in it."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _memory(self, pages: Tensor) -> PageMemory:
        return CudaPageMemory(pages)


@dataclass(frozen=True)
class DeviceStep:
    """A StepBatch on the device: ``cu_tokens`` int32 [B + 1], ``slots`` int32 [B], ``start_pos``
    int64 [B], ``visible_end`` int64 [T]. Good until the next upload."""

    cu_tokens: Tensor
    slots: Tensor
    start_pos: Tensor
    visible_end: Tensor


class StepUpload:
    """Brings batches, and what changed of their sequences' page tables, to the device.

    One copy a step from pinned memory to a place that stays where it is, so that a captured graph
    finds each batch where it found the first; nothing waits for the device but a third step for the
    copy of the first.
    """

    def __init__(self, kv: CudaKvStore, max_tokens: int) -> None:
        self._kv = kv
        self._tables = (
            _Mirror(kv.global_table, kv.device_global_table, 0),
            _Mirror(kv.sliding_table, kv.device_sliding_table, kv.config.window),
        )
        self._max_seqs = kv.num_slots
        self._make(max_tokens)

    @property
    def place(self) -> Tensor:
        """The memory that batches are found in; another one after a batch it was too small for."""
        return self._staging.device_bytes

    def __call__(self, batch: StepBatch) -> DeviceStep:
        """The batch on the device, in the order of the current stream."""
        num_seqs, num_tokens = batch.num_seqs, batch.num_tokens
        if num_tokens > self._max_tokens:
            self._make(2 * num_tokens)
        for table in self._tables:
            table.update(batch)
        words = self._staging.words()
        long, short = words.view(np.int64), words.view(np.int32)
        ends, cu, slots = self._offsets
        long[:num_seqs] = batch.start_pos.numpy()
        long[ends : ends + num_tokens] = batch.visible_end.numpy()
        short[cu : cu + num_seqs + 1] = batch.cu_tokens.numpy()
        short[slots : slots + num_seqs] = batch.slots.numpy()
        self._staging.send()
        long_D, short_D = self._long, self._short
        return DeviceStep(
            short_D[cu : cu + num_seqs + 1],
            short_D[slots : slots + num_seqs],
            long_D[:num_seqs],
            long_D[ends : ends + num_tokens],
        )

    def _make(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        # start_pos, then visible_end, as int64; cu_tokens and slots behind them as int32.
        num_long = self._max_seqs + max_tokens
        cu = 2 * num_long
        self._offsets = self._max_seqs, cu, cu + self._max_seqs + 1
        num_bytes = 8 * num_long + 4 * (2 * self._max_seqs + 1)
        self._staging = _Staging(-(-num_bytes // 8) * 8, self._kv.device)
        self._long = self._staging.device_bytes.view(torch.int64)
        self._short = self._staging.device_bytes.view(torch.int32)


class _Staging:
    """Bytes that are written on the host and sent to one place on the device."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self.device_bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        is_cuda = device.type == "cuda"
        # Two, so that one is written while the other is on its way.
        self._hosts = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)
        ]
        self._sent: list[Any] = [torch.cuda.Event() if is_cuda else None for _ in range(2)]
        self._turn = 0

    def words(self) -> NDArray[np.uint8]:
        """Memory to write, whose last content has arrived."""
        self._turn = 1 - self._turn
        event = self._sent[self._turn]
        if event is not None:
            event.synchronize()
        out: NDArray[np.uint8] = self._hosts[self._turn].numpy()
        return out

    def send(self) -> None:
        """Copy what was written, in the order of the current stream."""
        self.device_bytes.copy_(self._hosts[self._turn], non_blocking=True)
        event = self._sent[self._turn]
        if event is not None:
            event.record(torch.cuda.current_stream(self._device))


class _Mirror:
    """The device's copy of a page table; ``window`` 0: all earlier pages are looked at."""

    def __init__(self, host: Tensor, device: Tensor, window: int) -> None:
        self._host: NDArray[np.int32] = host.numpy()
        self._device = device.view(-1)
        self._window = window
        self._sent = self._host.copy()

    def update(self, batch: StepBatch) -> None:
        """Send the entries that the batch's tokens look at and that have changed."""
        places: list[NDArray[np.int64]] = []
        entries: list[NDArray[np.int32]] = []
        width = self._host.shape[1]
        counts = np.diff(batch.cu_tokens.numpy())
        for slot, start, count in zip(
            batch.slots.tolist(), batch.start_pos.tolist(), counts.tolist(), strict=True
        ):
            first = max(0, start - self._window + 1) // PAGE_LEN if self._window else 0
            end = -(-(start + count) // PAGE_LEN)
            row, sent = self._host[slot, first:end], self._sent[slot, first:end]
            changed = (row != sent).nonzero()[0]
            if len(changed):
                sent[changed] = row[changed]
                places.append(changed + (slot * width + first))
                entries.append(row[changed])
        if places:
            # Once in 128 positions: ordinary memory, whose copy waits for itself alone.
            where = torch.from_numpy(np.concatenate(places)).to(self._device.device)
            what = torch.from_numpy(np.concatenate(entries)).to(self._device.device)
            self._device.index_copy_(0, where, what)


def _host_bytes(page: Tensor) -> Bytes:
    flat: Bytes = page.cpu().reshape(-1).view(torch.uint8).numpy()
    return flat
