"""Page ids, page tables, the token log and the memory they describe."""

import numpy as np
import pytest
import torch

from sequence_fakes import HEAD_DIM, new_store, tiny_text_config
from tml_core import errors
from tml_core.contract import PAGE_LEN
from tml_core.model.kv_store import KvStore, kv_sizes
from tml_core.model.page_memory import PageMemory, as_bytes, clean_page
from tml_core.model.step_batch import StepBatch
from tml_core.sequence import PagePool
from tml_core.sequence.page_table import PageTable, pages_for
from tml_core.sequence.token_log import RECORD, TokenLog, records


def ids(*pages: int) -> np.ndarray:
    return np.array(pages, np.int32)


def test_pool_hands_out_the_last_freed_page_first() -> None:
    pool = PagePool(4)
    assert pool.alloc(3).tolist() == [0, 1, 2]
    assert pool.free_pages == 1
    pool.release(ids(1))
    assert pool.alloc(2).tolist() == [1, 3]
    assert pool.free_pages == 0
    assert len(pool.alloc(0)) == 0


def test_pool_frees_a_page_with_its_last_reference() -> None:
    pool = PagePool(4)
    held = pool.alloc(2)
    pool.addref(held)
    pool.release(held)
    assert (pool.free_pages, pool.refs(0), pool.refs(1)) == (2, 1, 1)
    pool.release(held)
    assert pool.free_pages == 4


def test_pool_refusals_change_nothing() -> None:
    pool = PagePool(4, "global pages")
    pool.alloc(3)
    with pytest.raises(errors.PoolExhausted, match=r"global pages: .* needs 2 more, 1 of 4 are"):
        pool.alloc(2)
    with pytest.raises(errors.TmlError, match="global pages: page 3 is used by someone who"):
        pool.release(ids(0, 3))
    with pytest.raises(errors.TmlError, match="page 3"):
        pool.addref(ids(3))
    assert (pool.free_pages, pool.refs(0)) == (1, 1)
    with pytest.raises(errors.InvalidArgument, match="num_pages must be at least 1, got 0"):
        PagePool(0)


def test_pool_audit_names_the_first_difference() -> None:
    pool = PagePool(4, "sliding pages")
    pool.alloc(2)
    pool.audit(np.array([1, 1, 0, 0]))
    with pytest.raises(errors.TmlError, match="sliding pages: page 1 is held 2 times, its count"):
        pool.audit(np.array([1, 2, 0, 0]))
    pool._free[0] = 2  # now 2 is listed twice and 3 not at all
    with pytest.raises(errors.TmlError, match="page 2 stands 2 times in the free list"):
        pool.audit(np.array([1, 1, 0, 0]))


@pytest.mark.parametrize(
    ("positions", "pages"), [(0, 0), (1, 1), (127, 1), (128, 1), (129, 2), (256, 2)]
)
def test_pages_for(positions: int, pages: int) -> None:
    assert pages_for(positions) == pages


def new_table(pool: PagePool, keep: int = 0) -> PageTable:
    memory = PageMemory(torch.zeros(pool.num_pages, 8, dtype=torch.uint8))
    return PageTable(pool, np.full(16, -1, np.int32), memory, keep)


def grown(table: PageTable, tip: int, new_tip: int) -> None:
    table.grow(tip, new_tip)
    table.accept_growth()


def test_table_growth_can_be_undone() -> None:
    pool = PagePool(8)
    table = new_table(pool)
    grown(table, 0, 100)
    assert table.missing(100, 300) == 2
    table.grow(100, 300)
    assert table.ids().tolist() == [0, 1, 2]
    table.undo_growth()
    assert table.ids().tolist() == [0]
    assert (pool.free_pages, table.end) == (7, 1)
    table.undo_growth()
    assert table.references().tolist() == [0]


