"""One sequence: transactions, marks, rewind, fork, retention, closing."""

import gc
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from sequence_fakes import WINDOW, Rig, StepFailed, new_store, step_input
from tml_core import errors
from tml_core.contract import PAGE_LEN
from tml_core.media.dmel import DmelState
from tml_core.media.segments import Tokens
from tml_core.sequence import Carry, Evicted, Mark, Retention, Sequence
from tml_core.sequence.token_log import records


def state(sequence: Sequence) -> tuple[object, ...]:
    """Everything that must not change when something fails."""
    slot, store = sequence.slot, sequence.store
    return (
        sequence.tip,
        sequence.state_hash,
        sequence.carry,
        sequence.boundaries,
        slot.global_.row.tolist(),
        slot.sliding.row.tolist(),
        dict(slot.sliding.pinned),
        slot.conv.nan_to_num(nan=-1).tolist(),
        store.global_pool.free_pages,
        store.sliding_pool.free_pages,
    )


# Appending.


@pytest.mark.parametrize("count", [1, 19, 127, 128, 129, 257, 700])
def test_append_sees_the_whole_prefix(count: int) -> None:
    rig = Rig()
    sequence, oracle = rig.open()
    for _ in range(3):
        rig.append(sequence, oracle, count)
        rig.store.audit()
    assert sequence.token_ids().tolist() == oracle.tokens
    assert sequence.token_ids(1, 3).tolist() == oracle.tokens[1:3]


def test_append_one_by_one_equals_all_at_once() -> None:
    rig = Rig()
    one_by_one, at_once = Sequence(rig.store), Sequence(rig.store)
    tokens = rig.tokens(400)
    rows = [rig.runner.run([step_input(one_by_one, [token])])[0] for token in tokens]
    assert torch.equal(torch.cat(rows), rig.runner.run([step_input(at_once, tokens)])[0])
    assert one_by_one.state_hash == at_once.state_hash


def test_sliding_pages_stay_within_the_window() -> None:
    rig = Rig(num_sliding_pages=7)
    sequence, oracle = rig.open()
    for _ in range(60):
        rig.append(sequence, oracle, 50)
        assert sequence.slot.sliding.num_pages <= rig.store.kv.sizes.window_pages
    assert sequence.slot.global_.num_pages == 24
    last_seen = (sequence.tip - WINDOW + 1) // PAGE_LEN
    assert (sequence.slot.sliding.row[:last_seen] == -1).all()
    assert (sequence.slot.sliding.row[last_seen:24] >= 0).all()


def test_blocks_see_ahead_and_are_never_cut() -> None:
    rig = Rig(max_step_tokens=100)
    sequence, oracle = rig.open()
    rig.append(sequence, oracle, 150, ((90, 120), (120, 121), (140, 150)))
    rig.append(sequence, oracle, 400, ((10, 380),))  # longer than a step, and than the window
    rig.append(sequence, oracle, 30)
    assert [shape[1] for shape in rig.fake.batch_shapes] == [90, 60, 10, 370, 20, 30]


def test_chunks_of_a_long_input_do_not_show() -> None:
    tokens, hashes = Rig().tokens(1000), set()
    expected = None
    for max_step_tokens in (1000, 512, 128, 77):
        rig = Rig(max_step_tokens=max_step_tokens)
        sequence, _ = rig.open()
        (h,) = rig.runner.run([step_input(sequence, list(tokens), ((500, 540),))])
        expected = h if expected is None else expected
        assert torch.equal(h, expected)
        hashes.add(sequence.state_hash)
    assert len(hashes) == 1


def test_batch_mates_do_not_show() -> None:
    rig = Rig(max_step_tokens=64)
    together = [rig.open() for _ in range(3)]
    for counts in ((5, 100, 1), (40, 1, 1), (1, 1, 90), (200, 3, 128)):
        tokens = [rig.tokens(count) for count in counts]
        inputs = [step_input(s, list(t)) for (s, _), t in zip(together, tokens, strict=True)]
        results = rig.runner.run(inputs)
        for h, (_, oracle), new in zip(results, together, tokens, strict=True):
            assert torch.equal(h, oracle.append(new))
        rig.store.audit()
    assert max(shape[1] for shape in rig.fake.batch_shapes) == 64


