"""session_attn: value, the same bits however the sequence is cut, shared, paged or threaded."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_core import _ext, errors
from tml_core.contract import PAGE_LEN
from tml_core.ops.session_attn import (
    RelBank,
    pack_rel_bank,
    session_attn,
    session_attn_reference,
)

NAN = float("nan")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@dataclass
class Heads:
    """A layer: its head counts and sizes, and its bias profiles."""

    num: int
    num_kv: int
    dim: int
    bank_CR: torch.Tensor
    window: int = 0

    @property
    def packed(self) -> RelBank:
        return pack_rel_bank(self.bank_CR)


@dataclass
class Tokens:
    """A whole sequence: what every token asks and offers, and how far it sees."""

    q: torch.Tensor
    r: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    visible_end: torch.Tensor

    def __len__(self) -> int:
        return self.q.shape[0]


def layer(
    num: int,
    num_kv: int,
    dim: int,
    dtype: torch.dtype,
    *,
    rel: int = 16,
    rel_len: int = 200,
    window: int = 0,
) -> Heads:
    generator = torch.Generator().manual_seed(99)
    bank = torch.randn(rel, rel_len, generator=generator).to(dtype)
    return Heads(num, num_kv, dim, bank, window)


def tokens(
    heads: Heads, length: int, blocks: tuple[tuple[int, int], ...] = (), seed: int = 0
) -> Tokens:
    """Random tokens; ``blocks`` are the [begin, end) ranges that see all of themselves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(length, *shape, generator=generator).to(heads.bank_CR.dtype)

    visible_end = torch.arange(length)
    for begin, end in blocks:
        visible_end[begin:end] = end - 1
    return Tokens(
        draw(heads.num, heads.dim) * 4,  # scores of about 4 / sqrt(dim): far from uniform weights
        draw(heads.num, heads.bank_CR.shape[0]) * 0.25,
        draw(heads.num_kv, heads.dim),
        draw(heads.num_kv, heads.dim),
        visible_end,
    )


