"""A decoder whose result can be worked out by hand, and the hand that works it out.

The fake writes token + 1 of each position into its K/V pages and convolution rows through the same
tables as the kernels, and returns three numbers a position: a weighted sum over every key that
global layers see, the same over the sliding window, and the last three tokens. The oracle computes
them from plain lists. A page that is lost, shared by mistake or overwritten shows as another sum.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tml_core.contract import PAGE_LEN
from tml_core.engine.runner import StepInput, StepRunner
from tml_core.model.config import TextConfig
from tml_core.model.kv_store import KvStore
from tml_core.model.step_batch import StepBatch
from tml_core.sequence import Carry, Evicted, Retention, Sequence, SequenceStore
from tml_core.sequence.page_table import pages_for

WINDOW = 200  # not a multiple of a page
HEAD_DIM = 2
HIDDEN = 4


def tiny_text_config(window: int = WINDOW) -> TextConfig:
    return TextConfig(
        vocab_size=512,
        unpadded_vocab_size=500,
        hidden_size=HIDDEN,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        swa_num_heads=2,
        swa_num_kv_heads=1,
        swa_head_dim=HEAD_DIM,
        window=window,
        d_rel=2,
        rel_extent=8,
        log_scaling_floor=None,
        log_scaling_alpha=0.1,
        layer_is_sliding=(True, False, True),
        layer_is_dense=(True, True, True),
        dense_width=8,
        expert_width=8,
        num_experts=1,
        top_k=1,
        num_shared=0,
        route_scale=1.0,
        mup=1.0,
        rms_eps=1e-6,
        max_positions=1 << 20,
    )


def new_store(
    *,
    num_slots: int = 4,
    max_positions: int = 4096,
    num_global_pages: int = 64,
    num_sliding_pages: int = 64,
    fingerprint: str = "fake",
    dtype: torch.dtype = torch.float32,
) -> SequenceStore:
    kv = KvStore(
        tiny_text_config(), dtype, num_slots, max_positions, num_global_pages, num_sliding_pages
    )
    if num_global_pages * kv.sizes.global_page_bytes < 1 << 24:
        # Unused memory is poison: a sum that touches it is not a number.
        kv.global_pages.fill_(float("nan"))
        kv.sliding_pages.fill_(float("nan"))
        kv.conv_rows.fill_(float("nan"))
    return SequenceStore(kv, fingerprint)


class StepFailed(Exception):
    """Raised by the fake on request."""


class FakeBackbone:
    """See the module's docstring. ``fail_in`` raises StepFailed in that many steps, half done."""

    def __init__(self) -> None:
        self.fail_in: int | None = None
        self.batch_shapes: list[tuple[int, int]] = []

    def step(self, x_TD: Tensor, batch: StepBatch, kv: KvStore) -> Tensor:
        tokens_T = x_TD[:, 0].double().numpy().copy()
        x_TD.fill_(float("nan"))  # a step may use its input up
        self.batch_shapes.append((batch.num_seqs, batch.num_tokens))
        cu_tokens, slots = batch.cu_tokens.tolist(), batch.slots.tolist()
        start_pos, visible_end = batch.start_pos.tolist(), batch.visible_end.tolist()
        fails = self.fail_in is not None and self.fail_in <= 1
        if self.fail_in is not None:
            self.fail_in -= 1
        h_T3 = np.zeros((len(tokens_T), 3))
        for b, slot in enumerate(slots):
            first, last = cu_tokens[b], cu_tokens[b + 1]
            tip, new_tip = start_pos[b], start_pos[b] + last - first
            for tensor, table in (
                (kv.global_pages, kv.global_table),
                (kv.sliding_pages, kv.sliding_table),
            ):
                pages, slots_in_page = np.divmod(np.arange(tip, new_tip), PAGE_LEN)
                ids = table[slot].numpy()[pages]
                assert (ids >= 0).all()
                values(tensor)[ids, slots_in_page] = tokens_T[first:last] + 1
            if fails:
                kv.conv_rows[slot].fill_(float("nan"))
                raise StepFailed("the step failed half way")
            everything = gather(kv.global_pages, kv.global_table[slot], 0, new_tip)
            start = max(0, tip - WINDOW + 1)
            recent = gather(kv.sliding_pages, kv.sliding_table[slot], start, new_tip)
            past = [*kv.conv_rows[slot, 0, :, 0].tolist(), *tokens_T[first:last].tolist()]
            for t in range(first, last):
                q, end = tip + t - first, visible_end[t] + 1
                low = max(0, q - WINDOW + 1)
                h_T3[t, 0] = weighted(everything[:end], 0)
                h_T3[t, 1] = weighted(recent[low - start : end - start], low)
                h_T3[t, 2] = conv_code(past[t - first : t - first + 3])
            kv.conv_rows[slot].copy_(torch.tensor(past[-3:]).view(1, 3, 1))
        return torch.from_numpy(h_T3)