def test_empty_inputs_only_move_the_carry() -> None:
    rig = Rig()
    sequence, oracle = rig.open()
    (h,) = rig.runner.run([step_input(sequence, [], carry=Carry(clock_ms=200))])
    assert (len(h), sequence.tip, sequence.carry.clock_ms) == (0, 0, 200)
    assert rig.fake.batch_shapes == []
    rig.append(sequence, oracle, 5)


def test_steady_appends_allocate_no_numpy_or_tensor_memory() -> None:
    rig = Rig()
    sequence, oracle = rig.open()
    rig.append(sequence, oracle, 10)

    def append(count: int) -> None:
        for _ in range(count):
            sequence.reserve(1)
            sequence.commit(one)

    one = records(np.array([1]), np.array([0]), torch.zeros(1, 4))
    append(200)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    append(1000)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - before < 4096


# Failing.


@pytest.mark.parametrize("fail_in", [1, 2, 3, 4])
@pytest.mark.parametrize("tip", [0, 100, 128, 300])
def test_failed_step_leaves_no_trace(tip: int, fail_in: int) -> None:
    rig = Rig(max_step_tokens=100)
    sequence, oracle = rig.open()
    other, other_oracle = rig.open()
    rig.append(other, other_oracle, 30)
    if tip:
        rig.append(sequence, oracle, tip)
    sequence.carry = Carry(clock_ms=7)
    before, other_before = state(sequence), state(other)
    rig.fake.fail_in = fail_in
    inputs = [
        step_input(sequence, rig.tokens(250), carry=Carry(clock_ms=8)),
        step_input(other, rig.tokens(80), carry=Carry(clock_ms=9)),
    ]
    with pytest.raises(StepFailed):
        rig.runner.run(inputs)
    rig.fake.fail_in = None
    assert (state(sequence), state(other)) == (before, other_before)
    rig.store.audit()
    rig.append(sequence, oracle, 40)
    rig.append(other, other_oracle, 40)


@pytest.mark.parametrize("count", [30, 250])
def test_stage_whose_body_raises_leaves_no_trace(count: int) -> None:
    rig = Rig(max_step_tokens=100)
    sequence, oracle = rig.open()
    rig.append(sequence, oracle, 90)
    before = state(sequence)
    with (
        pytest.raises(KeyboardInterrupt),
        rig.runner.stage([step_input(sequence, rig.tokens(count))]) as (h,),
    ):
        assert len(h) == count and sequence.slot.is_growing
        raise KeyboardInterrupt
    assert state(sequence) == before
    rig.store.audit()
    rig.append(sequence, oracle, 90)


def test_exhausted_pages_leave_everyone_unchanged() -> None:
    rig = Rig(num_global_pages=6, num_sliding_pages=20)
    first, first_oracle = rig.open()
    second, second_oracle = rig.open()
    rig.append(first, first_oracle, 300)
    rig.append(second, second_oracle, 200)
    before = state(first), state(second)
    inputs = [step_input(first, rig.tokens(100)), step_input(second, rig.tokens(100))]
    with pytest.raises(
        errors.PoolExhausted,
        match="global pages: appending 100 positions at 200 needs 1 more, 0 of 6 are free",
    ):
        rig.runner.run(inputs)
    assert (state(first), state(second)) == before
    rig.store.audit()
    first.close()
    rig.append(second, second_oracle, 100)


def test_exhausted_sliding_pages_change_nothing() -> None:
    rig = Rig(num_sliding_pages=4, max_step_tokens=1000)
    sequence, oracle = rig.open()
    rig.append(sequence, oracle, 100)
    before = state(sequence)
    with pytest.raises(errors.PoolExhausted, match=r"sliding pages: .* needs 4 more, 3 of 4"):
        rig.append(sequence, oracle, 500)
    assert state(sequence) == before


