"""What a sequence is made of, position by position: for transcripts, and for the state hash."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tml_core.contract import PAGE_LEN

__all__ = ["AUDIO_ID", "IMAGE_ID", "RECORD", "Records", "TokenLog", "records", "text_records"]

# Stand in the log where there is no text token.
AUDIO_ID: Final = -1
IMAGE_ID: Final = -2

# One position: its token id (or AUDIO_ID, IMAGE_ID), how far past itself it sees (0 outside
# blocks), and for what is not text a digest of its embedding.
RECORD: Final = np.dtype([("token_id", "<i4"), ("reach", "<i4"), ("digest", "<u8")])
Records = NDArray[Any]

# Positions of one block of memory; a multiple of a page, so that a page is hashed from one block.
_BLOCK_LEN: Final = 32 * PAGE_LEN


def records(
    token_ids_T: NDArray[np.int64], reach_T: NDArray[np.int64] | None, x_TH: Tensor
) -> Records:
    """Log records of T positions: their ids, how far past themselves they see (None: nowhere), and
    their embeddings [T, hidden] (looked at only where the id is negative)."""
    out = np.zeros(len(token_ids_T), RECORD)
    out["token_id"] = token_ids_T
    if reach_T is not None:
        out["reach"] = reach_T
    (media,) = (token_ids_T < 0).nonzero()
    if len(media):
        rows = x_TH.contiguous().view(torch.uint8).cpu().numpy()
        digests = b"".join(blake2b(rows[i].data, digest_size=8).digest() for i in media.tolist())
        out["digest"][media] = np.frombuffer(digests, "<u8")
    return out


def text_records(token_ids: Sequence[int]) -> Records:
    """Log records of text tokens outside blocks."""
    out = np.zeros(len(token_ids), RECORD)
    out["token_id"] = token_ids
    return out


class TokenLog:
    """Append-only records with truncation. Blocks of memory never move; a twin shares full ones."""

    def __init__(self) -> None:
        self._blocks: list[Records] = []
        self._num_shared = 0  # leading blocks that another log may read: copied before a write
        self._len = 0
        self._chain = b""  # over all complete pages
        self._chain_pages = 0

    def __len__(self) -> int:
        return self._len

    def reserve(self, count: int) -> None:
        """Make room so that appending ``count`` records allocates nothing."""
        first = self._len // _BLOCK_LEN
        if first < self._num_shared:
            self._blocks[first] = self._blocks[first].copy()
            self._num_shared = first
        while len(self._blocks) * _BLOCK_LEN < self._len + count:
            self._blocks.append(np.empty(_BLOCK_LEN, RECORD))

    def append(self, new: Records) -> None:
        """Append records and extend the hash chain over the pages they complete."""
        self.reserve(len(new))
        done = 0
        while done < len(new):
            offset = (self._len + done) % _BLOCK_LEN
            count = min(len(new) - done, _BLOCK_LEN - offset)
            block = self._blocks[(self._len + done) // _BLOCK_LEN]
            block[offset : offset + count] = new[done : done + count]
            done += count
        self._len += len(new)
        while (self._chain_pages + 1) * PAGE_LEN <= self._len:
            self._chain = self._hash(self._chain_pages * PAGE_LEN, PAGE_LEN)
            self._chain_pages += 1

    def chain(self) -> bytes:
        """The hash of the complete pages; `truncate` wants the one of its length back."""
        return self._chain

    def truncate(self, length: int, chain: bytes) -> None:
        """Forget all but the first ``length`` records, whose complete pages hash to ``chain``."""
        self._len = length
        self._chain = chain
        self._chain_pages = length // PAGE_LEN
        del self._blocks[-(-length // _BLOCK_LEN) :]
        self._num_shared = min(self._num_shared, len(self._blocks))

    def twin(self, length: int, chain: bytes) -> "TokenLog":
        """A log of the first ``length`` records that goes on alone; copies one block at most."""
        num_full = length // _BLOCK_LEN
        twin = TokenLog()
        twin._blocks = self._blocks[:num_full]
        twin._num_shared = num_full
        self._num_shared = max(self._num_shared, num_full)
        if num_full * _BLOCK_LEN < length:
            twin._blocks.append(self._blocks[num_full].copy())
        twin._len, twin._chain, twin._chain_pages = length, chain, length // PAGE_LEN
        return twin

    def read(self, start: int, stop: int) -> Records:
        """A copy of the records [start, stop)."""
        out = np.empty(max(0, stop - start), RECORD)
        done = 0
        while done < len(out):
            offset = (start + done) % _BLOCK_LEN
            count = min(len(out) - done, _BLOCK_LEN - offset)
            block = self._blocks[(start + done) // _BLOCK_LEN]
            out[done : done + count] = block[offset : offset + count]
            done += count
        return out

    def digest(self) -> str:
        """Hex hash of everything in the log: equal for equal contents, however they were cut."""
        start = self._chain_pages * PAGE_LEN
        return self._hash(start, self._len - start).hex()

    def _hash(self, start: int, count: int) -> bytes:
        head = self._chain + start.to_bytes(8, "little") + count.to_bytes(8, "little")
        hasher = blake2b(head, digest_size=16)
        if count:
            offset = start % _BLOCK_LEN
            block = self._blocks[start // _BLOCK_LEN]
            hasher.update(block[offset : offset + count].view(np.uint8).data)
        return hasher.digest()
