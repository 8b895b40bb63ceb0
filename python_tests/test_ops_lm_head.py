"""lm_head: log-probabilities and sampling against the references, bits, statistics, refusals."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from tml_core import _ext, errors
from tml_core.ops.linear import PackedWeight, linear, pack_weight
from tml_core.ops.lm_head import (
    SampleRows,
    lm_head_logits,
    lm_head_logprobs,
    lm_head_logprobs_reference,
    lm_head_sample,
    lm_head_sample_reference,
    pack_allowed,
)
from tml_core.ops.philox import gumbel_reference, philox4x32_reference

ONE = torch.ones(1, 1)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def column(logits: list[float] | torch.Tensor) -> PackedWeight:
    """A head whose logits are these for the hidden state 1."""
    return pack_weight(torch.as_tensor(logits, dtype=torch.float32)[:, None])


def params(
    rows: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 7,
    position: int = 0,
) -> SampleRows:
    """The same settings for every row, at consecutive positions."""
    return SampleRows(
        temperature_B=torch.full((rows,), temperature),
        top_k_B=torch.full((rows,), top_k, dtype=torch.int32),
        top_p_B=torch.full((rows,), top_p),
        seed_B=torch.full((rows,), seed),
        position_B=torch.arange(position, position + rows),
    )


def mixed_params(rows: int, allowed_BW: torch.Tensor | None = None) -> SampleRows:
    """Greedy, plain, top-k, top-p and both, side by side."""
    row = torch.arange(rows)
    return SampleRows(
        temperature_B=torch.tensor([0.0, 1.0, 0.7, 1.3, 1.0, 0.5])[row % 6],
        top_k_B=torch.tensor([0, 0, 5, 0, 40, 300], dtype=torch.int32)[row % 6],
        top_p_B=torch.tensor([1.0, 1.0, 1.0, 0.9, 0.6, 0.999])[row % 6],
        seed_B=(row * 0x123456789ABCDEF) - (1 << 40),
        position_B=row * 3 + (1 << 33),
        allowed_BW=allowed_BW,
    )


# ---- logits and log-probabilities ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_ignore_the_padded_vocabulary(dtype: torch.dtype) -> None:
    h, w = draw(5, 40, dtype=dtype), draw(200, 40, dtype=dtype, seed=1)
    w[150:] = float("nan")
    got = lm_head_logits(h, pack_weight(w), 150)
    assert torch.equal(got, linear(h, pack_weight(w[:150]), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("t", "vocab", "hidden"),
    [(0, 8, 4), (1, 1, 1), (1, 128, 16), (19, 300, 75), (257, 129, 33), (100, 1000, 8)],
)
def test_logprobs_match_reference(dtype: torch.dtype, t: int, vocab: int, hidden: int) -> None:
    h, w = draw(t, hidden, dtype=dtype), draw(vocab + 70, hidden, dtype=dtype, seed=1)
    w[vocab:] = float("nan")
    packed = pack_weight(w)
    targets = torch.arange(t) * 37 % vocab
    got = lm_head_logprobs(h, packed, vocab, targets)
    want = lm_head_logprobs_reference(lm_head_logits(h, packed, vocab), targets)
    # fp32 at magnitude |logit| + |lse|, and exp and log within 2 ulp
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=5e-6)


def test_logprobs_follow_the_stated_fold() -> None:
    """The blocks and their halving tree, replayed in fp32 torch up to exp and log themselves."""
    logits = draw(300, seed=3) * 5
    padded = torch.full((384,), -torch.inf)
    padded[:300] = logits
    m, s = torch.tensor(torch.finfo(torch.float32).min), torch.tensor(0.0)
    for block in padded.view(3, 128):
        top = torch.maximum(m, block.max())
        terms = (block - block.max()).exp()
        while terms.numel() > 1:
            terms = terms[: terms.numel() // 2] + terms[terms.numel() // 2 :]
        s = terms[0] * (block.max() - top).exp() + s * (m - top).exp()
        m = top
    got = lm_head_logprobs(ONE, column(logits), 300, torch.tensor([17]))
    # torch's exp and log may differ from the kernel's by 2 ulp
    torch.testing.assert_close(got[0], logits[17] - (m + s.log()), rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprob_bits_do_not_depend_on_batch_threads_or_isa(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    h, packed = draw(110, 70, dtype=dtype), pack_weight(draw(700, 70, dtype=dtype, seed=1))
    targets = torch.arange(110) * 13 % 690
    expected = lm_head_logprobs(h, packed, 690, targets)
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(lm_head_logprobs(h, packed, 690, targets), expected)
        parts = [slice(0, 1), slice(1, 14), slice(14, 110)]
        split = [lm_head_logprobs(h[part], packed, 690, targets[part]) for part in parts]
        assert torch.equal(torch.cat(split), expected)


def test_logprobs_of_extreme_logits() -> None:
    far = torch.full((400,), -torch.inf)
    far[5], far[390] = 3e38, -3e38
    got = lm_head_logprobs(ONE.expand(3, 1), column(far), 400, torch.tensor([5, 390, 0]))
    assert got.tolist() == [0.0, -torch.inf, -torch.inf]
    got = lm_head_logprobs(ONE, column(torch.full((400,), -80.0)), 400, torch.tensor([3]))
    torch.testing.assert_close(got, -torch.tensor([400.0]).log(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logprobs_of_a_bad_row_are_nan_and_stay_in_it(bad: float) -> None:
    h, packed = draw(4, 8), pack_weight(draw(200, 8, seed=1))
    targets = torch.tensor([3, 199, 0, 64])
    expected = lm_head_logprobs(h, packed, 200, targets)
    h[2, 3] = bad
    got = lm_head_logprobs(h, packed, 200, targets)
    assert got[2].isnan()
    assert torch.equal(got[[0, 1, 3]], expected[[0, 1, 3]])


# ---- random numbers ----


def test_philox_known_answers() -> None:
    """kat_vectors of the Random123 distribution, philox 4x32 with 10 rounds."""
    ones = 0xFFFFFFFF
    cases = [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, (ones, ones), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, answer in cases:
        got = philox4x32_reference(np.array(counter, dtype=np.uint32), key)
        assert got.tolist() == answer


def test_gumbel_reference_is_standard_gumbel() -> None:
    noise = gumbel_reference(seed=-5, position=1 << 40, num_ids=200_000)
    # mean and deviation of Gumbel(0, 1); 5 standard errors at 200 000 draws
    assert abs(noise.mean() - 0.5772157) < 5 * 1.2825 / 200_000**0.5
    assert abs(noise.std() - 1.2825498) < 0.02


# ---- sampling ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(0, 9), (1, 1), (60, 5), (60, 300), (130, 777)])
def test_sample_matches_reference(dtype: torch.dtype, rows: int, vocab: int) -> None:
    h, packed = draw(rows, 24, dtype=dtype), pack_weight(draw(vocab + 40, 24, dtype=dtype, seed=1))
    settings = mixed_params(rows)
    allowed = draw(rows, vocab, seed=2) > 0.3
    allowed[:, 0] |= ~allowed.any(dim=1)
    logits = lm_head_logits(h, packed, vocab)
    tokens, _ = lm_head_sample(h, packed, vocab, settings)
    assert torch.equal(tokens, lm_head_sample_reference(logits, settings))
    settings = mixed_params(rows, pack_allowed(allowed))
    tokens, _ = lm_head_sample(h, packed, vocab, settings)
    assert torch.equal(tokens, lm_head_sample_reference(logits, settings))
    assert allowed[torch.arange(rows), tokens].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample_logprob_has_the_bits_of_lm_head_logprobs(dtype: torch.dtype) -> None:
    h, packed = draw(40, 64, dtype=dtype), pack_weight(draw(500, 64, dtype=dtype, seed=1))
    allowed = pack_allowed(draw(40, 490, seed=2) > 1.0)
    tokens, logprobs = lm_head_sample(h, packed, 490, mixed_params(40, allowed))
    assert torch.equal(logprobs, lm_head_logprobs(h, packed, 490, tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample_bits_do_not_depend_on_batch_threads_or_isa(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    h, packed = draw(101, 60, dtype=dtype), pack_weight(draw(900, 60, dtype=dtype, seed=1))
    settings = mixed_params(101, pack_allowed(draw(101, 890, seed=2) > -1.0))

    def sample(rows: slice) -> torch.Tensor:
        part = SampleRows(*(getattr(settings, field.name)[rows] for field in fields(settings)))
        tokens, logprobs = lm_head_sample(h[rows], packed, 890, part)
        return torch.stack([tokens.double(), logprobs.double()])

    expected = sample(slice(0, 101))
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(sample(slice(0, 101)), expected)
        alone = [sample(slice(i, i + 1)) for i in range(12)] + [sample(slice(12, 101))]
        assert torch.equal(torch.cat(alone, dim=1), expected)


def test_sample_ties_and_masks_go_to_the_lowest_allowed_id() -> None:
    flat = column(torch.zeros(300))
    tokens, _ = lm_head_sample(ONE, flat, 300, params(1, temperature=0.0))
    assert tokens.tolist() == [0]
    mask = torch.zeros(3, 300, dtype=torch.bool)
    mask[0, 299] = mask[1, 127] = mask[1, 128] = mask[2, 31] = mask[2, 32] = True
    allowed = pack_allowed(mask)
    ones = ONE.expand(3, 1)
    for settings in (params(3, temperature=0.0), params(3, top_k=1), params(3, top_p=1e-6)):
        tokens, logprobs = lm_head_sample(ones, flat, 300, replace(settings, allowed_BW=allowed))
        assert tokens.tolist() == [299, 127, 31]
        assert torch.equal(logprobs, lm_head_logprobs(ones, flat, 300, tokens))


def test_sample_ignores_mask_bits_past_the_vocabulary() -> None:
    allowed = torch.tensor([[0, -16]], dtype=torch.int32)  # ids 36 to 63
    for settings in (params(1, temperature=0.0), params(1), params(1, top_p=0.5)):
        tokens, _ = lm_head_sample(
            ONE, column(torch.zeros(64)), 37, replace(settings, allowed_BW=allowed)
        )
        assert tokens.tolist() == [36]
    with pytest.raises(errors.InvalidArgument, match="allowed must be a mask with at least one"):
        lm_head_sample(ONE, column(torch.zeros(64)), 36, replace(params(1), allowed_BW=allowed))


def test_wide_filters_draw_what_no_filter_draws() -> None:
    h, packed = draw(50, 16), pack_weight(draw(400, 16, seed=1))
    plain, _ = lm_head_sample(h, packed, 400, params(50))
    wide, _ = lm_head_sample(h, packed, 400, params(50, top_k=400))
    assert torch.equal(plain, wide)
    huge, _ = lm_head_sample(h, packed, 400, params(50, top_k=2**31 - 1))
    assert torch.equal(plain, huge)


def test_sample_survives_nan_and_infinite_logits(each_isa: list[str]) -> None:
    nan, ones = float("nan"), ONE.expand(4, 1)
    mask = torch.zeros(4, 200, dtype=torch.bool)
    mask[:, [150, 170]] = True
    for isa in each_isa:
        _ext.set_isa(isa)
        for rows in (params(4, 0.0), params(4), params(4, top_k=3), params(4, top_p=0.9)):
            mixed = column([nan, -torch.inf, nan, 2.0] + [nan] * 200)
            tokens, logprobs = lm_head_sample(ones, mixed, 204, rows)
            assert tokens.tolist() == [3] * 4 and logprobs.isnan().all()
            tokens, _ = lm_head_sample(ones, column([5.0, torch.inf, 1.0, torch.inf]), 4, rows)
            assert tokens.tolist() == [1] * 4
            masked = replace(rows, allowed_BW=pack_allowed(mask))
            for filler in (nan, -torch.inf):
                tokens, _ = lm_head_sample(ones, column([filler] * 200), 200, masked)
                assert tokens.tolist() == [150] * 4


SHAPE = [2.0, 0.5, 1.5, -1.0, 0.0, 1.0, -2.0, 0.7, 0.2, -0.4]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [
        (1.0, 0, 1.0, range(10)),
        (0.6, 0, 1.0, range(10)),
        (2.0, 4, 1.0, [0, 2, 5, 7]),
        # shares by size: .341 .207 .126 .093 ...: the fourth reaches 0.7
        (1.0, 0, 0.7, [0, 2, 5, 7]),
        # of the first four, renormalised: .445 .270 .164 .121: the second reaches 0.7
        (1.0, 4, 0.7, [0, 2]),
    ],
)
def test_sample_frequencies(temperature: float, top_k: int, top_p: float, kept: list[int]) -> None:
    rows = 20_000
    tokens, _ = lm_head_sample(
        ONE.expand(rows, 1), column(SHAPE), 10, params(rows, temperature, top_k, top_p)
    )
    scaled = torch.full((10,), -torch.inf, dtype=torch.float64)
    scaled[list(kept)] = torch.tensor(SHAPE, dtype=torch.float64)[list(kept)] / temperature
    expected = scaled.softmax(dim=0) * rows
    counts = torch.bincount(tokens, minlength=10).double()
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi2 = ((counts - expected)[live] ** 2 / expected[live]).sum().item()
    assert chi2 < 29.6  # 99.95 % of chi-square with 9 degrees of freedom; the seed is fixed


def test_sample_covers_rare_ids_evenly() -> None:
    """Where every id is rare the largest noise decides: its far tail must not be coarse."""
    rows, vocab = 4000, 4096
    tokens, _ = lm_head_sample(ONE.expand(rows, 1), column(torch.zeros(vocab)), vocab, params(rows))
    counts = torch.bincount(tokens // 256, minlength=16).double()
    chi2 = ((counts - rows / 16) ** 2 / (rows / 16)).sum().item()
    assert chi2 < 39.7  # 99.95 % at 15 degrees of freedom; the seed is fixed
    # 4000 draws of 4096 ids: 4096 * (1 - (1 - 1/4096)^4000) = 2553.8 distinct, deviation 24.6
    assert abs(tokens.unique().numel() - 2553.8) < 5 * 24.6


def test_draws_depend_on_seed_and_position_only() -> None:
    flat = column(torch.zeros(1000))
    ones = ONE.expand(64, 1)
    first, _ = lm_head_sample(ones, flat, 1000, params(64, seed=1))
    again, _ = lm_head_sample(ones, flat, 1000, params(64, seed=1))
    shifted, _ = lm_head_sample(ones, flat, 1000, params(64, seed=1, position=1))
    assert torch.equal(first, again)
    assert torch.equal(shifted[:-1], first[1:])
    for other in (2, 1 + (1 << 32), -1):
        tokens, _ = lm_head_sample(ones, flat, 1000, params(64, seed=other))
        assert (tokens == first).sum() < 5
    far, _ = lm_head_sample(ones, flat, 1000, params(64, seed=1, position=1 << 32))
    assert (far == first).sum() < 5


def test_steady_sampling_grows_no_scratch() -> None:
    h, packed = draw(33, 60), pack_weight(draw(900, 60, seed=1))
    settings = mixed_params(33)
    lm_head_sample(h, packed, 900, settings)
    before = _ext.num_scratch_growths()
    for _ in range(3):
        lm_head_sample(h, packed, 900, settings)
    assert _ext.num_scratch_growths() == before


def test_pack_allowed() -> None:
    mask = torch.zeros(2, 65, dtype=torch.bool)
    mask[0, [0, 31, 32, 64]] = True
    assert pack_allowed(mask).tolist() == [[-(2**31) + 1, 1, 1], [0, 0, 0]]
    with pytest.raises(
        errors.InvalidArgument, match=r"pack_allowed: allowed must be bool \[B, V\]"
    ):
        pack_allowed(torch.zeros(2, 65))


# ---- refusals ----


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature_B", -0.5, r"temperature must be 0 \(greedy\) or in \[1e-6, inf\), got -0.5"),
        ("temperature_B", float("nan"), r"temperature must be .* got -?nan.* in row 1"),
        ("temperature_B", float("inf"), "temperature must be"),
        ("temperature_B", 1e-7, "temperature must be"),
        ("top_p_B", 0.0, r"top_p must be in \(0, 1\], got 0.0+ in row 1"),
        ("top_p_B", 1.5, "top_p must be"),
        ("top_p_B", float("nan"), "top_p must be"),
        ("top_k_B", -1, r"top_k must be 0 \(off\) or positive, got -1 in row 1"),
    ],
)
def test_sample_refuses_values_out_of_range(name: str, value: float, message: str) -> None:
    settings = params(2)
    getattr(settings, name)[1] = value
    with pytest.raises(errors.InvalidArgument, match=f"lm_head_sample: {message}"):
        lm_head_sample(ONE.expand(2, 1), column(torch.zeros(40)), 40, settings)


def test_sample_refuses_shapes_and_types() -> None:
    h, packed = torch.zeros(2, 8), pack_weight(torch.zeros(70, 8))

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(errors.InvalidArgument, match=match):
            lm_head_sample(h, packed, 70, replace(params(2), **changes))

    refused(r"temperature must be of shape \[2\]", temperature_B=torch.ones(3))
    refused("temperature must be float32", temperature_B=torch.ones(2).double().long())
    refused("top_k must be int32", top_k_B=torch.zeros(2, dtype=torch.int64))
    refused("seed must be int64", seed_B=torch.zeros(2))
    refused("position must be int64", position_B=torch.zeros(2, dtype=torch.int32))
    refused(r"allowed must be of shape \[2, 3\]", allowed_BW=torch.ones(2, 2, dtype=torch.int32))
    refused(
        "at least one bit set in each row, got none in row 1",
        allowed_BW=torch.tensor([[1, 0, 0], [0, 0, 64]], dtype=torch.int32),
    )


def test_logprobs_refusals() -> None:
    h, packed, targets = torch.zeros(2, 8), pack_weight(torch.zeros(70, 8)), torch.tensor([0, 1])
    with pytest.raises(errors.InvalidArgument, match=r"lm_head_logprobs: h must be \[T, 8\]"):
        lm_head_logprobs(torch.zeros(2, 9), packed, 70, targets)
    with pytest.raises(errors.InvalidArgument, match=r"vocab_size must be in \[1, 70\], got 71"):
        lm_head_logprobs(h, packed, 71, targets)
    with pytest.raises(errors.InvalidArgument, match=r"vocab_size must be in \[1, 70\], got 0"):
        lm_head_logits(h, packed, 0)
    with pytest.raises(errors.InvalidArgument, match=r"targets must be in \[0, 70\), got 70"):
        lm_head_logprobs(h, packed, 70, torch.tensor([0, 70]))
    with pytest.raises(errors.InvalidArgument, match=r"targets must be in \[0, 70\), got -100"):
        lm_head_logprobs(h, packed, 70, torch.tensor([0, -100]))
    with pytest.raises(errors.InvalidArgument, match="targets must be int64, got int32"):
        lm_head_logprobs(h, packed, 70, targets.int())
    with pytest.raises(errors.InvalidArgument, match="weight must be bfloat16, got float32"):
        lm_head_logprobs(h.bfloat16(), packed, 70, targets)
    with pytest.raises(errors.InvalidArgument, match="lm_head_logprobs: h requires grad"):
        lm_head_logprobs(h.requires_grad_(), packed, 70, targets)