def test_position_limit() -> None:
    rig = Rig(max_positions=200)
    sequence, oracle = rig.open()
    rig.append(sequence, oracle, 199)
    with pytest.raises(errors.PoolExhausted, match=r"2 positions after 199 pass .* limit of 200"):
        sequence.reserve(2)
    rig.append(sequence, oracle, 1)


def test_no_slot_left() -> None:
    rig = Rig(num_slots=2)
    sequences = [rig.open()[0], rig.open()[0]]
    with pytest.raises(errors.PoolExhausted, match="sequences: all 2 slots are in use"):
        rig.open()
    with pytest.raises(errors.PoolExhausted, match="all 2 slots"):
        sequences[0].fork()
    rig.store.audit()
    sequences[0].close()
    rig.open()


def test_misused_transactions_are_refused() -> None:
    rig = Rig()
    sequence, _ = rig.open()
    none = records(np.array([], np.int64), np.array([], np.int64), torch.zeros(0, 4))
    three = records(np.zeros(3, np.int64), np.zeros(3, np.int64), torch.zeros(3, 4))
    with pytest.raises(errors.InvalidArgument, match="reserve: count must be at least 1, got 0"):
        sequence.reserve(0)
    with pytest.raises(errors.InvalidArgument, match=r"commit: expected 0 reserved .* got 3"):
        sequence.commit(three)
    with pytest.raises(errors.InvalidArgument, match="commit: expected 0 reserved"):
        sequence.commit(none)
    sequence.reserve(2)
    rig.store.audit()
    with pytest.raises(errors.InvalidArgument, match=r"commit: expected 2 reserved .* got 3"):
        sequence.commit(three)
    mark_error = "mark: a step of this sequence is in flight"
    with pytest.raises(errors.SessionBusy, match=mark_error):
        sequence.mark()
    with pytest.raises(errors.SessionBusy, match="fork: a step"):
        sequence.fork()
    with pytest.raises(errors.SessionBusy, match=r"inputs\[0\]: a step"):
        rig.runner.run([step_input(sequence, [1])])
    assert sequence.slot.is_growing
    sequence.abort()
    sequence.abort()
    assert sequence.tip == 0 and rig.store.global_pool.free_pages == 64


def test_runner_refusals() -> None:
    rig = Rig()
    sequence, _ = rig.open()
    stranger = Sequence(new_store())
    good = step_input(sequence, [1, 2, 3])
    with pytest.raises(errors.InvalidArgument, match=r"inputs\[1\]: the sequence is in the batch"):
        rig.runner.run([good, good])
    with pytest.raises(errors.InvalidArgument, match=r"inputs\[0\]: .* belongs to another store"):
        rig.runner.run([step_input(stranger, [1])])
    with pytest.raises(errors.InvalidArgument, match=r"inputs\[0\]: x must be \[3, D\]"):
        rig.runner.run([good._replace(x_TD=torch.zeros(2, 4))])
    for blocks in (((0, 4),), ((1, 1),), ((1, 3), (0, 1)), ((-1, 2),)):
        with pytest.raises(errors.InvalidArgument, match=r"blocks must be ascending in \[0, 3\)"):
            rig.runner.run([good._replace(blocks=blocks)])
    with pytest.raises(errors.InvalidArgument, match="max_step_tokens must be at least 1, got 0"):
        Rig(max_step_tokens=0)
    assert sequence.tip == 0 and rig.runner.run([]) == []


# Marks.


@pytest.mark.parametrize("tip", [0, 1, 100, 128, 250, 700])
@pytest.mark.parametrize("more", [0, 1, 27, 128, 600])
def test_rewind_goes_back_exactly(tip: int, more: int) -> None:
    rig = Rig()
    sequence, oracle = rig.open()
    if tip:
        rig.append(sequence, oracle, tip)
    sequence.carry = Carry(num_sampled=3, clock_ms=200)
    mark, before, then = sequence.mark(), state(sequence), oracle.copy()
    for _ in range(3):
        if more:
            rig.append(sequence, oracle, more)
        sequence.carry = Carry(num_sampled=9)
        rig.store.audit()
        sequence.rewind(mark)
        oracle = then.copy()
        assert state(sequence)[:6] == before[:6] and state(sequence)[7] == before[7]
        rig.store.audit()
    rig.append(sequence, oracle, 300)
    mark.release()
    rig.store.audit()


