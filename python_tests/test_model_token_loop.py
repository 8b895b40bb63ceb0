"""Tokens drawn in one call: those of embed, step and sample one by one, to the last bit."""

from typing import Any, NamedTuple

import pytest
import torch

from session_kit import CALL, END_CALL, END_OUT, SILENCE, nano
from tml_core import _ext, errors
from tml_core.engine.sampler import SampleRequest, SamplingParams, sample_rows, signed
from tml_core.layout.select import layout_for
from tml_core.layout.state import TokenRun
from tml_core.model.kv_store import KvStore
from tml_core.model.step_batch import StepBatch
from tml_core.model.token_loop import TokenLoop, TokenTable

MAX_ROWS, MAX_RUN, PAST = 4, 8, 125  # a run crosses a page


class Row(NamedTuple):
    """One sequence, and how its tokens are drawn."""

    params: SamplingParams
    seed: int
    num_text: int
    room: int
    is_in_call: bool = False


ROWS = (
    Row(SamplingParams(), 1, 8, 8),
    Row(SamplingParams(0.7, 12, 0.9), 2**64 - 5, 3, 8),
    Row(SamplingParams(temperature=0), 7, 8, 5, is_in_call=True),
    Row(SamplingParams(1.3), 8, 1, 1),
)


def store() -> KvStore:
    """A past of other lengths in every slot, pages for what comes; all else is not a number."""
    config, backbone = nano().config.text, nano().backbone
    kv = KvStore(config, torch.bfloat16, MAX_ROWS, 1024, 12, 12)
    kv.global_pages.fill_(float("nan"))
    kv.sliding_pages.fill_(float("nan"))
    batch = StepBatch(MAX_ROWS, 1024)
    ids = torch.Generator().manual_seed(0)
    for slot in range(MAX_ROWS):
        kv.global_table[slot, :3] = torch.tensor([slot, slot + 4, slot + 8])
        kv.sliding_table[slot, :3] = torch.tensor([slot + 8, slot, slot + 4])
        batch.clear()
        batch.add(slot, 0, PAST - slot)
        past = torch.randint(0, 256, (PAST - slot,), generator=ids)
        backbone.step(backbone.embed_ids(past), batch, kv)
    return kv


def runs(rows: tuple[Row, ...]) -> list[TokenRun]:
    layout = layout_for(nano().config, nano().tokenizer)
    outputs = [layout.begin_output(layout.initial_state(), 0) for _ in rows]
    found = []
    for row, output in zip(rows, outputs, strict=True):
        if row.is_in_call:
            output.accept(CALL, 0.0)
        found.append(output.run_ahead()._replace(num_text=row.num_text))
    return found


def drawn(
    kv: KvStore, rows: tuple[Row, ...], slots: tuple[int, ...], limit_s: float = 100.0
) -> list[tuple[list[int], list[float]]]:
    loop = nano().backbone.token_loop(kv, MAX_ROWS, MAX_RUN)
    ahead = runs(rows)
    fill(loop, rows, ahead, slots)
    return loop.run(len(rows), ahead[0].table, limit_s).rows


def fill(
    loop: TokenLoop, rows: tuple[Row, ...], ahead: list[TokenRun], slots: tuple[int, ...]
) -> None:
    for i, (row, run, slot) in enumerate(zip(rows, ahead, slots, strict=True)):
        params = row.params
        loop.rows[i] = (
            *(PAST - slot, 65 + slot, signed(row.seed), slot, run.phase, run.num_text, row.room),
            *(params.temperature, params.top_p, params.top_k, 0),
        )


def by_hand(kv: KvStore, row: Row, slot: int) -> tuple[list[int], list[float]]:
    """One sequence alone, op by op, its output half asked before and after every draw."""
    backbone, layout = nano().backbone, layout_for(nano().config, nano().tokenizer)
    output = layout.begin_output(layout.initial_state(), 0)
    if row.is_in_call:
        output.accept(CALL, 0.0)
    token, position, num_text = 65 + slot, PAST - slot, row.num_text
    batch = StepBatch(1, 1)
    found: tuple[list[int], list[float]] = ([], [])
    for _ in range(row.room):
        batch.fill_single([slot], [position])
        h_1D = backbone.step(backbone.embed_ids(torch.tensor([token])), batch, kv)
        position += 1
        request = SampleRequest(row.params, row.seed, position, output.allowed())
        tokens, logprobs = backbone.sample(h_1D, sample_rows([request]))
        token = int(tokens[0])
        found[0].append(token)
        found[1].append(float(logprobs[0]))
        output.accept(token, 0.0)
        num_text -= token not in (CALL, END_CALL, END_OUT, SILENCE)
        if output.is_done or num_text == 0:
            break
    return found