def test_table_copies_a_shared_tail_before_writing() -> None:
    pool = PagePool(8)
    table, other = new_table(pool), new_table(pool)
    other._memory = table._memory
    grown(table, 0, 256)
    table._memory.pages[0] = 7
    table.share_with(other, 0, 256)
    assert pool.refs(0) == 2 and other.ids().tolist() == [0, 1]
    table.cut(0, 1)  # back into page 0, which the other still reads
    assert table.missing(100, 200) == 2
    table.grow(100, 200)
    copy = int(table.row[0])
    assert copy not in (0, 1)
    assert (table._memory.pages[copy] == 7).all()
    assert sorted(table.references().tolist()) == sorted([0, copy, int(table.row[1])])
    table.undo_growth()
    assert int(table.row[0]) == 0 and pool.refs(0) == 2
    grown(table, 100, 200)
    assert pool.refs(0) == 1 and table.missing(200, 201) == 0


def test_table_shares_full_pages_and_copies_the_partial_one() -> None:
    pool = PagePool(8)
    table, other = new_table(pool), new_table(pool)
    grown(table, 0, 300)
    table.share_with(other, 0, 300)
    assert [pool.refs(page) for page in range(4)] == [2, 2, 1, 1]
    assert other.ids().tolist() == [0, 1, 3]
    other.close()
    table.close()
    assert pool.free_pages == 8
    assert (table.row == -1).all() and (other.row == -1).all()


def test_table_keeps_what_a_pin_needs_and_no_more() -> None:
    pool = PagePool(16)
    table = new_table(pool)
    grown(table, 0, 3 * PAGE_LEN)
    table.drop_before(1)
    first = table.pin(1)
    grown(table, 3 * PAGE_LEN, 6 * PAGE_LEN)
    table.drop_before(4)
    assert sorted(table.pinned) == [1, 2]  # page 0 was gone before, page 3 came after
    second = table.pin(2)
    grown(table, 6 * PAGE_LEN, 9 * PAGE_LEN)
    table.drop_before(7)
    assert sorted(table.pinned) == [1, 2, 4, 5]
    assert pool.free_pages == 16 - 4 - 2
    table.references()
    table.unpin(2)
    assert sorted(table.pinned) == [1, 2] and not table.has_pin(second.serial)
    table.unpin(2)
    table.rewind(first)
    assert table.pinned == {} and table.num_pages == 2
    assert pool.free_pages == 14 and table.has_pin(1)


def test_table_unpinning_in_the_middle_asks_only_the_neighbours() -> None:
    pool = PagePool(32)
    table = new_table(pool)
    for serial, tip in enumerate(range(0, 12, 1)):
        grown(table, tip * PAGE_LEN, (tip + 1) * PAGE_LEN)
        table.drop_before(tip - 2)
        table.pin(serial)
    for serial in (5, 4, 0, 11, 7, 6, 1, 2, 3, 10, 8, 9):
        table.unpin(serial)
        table.references()  # checks that exactly the needed pages are pinned
    assert table.pinned == {}


def test_table_with_a_kept_prefix_drops_behind_it() -> None:
    pool = PagePool(16)
    table = new_table(pool, keep=2)
    grown(table, 0, PAGE_LEN)
    table.drop_before(5)
    assert (table.num_pages, table.floor) == (1, 2)
    grown(table, PAGE_LEN, 7 * PAGE_LEN)
    table.drop_before(1)
    assert table.num_pages == 7
    table.drop_before(5)
    assert table.row[:8].tolist() == [0, 1, -1, -1, -1, 5, 6, -1]
    assert table.ids().tolist() == [0, 1, 5, 6] and table.num_pages == 4


def test_table_references_find_a_row_that_contradicts_itself() -> None:
    table = new_table(PagePool(4))
    grown(table, 0, 256)
    table.row[5] = 1
    with pytest.raises(errors.TmlError, match=r"logical page 5 is 1 in a row that holds"):
        table.references()


# The token log.


def some_records(count: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).integers(0, 500, count)
    return records(drawn, np.zeros(count, np.int64), torch.zeros(count, 2))