def test_rewind_past_marks_in_any_order() -> None:
    rig = Rig(num_sliding_pages=40)
    sequence, oracle = rig.open()
    marks: list[tuple[Mark, object]] = []
    for count in (50, 100, 200, 300, 10, 400):
        rig.append(sequence, oracle, count)
        marks.append((sequence.mark(), oracle.copy()))
    assert rig.store.audit().num_marks == 6
    rig.append(sequence, oracle, 500)
    for index in (4, 4, 2, 0):
        mark, then = marks[index]
        sequence.rewind(mark)
        oracle = then.copy()  # type: ignore[attr-defined]
        assert [one.is_live for one, _ in marks] == [i <= index for i in range(6)]
        rig.store.audit()
        rig.append(sequence, oracle, 333)
    with pytest.raises(errors.InvalidArgument, match="mark at position 1060 is no longer on the"):
        sequence.rewind(marks[5][0])


def test_marks_keep_sliding_pages_only_while_they_live() -> None:
    rig = Rig()
    sequence, oracle = rig.open()
    rig.append(sequence, oracle, 1000)
    in_window = sequence.slot.sliding.num_pages
    held = lambda: 64 - rig.store.sliding_pool.free_pages  # noqa: E731
    marks = [sequence.mark(), sequence.mark()]
    rig.append(sequence, oracle, 1000)
    pinned = held() - sequence.slot.sliding.num_pages
    assert pinned == in_window
    marks[0].release()
    marks[0].release()
    assert held() - sequence.slot.sliding.num_pages == pinned
    marks.clear()
    gc.collect()
    rig.append(sequence, oracle, 1)
    assert held() == sequence.slot.sliding.num_pages
    assert rig.store.audit().num_marks == 0


def test_mark_refusals() -> None:
    rig = Rig()
    sequence, oracle = rig.open()
    other, _ = rig.open()
    rig.append(sequence, oracle, 10)
    mark = sequence.mark()
    for go in (other.rewind, other.fork):
        with pytest.raises(errors.InvalidArgument, match="the mark was taken on another sequence"):
            go(mark)
    mark.release()
    assert not mark.is_live
    with pytest.raises(errors.InvalidArgument, match="rewind: the mark at position 10 was"):
        sequence.rewind(mark)
    late = sequence.mark()
    sequence.close()
    assert not late.is_live
    late.release()
    with pytest.raises(errors.SessionClosed):
        sequence.rewind(late)


# Forks.


@pytest.mark.parametrize("tip", [0, 1, 127, 128, 129, 500])
def test_fork_and_original_go_their_own_ways(tip: int) -> None:
    rig = Rig()
    sequence, oracle = rig.open()
    if tip:
        rig.append(sequence, oracle, tip)
    sequence.carry = Carry(num_sampled=4)
    child, child_oracle = sequence.fork(), oracle.copy()
    assert (child.tip, child.carry, child.seed) == (tip, sequence.carry, sequence.seed)
    assert child.state_hash == sequence.state_hash
    for count in (1, 130, 300):
        rig.append(sequence, oracle, count)
        rig.append(child, child_oracle, count)
        report = rig.store.audit()
    assert report.global_pages_shared == tip // PAGE_LEN
    sequence.close()
    rig.append(child, child_oracle, 200)
    child.close()
    report = rig.store.audit()
    assert (report.global_pages_held, report.sliding_pages_held, report.num_sequences) == (0, 0, 0)


def test_fork_keeps_the_seed_unless_told() -> None:
    rig = Rig()
    sequence = Sequence(rig.store, seed=5)
    assert (sequence.fork().seed, sequence.fork(seed=6).seed) == (5, 6)
    with pytest.raises(errors.InvalidArgument, match="seed: expected an unsigned 64-bit"):
        sequence.fork(seed=-1)
    assert rig.store.audit().num_sequences == 1  # the refused one and the collected ones are gone


