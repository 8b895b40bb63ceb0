"""linear_logp: serving's bits forward, float64 autograd's gradients backward, whoever computes."""

import pytest
import torch

from tml_core import _ext, errors
from tml_core.ops.linear import pack_weight
from tml_core.ops.linear_logp import (
    IGNORED_TARGET,
    linear_logp,
    linear_logp_reference,
    linear_nll,
)
from tml_core.ops.lm_head import lm_head_logprobs

NAN = float("nan")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class Case:
    """Random h, weight, targets (some ignored) and gradients of both results."""

    def __init__(
        self, t: int, h: int, v: int, vocab_size: int, dtype: torch.dtype, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocab_size
        self.h = torch.randn(t, h, generator=generator).to(dtype)
        self.weight = (torch.randn(v, h, generator=generator) / h**0.5 * 2).to(dtype)
        self.targets = torch.randint(0, vocab_size, (t,), generator=generator)
        self.targets[3::7] = IGNORED_TARGET
        self.d_logprobs = torch.randn(t, generator=generator)
        self.d_entropy = torch.randn(t, generator=generator)

    def run(self, with_entropy: bool = False) -> tuple[torch.Tensor, ...]:
        """Results, then the gradients of h and weight."""
        h, weight = self.h.clone().requires_grad_(), self.weight.clone().requires_grad_()
        logprobs, entropy = linear_logp(h, weight, self.targets, self.vocab_size, with_entropy=True)
        loss = (logprobs * self.d_logprobs).sum()
        if with_entropy:
            loss = loss + (entropy * self.d_entropy).sum()
        loss.backward()
        assert h.grad is not None and weight.grad is not None
        return logprobs.detach(), entropy.detach(), h.grad, weight.grad

    def expected(self, with_entropy: bool = False) -> tuple[torch.Tensor, ...]:
        """The same by float64 autograd of the reference."""
        h, weight = self.h.double().requires_grad_(), self.weight.double().requires_grad_()
        logprobs, entropy = linear_logp_reference(h, weight, self.targets, self.vocab_size)
        loss = (logprobs * self.d_logprobs).sum()
        if with_entropy:
            loss = loss + (entropy * self.d_entropy).sum()
        loss.backward()
        assert h.grad is not None and weight.grad is not None
        return logprobs.detach(), entropy.detach(), h.grad, weight.grad


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    return float((x.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@BOTH
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(
    ("t", "h", "v", "vocab_size"),
    [(1, 1, 1, 1), (19, 75, 130, 129), (257, 64, 600, 523), (515, 19, 1100, 1100)],
)
def test_linear_logp_matches_float64(
    dtype: torch.dtype, with_entropy: bool, t: int, h: int, v: int, vocab_size: int
) -> None:
    case = Case(t, h, v, vocab_size, dtype)
    results, expected = case.run(with_entropy), case.expected(with_entropy)
    # Logits of size 2 by chains of up to 75 products in fp32; exact in bf16 too (exact products).
    for result, value in zip(results[:2], expected[:2], strict=True):
        torch.testing.assert_close(result.double(), value, rtol=1e-5, atol=2e-5)
    # bf16: dl and the result are rounded once each, 2^-9 of a value.
    bound = 1e-4 if dtype == torch.float32 else 2**-7
    for result, value in zip(results[2:], expected[2:], strict=True):
        assert result.dtype == dtype
        assert relative_error(result, value) < bound or value.norm() < 1e-6
    assert not results[3][vocab_size:].any()


@BOTH
def test_linear_logp_has_the_bits_of_serving(dtype: torch.dtype) -> None:
    case = Case(100, 64, 700, 650, dtype)
    logprobs = linear_logp(case.h, case.weight, case.targets, case.vocab_size)
    kept = case.targets != IGNORED_TARGET
    served = lm_head_logprobs(
        case.h[kept], pack_weight(case.weight), case.vocab_size, case.targets[kept]
    )
    assert torch.equal(logprobs[kept], served)
    assert not logprobs[~kept].any()


@BOTH
def test_linear_logp_bits_do_not_depend_on_threads_or_isa(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    case = Case(530, 75, 600, 590, dtype)
    expected = case.run(with_entropy=True)
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for result, value in zip(case.run(with_entropy=True), expected, strict=True):
                assert torch.equal(result, value)


@BOTH
def test_linear_logp_repeats_its_bits(dtype: torch.dtype) -> None:
    case = Case(40, 64, 300, 300, dtype)
    expected = case.run(with_entropy=True)
    for _ in range(50):
        for result, value in zip(case.run(with_entropy=True), expected, strict=True):
            assert torch.equal(result, value)


@BOTH
def test_linear_logp_ignores_padding_even_nan(dtype: torch.dtype) -> None:
    case, padded = Case(37, 48, 530, 530, dtype), Case(37, 48, 530, 530, dtype)
    padded.h = torch.cat([case.h, torch.full((500, 48), NAN, dtype=dtype)])
    padded.targets = torch.cat([case.targets, torch.full((500,), IGNORED_TARGET)])
    padded.d_logprobs = torch.cat([case.d_logprobs, torch.ones(500)])
    padded.d_entropy = torch.cat([case.d_entropy, torch.ones(500)])
    for result, value in zip(
        padded.run(with_entropy=True), case.run(with_entropy=True), strict=True
    ):
        assert torch.equal(result[: len(value)], value)
        assert not result[len(value) :].any()


@BOTH
def test_linear_logp_row_gradient_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    whole, alone = Case(60, 64, 700, 700, dtype), Case(60, 64, 700, 700, dtype)
    alone.h, alone.targets = whole.h[17:18], whole.targets[17:18]
    alone.targets[0] = 699
    alone.d_logprobs, alone.d_entropy = whole.d_logprobs[17:18], whole.d_entropy[17:18]
    assert torch.equal(alone.run()[2][0], whole.run()[2][17])


def test_linear_logp_of_no_tokens() -> None:
    logprobs, entropy, dh, dw = Case(0, 16, 20, 20, torch.float32).run(with_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    assert dh.shape == (0, 16) and not dw.any()


def test_linear_logp_takes_strided_rows() -> None:
    case, wide = Case(9, 32, 40, 40, torch.float32), torch.full((9, 50), NAN)
    wide[:, :32] = case.h
    expected = case.run()
    case.h = wide[:, :32]
    h, weight = case.h.detach().requires_grad_(), case.weight.T.contiguous().T.requires_grad_()
    logprobs = linear_logp(h, weight, case.targets)
    (logprobs * case.d_logprobs).sum().backward()
    assert torch.equal(logprobs, expected[0]) and torch.equal(h.grad, expected[2])
    assert torch.equal(weight.grad, expected[3])


@BOTH
def test_linear_logp_passes_opcheck(dtype: torch.dtype) -> None:
    case = Case(19, 32, 70, 66, dtype)
    for with_entropy in (False, True):
        args = (
            case.h.clone().requires_grad_(),
            case.weight.clone().requires_grad_(),
            case.targets,
            case.vocab_size,
            with_entropy,
        )
        torch.library.opcheck(torch.ops.tml.linear_logp.default, args)


def test_linear_logp_compiles_whole() -> None:
    case = Case(19, 32, 70, 66, torch.float32)
    expected = case.run()
    h, weight = case.h.clone().requires_grad_(), case.weight.clone().requires_grad_()

    def loss(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (linear_logp(h, weight, case.targets, case.vocab_size) * case.d_logprobs).sum()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(h, weight).backward()
    assert torch.equal(h.grad, expected[2]) and torch.equal(weight.grad, expected[3])


def test_linear_logp_refusals() -> None:
    h, weight, targets = torch.zeros(3, 8), torch.zeros(20, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(errors.InvalidArgument, match=r"linear_logp: h must be \[T, H\] and weight"):
        linear_logp(h, torch.zeros(20, 7), targets)
    with pytest.raises(errors.InvalidArgument, match="linear_logp: h and weight must both be"):
        linear_logp(h, weight.bfloat16(), targets)
    with pytest.raises(errors.InvalidArgument, match=r"linear_logp: targets must be int64 \[3\]"):
        linear_logp(h, weight, targets[:2])
    with pytest.raises(errors.InvalidArgument, match=r"vocab_size must be in \[1, 20\], got 21"):
        linear_logp(h, weight, targets, 21)
    with pytest.raises(errors.InvalidArgument, match=r"targets must be in \[0, 5\) or -100"):
        linear_logp(h, weight, targets + 5, 5)
    with pytest.raises(errors.InvalidArgument, match="targets must be in"):
        linear_logp(h, weight, targets - 1)


def weights_of(case: Case) -> torch.Tensor:
    return case.d_logprobs.abs()


@BOTH
@pytest.mark.parametrize(
    ("t", "h", "v", "vocab_size"),
    [(1, 1, 1, 1), (19, 75, 130, 129), (1200, 64, 600, 523), (0, 16, 20, 20)],
)
def test_linear_nll_has_the_bits_of_linear_logp(
    dtype: torch.dtype, t: int, h: int, v: int, vocab_size: int
) -> None:
    case = Case(t, h, v, vocab_size, dtype)
    weights = weights_of(case)
    case.d_logprobs = -weights
    logprobs, _, dh, dw = case.run()
    own_h, own_w = case.h.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss, found = linear_nll(own_h, own_w, case.targets, weights, vocab_size)
    loss.backward()
    assert torch.equal(found, logprobs) and not found.requires_grad
    assert own_h.grad is not None and own_w.grad is not None
    assert torch.equal(own_h.grad, dh) and torch.equal(own_w.grad, dw)
    exact = -(logprobs.double() * weights.double()).sum()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        same, alone = linear_nll(case.h, case.weight, case.targets, weights, vocab_size)
    assert torch.equal(same, loss) and torch.equal(alone, logprobs)


@BOTH
def test_linear_nll_keeps_no_more_logits_than_it_has_room_for(dtype: torch.dtype) -> None:
    """65,000 entries: 256 tokens at a time, and chains of dw as long."""
    case = Case(300, 8, 65000, 65000, dtype)
    weights = weights_of(case)
    h, weight = case.h.clone().requires_grad_(), case.weight.clone().requires_grad_()
    linear_nll(h, weight, case.targets, weights)[0].backward()
    case.d_logprobs = -weights
    _, _, dh, dw = case.expected()
    bound = 1e-4 if dtype == torch.float32 else 2**-7
    assert h.grad is not None and weight.grad is not None
    assert relative_error(h.grad, dh) < bound and relative_error(weight.grad, dw) < bound
    later = 256 + case.targets[256:].ne(IGNORED_TARGET).nonzero()[0, 0]
    alone = case.h[later : later + 1].clone().requires_grad_()
    targets = case.targets[later : later + 1]
    linear_nll(alone, case.weight, targets, weights[later : later + 1])[0].backward()
    assert torch.equal(alone.grad[0], h.grad[later])


def test_linear_nll_scales_with_what_comes_after() -> None:
    case = Case(19, 32, 70, 66, torch.float32)
    weights = weights_of(case)
    grads = []
    for scale in (1.0, 4.0):
        h = case.h.clone().requires_grad_()
        (scale * linear_nll(h, case.weight, case.targets, weights, 66)[0]).backward()
        grads.append(h.grad)
    assert torch.equal(grads[1], 4 * grads[0])


@BOTH
def test_linear_nll_passes_opcheck_and_compiles(dtype: torch.dtype) -> None:
    case = Case(19, 32, 70, 66, dtype)
    weights = weights_of(case)
    h, weight = case.h.clone().requires_grad_(), case.weight.clone().requires_grad_()
    args = (h, weight, case.targets, weights, 66)
    torch.library.opcheck(torch.ops.tml.linear_nll.default, args)
    expected, _ = linear_nll(*args)
    compiled = torch.compile(linear_nll, fullgraph=True, backend="aot_eager")
    loss, _ = compiled(*args)
    assert torch.equal(loss, expected)
    loss.backward()
    assert h.grad is not None and h.grad.abs().sum() > 0


def test_linear_nll_refusals() -> None:
    h, weight, targets = torch.zeros(3, 8), torch.zeros(20, 8), torch.zeros(3, dtype=torch.int64)
    weights = torch.ones(3)
    with pytest.raises(errors.InvalidArgument, match=r"linear_nll: weights must be float32 \[3\]"):
        linear_nll(h, weight, targets, weights[:2])
    with pytest.raises(errors.InvalidArgument, match="linear_nll: weights must not require"):
        linear_nll(h, weight, targets, weights.requires_grad_())
    with pytest.raises(errors.InvalidArgument, match=r"linear_nll: targets must be int64 \[3\]"):
        linear_nll(h, weight, targets[:2], weights)