def values(pages: Tensor) -> np.ndarray[Any, Any]:
    """The first V element of every key of the first layer and head: [num_pages, 128], a view."""
    return pages[:, 0, 0, 1].view(-1, PAGE_LEN, HEAD_DIM)[:, :, 0].numpy()


def gather(pages: Tensor, row: Tensor, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Values at positions [start, stop); zero where the page was dropped."""
    index, offset = np.divmod(np.arange(start, stop), PAGE_LEN)
    ids = row.numpy()[index]
    return np.where(ids >= 0, values(pages)[ids, offset].astype(np.float64), 0.0)


def weighted(some: np.ndarray[Any, Any], start: int) -> float:
    weights = (np.arange(start, start + len(some)) * 7919) % 1009 + 1
    return float((some * weights).sum())


def conv_code(last_three: list[float]) -> float:
    return last_three[0] * 1e6 + last_three[1] * 1e3 + last_three[2]


@dataclass
class Oracle:
    """What a sequence should be: plain lists."""

    tokens: list[int] = field(default_factory=list)
    reach: list[int] = field(default_factory=list)
    floor: int = 0  # positions [keep, floor) are evicted
    keep: int = 0

    def copy(self) -> "Oracle":
        return Oracle(list(self.tokens), list(self.reach), self.floor, self.keep)

    def append(self, tokens: list[int], blocks: tuple[tuple[int, int], ...] = ()) -> Tensor:
        """Append, and return what the fake should return."""
        tip = len(self.tokens)
        reach = [0] * len(tokens)
        for start, end in blocks:
            reach[start:end] = [end - 1 - t for t in range(start, end)]
        self.tokens += tokens
        self.reach += reach
        seen = np.array(self.tokens, np.float64) + 1
        kept = seen.copy()
        kept[self.keep : self.floor] = 0
        h = []
        for q in range(tip, len(self.tokens)):
            end, low = q + self.reach[q] + 1, max(0, q - WINDOW + 1)
            past = [0.0, 0.0, 0.0, *map(float, self.tokens[:q])][-3:]
            h.append((weighted(kept[:end], 0), weighted(seen[low:end], low), conv_code(past)))
        return torch.tensor(h, dtype=torch.float64).view(-1, 3)


def step_input(
    sequence: Sequence,
    tokens: list[int],
    blocks: tuple[tuple[int, int], ...] = (),
    carry: Carry | None = None,
) -> StepInput:
    x_TD = torch.zeros(len(tokens), HIDDEN)
    x_TD[:, 0] = torch.tensor(tokens, dtype=torch.float32)
    return StepInput(sequence, x_TD, torch.tensor(tokens, dtype=torch.int64), blocks, carry)


class Rig:
    """A store, a fake and a runner, with the oracle beside every sequence."""

    def __init__(self, *, max_step_tokens: int = 512, **store: Any) -> None:
        self.store = new_store(**store)
        self.fake = FakeBackbone()
        self.runner = StepRunner(self.fake, self.store, max_step_tokens=max_step_tokens)
        self.random = np.random.default_rng(0)

    def open(self, retention: Retention | None = None) -> tuple[Sequence, Oracle]:
        return Sequence(self.store, retention=retention), Oracle()

    def tokens(self, count: int) -> list[int]:
        drawn: list[int] = self.random.integers(0, 500, count).tolist()
        return drawn

    def boundary(self, sequence: Sequence, oracle: Oracle) -> Evicted | None:
        """Note a micro-turn start in both."""
        evicted = sequence.note_boundary()
        if evicted is not None:
            assert sequence.retention is not None
            oracle.keep = pages_for(sequence.retention.pinned_prefix) * PAGE_LEN
            assert evicted.start == max(oracle.floor, oracle.keep)
            assert evicted.end <= sequence.tip - sequence.retention.window_positions
            oracle.floor = evicted.end
            assert sequence.evicted == Evicted(oracle.keep, oracle.floor)
        return evicted

    def append(
        self,
        sequence: Sequence,
        oracle: Oracle,
        count: int,
        blocks: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """Append random tokens and compare every number with the oracle."""
        tokens = self.tokens(count)
        (h,) = self.runner.run([step_input(sequence, tokens, blocks)])
        assert torch.equal(h, oracle.append(tokens, blocks))
        assert sequence.tip == len(oracle.tokens)