def page_count(length: int) -> int:
    return -(-length // PAGE_LEN)


def fill_pages(pages: torch.Tensor, ids: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
    """Write keys and values of one sequence; whatever they do not cover keeps its NaN."""
    num_kv, dim = k.shape[1:]
    pair = 2 if k.dtype == torch.bfloat16 else 1
    for i, page_id in enumerate(ids):
        rows = slice(i * PAGE_LEN, min((i + 1) * PAGE_LEN, k.shape[0]))
        count = rows.stop - rows.start
        padded = torch.zeros(-(-count // pair) * pair, num_kv, dim, dtype=v.dtype)
        padded[:count] = v[rows]
        for head in range(num_kv):
            k_block = pages[page_id, head, 0].view(dim // pair, PAGE_LEN, pair)
            k_block[:, :count] = k[rows, head].view(count, dim // pair, pair).transpose(0, 1)
            v_block = pages[page_id, head, 1].view(PAGE_LEN // pair, dim, pair)
            v_block[: padded.shape[0] // pair] = (
                padded[:, head].reshape(-1, pair, dim).transpose(1, 2)
            )


def attend(
    heads: Heads,
    parts: list[tuple[Tokens, int, int]],
    *,
    dropped: tuple[int, ...] = (),
    seed: int = 0,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One step: tokens [begin, end) of each sequence. Nothing after end has been written."""
    dtype, dim = heads.bank_CR.dtype, heads.dim
    counts = [page_count(end) for _, _, end in parts]
    num_pages = sum(counts) + 3
    pool = torch.full((num_pages, 2, heads.num_kv, 2, PAGE_LEN * dim), NAN, dtype=dtype)
    free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(parts) + 2, max(counts) + 1), -7, dtype=torch.int32)
    slots = torch.arange(len(parts), dtype=torch.int32).flip(0) + 1
    for (seq, _, end), slot, count in zip(parts, slots.tolist(), counts, strict=True):
        ids = [free.pop() for _ in range(count)]
        fill_pages(pool[:, 1], ids, seq.k[:end], seq.v[:end])
        table[slot, :count] = torch.tensor(ids, dtype=torch.int32)
        for page in dropped:
            table[slot, page] = -1
    lengths = [end - begin for _, begin, end in parts]
    lse = torch.full((sum(lengths), heads.num), NAN)
    out = session_attn(
        torch.cat([s.q[a:b] for s, a, b in parts]),
        torch.cat([s.r[a:b] for s, a, b in parts]),
        heads.packed,
        pages=pool,
        layer=1,
        table=table,
        cu_tokens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        slots=slots,
        start_pos=torch.tensor([a for _, a, _ in parts]),
        visible_end_T=torch.cat([s.visible_end[a:b] for s, a, b in parts]),
        window=heads.window,
        lse_TN=lse,
    )
    return list(out.split(lengths)), list(lse.split(lengths))


def chunked(heads: Heads, seq: Tokens, cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    edges = [0, *cuts, len(seq)]
    steps = [attend(heads, [(seq, a, b)]) for a, b in itertools.pairwise(edges) if a < b]
    return torch.cat([o[0] for o, _ in steps]), torch.cat([lse[0] for _, lse in steps])


def check_value(
    heads: Heads, seq: Tokens, begin: int, end: int, dropped: tuple[int, ...] = ()
) -> None:
    (out,), (lse,) = attend(heads, [(seq, begin, end)], dropped=dropped)
    present = torch.ones(page_count(end), PAGE_LEN, dtype=torch.bool)
    present[list(dropped)] = False
    expected, expected_lse = session_attn_reference(
        seq.q[begin:end].double(),
        seq.r[begin:end].double(),
        heads.bank_CR.double(),
        seq.k[:end].double(),
        seq.v[:end].double(),
        torch.arange(begin, end),
        seq.visible_end[begin:end],
        window=heads.window,
        present_S=present.flatten()[:end],
    )
    # fp32: a score is a chain of dim + rel products, each off by at most 2^-24 of |q||k| / dim.
    # bf16: p and o are rounded once each, 2^-9 of a value of at most |v| (below 6 here).
    exact = heads.bank_CR.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-5 if exact else 6 * 2**-8)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-5)


@BOTH
@pytest.mark.parametrize(
    ("num", "num_kv", "dim", "rel"),
    [(2, 2, 32, 16), (4, 2, 16, 5), (8, 2, 64, 16), (4, 1, 128, 16)],
)
@pytest.mark.parametrize(("begin", "count"), [(0, 1), (127, 19), (128, 1), (129, 257)])
def test_session_attn_matches_reference(
    dtype: torch.dtype, num: int, num_kv: int, dim: int, rel: int, begin: int, count: int
) -> None:
    heads = layer(num, num_kv, dim, dtype, rel=rel)
    check_value(heads, tokens(heads, begin + count), begin, begin + count)


@BOTH
@pytest.mark.parametrize("begin", [2046, 2047, 2048, 2049, 4100])
def test_session_attn_across_segments(dtype: torch.dtype, begin: int) -> None:
    heads = layer(2, 1, 32, dtype)
    check_value(heads, tokens(heads, begin + 3), begin, begin + 3)


@BOTH
@pytest.mark.parametrize("window", [1, 100, 128, 512])
def test_session_attn_window(dtype: torch.dtype, window: int) -> None:
    heads = layer(4, 2, 32, dtype, rel_len=window, window=window)
    check_value(heads, tokens(heads, 700), 600, 700)


@BOTH
@pytest.mark.parametrize("rel_len", [1, 128, 1024])
def test_session_attn_bias_extent(dtype: torch.dtype, rel_len: int) -> None:
    heads = layer(2, 2, 32, dtype, rel_len=rel_len)
    check_value(heads, tokens(heads, 1300, blocks=((1200, 1290),)), 1190, 1300)


@BOTH
def test_session_attn_sees_the_rest_of_its_block(dtype: torch.dtype) -> None:
    heads = layer(4, 2, 64, dtype)
    check_value(heads, tokens(heads, 300, blocks=((20, 60), (100, 290))), 20, 300)


@BOTH
def test_session_attn_skips_dropped_pages(dtype: torch.dtype) -> None:
    heads = layer(4, 2, 32, dtype)
    seq = tokens(heads, 2700)
    check_value(heads, seq, 2680, 2700, dropped=(0, 2, 3, 17))


def test_session_attn_that_sees_nothing_is_zero() -> None:
    heads = layer(2, 1, 16, torch.float32)
    (out,), (lse,) = attend(heads, [(tokens(heads, 140), 120, 130)], dropped=(0,))
    assert torch.equal(out[:8], torch.zeros(8, 32))
    assert torch.equal(lse[:8], torch.full((8, 2), -math.inf))
    assert bool(lse[8:].isfinite().all())


@BOTH
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_session_attn_bits_do_not_depend_on_cuts(dtype: torch.dtype, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 420))
    window = data.draw(st.sampled_from([0, 70, 128]))
    edges = sorted(data.draw(st.sets(st.integers(1, 419), max_size=6)) | {0, length})
    edges = [e for e in edges if e <= length]
    runs = list(itertools.pairwise(edges))
    blocks = tuple(run for run in runs if data.draw(st.booleans()))
    heads = layer(4, 2, 32, dtype, rel_len=150, window=window)
    seq = tokens(heads, length, blocks)
    inside = {i for a, b in blocks for i in range(a + 1, b)}
    allowed = [i for i in range(1, length) if i not in inside]
    cuts = sorted(data.draw(st.sets(st.sampled_from(allowed or [0]), max_size=8)))
    whole, whole_lse = chunked(heads, seq, [])
    out, lse = chunked(heads, seq, cuts)
    assert torch.equal(out, whole)
    assert torch.equal(lse, whole_lse)


@BOTH
@pytest.mark.parametrize(("group", "dim"), [(1, 128), (2, 48), (3, 96), (4, 64), (5, 16)])
def test_session_attn_token_by_token(dtype: torch.dtype, group: int, dim: int) -> None:
    heads = layer(group, 1, dim, dtype)
    seq = tokens(heads, 140)
    whole, whole_lse = chunked(heads, seq, [])
    out, lse = chunked(heads, seq, list(range(1, 140)))
    assert torch.equal(out, whole)
    assert torch.equal(lse, whole_lse)


@BOTH
def test_session_attn_bits_across_segments(dtype: torch.dtype) -> None:
    heads = layer(2, 1, 32, dtype)
    seq = tokens(heads, 4200)
    torch.set_num_threads(1)
    (whole,), (whole_lse,) = attend(heads, [(seq, 0, 4200)])
    torch.set_num_threads(2)
    for begin, end in [(0, 2050), (2040, 2060), (4000, 4200), (4095, 4098), (4199, 4200)]:
        (out,), (lse,) = attend(heads, [(seq, begin, end)])
        assert torch.equal(out, whole[begin:end])
        assert torch.equal(lse, whole_lse[begin:end])


@BOTH
def test_session_attn_bits_do_not_depend_on_batch_pages_or_threads(dtype: torch.dtype) -> None:
    heads = layer(4, 2, 32, dtype)
    lengths = [1, 19, 257, 2100, 4300, 130]
    news = [1, 19, 5, 20, 1, 64]
    seqs = [tokens(heads, n, seed=i) for i, n in enumerate(lengths)]
    parts = [(s, n - new, n) for s, n, new in zip(seqs, lengths, news, strict=True)]
    alone = [attend(heads, [part]) for part in parts]
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        outs, lses = attend(heads, parts, seed=threads)
        for (out, lse), o, x in zip(alone, outs, lses, strict=True):
            assert torch.equal(o, out[0])
            assert torch.equal(x, lse[0])


@BOTH
def test_session_attn_splits_one_long_head_over_threads(dtype: torch.dtype) -> None:
    heads = layer(8, 1, 128, dtype)  # enough work that every thread gets a part
    seq = tokens(heads, 9000)
    results = []
    for threads in (1, 2, 3, 5, 16):
        torch.set_num_threads(threads)
        results.append(attend(heads, [(seq, 8998, 9000)], dropped=(1, 40, 41)))
    for outs, lses in results[1:]:
        assert torch.equal(outs[0], results[0][0][0])
        assert torch.equal(lses[0], results[0][1][0])


@BOTH
def test_session_attn_bits_do_not_depend_on_isa(dtype: torch.dtype, each_isa: list[str]) -> None:
    heads = layer(8, 2, 48, dtype, rel=7)
    seq = tokens(heads, 400, blocks=((130, 170),))
    (expected,), (expected_lse,) = attend(heads, [(seq, 100, 400)])
    for isa in each_isa:
        _ext.set_isa(isa)
        for begin, end in [(100, 400), (130, 170), (399, 400)]:
            (out,), (lse,) = attend(heads, [(seq, begin, end)])
            assert torch.equal(out, expected[begin - 100 : end - 100])
            assert torch.equal(lse, expected_lse[begin - 100 : end - 100])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00155, -0x00400000, -0x003FFE01])
def test_session_attn_shows_a_nan_to_who_sees_it(bits: int, each_isa: list[str]) -> None:
    heads = layer(2, 1, 32, torch.float32)
    seq = tokens(heads, 40)
    seq.k[20, 0, 7] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for isa in each_isa:
        _ext.set_isa(isa)
        (out,), (lse,) = attend(heads, [(seq, 0, 40)])
        assert bool(out[:20].isfinite().all())
        assert bool(out[20:].isnan().all())
        assert bool(lse[20:].isnan().all())


def test_session_attn_many_heads_of_one_group() -> None:
    heads = layer(50, 1, 16, torch.bfloat16)
    check_value(heads, tokens(heads, 150), 140, 150)


def test_session_attn_of_no_tokens() -> None:
    heads = layer(2, 1, 16, torch.float32)
    seq = tokens(heads, 5)
    outs, _ = attend(heads, [(seq, 5, 5), (seq, 3, 5), (seq, 0, 0)])
    assert [o.shape[0] for o in outs] == [0, 2, 0]
    assert torch.equal(outs[1], attend(heads, [(seq, 3, 5)])[0][0])


@BOTH
@pytest.mark.parametrize("rel", [1, 5, 16])
def test_pack_rel_bank_reverses_distances(dtype: torch.dtype, rel: int) -> None:
    bank = torch.randn(rel, 33).to(dtype)
    packed = pack_rel_bank(bank)
    rows = packed.data if dtype == torch.float32 else packed.data.transpose(1, 2).flatten(0, 1)
    assert (packed.rel_dim, packed.rel_len) == (rel, 33)
    assert torch.equal(rows[:rel, 128:161].flip(1), bank)
    assert torch.equal(rows[rel:], torch.zeros_like(rows[rel:]))
    assert not rows[:, :128].any()
    assert not rows[:, 161:].any()


def test_pack_rel_bank_refusals() -> None:
    with pytest.raises(errors.InvalidArgument, match=r"pack_rel_bank: bank must be \[C, R\]"):
        pack_rel_bank(torch.zeros(3))
    with pytest.raises(errors.InvalidArgument, match=r"pack_rel_bank: bank must be \[C, R\]"):
        pack_rel_bank(torch.zeros(3, 0))
    with pytest.raises(errors.InvalidArgument, match="bank must be float32 or bfloat16, got"):
        pack_rel_bank(torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(errors.InvalidArgument, match="pack_rel_bank: bank requires grad"):
        pack_rel_bank(torch.zeros(3, 4, requires_grad=True))


def call(**changes: object) -> None:
    arguments: dict[str, object] = {
        "q_TND": torch.zeros(2, 4, 32),
        "r_TNC": torch.zeros(2, 4, 8),
        "bank": pack_rel_bank(torch.zeros(8, 16)),
        "pages": torch.zeros(3, 1, 2, 2, PAGE_LEN * 32),
        "layer": 0,
        "table": torch.tensor([[0, 1], [2, -1]], dtype=torch.int32),
        "cu_tokens": torch.tensor([0, 2], dtype=torch.int32),
        "slots": torch.tensor([1], dtype=torch.int32),
        "start_pos": torch.tensor([7]),
        "visible_end_T": torch.tensor([7, 8]),
    }
    arguments.update(changes)
    session_attn(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_TND": torch.zeros(2, 128)}, r"q must be \[T, N, D\], got \[2, 128\]"),
        ({"q_TND": torch.zeros(2, 4, 16)}, r"q must be of shape \[\*, \*, 32\], got \[2, 4, 16\]"),
        ({"q_TND": torch.zeros(2, 3, 32), "r_TNC": torch.zeros(2, 3, 8)}, "q must be of heads"),
        ({"q_TND": torch.zeros(2, 4, 32).int()}, "q must be float32 or bfloat16"),
        ({"q_TND": torch.zeros(2, 4, 32).bfloat16()}, "pages must be bfloat16, got float32"),
        ({"r_TNC": torch.zeros(2, 4, 7)}, r"r must be \[T, N, 8\], got \[2, 4, 7\]"),
        ({"r_TNC": torch.zeros(1, 4, 8)}, r"r must be of shape \[2, 4, \*\], got \[1, 4, 8\]"),
        ({"bank": pack_rel_bank(torch.zeros(8, 16).bfloat16())}, "rel_bank must be float32"),
        (
            {"pages": torch.zeros(3, 1, 2, 2, PAGE_LEN * 40), "q_TND": torch.zeros(2, 4, 40)},
            "pages must be of a head_dim",
        ),
        ({"layer": 1}, r"layer must be in \[0, 1\)"),
        ({"slots": torch.tensor([2], dtype=torch.int32)}, r"slots\[0\] must be in \[0, 2\), got 2"),
        ({"start_pos": torch.tensor([127])}, r"visible_end\[0\] must be in \[127, 129\)"),
        ({"start_pos": None}, "visible_end needs start_pos"),
        ({"visible_end_T": None}, "start_pos and visible_end must be tensors"),
        (
            {"table": torch.tensor([[0, 1], [3, -1]], dtype=torch.int32)},
            r"table\[1, 0\] must be a page id in \[-1, 3\), got 3",
        ),
        ({"window": -1}, "window must be >= 0"),
        ({"lse_TN": torch.zeros(2, 3)}, r"lse must be of shape \[2, 4\], got \[2, 3\]"),
    ],
)
def test_session_attn_refusals(changes: dict[str, object], message: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=f"session_attn: {message}"):
        call(**changes)


def test_session_attn_refuses_grad() -> None:
    call()
    with pytest.raises(errors.InvalidArgument, match="session_attn: q requires grad"):
        call(q_TND=torch.zeros(2, 4, 32, requires_grad=True))
