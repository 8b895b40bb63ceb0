"""session_attn against torch's scaled_dot_product_attention, bf16, keys cold.

The peer gets what suits it best: dense keys and values, the query heads of a KV head as so many
more queries, no bias and no mask; ours reads pages, adds the relative bias and masks.
"""

from dataclasses import dataclass
from itertools import cycle
from typing import Any

import pytest
import torch

from tml_core.contract import PAGE_LEN
from tml_core.ops._common import huge_empty
from tml_core.ops.session_attn import pack_rel_bank, session_attn, session_attn_reference

REL_DIM, REL_LEN = 16, 1024
# Each call takes the next layer; together they are larger than any cache.
COLD_BYTES = 200 << 20


@dataclass(frozen=True)
class Shape:
    """``new`` tokens at the end of ``keys``; ``window`` 0 sees all of them."""

    new: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    window: int = 0

    @property
    def name(self) -> str:
        kind = f"w{self.window}" if self.window else "global"
        return (
            f"attention {self.new} on {self.keys} keys {kind} "
            f"{self.heads}/{self.kv_heads}x{self.dim}"
        )

    @property
    def kept(self) -> int:
        """Keys that any new token sees, rounded up to pages as a sliding layer keeps them."""
        if self.window == 0:
            return self.keys
        first = (self.keys - self.new - self.window + 1) // PAGE_LEN * PAGE_LEN
        return self.keys - max(0, first)

    @property
    def seen(self) -> int:
        """Pairs of a new token and a key."""
        start = self.keys - self.new
        return sum(min(p + 1, self.window or p + 1) for p in range(start, self.keys))

    @property
    def bytes_per_layer(self) -> int:
        return 2 * 2 * self.kept * self.kv_heads * self.dim


SHAPES = [
    Shape(1, 4096, 32, 8, 128),
    Shape(1, 32768, 32, 8, 128),
    Shape(16, 4096, 16, 16, 128),
    Shape(16, 8192, 32, 8, 128),
    Shape(16, 4096, 16, 4, 64, window=512),
    Shape(512, 2048, 32, 8, 128),
]


def dense(pages: torch.Tensor, part: int, dim: int) -> torch.Tensor:
    """K (part 0) or V (part 1) of one layer's pages [P, K, 2, 128 * D] as [1, K, S, D]."""
    num_pages, kv_heads = pages.shape[:2]
    block = pages[:, :, part].unflatten(-1, (-1, dim if part else PAGE_LEN, 2))
    rows = block.permute(1, 0, 2, 4, 3) if part else block.permute(1, 0, 3, 2, 4)
    return rows.reshape(1, kv_heads, num_pages * PAGE_LEN, dim)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name.replace(" ", "_"))
def test_session_attn(measure: Any, shape: Shape) -> None:
    generator = torch.Generator().manual_seed(0)
    num_pages = -(-shape.kept // PAGE_LEN)
    num_layers = max(1, COLD_BYTES // shape.bytes_per_layer)
    pool = huge_empty(
        (num_pages, num_layers, shape.kv_heads, 2, PAGE_LEN * shape.dim), torch.bfloat16
    ).normal_(generator=generator)
    q, r = (
        torch.randn(shape.new, shape.heads, width, generator=generator).bfloat16()
        for width in (shape.dim, REL_DIM)
    )
    bank = torch.randn(REL_DIM, shape.window or REL_LEN, generator=generator).bfloat16() / 4
    start = shape.keys - shape.new
    visible_end = torch.arange(start, shape.keys)
    total_pages = -(-shape.keys // PAGE_LEN)
    table = torch.full((1, total_pages), -1, dtype=torch.int32)
    table[0, total_pages - num_pages :] = torch.arange(num_pages)
    packed = pack_rel_bank(bank)
    batch = {
        "table": table,
        "cu_tokens": torch.tensor([0, shape.new], dtype=torch.int32),
        "slots": torch.zeros(1, dtype=torch.int32),
        "start_pos": torch.tensor([start]),
        "visible_end_T": visible_end,
        "window": shape.window,
    }
    keys, values = (
        [dense(pool[:, i], part, shape.dim) for i in range(num_layers)] for part in (0, 1)
    )
    before = (total_pages - num_pages) * PAGE_LEN
    expected, _ = session_attn_reference(
        q.float(),
        r.float(),
        bank.float(),
        keys[0][0].transpose(0, 1).float()[: shape.keys - before],
        values[0][0].transpose(0, 1).float()[: shape.keys - before],
        visible_end - before,
        visible_end - before,
        window=shape.window,
    )
    out = session_attn(q, r, packed, pages=pool, layer=0, **batch)
    # p and o are rounded to bf16 once each: 2^-9 of values of order one.
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02)

    group = shape.heads // shape.kv_heads
    rows = q.view(shape.new, shape.kv_heads, group, shape.dim).permute(1, 2, 0, 3)
    dense_q = rows.reshape(1, shape.kv_heads, group * shape.new, shape.dim)
    ours, theirs = cycle(range(num_layers)), cycle(zip(keys, values, strict=True))
    measure(
        shape.name,
        lambda: session_attn(q, r, packed, pages=pool, layer=next(ours), **batch),
        peer=lambda: torch.nn.functional.scaled_dot_product_attention(
            dense_q, *next(theirs), scale=1 / shape.dim
        ),
        num_bytes=shape.bytes_per_layer + 4.0 * q.numel(),
        flops=4.0 * shape.seen * shape.heads * shape.dim,
    )
