"""session_attn_train: serving's bits forward, float64 autograd's gradients backward."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_ops_session_attn import Heads, Tokens, attend, layer, tokens
from tml_core import _ext, errors
from tml_core.ops.session_attn_train import session_attn_train, session_attn_train_reference

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
NAMES = ("q", "k", "v", "r", "bank")
Grads = dict[str, torch.Tensor]


class Packed:
    """Several sequences side by side, with the gradient of their outputs."""

    def __init__(self, heads: Heads, seqs: list[Tokens], seed: int = 5) -> None:
        self.heads, self.seqs = heads, seqs
        self.cu = torch.tensor([0, *torch.tensor([len(s) for s in seqs]).cumsum(0).tolist()]).int()
        self.visible_end = torch.cat([s.visible_end for s in seqs])
        self.inputs = {n: torch.cat([getattr(s, n) for s in seqs]) for n in ("q", "k", "v", "r")}
        self.inputs["bank"] = heads.bank_CR
        generator = torch.Generator().manual_seed(seed)
        width = heads.num * heads.dim
        self.d_out = torch.randn(int(self.cu[-1]), width, generator=generator)

    def run(self) -> tuple[torch.Tensor, torch.Tensor, Grads]:
        inputs = {n: x.clone().requires_grad_() for n, x in self.inputs.items()}
        out, lse = session_attn_train(
            *inputs.values(),
            cu_tokens=self.cu,
            visible_end_T=self.visible_end,
            window=self.heads.window,
        )
        out.backward(self.d_out.to(out.dtype))
        grads = {n: x.grad for n, x in inputs.items()}
        return out.detach(), lse, {n: x for n, x in grads.items() if x is not None}

    def expected(self) -> tuple[torch.Tensor, Grads]:
        inputs = {n: x.double().requires_grad_() for n, x in self.inputs.items()}
        out, _ = session_attn_train_reference(
            *inputs.values(),
            cu_tokens=self.cu,
            visible_end_T=self.visible_end,
            window=self.heads.window,
        )
        d_out = self.d_out.to(self.inputs["q"].dtype).double()
        grads = torch.autograd.grad(out, list(inputs.values()), d_out)
        return out.detach(), dict(zip(inputs, grads, strict=True))


def check_gradients(packed: Packed) -> None:
    out, _, grads = packed.run()
    expected_out, expected = packed.expected()
    dtype = packed.inputs["q"].dtype
    # fp32: chains of fp32 products. bf16: o (in delta), p, ds and the result are rounded once
    # each, 2^-9 of a value; ds is a difference of such values.
    bound = 1e-4 if dtype == torch.float32 else 2**-6
    assert (out.double() - expected_out).norm() <= bound * expected_out.norm()
    for name in NAMES:
        assert grads[name].dtype == dtype
        # Where a softmax has one key, the gradients of its scores cancel to 0.
        scale = torch.maximum(expected[name].norm(), 1e-2 * expected["v"].norm())
        assert (grads[name].double() - expected[name]).norm() <= bound * scale, name


def assert_same(a: Grads, b: Grads) -> None:
    for name in NAMES:
        assert torch.equal(a[name], b[name]), name


@BOTH
@pytest.mark.parametrize(
    ("num", "num_kv", "dim", "rel"),
    [(2, 2, 32, 16), (3, 1, 48, 5), (8, 2, 64, 16), (4, 1, 128, 20), (5, 5, 16, 1)],
)
@pytest.mark.parametrize("length", [1, 19, 128, 257])
def test_session_attn_train_matches_float64(
    dtype: torch.dtype, num: int, num_kv: int, dim: int, rel: int, length: int
) -> None:
    heads = layer(num, num_kv, dim, dtype, rel=rel)
    check_gradients(Packed(heads, [tokens(heads, length)]))


@BOTH
@pytest.mark.parametrize("window", [1, 100, 128, 300])
def test_session_attn_train_window(dtype: torch.dtype, window: int) -> None:
    heads = layer(4, 2, 32, dtype, rel_len=window, window=window)
    check_gradients(Packed(heads, [tokens(heads, 530)]))


@BOTH
def test_session_attn_train_sees_the_rest_of_its_block(dtype: torch.dtype) -> None:
    heads = layer(4, 2, 64, dtype)
    blocks = ((20, 60), (100, 290))
    check_gradients(Packed(heads, [tokens(heads, 300, blocks=blocks)]))
    heads = layer(4, 2, 64, dtype, window=90)
    check_gradients(Packed(heads, [tokens(heads, 300, blocks=blocks)]))


@BOTH
@pytest.mark.parametrize("rel_len", [1, 2, 127, 128, 129])
def test_session_attn_train_bias_extent(dtype: torch.dtype, rel_len: int) -> None:
    heads = layer(2, 1, 32, dtype, rel_len=rel_len)
    check_gradients(Packed(heads, [tokens(heads, 300, blocks=((200, 290),))]))


@BOTH
def test_session_attn_train_packed_sequences(dtype: torch.dtype) -> None:
    heads = layer(6, 2, 32, dtype, window=150)
    lengths = (1, 257, 19, 0, 128)
    seqs = [tokens(heads, n, seed=i) for i, n in enumerate(lengths)]
    seqs[1].visible_end[30:70] = 69
    check_gradients(Packed(heads, seqs))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=4),
    st.sampled_from([(1, 1, 16), (6, 2, 32), (7, 1, 48), (16, 1, 16)]),
    st.sampled_from([0, 1, 40, 128]),
    st.integers(1, 20),
    st.data(),
)
def test_session_attn_train_of_any_batch(
    lengths: list[int],
    sizes: tuple[int, int, int],
    window: int,
    rel: int,
    data: st.DataObject,
) -> None:
    rel_len = data.draw(st.integers(1, 140), label="rel_len")
    heads = layer(*sizes, torch.float32, rel=rel, rel_len=rel_len, window=window)
    seqs = []
    for i, length in enumerate(lengths):
        edges = sorted(data.draw(st.sets(st.integers(0, length), max_size=4), label="edges"))
        seqs.append(tokens(heads, length, tuple(itertools.pairwise(edges)), seed=i))
    if sum(lengths) > 0:
        check_gradients(Packed(heads, seqs))


@BOTH
def test_session_attn_train_gradient_of_each_distance(dtype: torch.dtype) -> None:
    """The last token alone asks: the bank's gradient at distances 0, R - 1 and past R."""
    heads = layer(1, 1, 16, dtype, rel=16, rel_len=140)
    packed = Packed(heads, [tokens(heads, 150)])
    packed.d_out[:-1] = 0
    bank = packed.run()[2]["bank"].double()
    expected = packed.expected()[1]["bank"]
    for distance in (0, 1, 127, 128, 139):
        error = (bank[:, distance] - expected[:, distance]).norm()
        assert error <= 2**-6 * expected[:, distance].norm() + 1e-3 * expected.norm()


