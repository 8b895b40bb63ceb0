"""attn_prologue: value, chunked as whole, bits on every ISA and thread count, poison, refusals."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_core import _ext, errors
from tml_core.contract import PAGE_LEN
from tml_core.ops.attn_prologue import attn_prologue, attn_prologue_reference, read_page

DTYPES = [torch.float32, torch.bfloat16]
HEADS, KV_HEADS, D_REL = 4, 2, 6
NUM_SLOTS, MAX_PAGES, LAYERS, LAYER = 5, 5, 2, 1
K_CHANNEL, V_CHANNEL, ROW_WIDTH = 8, 200, 400


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


class World:
    """One layer with its pages and conv state; everything a step must not read is NaN."""

    def __init__(self, head_dim: int, dtype: torch.dtype, log_floor: float = 0.0) -> None:
        self.head_dim, self.dtype = head_dim, dtype
        self.channels = KV_HEADS * head_dim
        self.width = HEADS * (head_dim + D_REL) + 2 * self.channels
        self.weights = {
            "k_conv_C4": draw(self.channels, 4, seed=1),
            "v_conv_C4": draw(self.channels, 4, seed=2),
            "q_norm_D": draw(head_dim, dtype=dtype, seed=3),
            "k_norm_D": draw(head_dim, dtype=dtype, seed=4),
            "eps": 1e-6,
            "log_floor": log_floor,
            "log_alpha": 0.1,
        }
        num_pages = NUM_SLOTS * MAX_PAGES + 3
        nan = float("nan")
        self.pages = torch.full(
            (num_pages, LAYERS, KV_HEADS, 2, PAGE_LEN * head_dim), nan, dtype=dtype
        )
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(5)).int()
        self.table = order[: NUM_SLOTS * MAX_PAGES].view(NUM_SLOTS, MAX_PAGES).contiguous()
        self.conv_rows = torch.full((NUM_SLOTS, 3, 3, ROW_WIDTH), nan, dtype=dtype)

    def state(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.conv_rows[slot, 2]
        return (
            rows[:, K_CHANNEL : K_CHANNEL + self.channels],
            rows[:, V_CHANNEL : V_CHANNEL + self.channels],
        )

    def start(self, slot: int, seed: int | None = None) -> None:
        for i, rows in enumerate(self.state(slot)):
            rows.zero_() if seed is None else rows.copy_(
                draw(*rows.shape, dtype=self.dtype, seed=seed + i)
            )

    def batch(self, lengths: list[int], slots: list[int], start: list[int]) -> dict[str, Any]:
        return {
            "pages": self.pages,
            "layer": LAYER,
            "table": self.table,
            "conv_rows": self.conv_rows,
            "conv_layer": 2,
            "k_channel": K_CHANNEL,
            "v_channel": V_CHANNEL,
            "cu_tokens": torch.tensor([0, *lengths]).cumsum(0).int(),
            "slots": torch.tensor(slots, dtype=torch.int32),
            "start_pos": torch.tensor(start, dtype=torch.int64),
        }

    def step(
        self, qkvr: torch.Tensor, lengths: list[int], slots: list[int], start: list[int]
    ) -> torch.Tensor:
        q, r = attn_prologue(qkvr, HEADS, **self.weights, **self.batch(lengths, slots, start))
        return torch.cat([q.flatten(1), r.flatten(1)], 1)

    def keys_and_values(self, slot: int, begin: int, end: int) -> torch.Tensor:
        """[end - begin, KV_HEADS, 2, head_dim] as stored for the positions of a slot."""
        heads = []
        for head in range(KV_HEADS):
            blocks = [read_page(self.pages[page, LAYER, head]) for page in self.table[slot]]
            heads.append(torch.stack([torch.cat([b[i] for b in blocks]) for i in (0, 1)], 1))
        return torch.stack(heads, 1)[begin:end]


def reference(
    world: World, qkvr: torch.Tensor, slot: int, start: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    k_state, v_state = world.state(slot)
    q, r, k, v, k_state, v_state = attn_prologue_reference(
        qkvr, HEADS, **world.weights, k_state_3C=k_state, v_state_3C=v_state, start_pos=start
    )
    return torch.cat([q.flatten(1), r.flatten(1)], 1), torch.stack([k, v], 2), (k_state, v_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_floor", [0.0, 100.0])
@pytest.mark.parametrize(
    ("lengths", "start", "head_dim"),
    [
        ([0], [0], 16),
        ([1], [0], 64),
        ([1], [127], 16),
        ([257], [126], 16),
        ([19, 1, 0, 2], [0, 300, 5, 127], 48),
        ([3, 130, 18], [253, 1, 128], 32),
        ([], [], 16),
    ],
)
def test_attn_prologue_matches_reference(
    dtype: torch.dtype, log_floor: float, lengths: list[int], start: list[int], head_dim: int
) -> None:
    world = World(head_dim, dtype, log_floor)
    slots = [3, 0, 4, 1][: len(lengths)]
    for slot in slots:
        world.start(slot, seed=10 * slot)
    qkvr = draw(sum(lengths), world.width, dtype=dtype, seed=6)
    parts = [qkvr[sum(lengths[:i]) :][:n] for i, n in enumerate(lengths)]
    expected = [reference(world, *args) for args in zip(parts, slots, start, strict=True)]
    state = world.conv_rows.clone()
    got = world.step(qkvr, lengths, slots, start)
    # A sum in another order moves an fp32 ulp or two; bf16 then falls to a neighbour (an ulp is at
    # most 2^-7) at up to three roundings: convolution, norm, weight. log1 is within 2 ulp. Values
    # near zero after cancellation in the convolution: fp32 noise, or an ulp of terms up to 4.
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (3 * 2.0**-7, 2.0**-7)
    if expected:
        torch.testing.assert_close(got, torch.cat([e[0] for e in expected]), rtol=rtol, atol=atol)
    written = torch.zeros(world.pages.shape[0], dtype=torch.bool)
    for slot, begin, n, (_, kv, (k_state, v_state)) in zip(
        slots, start, lengths, expected, strict=True
    ):
        stored = world.keys_and_values(slot, begin, begin + n)
        torch.testing.assert_close(stored, kv, rtol=rtol, atol=atol)
        state[slot, 2, :, K_CHANNEL : K_CHANNEL + world.channels] = k_state
        state[slot, 2, :, V_CHANNEL : V_CHANNEL + world.channels] = v_state
        for pos in range(begin, begin + n):
            written[world.table[slot, pos // PAGE_LEN].long()] = True
    # state is copied, not computed; unused slots, layers, channels, pages keep their NaN
    torch.testing.assert_close(world.conv_rows, state, rtol=0, atol=0, equal_nan=True)
    assert world.pages[:, 1 - LAYER].isnan().all()
    assert world.pages[~written].isnan().all()


def test_attn_prologue_zeroes_the_odd_partner_of_the_last_even_key() -> None:
    world = World(16, torch.bfloat16)
    world.start(0)
    world.step(draw(5, world.width, dtype=torch.bfloat16), [5], [0], [0])
    keys, values = world.keys_and_values(0, 0, 8).unbind(2)
    assert values[5].eq(0).all()
    assert values[6:].isnan().all()
    assert keys[5:].isnan().all()
    # the odd key arrives later and leaves its partner alone
    world.step(draw(1, world.width, dtype=torch.bfloat16, seed=1), [1], [0], [5])
    after = world.keys_and_values(0, 0, 6)[:, :, 1]
    assert torch.equal(after[:5], values[:5])
    assert after[5].ne(0).any()


def test_attn_prologue_log_scaling_is_exactly_one_up_to_the_floor() -> None:
    plain, scaled = World(16, torch.float32), World(16, torch.float32, log_floor=40.0)
    qkvr = draw(60, plain.width)
    for world in (plain, scaled):
        world.start(0)
    a, b = plain.step(qkvr, [60], [0], [0]), scaled.step(qkvr, [60], [0], [0])
    assert torch.equal(a[:40], b[:40])
    tau = 1 + 0.1 * (torch.arange(41, 61) / 40.0).log()
    # tau by another logarithm: a few ulp of fp32
    torch.testing.assert_close(b[40:], a[40:] * tau[:, None], rtol=1e-6, atol=0)
    assert torch.equal(plain.keys_and_values(0, 0, 60), scaled.keys_and_values(0, 0, 60))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    first=st.sampled_from([0, 1, 125, 127, 128, 250]),
)
def test_attn_prologue_chunked_in_a_batch_equals_whole_alone(
    seed: int, dtype: torch.dtype, lengths: list[int], first: int
) -> None:
    rng = random.Random(seed)
    whole, chunked = World(16, dtype, log_floor=100.0), World(16, dtype, log_floor=100.0)
    qkvr = [draw(n, whole.width, dtype=dtype, seed=seed + i) for i, n in enumerate(lengths)]
    expected = []
    for slot, x in enumerate(qkvr):
        for world in (whole, chunked):
            world.start(slot, seed=slot)
        expected.append(whole.step(x, [len(x)], [slot], [first]))
    outputs: list[list[torch.Tensor]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        slots = rng.sample(range(len(lengths)), rng.randint(1, len(lengths)))
        counts = [min(rng.choice([0, 1, 2, 3, 17, 150]), lengths[s] - done[s]) for s in slots]
        rows = [qkvr[s][done[s] : done[s] + n] for s, n in zip(slots, counts, strict=True)]
        step = chunked.step(torch.cat(rows), counts, slots, [first + done[s] for s in slots])
        for s, n, part in zip(slots, counts, step.split(counts), strict=True):
            outputs[s].append(part)
            done[s] += n
    for slot, want in enumerate(expected):
        if lengths[slot]:
            assert torch.equal(torch.cat(outputs[slot]), want)
        end = first + lengths[slot]
        stored = [world.keys_and_values(slot, first, end) for world in (chunked, whole)]
        assert torch.equal(*stored)
        for a, b in zip(chunked.state(slot), whole.state(slot), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attn_prologue_bits_do_not_depend_on_threads_or_isa(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    # enough elements that two threads share them; sequences of one and of several pieces
    lengths, slots, start = [1, 390, 2, 40], [4, 0, 2, 3], [127, 126, 126, 300]
    qkvr = draw(sum(lengths), World(32, dtype).width, dtype=dtype)
    results = []
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            world = World(32, dtype, log_floor=100.0)
            for slot in slots:
                world.start(slot, seed=slot)
            step = world.step(qkvr, lengths, slots, start)
            states = [torch.cat(world.state(slot), 1).flatten() for slot in slots]
            kv = [
                world.keys_and_values(slot, begin, begin + n).flatten()
                for slot, begin, n in zip(slots, start, lengths, strict=True)
            ]
            results.append(torch.cat([step.flatten(), *states, *kv]))
    assert not results[0].isnan().any()
    assert all(torch.equal(result, results[0]) for result in results)


def test_attn_prologue_takes_rows_of_a_wider_buffer() -> None:
    world, other = World(16, torch.float32), World(16, torch.float32)
    wide = draw(7, world.width + 5)
    wide[:, world.width :] = float("nan")
    for w in (world, other):
        w.start(0)
    strided = world.step(wide[:, : world.width], [7], [0], [0])
    dense = other.step(wide[:, : world.width].contiguous(), [7], [0], [0])
    assert torch.equal(strided, dense)


def test_attn_prologue_refusals() -> None:
    world = World(16, torch.float32)
    qkvr = torch.zeros(3, world.width)

    def refuse(match: str, x: torch.Tensor = qkvr, **named: Any) -> None:
        named = {**world.weights, **world.batch([2, 1], [1, 3], [0, 200]), **named}
        with pytest.raises(errors.InvalidArgument, match=match):
            attn_prologue(x, HEADS, **named)

    def batch(lengths: list[int], slots: list[int], start: list[int]) -> dict[str, Any]:
        return world.batch(lengths, slots, start)

    refuse(r"qkvr must be 4 \* 16 \+ 2 \* 32 \+ 4 \* d_rel wide, got 150", torch.zeros(3, 150))
    refuse("qkvr must be float32 or bfloat16, got int32", qkvr.int())
    refuse("attn_prologue: qkvr requires grad", qkvr.clone().requires_grad_())
    refuse(r"v_conv must be of shape \[32, 4\]", v_conv_C4=torch.zeros(31, 4))
    refuse("k_norm must be float32, got bfloat16", k_norm_D=torch.ones(16).bfloat16())
    refuse("log_floor must be >= 0 .*, got -1", log_floor=-1.0)
    refuse("pages must be float32, got bfloat16", pages=world.pages.bfloat16())
    refuse(r"pages must be \[\.\.\., 2, 128 \* head_dim\]", pages=torch.zeros(1, 2, 2, 2, 100))
    refuse("head_dim that is a multiple of 16, got head_dim 8", pages=torch.zeros(1, 2, 2, 2, 1024))
    refuse("pages must be contiguous", pages=world.pages[:, :, ::2])
    refuse(r"attn_prologue: layer must be in \[0, 2\) .*, got 2", layer=2)
    refuse(r"conv layer must be in \[0, 3\) .*, got -1", conv_layer=-1)
    refuse("at least 32 channels wide from channel 380, got 400 wide", v_channel=380)
    refuse("k_channel and v_channel must be at least 32 apart, got 8 and 30", v_channel=30)
    refuse("table must be int32, got int64", table=world.table.long())
    refuse(r"conv_rows must be of shape \[5, \*, 3, \*\]", conv_rows=world.conv_rows[:4])
    refuse(r"start_pos\[1\] must be in .*, got -1", **batch([2, 1], [1, 3], [0, -1]))
    refuse("start_pos must be a tensor, got None", start_pos=None)
    refuse("start_pos must be int64, got int32", start_pos=torch.tensor([0, 1]).int())
    refuse(r"slots\[1\] must be distinct", **batch([2, 1], [1, 1], [0, 0]))
    refuse("table has room for 640 positions, slot 3 needs 641", **batch([2, 1], [1, 3], [0, 640]))
    for bad in (-1, 28):
        table = world.table.clone()
        table[3, 1] = bad
        refuse(rf"table\[3, 1\] must be a page id in \[0, 28\), got {bad}", table=table)
    assert world.pages.isnan().all()
    assert world.conv_rows.isnan().all()