@pytest.mark.parametrize("cut", [1, 127, 128, 129, 4096, 5000])
def test_log_hash_does_not_depend_on_how_it_was_cut(cut: int) -> None:
    new = some_records(9000)
    whole, cut_up = TokenLog(), TokenLog()
    whole.append(new)
    for start in range(0, len(new), cut) if cut > 1 else range(300):
        cut_up.append(new[start : start + cut])
    if cut == 1:
        cut_up.append(new[300:])
    assert cut_up.digest() == whole.digest()
    assert (cut_up.read(0, 9000) == new).all() and len(cut_up) == 9000
    assert (whole.read(4000, 8200) == new[4000:8200]).all()


def test_log_hash_sees_ids_places_blocks_and_embeddings() -> None:
    def digest(token_ids: list[int], reach: list[int], x: float = 0.0) -> str:
        log = TokenLog()
        x_TD = torch.full((len(token_ids), 2), x, dtype=torch.bfloat16)
        log.append(records(np.array(token_ids), np.array(reach), x_TD))
        return log.digest()

    base = digest([1, 2, -1], [0, 0, 0])
    assert base == digest([1, 2, -1], [0, 0, 0])
    others = [
        digest([1, 3, -1], [0, 0, 0]),
        digest([2, 1, -1], [0, 0, 0]),
        digest([1, 2, -2], [0, 0, 0]),
        digest([1, 2, -1], [1, 0, 0]),
        digest([1, 2, -1], [0, 0, 0], x=1.0),
        digest([1, 2], [0, 0]),
    ]
    assert len({base, *others}) == 7


def test_log_text_hash_ignores_the_embedding() -> None:
    token_ids, reach = np.array([1, 2]), np.zeros(2, np.int64)
    poison = torch.full((2, 2), float("nan"))
    assert (records(token_ids, reach, poison) == records(token_ids, reach, poison * 0 + 1)).all()


def test_log_twins_do_not_see_each_other() -> None:
    log = TokenLog()
    log.append(some_records(9000))
    early = log.twin(3000, log_chain_at(log, 3000))
    twin = log.twin(len(log), log.chain())
    before = log.read(0, 9000)
    chain = log_chain_at(log, 100)
    log.truncate(100, chain)
    log.append(some_records(9500, seed=1))
    assert (twin.read(0, 9000) == before).all()
    assert (early.read(0, 3000) == before[:3000]).all()
    twin.truncate(100, chain)
    twin.append(some_records(9500, seed=1))
    assert twin.digest() == log.digest()
    early.append(before[3000:])
    again = TokenLog()
    again.append(before)
    assert early.digest() == again.digest()


def log_chain_at(log: TokenLog, length: int) -> bytes:
    fresh = TokenLog()
    fresh.append(log.read(0, length))
    return fresh.chain()


def test_log_reserved_append_allocates_nothing() -> None:
    log = TokenLog()
    log.reserve(5000)
    blocks = [id(block) for block in log._blocks]
    log.append(some_records(5000))
    assert [id(block) for block in log._blocks] == blocks
    assert RECORD.itemsize == 16


# The memory.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_store_shapes_and_sizes(dtype: torch.dtype) -> None:
    config = tiny_text_config()
    kv = KvStore(config, dtype, 3, 1000, 5, 7)
    assert kv.global_pages.shape == (5, 1, 1, 2, PAGE_LEN * HEAD_DIM)
    assert kv.sliding_pages.shape == (7, 2, 1, 2, PAGE_LEN * HEAD_DIM)
    assert kv.global_table.shape == kv.sliding_table.shape == (3, 8)
    assert (kv.global_table == -1).all() and (kv.sliding_table == -1).all()
    assert kv.conv_rows.shape == (3, 3, 3, 2 * HEAD_DIM + 2 * 4)
    sizes = kv_sizes(config, dtype)
    assert sizes.global_page_bytes == kv.global_pages[0].nbytes
    assert sizes.sliding_page_bytes == kv.sliding_pages[0].nbytes
    assert sizes.conv_bytes == kv.conv_rows[0].nbytes
    assert sizes.bytes_per_position == sizes.global_page_bytes / 128
    assert sizes.window_pages == 3  # 200 keys touch at most 3 pages
    assert sizes.sequence_bytes(1000) == (
        8 * sizes.global_page_bytes + 3 * sizes.sliding_page_bytes + sizes.conv_bytes
    )
    assert kv.capacity_bytes == kv.global_pages.nbytes + kv.sliding_pages.nbytes + (
        3 * sizes.conv_bytes
    )