@BOTH
def test_session_attn_train_has_the_bits_of_serving(dtype: torch.dtype) -> None:
    heads = layer(4, 2, 64, dtype, window=200)
    seqs = [tokens(heads, 300, blocks=((40, 80),), seed=1), tokens(heads, 131, seed=2)]
    out, lse, _ = Packed(heads, seqs).run()
    served, served_lse = [], []
    for seq, cuts in zip(seqs, ([0, 37, 128, 299, 300], [0, 131]), strict=True):
        # A block is appended whole: [37, 128) holds all of [40, 80).
        for begin, end in itertools.pairwise(cuts):
            (o,), (log_sum,) = attend(heads, [(seq, begin, end)], seed=begin)
            served.append(o)
            served_lse.append(log_sum)
    assert torch.equal(out, torch.cat(served))
    assert torch.equal(lse, torch.cat(served_lse))


@BOTH
def test_session_attn_train_bits_do_not_depend_on_threads_or_isa(
    dtype: torch.dtype, each_isa: list[str]
) -> None:
    heads = layer(6, 3, 48, dtype, rel=5, window=200)
    packed = Packed(heads, [tokens(heads, 270, seed=1), tokens(heads, 19, blocks=((3, 9),))])
    _, _, expected = packed.run()
    for isa in each_isa:
        _ext.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_same(packed.run()[2], expected)


@BOTH
def test_session_attn_train_repeats_its_bits(dtype: torch.dtype) -> None:
    heads = layer(4, 2, 32, dtype)
    packed = Packed(heads, [tokens(heads, 150, seed=1), tokens(heads, 60)])
    _, _, expected = packed.run()
    for _ in range(50):
        assert_same(packed.run()[2], expected)


@BOTH
def test_session_attn_train_gradients_do_not_depend_on_neighbours(dtype: torch.dtype) -> None:
    heads = layer(3, 1, 32, dtype)
    seqs = [tokens(heads, n, seed=n) for n in (33, 140, 5)]
    together = Packed(heads, seqs)
    _, _, grads = together.run()
    alone = Packed(heads, seqs[1:2])
    alone.d_out = together.d_out[33:173]
    _, _, expected = alone.run()
    for name in ("q", "k", "v", "r"):
        assert torch.equal(grads[name][33:173], expected[name]), name


