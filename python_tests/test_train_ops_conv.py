"""sconv_norm and attn_prologue over packed sequences: serving bits, gradients, folds, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tml_core import _ext, errors
from tml_core.contract import CONV_TAPS, GRAD_BLOCK, PAGE_LEN
from tml_core.ops.attn_prologue import attn_prologue, read_page
from tml_core.ops.attn_prologue_packed import (
    attn_prologue_packed,
    attn_prologue_packed_reference,
)
from tml_core.ops.sconv_norm import sconv_norm
from tml_core.ops.sconv_norm_packed import sconv_norm_packed, sconv_norm_packed_reference

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
# fp32: sums in another order. bf16: the kernel differentiates at rounded values, a few roundings of
# half of 2^-7 each.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}
LENGTHS = [[], [0], [1], [2, 0, 3, 1], [19, 257, 4], [5, 700, 400]]
HEADS, KV_HEADS, D_REL = 4, 2, 6
OPS = torch.ops.tml


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of the whole tensor's norm."""
    assert got.shape == want.shape
    assert (got.double() - want.double()).norm() <= TOLERANCE[dtype] * want.double().norm()


def gradients(
    op: Callable[..., Any], leaves: list[torch.Tensor], douts: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    outputs = [output for output in op(*leaves) if output is not None]
    return torch.autograd.grad(outputs, leaves, douts, allow_unused=True)


def leaves64(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def norm64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def conv64(x: torch.Tensor, weight: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    parts = [x[:0]]
    for part in x.split(lengths):
        inputs = torch.cat([x.new_zeros(CONV_TAPS - 1, x.shape[1]), part])
        taps = [weight[:, tap] * inputs[tap : tap + len(part)] for tap in range(CONV_TAPS)]
        parts.append(part + sum(taps))
    return torch.cat(parts)


# ---- sconv_norm_packed ----


def sconv_inputs(num_tokens: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, residual, conv weight, norm weight."""
    return [
        draw(num_tokens, dim, dtype=dtype),
        draw(num_tokens, dim, dtype=dtype, seed=1),
        draw(dim, CONV_TAPS, seed=2) / 2,
        draw(dim, dtype=dtype, seed=3),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("has_norm", [False, True])
def test_sconv_norm_packed_has_the_bits_of_serving(
    dtype: torch.dtype, lengths: list[int], has_norm: bool
) -> None:
    x, residual, conv, norm = sconv_inputs(sum(lengths), 48, dtype)
    normed, total = sconv_norm_packed(
        x, residual, conv, norm if has_norm else None, EPS, cu(lengths)
    )
    rows = torch.zeros(9, 1, CONV_TAPS - 1, 48, dtype=dtype)
    for slot, (part, start) in enumerate(zip(x.split(lengths), cu(lengths).tolist(), strict=False)):
        for begin in range(0, len(part), 100):  # in steps, as a session appends
            where = slice(start + begin, start + min(begin + 100, len(part)))
            piece = sconv_norm(
                x[where],
                residual[where],
                conv,
                norm if has_norm else None,
                EPS,
                conv_rows=rows,
                conv_layer=0,
                channel=0,
                cu_tokens=cu([len(x[where])]),
                slots=torch.tensor([slot], dtype=torch.int32),
            )
            assert torch.equal(total[where], residual[where])  # updated in place
            if has_norm:
                assert normed is not None
                assert torch.equal(normed[where], piece)
    assert (normed is None) == (not has_norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("has_norm", [False, True])
def test_sconv_norm_packed_gradients_match_float64(
    dtype: torch.dtype, lengths: list[int], has_norm: bool
) -> None:
    leaves = [leaf.requires_grad_() for leaf in sconv_inputs(sum(lengths), 48, dtype)]
    douts = [draw(sum(lengths), 48, dtype=dtype, seed=4 + i) for i in range(1 + has_norm)]

    def run(*leaves: torch.Tensor) -> Any:
        x, residual, conv, norm = leaves
        return sconv_norm_packed(x, residual, conv, norm if has_norm else None, EPS, cu(lengths))

    def run64(*leaves: torch.Tensor) -> Any:
        x, residual, conv, norm = leaves
        total = residual + conv64(x, conv, lengths)
        return norm64(total, norm) if has_norm else None, total

    got = gradients(run, leaves, douts)
    want = gradients(run64, leaves64(leaves), [dout.double() for dout in douts])
    for a, b, leaf in zip(got, want, leaves, strict=True):
        if b is None:  # no norm, or no token
            assert a is None or a.eq(0).all()
        else:
            assert a.dtype == leaf.dtype
            assert_near(a, b, dtype)


def test_sconv_norm_packed_reference_agrees() -> None:
    leaves = [leaf.requires_grad_() for leaf in sconv_inputs(24, 16, torch.float32)]
    bounds, douts = cu([4, 0, 20]), [draw(24, 16, seed=4), draw(24, 16, seed=5)]
    assert_all_near(
        gradients(lambda *leaf: sconv_norm_packed(*leaf, EPS, bounds), leaves, douts),
        gradients(lambda *leaf: sconv_norm_packed_reference(*leaf, EPS, bounds), leaves, douts),
    )
    assert sconv_norm_packed_reference(*leaves[:3], None, EPS, bounds)[0] is None


def assert_all_near(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, torch.float32)


def sconv_bwd(lengths: list[int], dtype: torch.dtype, dim: int = 48) -> tuple[torch.Tensor, ...]:
    x, total, conv, norm = sconv_inputs(sum(lengths), dim, dtype)
    dnormed, dsum = (draw(sum(lengths), dim, dtype=dtype, seed=s) for s in (4, 5))
    grads: tuple[torch.Tensor, ...] = OPS.sconv_norm_packed_bwd(
        dnormed, dsum, x, total, conv, norm, EPS, cu(lengths)
    )
    return grads


@pytest.mark.parametrize("dtype", DTYPES)
def test_sconv_norm_packed_gradient_bits_do_not_depend_on_threads_isa_or_run(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    lengths = [3, 500, 0, 1, 297]  # enough elements that two threads share them
    expected = sconv_bwd(lengths, dtype, 80)
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(50 if isa == each_isa[-1] else 1):
                for got, want in zip(sconv_bwd(lengths, dtype, 80), expected, strict=True):
                    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sconv_norm_packed_input_gradients_do_not_see_the_neighbours(dtype: torch.dtype) -> None:
    lengths = [3, 40, 1, 20]
    x, total, conv, norm = sconv_inputs(64, 16, dtype)
    douts = [draw(64, 16, dtype=dtype, seed=s) for s in (4, 5)]
    packed = OPS.sconv_norm_packed_bwd(*douts, x, total, conv, norm, EPS, cu(lengths))
    for start, n in zip(cu(lengths).tolist(), lengths, strict=False):
        own = slice(start, start + n)
        alone = OPS.sconv_norm_packed_bwd(
            *(dout[own] for dout in douts), x[own], total[own], conv, norm, EPS, cu([n])
        )
        assert torch.equal(packed[0][own], alone[0])
        assert torch.equal(packed[1][own], alone[1])


def test_sconv_norm_packed_parameter_gradients_fold_blocks_of_tokens() -> None:
    # sequences that end with the blocks, so that each block can be computed alone
    lengths = [GRAD_BLOCK - 7, 7, GRAD_BLOCK, 76]
    x, total, conv, norm = sconv_inputs(sum(lengths), 32, torch.float32)
    douts = [draw(sum(lengths), 32, seed=s) for s in (4, 5)]
    whole = OPS.sconv_norm_packed_bwd(*douts, x, total, conv, norm, EPS, cu(lengths))
    expected = [torch.zeros(32, CONV_TAPS), torch.zeros(32)]
    for i, own in enumerate(([GRAD_BLOCK - 7, 7], [GRAD_BLOCK], [76])):
        block = slice(i * GRAD_BLOCK, i * GRAD_BLOCK + sum(own))
        part = OPS.sconv_norm_packed_bwd(
            *(dout[block] for dout in douts), x[block], total[block], conv, norm, EPS, cu(own)
        )
        expected = [expected[0] + part[2], expected[1] + part[3]]
    assert torch.equal(whole[2], expected[0])
    assert torch.equal(whole[3], expected[1])


# ---- attn_prologue_packed ----


class Prologue:
    """Inputs of one prologue over packed sequences."""

    def __init__(
        self, lengths: list[int], dtype: torch.dtype, log_floor: float = 0.0, head_dim: int = 32
    ) -> None:
        self.lengths, self.dtype, self.head_dim = lengths, dtype, head_dim
        self.channels = KV_HEADS * head_dim
        width = HEADS * (head_dim + D_REL) + 2 * self.channels
        self.leaves = [
            draw(sum(lengths), width, dtype=dtype),
            draw(self.channels, CONV_TAPS, seed=1) / 2,
            draw(self.channels, CONV_TAPS, seed=2) / 2,
            draw(head_dim, dtype=dtype, seed=3),
            draw(head_dim, dtype=dtype, seed=4),
        ]
        self.settings = {"eps": EPS, "log_floor": log_floor, "log_alpha": 0.3}
        self.douts = [
            draw(sum(lengths), *shape, dtype=dtype, seed=5 + i)
            for i, shape in enumerate(
                ((HEADS, head_dim), (KV_HEADS, head_dim), (KV_HEADS, head_dim), (HEADS, D_REL))
            )
        ]

    def named(self, leaves: tuple[torch.Tensor, ...]) -> dict[str, Any]:
        names = ("k_conv_C4", "v_conv_C4", "q_norm_D", "k_norm_D")
        return {**dict(zip(names, leaves[1:], strict=True)), **self.settings}

    def run(self, *leaves: torch.Tensor) -> Any:
        bounds = cu(self.lengths)
        return attn_prologue_packed(leaves[0], HEADS, **self.named(leaves), cu_tokens=bounds)

    def run64(self, *leaves: torch.Tensor) -> Any:
        qkvr, k_conv, v_conv, q_norm, k_norm = leaves
        dim = self.head_dim
        q, k, v, r = qkvr.split([HEADS * dim, self.channels, self.channels, HEADS * D_REL], 1)
        q = norm64(q.unflatten(1, (HEADS, dim)), q_norm)
        k = norm64(conv64(k, k_conv, self.lengths).unflatten(1, (KV_HEADS, dim)), k_norm)
        v = conv64(v, v_conv, self.lengths).unflatten(1, (KV_HEADS, dim))
        r = r.unflatten(1, (HEADS, D_REL))
        if self.settings["log_floor"] > 0:
            position = torch.cat([torch.arange(0), *(torch.arange(n) for n in self.lengths)])
            ratio = (position + 1).double() / self.settings["log_floor"]
            tau = (1 + self.settings["log_alpha"] * ratio.clamp(min=1).log())[:, None, None]
            q, r = q * tau, r * tau
        return q, k, v, r

    def backward(self) -> tuple[torch.Tensor, ...]:
        settings = self.settings
        grads: tuple[torch.Tensor, ...] = OPS.attn_prologue_packed_bwd(
            *self.douts,
            *(leaf.detach() for leaf in self.leaves),
            settings["eps"],
            settings["log_floor"],
            settings["log_alpha"],
            cu(self.lengths),
        )
        return grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("log_floor", [0.0, 100.0])
def test_attn_prologue_packed_has_the_bits_of_serving(
    dtype: torch.dtype, lengths: list[int], log_floor: float
) -> None:
    world = Prologue(lengths, dtype, log_floor)
    q, k, v, r = world.run(*world.leaves)
    num_seqs, max_pages = len(lengths), 6
    pages = torch.full(
        (num_seqs * max_pages, 1, KV_HEADS, 2, PAGE_LEN * world.head_dim), float("nan"), dtype=dtype
    )
    table = torch.arange(num_seqs * max_pages).int().view(num_seqs, max_pages)
    serving_q, serving_r = attn_prologue(
        world.leaves[0],
        HEADS,
        **world.named(tuple(world.leaves)),
        pages=pages,
        layer=0,
        table=table,
        conv_rows=torch.zeros(num_seqs, 1, CONV_TAPS - 1, 2 * world.channels, dtype=dtype),
        conv_layer=0,
        k_channel=0,
        v_channel=world.channels,
        cu_tokens=cu(lengths),
        slots=torch.arange(num_seqs).int(),
        start_pos=torch.zeros(num_seqs, dtype=torch.int64),
    )
    assert torch.equal(q, serving_q)
    assert torch.equal(r, serving_r)
    for seq, (keys, values) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
        for head in range(KV_HEADS):
            blocks = [read_page(pages[page, 0, head]) for page in table[seq]]
            stored = [torch.cat([block[i] for block in blocks])[: len(keys)] for i in (0, 1)]
            assert torch.equal(keys[:, head], stored[0])
            assert torch.equal(values[:, head], stored[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("log_floor", [0.0, 100.0])
def test_attn_prologue_packed_gradients_match_float64(
    dtype: torch.dtype, lengths: list[int], log_floor: float
) -> None:
    world = Prologue(lengths, dtype, log_floor)
    leaves = [leaf.requires_grad_() for leaf in world.leaves]
    got = gradients(world.run, leaves, world.douts)
    want = gradients(world.run64, leaves64(leaves), [dout.double() for dout in world.douts])
    for a, b, leaf in zip(got, want, leaves, strict=True):
        assert a.dtype == leaf.dtype
        assert_near(a, torch.zeros_like(leaf) if b is None else b, dtype)  # None: no token


def test_attn_prologue_packed_reference_agrees() -> None:
    world = Prologue([4, 0, 20], torch.float32, 7.0)
    leaves = [leaf.requires_grad_() for leaf in world.leaves]

    def reference(*leaves: torch.Tensor) -> Any:
        return attn_prologue_packed_reference(
            leaves[0], HEADS, **world.named(leaves), cu_tokens=cu(world.lengths)
        )

    assert_all_near(
        gradients(world.run, leaves, world.douts), gradients(reference, leaves, world.douts)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_attn_prologue_packed_gradient_bits_do_not_depend_on_threads_isa_or_run(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    # enough elements that two threads share them, in both directions
    world = Prologue([3, 500, 0, 1, 97], dtype, 100.0)
    values, grads = world.run(*world.leaves), world.backward()
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for got, want in zip(world.run(*world.leaves), values, strict=True):
                assert torch.equal(got, want)
            for _ in range(50 if isa == each_isa[-1] else 1):
                for got, want in zip(world.backward(), grads, strict=True):
                    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attn_prologue_packed_input_gradients_do_not_see_the_neighbours(dtype: torch.dtype) -> None:
    world = Prologue([3, 40, 1, 20], dtype, 7.0)
    packed = world.backward()[0]
    for start, n in zip(cu(world.lengths).tolist(), world.lengths, strict=False):
        own = slice(start, start + n)
        alone = Prologue([n], dtype, 7.0)
        alone.leaves[0] = world.leaves[0][own]
        alone.douts = [dout[own] for dout in world.douts]
        assert torch.equal(packed[own], alone.backward()[0])


def test_packed_ops_ignore_what_surrounds_their_rows() -> None:
    world = Prologue([3, 40], torch.bfloat16, 7.0)
    qkvr = world.leaves[0]
    expected = world.backward()
    wide = torch.full((43, qkvr.shape[1] + 5), float("nan"), dtype=torch.bfloat16)
    wide[:, : qkvr.shape[1]] = qkvr
    world.leaves[0] = wide[:, : qkvr.shape[1]]
    assert all(map(torch.equal, world.backward(), expected))
    leaves = sconv_inputs(43, 32, torch.bfloat16)
    douts = [draw(43, 32, dtype=torch.bfloat16, seed=s) for s in (4, 5)]
    bounds = cu([3, 40])
    want = OPS.sconv_norm_packed_bwd(*douts, *leaves, EPS, bounds)
    inside = []
    for tensor in (*douts, *leaves[:2]):
        wide = torch.full((43, 40), float("nan"), dtype=torch.bfloat16)
        wide[:, :32] = tensor
        inside.append(wide[:, :32])
    got = OPS.sconv_norm_packed_bwd(*inside, *leaves[2:], EPS, bounds)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_ops_pass_opcheck(dtype: torch.dtype) -> None:
    bounds = cu([4, 0, 15])
    world = Prologue([4, 0, 15], dtype, 7.0, head_dim=16)
    prologue = (EPS, 7.0, 0.3, bounds)
    torch.library.opcheck(
        OPS.attn_prologue_packed_bwd.default, (*world.douts, *world.leaves, *prologue)
    )
    leaves = sconv_inputs(19, 16, dtype)
    douts = [draw(19, 16, dtype=dtype, seed=s) for s in (4, 5)]
    torch.library.opcheck(OPS.sconv_norm_packed_bwd.default, (*douts, *leaves, EPS, bounds))
    for leaf in (*leaves, *world.leaves):
        leaf.requires_grad_()
    qkvr, *parameters = world.leaves
    torch.library.opcheck(OPS.attn_prologue_packed.default, (qkvr, HEADS, *parameters, *prologue))
    torch.library.opcheck(OPS.sconv_norm_packed.default, (*leaves, EPS, bounds))
    torch.library.opcheck(OPS.sconv_norm_packed.default, (*leaves[:3], None, EPS, bounds))


def test_packed_ops_compile_whole() -> None:
    world, bounds = Prologue([4, 15], torch.float32, 7.0, head_dim=16), cu([4, 15])
    leaves = [*world.leaves, *sconv_inputs(19, 64, torch.float32)]

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        q, k, v, r = world.run(*leaves[:5])
        normed, total = sconv_norm_packed(q.flatten(1), *leaves[6:], EPS, bounds)
        assert normed is not None
        return sum(y.square().sum() for y in (normed, total, k, v, r))

    inputs = [leaf.requires_grad_() for i, leaf in enumerate(leaves) if i != 5]
    expected = torch.autograd.grad(loss(*leaves), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), inputs)
    assert_all_near(got, expected)


def test_packed_ops_refusals() -> None:
    x, residual, conv, norm = sconv_inputs(5, 16, torch.float32)

    def refuse(match: str, *args: Any) -> None:
        with pytest.raises(errors.InvalidArgument, match=match):
            sconv_norm_packed(*args)

    refuse("x must be .* H a multiple of 16", x[:, :8], residual, conv, norm, EPS, cu([5]))
    refuse(r"residual must be of shape \[5, 16\]", x, residual[:4], conv, norm, EPS, cu([5]))
    refuse(r"cu_tokens\[2\] must be 5 ", x, residual, conv, norm, EPS, cu([1, 3]))
    refuse("cu_tokens must be int32, got int64", x, residual, conv, norm, EPS, cu([5]).long())
    with pytest.raises(errors.InvalidArgument, match=r"_bwd: cu_tokens\[1\] must be at least 0"):
        bad = torch.tensor([0, -1, 5], dtype=torch.int32)
        OPS.sconv_norm_packed_bwd(x, x, x, x, conv, norm, EPS, bad)
    world = Prologue([5], torch.float32)

    def refuse_prologue(match: str, qkvr: torch.Tensor = world.leaves[0], **named: Any) -> None:
        named = {**world.named(tuple(world.leaves)), "cu_tokens": cu([5]), **named}
        with pytest.raises(errors.InvalidArgument, match=f"attn_prologue_packed: {match}"):
            attn_prologue_packed(qkvr, HEADS, **named)

    refuse_prologue(r"qkvr must be 4 \* 32 \+ 2 \* 64 \+ 4 \* d_rel wide", draw(5, 281))
    refuse_prologue(r"qkvr must be \[T, width\]", draw(280))
    refuse_prologue(r"cu_tokens\[1\] must be 5 ", cu_tokens=cu([4]))
    refuse_prologue(r"cu_tokens must be \[num_seqs \+ 1\], got an empty", cu_tokens=cu([5])[:0])
    refuse_prologue("k_norm must be float32, got bfloat16", k_norm_D=world.leaves[4].bfloat16())
    refuse_prologue("log_floor must be >= 0", log_floor=-1.0)
    refuse_prologue(r"v_conv must be of shape \[64, 4\]", v_conv_C4=draw(32, 4))
    refuse_prologue(r"q_norm must be \[D\] with D a multiple of 16", q_norm_D=draw(8))
