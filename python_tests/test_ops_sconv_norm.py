"""sconv_norm: value, chunked as whole, bits on every ISA and thread count, poison, refusals."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_core import _ext, errors
from tml_core.ops.sconv_norm import sconv_norm, sconv_norm_reference

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
LAYERS, LAYER, CHANNEL = 3, 1, 24


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


class World:
    """One convolution of one layer with its state; everything a step must not read is NaN."""

    def __init__(self, hidden: int, dtype: torch.dtype, num_slots: int = 5) -> None:
        self.hidden = hidden
        self.conv_weight = draw(hidden, 4, seed=1)
        self.norm_weight = draw(hidden, dtype=dtype, seed=2)
        self.conv_rows = torch.full(
            (num_slots, LAYERS, 3, CHANNEL + hidden + 8), float("nan"), dtype=dtype
        )

    def state(self, slot: int) -> torch.Tensor:
        return self.conv_rows[slot, LAYER, :, CHANNEL : CHANNEL + self.hidden]

    def step(
        self, x: torch.Tensor, residual: torch.Tensor, lengths: list[int], slots: list[int]
    ) -> torch.Tensor:
        normed = sconv_norm(
            x, residual, self.conv_weight, self.norm_weight, EPS, **self.batch(lengths, slots)
        )
        assert normed is not None
        return normed

    def batch(self, lengths: list[int], slots: list[int]) -> dict[str, Any]:
        return {
            "conv_rows": self.conv_rows,
            "conv_layer": LAYER,
            "channel": CHANNEL,
            "cu_tokens": torch.tensor([0, *lengths]).cumsum(0).int(),
            "slots": torch.tensor(slots, dtype=torch.int32),
        }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "hidden"),
    [([0], 16), ([1], 4096), ([2], 48), ([19, 0, 1, 3], 64), ([257, 2, 18], 32), ([], 16)],
)
def test_sconv_norm_matches_reference(dtype: torch.dtype, lengths: list[int], hidden: int) -> None:
    world = World(hidden, dtype)
    slots = [3, 0, 4, 1][: len(lengths)]
    for slot in slots:
        world.state(slot).copy_(draw(3, hidden, dtype=dtype, seed=10 + slot))
    before = world.conv_rows.clone()
    x, residual = draw(sum(lengths), hidden, dtype=dtype), draw(sum(lengths), hidden, dtype=dtype)
    expected = []
    for slot, x_s, residual_s in zip(
        slots, x.split(lengths) if lengths else [], residual.split(lengths), strict=True
    ):
        state = world.state(slot).clone()
        normed, summed, state = sconv_norm_reference(
            x_s, residual_s, world.conv_weight, world.norm_weight, EPS, state
        )
        assert normed is not None
        expected.append((normed, summed, state))
        before[slot, LAYER, :, CHANNEL : CHANNEL + hidden] = state
    normed = world.step(x, residual, lengths, slots)
    # Sums of five terms of size about 4 in another order (fp32), or a bf16 neighbour at each of
    # the three roundings y, residual and norm: an ulp at 16 is 2^-3, near 1 it is 2^-7.
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (3 * 2.0**-7, 3 * 2.0**-7)
    for got, part in ((normed, 0), (residual, 1)):
        if expected:
            want = torch.cat([e[part] for e in expected])
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    # the state is copied, not computed: exact; other slots, layers and channels keep their NaN
    torch.testing.assert_close(world.conv_rows, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sconv_norm_without_norm_only_adds(dtype: torch.dtype) -> None:
    with_norm, without = World(64, dtype), World(64, dtype)
    x, first = draw(19, 64, dtype=dtype), draw(19, 64, dtype=dtype, seed=3)
    second = first.clone()
    for world in (with_norm, without):
        world.state(2).zero_()
    with_norm.step(x, first, [19], [2])
    args = (x, second, without.conv_weight, None, EPS)
    assert sconv_norm(*args, **without.batch([19], [2])) is None
    assert torch.equal(first, second)
    assert torch.equal(with_norm.state(2), without.state(2))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=4),
)
def test_sconv_norm_chunked_in_a_batch_equals_whole_alone(
    seed: int, dtype: torch.dtype, lengths: list[int]
) -> None:
    hidden, rng = 48, random.Random(seed)
    whole, chunked = World(hidden, dtype), World(hidden, dtype)
    x = [draw(n, hidden, dtype=dtype, seed=seed + i) for i, n in enumerate(lengths)]
    residual = [draw(n, hidden, dtype=dtype, seed=seed + 9 + i) for i, n in enumerate(lengths)]
    expected = []
    for slot, (x_s, residual_s) in enumerate(zip(x, residual, strict=True)):
        whole.state(slot).zero_()
        chunked.state(slot).zero_()
        summed = residual_s.clone()
        normed = whole.step(x_s, summed, [len(x_s)], [slot])
        expected.append(torch.cat([normed, summed], 1))
    outputs: list[list[torch.Tensor]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        slots = rng.sample(range(len(lengths)), rng.randint(1, len(lengths)))
        counts = [min(rng.choice([0, 1, 1, 2, 3, 17]), lengths[s] - done[s]) for s in slots]
        spans = [slice(done[s], done[s] + n) for s, n in zip(slots, counts, strict=True)]
        x_step = torch.cat([x[s][span] for s, span in zip(slots, spans, strict=True)])
        summed = torch.cat([residual[s][span] for s, span in zip(slots, spans, strict=True)])
        normed = chunked.step(x_step, summed, counts, slots)
        parts = torch.cat([normed, summed], 1).split(counts)
        for s, n, part in zip(slots, counts, parts, strict=True):
            outputs[s].append(part)
            done[s] += n
    for slot, want in enumerate(expected):
        if lengths[slot]:
            assert torch.equal(torch.cat(outputs[slot]), want)
        assert torch.equal(chunked.state(slot), whole.state(slot))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sconv_norm_bits_do_not_depend_on_threads_or_isa(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    # enough elements that two threads share them, several pieces a sequence
    hidden, lengths, slots = 64, [1, 800, 2, 40], [4, 0, 2, 3]
    x, start = draw(843, hidden, dtype=dtype), draw(843, hidden, dtype=dtype, seed=1)
    results = []
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            world, residual = World(hidden, dtype), start.clone()
            for slot in slots:
                world.state(slot).copy_(draw(3, hidden, dtype=dtype, seed=10 + slot))
            normed = world.step(x, residual, lengths, slots)
            states = torch.cat([world.state(slot) for slot in slots])
            results.append(torch.cat([normed, residual, states]))
    assert not results[0].isnan().any()
    assert all(torch.equal(result, results[0]) for result in results)


def test_sconv_norm_refusals() -> None:
    world = World(32, torch.float32)
    x, residual = torch.zeros(3, 32), torch.zeros(3, 32)
    args = (x, residual, world.conv_weight, world.norm_weight, EPS)

    def refuse(match: str, *positional: Any, **named: Any) -> None:
        with pytest.raises(errors.InvalidArgument, match=match):
            sconv_norm(*(positional or args), **{**world.batch([2, 1], [1, 3]), **named})

    refuse("sconv_norm: x must be .* multiple of 16, got H = 24", x[:, :24], *args[1:])
    refuse(r"sconv_norm: residual must be of shape \[3, 32\]", x, residual[:2], *args[2:])
    refuse("sconv_norm: residual must be float32", x, residual.bfloat16(), *args[2:])
    refuse(r"conv_weight must be of shape \[32, 4\]", x, residual, torch.zeros(32, 3), *args[3:])
    refuse(r"norm_weight must be of shape \[32\]", *args[:3], torch.ones(31), EPS)
    refuse("sconv_norm: x requires grad", x.clone().requires_grad_(), *args[1:])
    refuse("sconv_norm: conv_rows must be float32", conv_rows=world.conv_rows.bfloat16())
    refuse(r"sconv_norm: conv layer must be in \[0, 3\)", conv_layer=3)
    refuse("conv_rows must be at least 32 channels wide from channel 40, got 64", channel=40)
    refuse("at least 32 channels wide from channel -1", channel=-1)
    refuse(r"slots\[1\] must be distinct within a step, got 1", **world.batch([2, 1], [1, 1]))
    refuse(r"slots\[0\] must be in \[0, 5\), got 5", **world.batch([2, 1], [5, 1]))
    refuse(r"slots\[1\] must be in \[0, 5\), got -1", **world.batch([2, 1], [0, -1]))
    refuse(r"cu_tokens must be of shape \[3\]", **world.batch([3], [0]) | {"slots": slots_of(0, 1)})
    refuse(
        r"cu_tokens\[2\] must be 3 \(the number of tokens\), got 4", **world.batch([2, 2], [0, 1])
    )
    refuse(r"cu_tokens\[2\] must be at least 4 .*, got 3", **world.batch([4, -1], [0, 1]))
    refuse(r"cu_tokens\[0\] must be 0, got 1", cu_tokens=torch.tensor([1, 2, 3]).int())
    refuse("slots must be int32, got int64", slots=torch.tensor([0, 1]))
    assert residual.eq(0).all()
    assert world.conv_rows.isnan().all()


def slots_of(*slots: int) -> torch.Tensor:
    return torch.tensor(slots, dtype=torch.int32)