def test_kv_store_refusals() -> None:
    with pytest.raises(errors.InvalidArgument, match="num_global_pages must be at least 1, got 0"):
        KvStore(tiny_text_config(), torch.float32, 1, 128, 0, 1)
    with pytest.raises(errors.InvalidArgument, match="dtype: expected float32 or bfloat16"):
        KvStore(tiny_text_config(), torch.float16, 1, 128, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_positions", [1, 2, 77, 127, 128])
def test_clean_page_zeroes_exactly_the_stale_keys(dtype: torch.dtype, num_positions: int) -> None:
    pages = new_store(dtype=dtype).kv.sliding_pages
    pages.fill_(1.0)
    view = torch.from_numpy(clean_page(pages, 3, num_positions)).view(dtype).view(pages[3].shape)
    group = 2 if dtype == torch.bfloat16 else 1
    k = view[:, :, 0].view(2, HEAD_DIM // group, PAGE_LEN, group)
    v = view[:, :, 1].view(2, PAGE_LEN // group, HEAD_DIM, group).transpose(2, 3)
    v = v.reshape(2, PAGE_LEN, HEAD_DIM)
    assert (k[:, :, :num_positions] == 1).all() and (k[:, :, num_positions:] == 0).all()
    assert (v[:, :num_positions] == 1).all() and (v[:, num_positions:] == 0).all()
    assert (pages == 1).all()


def test_as_bytes_is_a_view() -> None:
    tensor = torch.zeros(3, 2, dtype=torch.int32)
    as_bytes(tensor)[1] = 255
    assert tensor.tolist() == [[0, 0], [-1, -1], [0, 0]]
    assert as_bytes(torch.zeros(2, 0)).shape == (2, 0)


# The step batch.


def test_step_batch_is_filled_in_place() -> None:
    batch = StepBatch(3, 16)
    batch.add(2, 100, 3)
    visible = batch.add(0, 5, 4, [(1, 3)])
    assert visible.tolist() == [5, 7, 7, 8]
    assert batch.cu_tokens.tolist() == [0, 3, 7] and batch.cu_tokens.dtype == torch.int32
    assert batch.slots.tolist() == [2, 0] and batch.slots.dtype == torch.int32
    assert batch.start_pos.tolist() == [100, 5] and batch.start_pos.dtype == torch.int64
    assert batch.visible_end.tolist() == [100, 101, 102, 5, 7, 7, 8]
    address = batch.visible_end.data_ptr()
    batch.clear()
    assert (batch.num_seqs, batch.num_tokens, batch.cu_tokens.tolist()) == (0, 0, [0])
    batch.add(1, 0, 16)
    assert batch.visible_end.data_ptr() == address and batch.visible_end is batch.visible_end


def test_step_batch_grows_for_a_long_block() -> None:
    batch = StepBatch(2, 4)
    batch.add(0, 0, 3)
    batch.add(1, 10, 300, [(0, 300)])
    assert batch.visible_end[:4].tolist() == [0, 1, 2, 309]
    assert batch.visible_end.shape == (303,)


def test_step_batch_refusals_change_nothing() -> None:
    batch = StepBatch(1, 4)
    with pytest.raises(errors.InvalidArgument, match=r"inside \[0, 2\), got \[1, 3\)"):
        batch.add(0, 0, 2, [(1, 3)])
    with pytest.raises(errors.InvalidArgument, match="num_tokens must be at least 1, got 0"):
        batch.add(0, 0, 0)
    assert (batch.num_seqs, batch.num_tokens) == (0, 0)
    batch.add(0, 0, 2)
    with pytest.raises(errors.InvalidArgument, match="the batch holds 1 sequences"):
        batch.add(0, 0, 2)
    with pytest.raises(errors.InvalidArgument, match="max_seqs and max_tokens must be at least 1"):
        StepBatch(0, 1)