@pytest.mark.parametrize("mark_tip", [1, 100, 128, 400, 640])
@pytest.mark.parametrize("more", [1, 28, 400])
def test_rewind_into_a_page_shared_with_a_fork_copies_it(mark_tip: int, more: int) -> None:
    """The page the mark stands in is full, and a fork's too, when the original comes back."""
    rig = Rig()
    sequence, oracle = rig.open()
    rig.append(sequence, oracle, mark_tip)
    mark, then = sequence.mark(), oracle.copy()
    rig.append(sequence, oracle, 300)
    child, child_oracle = sequence.fork(), oracle.copy()
    grandchild, grandchild_oracle = child.fork(), oracle.copy()
    sequence.rewind(mark)
    rig.append(sequence, then, more)
    rig.store.audit()
    rig.append(child, child_oracle, 10)
    rig.append(grandchild, grandchild_oracle, 500)
    rig.append(sequence, then, 10)
    rig.store.audit()


def test_failed_step_after_copy_on_write_restores_the_shared_page() -> None:
    rig = Rig()
    sequence, oracle = rig.open()
    rig.append(sequence, oracle, 100)
    mark, then = sequence.mark(), oracle.copy()
    rig.append(sequence, oracle, 100)
    child, child_oracle = sequence.fork(), oracle.copy()
    sequence.rewind(mark)
    before = state(sequence)
    rig.fake.fail_in = 1
    with pytest.raises(StepFailed):
        rig.append(sequence, then.copy(), 5)
    rig.fake.fail_in = None
    assert state(sequence) == before
    rig.store.audit()
    rig.append(child, child_oracle, 5)
    rig.append(sequence, then, 5)


@pytest.mark.parametrize("mark_tip", [1, 128, 200, 640])
def test_fork_at_a_mark(mark_tip: int) -> None:
    rig = Rig()
    sequence, oracle = rig.open()
    rig.append(sequence, oracle, mark_tip)
    sequence.carry = Carry(clock_ms=1)
    mark, then = sequence.mark(), oracle.copy()
    sequence.carry = Carry(clock_ms=2)
    rig.append(sequence, oracle, 900)
    child = sequence.fork(at=mark)
    assert (child.tip, child.carry.clock_ms, sequence.carry.clock_ms) == (mark_tip, 1, 2)
    rig.store.audit()
    rig.append(sequence, oracle, 50)
    rig.append(child, then, 300)
    rig.store.audit()
    sequence.close()
    rig.append(child, then, 300)


def test_fork_without_the_page_for_its_tail_changes_nothing() -> None:
    rig = Rig(num_global_pages=2)
    sequence, oracle = rig.open()
    rig.append(sequence, oracle, 250)
    before = state(sequence)
    with pytest.raises(errors.PoolExhausted, match="a fork at position 250 needs 1 more, 0 of 2"):
        sequence.fork()
    assert state(sequence) == before and rig.store.audit().num_sequences == 1
    rig.append(sequence, oracle, 6)
    sequence.fork().close()  # at a page boundary there is nothing to copy


# Retention.


def live(rig: Rig, retention: Retention, turn: int, turns: int) -> tuple[Sequence, list[int]]:
    sequence, oracle = rig.open(retention)
    held = []
    for _ in range(turns):
        rig.boundary(sequence, oracle)
        rig.append(sequence, oracle, turn)
        held.append(64 - rig.store.global_pool.free_pages)
        rig.store.audit()
    return sequence, held