def test_a_call_draws_what_steps_draw() -> None:
    """Together and alone, in any order of slots, for every instruction set and number of threads:
    tokens, log-probabilities, and what is written."""
    expected_kv = store()
    expected = [by_hand(expected_kv, row, slot) for slot, row in enumerate(ROWS)]
    assert len({len(ids) for ids, _ in expected}) > 1  # rows end in different steps
    isa, threads = _ext.isa(), torch.get_num_threads()
    try:
        for name in _ext.supported_isas():
            for num_threads in (1, 2):
                _ext.set_isa(name)
                torch.set_num_threads(num_threads)
                kv = store()
                order = (2, 0, 3, 1)
                got = drawn(kv, tuple(ROWS[slot] for slot in order), order)
                assert got == [expected[slot] for slot in order], (name, num_threads)
                for tensor in ("global_pages", "sliding_pages", "conv_rows"):
                    one, other = getattr(kv, tensor), getattr(expected_kv, tensor)
                    assert torch.equal(one.view(torch.int16), other.view(torch.int16)), tensor
    finally:
        _ext.set_isa(isa)
        torch.set_num_threads(threads)


def test_out_of_time_every_row_has_one_token() -> None:
    expected_kv, kv = store(), store()
    expected = [by_hand(expected_kv, row._replace(room=1), i) for i, row in enumerate(ROWS)]
    assert drawn(kv, ROWS, (0, 1, 2, 3), limit_s=0.0) == expected


@pytest.mark.parametrize(
    ("row", "field", "value", "message"),
    [
        (1, "slot", 4, r"token_loop: rows\[1\].slot must be in \[0, 4\), got 4"),
        (1, "slot", 0, r"token_loop: rows\[1\].slot must be distinct within a step, got 0"),
        (0, "position", -1, r"token_loop: rows\[0\].position must be in \[0, "),
        (0, "token", 512, r"token_loop: rows\[0\].token must be in \[0, \d+\), got 512"),
        (0, "phase", 4, r"token_loop: rows\[0\].phase must be in \[0, 4\), got 4"),
        (1, "num_text", 0, r"token_loop: rows\[1\].num_text must be in \[1, "),
        (1, "room", 0, r"token_loop: rows\[1\].room must be in \[1, 9\), got 0"),
        (1, "room", 9, r"token_loop: rows\[1\].room must be in \[1, 9\), got 9"),
        (0, "position", 377, r"token_loop: table\[0, 3\] must be a page id in \[0, 12\), got -1"),
        (0, "temperature", float("nan"), r"token_loop: rows\[0\].temperature must be 0 \(greedy\)"),
        (0, "top_p", 0.0, r"token_loop: rows\[0\].top_p must be in \(0, 1\], got 0"),
        (0, "top_k", -1, r"token_loop: rows\[0\].top_k must be in \[0, "),
    ],
)
def test_a_row_that_does_not_fit_is_refused(row: int, field: str, value: Any, message: str) -> None:
    kv = store()
    before = [one.clone() for one in (kv.global_pages, kv.sliding_pages, kv.conv_rows)]
    loop, ahead = nano().backbone.token_loop(kv, MAX_ROWS, MAX_RUN), runs(ROWS[:2])
    fill(loop, ROWS[:2], ahead, (0, 1))
    loop.rows[row][field] = value
    with pytest.raises(errors.InvalidArgument, match=message):
        loop.run(2, ahead[0].table, 1.0)
    for one, other in zip(before, (kv.global_pages, kv.sliding_pages, kv.conv_rows), strict=True):
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))


def test_what_is_no_table_or_loop_is_refused() -> None:
    masks = torch.full((2, 2), -1, dtype=torch.int32)
    with pytest.raises(errors.InvalidArgument, match=r"token_loop: masks must be of shape \[\*, 3"):
        TokenTable(masks, (5,), ((0, 1), (-1, 1)), 65)
    with pytest.raises(
        errors.InvalidArgument, match=r"token_loop: next must be in \[-1, 2\), got 2"
    ):
        TokenTable(masks, (5,), ((0, 2), (-1, 1)), 64)
    with pytest.raises(errors.InvalidArgument, match=r"token_loop: next must be of shape \[2, 2\]"):
        TokenTable(masks, (5,), ((0,), (1,)), 64)
    masks[1, 0], masks[1, 1] = 0, 1 << 30
    with pytest.raises(errors.InvalidArgument, match="at least one bit set for each phase"):
        TokenTable(masks, (5,), ((0, 1), (-1, 1)), 40)
    backbone, kv = nano().backbone, store()
    with pytest.raises(errors.InvalidArgument, match="max_rows and max_run must be at least 1"):
        backbone.token_loop(kv, 0, 8)
    loop = backbone.token_loop(kv, MAX_ROWS, MAX_RUN)
    other = TokenTable(masks, (5,), ((0, 1), (-1, 1)), 64)
    with pytest.raises(
        errors.InvalidArgument, match=r"token_loop: table must be for \d+ ids, got 64"
    ):
        loop.run(1, other, 1.0)
    with pytest.raises(errors.InvalidArgument, match=r"token_loop: num_rows must be in \[0, 5\)"):
        loop.run(5, runs(ROWS[:1])[0].table, 1.0)
    assert loop.run(0, runs(ROWS[:1])[0].table, 1.0) == (0, 0, [])