@BOTH
def test_session_attn_train_padding_is_neutral(dtype: torch.dtype) -> None:
    """Tokens behind the end and a sequence of padding, none with a gradient of its own."""
    heads = layer(4, 2, 32, dtype)
    seq = tokens(heads, 200, seed=3)
    short = Tokens(*(getattr(seq, n)[:131] for n in ("q", "r", "k", "v", "visible_end")))
    padded = Packed(heads, [seq, tokens(heads, 40, seed=4)])
    plain = Packed(heads, [short])
    padded.d_out[131:] = 0
    plain.d_out = padded.d_out[:131]
    _, _, grads = padded.run()
    _, _, expected = plain.run()
    for name in ("q", "k", "v", "r"):
        assert torch.equal(grads[name][:131], expected[name]), name
        assert not grads[name][131:].any(), name
    assert torch.equal(grads["bank"], expected["bank"])


def test_session_attn_train_of_no_tokens() -> None:
    heads = layer(2, 1, 16, torch.float32)
    out, lse, grads = Packed(heads, [tokens(heads, 0)]).run()
    assert out.shape == (0, 32) and lse.shape == (0, 2)
    assert grads["q"].shape == (0, 2, 16) and not grads["bank"].any()


@BOTH
def test_session_attn_train_passes_opcheck(dtype: torch.dtype) -> None:
    heads = layer(4, 2, 32, dtype)
    packed = Packed(heads, [tokens(heads, 30), tokens(heads, 7)])
    inputs = [x.clone().requires_grad_() for x in packed.inputs.values()]
    args = (*inputs, packed.cu, packed.visible_end, 0, 1 / 32)
    torch.library.opcheck(torch.ops.tml.session_attn_train.default, args)


def test_session_attn_train_compiles_whole() -> None:
    heads = layer(4, 2, 32, torch.float32)
    packed = Packed(heads, [tokens(heads, 30), tokens(heads, 7)])
    _, _, expected = packed.run()
    inputs = {n: x.clone().requires_grad_() for n, x in packed.inputs.items()}

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        out, _ = session_attn_train(*inputs, cu_tokens=packed.cu, visible_end_T=packed.visible_end)
        return (out * packed.d_out).sum()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs.values()).backward()
    assert_same({n: x.grad for n, x in inputs.items() if x.grad is not None}, expected)


def test_session_attn_train_refusals() -> None:
    heads = layer(4, 2, 32, torch.float32)
    packed = Packed(heads, [tokens(heads, 6)])
    q, k, v, r, bank = packed.inputs.values()
    cu, end = packed.cu, packed.visible_end
    refuses = pytest.raises
    with refuses(errors.InvalidArgument, match="session_attn_train: q, k, v, r, bank must be"):
        session_attn_train(q[0], k, v, r, bank, cu_tokens=cu, visible_end_T=end)
    with refuses(errors.InvalidArgument, match="session_attn_train: N must be a multiple of K"):
        session_attn_train(q[:, :3], k, v, r[:, :3], bank, cu_tokens=cu, visible_end_T=end)
    with refuses(errors.InvalidArgument, match=r"session_attn_train: v must be \[6, 2, 32\]"):
        session_attn_train(q, k, v[:5], r, bank, cu_tokens=cu, visible_end_T=end)
    with refuses(errors.InvalidArgument, match=r"bank must be torch.float32 as q"):
        session_attn_train(q, k, v, r, bank.bfloat16(), cu_tokens=cu, visible_end_T=end)
    with refuses(errors.InvalidArgument, match=r"cu_tokens must be int32 \[B \+ 1\]"):
        session_attn_train(q, k, v, r, bank, cu_tokens=cu.long(), visible_end_T=end)
    with refuses(errors.InvalidArgument, match=r"cu_tokens must ascend from 0 to 6, got \[0, 5\]"):
        session_attn_train(
            q, k, v, r, bank, cu_tokens=torch.tensor([0, 5]).int(), visible_end_T=end
        )
    with refuses(errors.InvalidArgument, match=r"visible_end\[2\] must be"):
        session_attn_train(
            q, k, v, r, bank, cu_tokens=cu, visible_end_T=torch.tensor([0, 1, 1, 3, 4, 5])
        )
    with refuses(errors.InvalidArgument, match="window must be >= 0"):
        session_attn_train(q, k, v, r, bank, cu_tokens=cu, visible_end_T=end, window=-1)