@pytest.mark.parametrize(("window", "prefix", "turn"), [(300, 0, 9), (1, 130, 50), (600, 256, 33)])
def test_retention_keeps_memory_flat_and_positions(window: int, prefix: int, turn: int) -> None:
    rig = Rig()
    sequence, held = live(rig, Retention(window, prefix), turn, 3000 // turn)
    assert sequence.tip == 3000 // turn * turn
    most = -(-prefix // PAGE_LEN) + -(-(window + 2 * turn) // PAGE_LEN) + 1
    assert max(held) <= most < 24
    assert len(sequence.boundaries) <= (window + 2 * turn + PAGE_LEN) // turn + 1


def test_retention_does_not_depend_on_how_turns_are_cut() -> None:
    tokens = Rig().tokens(30 * 60)
    rows = []
    for cut in (30, 7, 1):
        rig = Rig()
        sequence = Sequence(rig.store, retention=Retention(200, 100))
        h = []
        for turn in range(0, len(tokens), 30):
            sequence.note_boundary()
            sequence.note_boundary()  # a second note of the same start is one
            for start in range(turn, turn + 30, cut):
                new = tokens[start : min(start + cut, turn + 30)]
                h += rig.runner.run([step_input(sequence, new)])
        rows.append(torch.cat(h))
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_rewind_and_fork_into_evicted_positions_are_refused() -> None:
    rig = Rig()
    sequence, oracle = rig.open(Retention(200, 50))
    rig.append(sequence, oracle, 20)
    early = sequence.mark()
    for _ in range(10):
        sequence.note_boundary()
        rig.append(sequence, oracle, 20)
    late = sequence.mark()
    for _ in range(10):
        evicted = rig.boundary(sequence, oracle)
        if evicted is not None:
            break
        rig.append(sequence, oracle, 50)
    assert evicted == Evicted(128, 256)
    before = state(sequence)
    message = r"positions \[128, 256\) that the mark at 220 sees were evicted"
    with pytest.raises(errors.InvalidArgument, match="rewind: " + message):
        sequence.rewind(late)
    with pytest.raises(errors.InvalidArgument, match="fork: " + message):
        sequence.fork(at=late)
    assert state(sequence) == before
    child, child_oracle = sequence.fork(), oracle.copy()
    rig.append(child, child_oracle, 40)
    rig.append(sequence, oracle, 30)
    sequence.rewind(early)  # stands inside the pinned prefix
    assert sequence.tip == 20 and sequence.evicted is None
    rig.store.audit()


def test_detours_do_not_change_what_retention_evicts() -> None:
    rig = Rig()
    straight, straight_oracle = rig.open(Retention(150, 10))
    winding, winding_oracle = rig.open(Retention(150, 10))
    num_detours = 0
    for _ in range(60):
        rig.boundary(winding, winding_oracle)
        with winding.fork() as probe:
            rig.append(probe, winding_oracle.copy(), 7)
            is_safe = probe.note_boundary() is None
        if is_safe:
            mark, then = winding.mark(), winding_oracle.copy()
            rig.append(winding, winding_oracle, 7)
            rig.boundary(winding, winding_oracle)
            rig.append(winding, winding_oracle, 3)
            winding.rewind(mark)
            winding_oracle = then
            num_detours += 1
        rig.append(winding, winding_oracle, 20)
        rig.boundary(straight, straight_oracle)
        rig.append(straight, straight_oracle, 20)
        assert winding.boundaries == straight.boundaries
        assert winding.num_boundaries == straight.num_boundaries
        assert winding.evicted == straight.evicted
    assert num_detours > 20 and winding.evicted == Evicted(128, 896)


def test_retention_refusals() -> None:
    with pytest.raises(errors.InvalidArgument, match="window_positions: expected at least 1"):
        Retention(0)
    with pytest.raises(errors.InvalidArgument, match="pinned_prefix: expected at least 0, got -1"):
        Retention(1, -1)
    rig = Rig()
    sequence, oracle = rig.open()
    rig.append(sequence, oracle, 500)
    assert sequence.note_boundary() is None and sequence.evicted is None


# Closing.


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.tip,
        lambda s: s.mark(),
        lambda s: s.fork(),
        lambda s: s.reserve(1),
        lambda s: s.token_ids(),
        lambda s: s.state_hash,
        lambda s: s.note_boundary(),
        lambda s: s.snapshot("x"),
        lambda s: s.extend([Tokens([1])]),
    ],
)
def test_closed_sequence_refuses(use: Callable[[Sequence], object]) -> None:
    rig = Rig()
    with rig.open()[0] as sequence:
        sequence.reserve(3)
    sequence.close()
    assert sequence.is_closed and rig.store.audit().num_sequences == 0
    with pytest.raises(errors.SessionClosed, match="sequence: it is closed"):
        use(sequence)


