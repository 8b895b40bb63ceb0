"""embed and dmel_embed: value, bits on every ISA and thread count, refusals."""

import pytest
import torch

from tml_core import _ext, errors
from tml_core.ops.embed import dmel_embed, dmel_embed_reference, embed, embed_reference
from tml_core.ops.rms_norm import rms_norm

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
# One fp32 ulp in rstd, and two bf16 roundings that may then fall to the neighbour (ulp <= 2^-7).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2 * 2.0**-7}


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def draw_ids(*shape: int, high: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "h"), [(0, 16), (1, 257), (19, 64), (257, 48)])
def test_embed_matches_reference(dtype: torch.dtype, t: int, h: int) -> None:
    table, weight = draw(37, h, dtype=dtype), draw(h, dtype=dtype, seed=1)
    ids = draw_ids(t, high=37)
    y = embed(ids, table, weight, EPS)
    expected = embed_reference(ids, table, weight, EPS)
    torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype], atol=0)
    assert torch.equal(y, rms_norm(table[ids], weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("f", "c", "levels", "h"), [(0, 5, 4, 16), (1, 1, 1, 257), (19, 80, 16, 144)]
)
def test_dmel_embed_matches_reference(
    dtype: torch.dtype, f: int, c: int, levels: int, h: int
) -> None:
    table, weight = draw(c * levels, h, dtype=dtype), draw(h, dtype=dtype, seed=1)
    bins = draw_ids(f, c, high=levels).int()
    y = dmel_embed(bins, table, levels, weight, EPS)
    expected = dmel_embed_reference(bins, table, levels, weight, EPS)
    # the sum of c terms of size 1 in another order: c * eps, near zero without relative precision
    torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype], atol=1e-5)


def test_dmel_embed_writes_where_it_is_told() -> None:
    generator = torch.Generator().manual_seed(3)
    bins = torch.randint(0, 4, (5, 3), generator=generator).int()
    table, weight = torch.randn(12, 17, generator=generator), torch.randn(17, generator=generator)
    around = torch.full((9, 17), float("nan"))
    out = around[2:7]
    assert dmel_embed(bins, table, 4, weight, EPS, out_FH=out) is out
    assert torch.equal(out, dmel_embed(bins, table, 4, weight, EPS))
    assert around[:2].isnan().all() and around[7:].isnan().all()
    with pytest.raises(errors.InvalidArgument, match=r"dmel_embed: out must be of shape \[5, 17\]"):
        dmel_embed(bins, table, 4, weight, EPS, out_FH=around)
    table.requires_grad_()
    with pytest.raises(errors.InvalidArgument, match="dmel_embed: table requires grad"):
        dmel_embed(bins, table, 4, weight, EPS, out_FH=out)


def test_dmel_embed_sums_channels_in_order_and_rounds_once() -> None:
    table, weight = draw(80 * 16, 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    bins = draw_ids(7, 80, high=16).int()
    summed = torch.zeros(7, 32)
    for c in range(80):
        summed = summed + table[c * 16 + bins[:, c].long()].float()
    assert torch.equal(
        dmel_embed(bins, table, 16, weight, EPS), rms_norm(summed.bfloat16(), weight, EPS)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_bits_do_not_depend_on_batch_threads_or_isa(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    table, weight = draw(80 * 16, 257, dtype=dtype), draw(257, dtype=dtype, seed=1)
    ids, bins = draw_ids(400, high=1280), draw_ids(30, 80, high=16).int()
    # enough elements that two threads really share them
    rows = embed(ids, table, weight, EPS)
    frames = dmel_embed(bins, table, 16, weight, EPS)
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(embed(ids, table, weight, EPS), rows)
            assert torch.equal(dmel_embed(bins, table, 16, weight, EPS), frames)
            alone = [dmel_embed(bins[i : i + 1], table, 16, weight, EPS) for i in range(30)]
            assert torch.equal(torch.cat(alone), frames)
        assert torch.equal(embed(ids[7:8], table, weight, EPS), rows[7:8])


def test_embed_ignores_rows_of_a_wider_table() -> None:
    wide = draw(37, 100, dtype=torch.float32)
    wide[:, 64:] = float("nan")
    ids, weight = draw_ids(19, high=37), torch.ones(64)
    assert torch.equal(
        embed(ids, wide[:, :64], weight, EPS), embed(ids, wide[:, :64].contiguous(), weight, EPS)
    )


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_embed_refuses_an_id_outside_the_table_before_writing(bad: int) -> None:
    out = torch.full((3, 16), 7.0)
    ids = torch.tensor([1, 2, bad])
    with pytest.raises(
        errors.InvalidArgument, match=rf"embed: ids\[2\] must be in \[0, 10\), got {bad}"
    ):
        _ext.embed(ids, torch.zeros(10, 16), torch.ones(16), EPS, out, 1)
    assert torch.equal(out, torch.full((3, 16), 7.0))


def test_embed_refusals() -> None:
    table, weight = torch.zeros(12, 16), torch.ones(16)
    ids, bins = torch.tensor([1, 2]), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(errors.InvalidArgument, match="embed: ids must be int64, got int32"):
        embed(ids.int(), table, weight, EPS)
    with pytest.raises(errors.InvalidArgument, match="embed: ids must be 1-dimensional"):
        embed(ids[None], table, weight, EPS)
    with pytest.raises(errors.InvalidArgument, match=r"embed: weight must be of shape \[16\]"):
        embed(ids, table, torch.ones(8), EPS)
    with pytest.raises(errors.InvalidArgument, match="dmel_embed: bins must be int32, got int64"):
        dmel_embed(bins.long(), table, 4, weight, EPS)
    with pytest.raises(
        errors.InvalidArgument,
        match=r"dmel_embed: table must be 3 channels \* 5 levels high, got 12 rows",
    ):
        dmel_embed(bins, table, 5, weight, EPS)
    with pytest.raises(errors.InvalidArgument, match="num_levels must be at least 1, got 0"):
        dmel_embed(bins, table, 0, weight, EPS)
    for bad in (-1, 4):
        bins[1, 2] = bad
        with pytest.raises(
            errors.InvalidArgument,
            match=rf"dmel_embed: bins\[1, 2\] must be in \[0, 4\), got {bad}",
        ):
            dmel_embed(bins, table, 4, weight, EPS)