def test_collected_sequence_gives_its_slot_back() -> None:
    rig = Rig(num_slots=1)
    for _ in range(5):
        sequence, oracle = rig.open()
        rig.append(sequence, oracle, 300)
        sequence.mark()
        del sequence
        gc.collect()
    assert rig.store.num_sequences == 0 and rig.store.audit().global_pages_held == 0


def test_slot_is_clean_for_the_next_sequence() -> None:
    rig = Rig(num_slots=1)
    for count in (300, 5, 140):
        sequence, oracle = rig.open()
        rig.append(sequence, oracle, count)
        sequence.close()


def test_thousands_of_marks_rewinds_and_forks_leak_nothing() -> None:
    rig = Rig()
    sequence, oracle = rig.open()
    rig.append(sequence, oracle, 300)
    mark = sequence.mark()
    base = (rig.store.global_pool.free_pages, rig.store.sliding_pool.free_pages)
    one = records(np.zeros(200, np.int64), np.zeros(200, np.int64), torch.zeros(200, 4))
    for turn in range(2500):
        sequence.mark()
        sequence.reserve(200)
        sequence.commit(one)
        sequence.fork(at=mark if turn % 2 else None).close()
        sequence.rewind(mark)
    assert (rig.store.global_pool.free_pages, rig.store.sliding_pool.free_pages) == base
    rig.store.audit()


def test_extend_without_a_model_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="extend: this sequence was opened without"):
        Sequence(new_store()).extend([Tokens([1])])


def test_token_ids_refuses_what_is_not_there() -> None:
    with pytest.raises(errors.InvalidArgument, match=r"0 <= start <= stop <= 0, got \[0, 1\)"):
        Sequence(new_store()).token_ids(0, 1)


def test_carry_is_replaced_not_shared() -> None:
    rig = Rig()
    sequence, _ = rig.open()
    audio = DmelState(np.zeros(800, np.float32), np.zeros(3, np.float32))
    sequence.carry = Carry(audio=audio, frame=np.zeros((2, 2, 3), np.uint8))
    child = sequence.fork()
    sequence.carry = Carry()
    assert child.carry.audio is audio and child.carry.frame is not None


# The audit.


def test_audit_finds_what_is_wrong() -> None:
    def broken() -> Rig:
        rig = Rig()
        for count in (300, 10):
            sequence, oracle = rig.open()
            rig.append(sequence, oracle, count)
            keep.append(sequence)
        return rig

    keep: list[Sequence] = []
    rig = broken()
    assert (rig.store.audit().global_pages_held, rig.store.audit().num_sequences) == (4, 2)
    keep[0].slot.global_.row[0] = keep[0].slot.global_.row[1]
    with pytest.raises(errors.TmlError, match="global pages: slot 0 holds a page twice"):
        rig.store.audit()
    keep.clear()
    rig = broken()
    keep[0].slot.global_.row[0] = 50
    with pytest.raises(errors.TmlError, match="global pages: page 0 is held 0 times, its count"):
        rig.store.audit()
    keep.clear()
    rig = broken()
    rig.store.kv.sliding_table[3, 7] = 1
    with pytest.raises(errors.TmlError, match="the table row of free slot 3 is not empty"):
        rig.store.audit()
    keep.clear()
    rig = broken()
    keep[1].slot.tip = 200
    with pytest.raises(errors.TmlError, match="slot 1 has 1 logical pages at position 200"):
        rig.store.audit()
    keep.clear()
    rig = broken()
    rig.store._free_slots.append(1)
    with pytest.raises(errors.TmlError, match=r"slots \[0, 1\] are in use and \[1, 2, 3\] free"):
        rig.store.audit()
