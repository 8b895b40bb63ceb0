"""session_attn_train: session_attn over whole packed sequences, differentiable.

Shape suffixes: T tokens of all sequences, N query heads, K KV heads, D head dim, C relative dim,
R relative extent, B sequences, P pages, S keys of a page.
"""

from typing import Any

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.contract import PAGE_LEN
from tml_core.errors import InvalidArgument
from tml_core.ops._common import huge_empty, num_threads
from tml_core.ops._library import register_op
from tml_core.ops.session_attn import (
    pack_rel_bank,
    session_attn,
    session_attn_reference,
)

__all__ = ["session_attn_train", "session_attn_train_reference"]


def _fill_pages(k_TKD: Tensor, v_TKD: Tensor, cu_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh pages [P, 1, K, 2, 128 * D] in the kernel's layout and their table int32 [B, pages]."""
    num_kv_heads, head_dim = k_TKD.shape[1:]
    group = 2 if k_TKD.dtype == torch.bfloat16 else 1
    cu = cu_tokens.long()
    lengths_B = cu[1:] - cu[:-1]
    counts_B = (lengths_B + PAGE_LEN - 1) // PAGE_LEN
    first_B = counts_B.cumsum(0) - counts_B
    num_pages = int(counts_B.sum())
    seq_T = torch.repeat_interleave(torch.arange(len(lengths_B)), lengths_B)
    row_T = torch.arange(k_TKD.shape[0]) - cu[seq_T] + first_B[seq_T] * PAGE_LEN
    pages = huge_empty((num_pages, 1, num_kv_heads, 2, PAGE_LEN * head_dim), k_TKD.dtype)
    rows_SKD = torch.zeros(num_pages * PAGE_LEN, num_kv_heads, head_dim, dtype=k_TKD.dtype)
    rows_SKD[row_T] = k_TKD
    pages[:, 0, :, 0].view(num_pages, num_kv_heads, head_dim // group, PAGE_LEN, group).copy_(
        rows_SKD.view(num_pages, PAGE_LEN, num_kv_heads, head_dim // group, group).permute(
            0, 2, 3, 1, 4
        )
    )
    rows_SKD[row_T] = v_TKD
    pages[:, 0, :, 1].view(num_pages, num_kv_heads, PAGE_LEN // group, head_dim, group).copy_(
        rows_SKD.view(num_pages, PAGE_LEN // group, group, num_kv_heads, head_dim).permute(
            0, 3, 1, 4, 2
        )
    )
    most = int(counts_B.max()) if len(counts_B) else 0
    page_BP = torch.arange(max(most, 1))
    table = torch.where(page_BP < counts_B[:, None], first_B[:, None] + page_BP, -1)
    return pages, table.int()


def _forward(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    r_TNC: Tensor,
    bank_CR: Tensor,
    cu_tokens: Tensor,
    visible_end_T: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, head_dim = q_TND.shape
    lse_TN = torch.empty(num_tokens, num_heads)
    cu = cu_tokens.tolist()
    if cu[0] != 0 or cu[-1] != num_tokens or cu != sorted(cu):
        raise InvalidArgument(
            f"session_attn_train: cu_tokens must ascend from 0 to {num_tokens}, got {cu}"
        )
    if num_tokens == 0:
        return torch.empty(0, num_heads * head_dim, dtype=q_TND.dtype), lse_TN
    with torch.no_grad():
        pages, table = _fill_pages(k_TKD, v_TKD, cu_tokens)
        slots, start_pos = _whole(cu_tokens)
        out = session_attn(
            q_TND.contiguous(),
            r_TNC.contiguous(),
            pack_rel_bank(bank_CR),
            pages=pages,
            layer=0,
            table=table,
            cu_tokens=cu_tokens,
            slots=slots,
            start_pos=start_pos,
            visible_end_T=visible_end_T,
            window=window,
            scale=scale,
            lse_TN=lse_TN,
        )
    return out, lse_TN


def _forward_fake(q_TND: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, head_dim = q_TND.shape
    out = q_TND.new_empty(num_tokens, num_heads * head_dim)
    return out, q_TND.new_empty(num_tokens, num_heads, dtype=torch.float32)


def _whole(cu_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Slots and start positions of sequences that begin at position 0."""
    num_seqs = cu_tokens.shape[0] - 1
    return torch.arange(num_seqs, dtype=torch.int32), torch.zeros(num_seqs, dtype=torch.int64)


def _backward(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    r_TNC: Tensor,
    bank_CR: Tensor,
    cu_tokens: Tensor,
    visible_end_T: Tensor,
    window: int,
    scale: float,
    out: Tensor,
    lse_TN: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq_TND, dk_TKD, dv_TKD, dr_TNC = (
        torch.empty(x.shape, dtype=x.dtype) for x in (q_TND, k_TKD, v_TKD, r_TNC)
    )
    dbank_CR = torch.zeros(bank_CR.shape)
    if q_TND.shape[0] > 0:
        slots, start_pos = _whole(cu_tokens)
        _ext.session_attn_bwd(
            q_TND.contiguous(),
            k_TKD.contiguous(),
            v_TKD.contiguous(),
            r_TNC.contiguous(),
            pack_rel_bank(bank_CR.detach()).data,
            out,
            lse_TN,
            d_out.contiguous(),
            dq_TND,
            dk_TKD,
            dv_TKD,
            dr_TNC,
            dbank_CR,
            cu_tokens,
            slots,
            start_pos,
            visible_end_T,
            window,
            scale,
            num_threads(),
        )
    return dq_TND, dk_TKD, dv_TKD, dr_TNC, dbank_CR.to(bank_CR.dtype)


def _backward_fake(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    r_TNC: Tensor,
    bank_CR: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q_TND, k_TKD, v_TKD, r_TNC, bank_CR))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, d_out: Tensor, _d_lse: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, out, lse_TN = ctx.saved_tensors
    grads = _session_attn_train_bwd(*inputs, ctx.window, ctx.scale, out, lse_TN, d_out)
    return (*grads, None, None, None, None)


_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor r, Tensor bank, Tensor cu_tokens, Tensor visible_end, "
    "int window, float scale"
)
_session_attn_train_bwd = register_op(
    f"session_attn_train_bwd({_ARGS}, Tensor out, Tensor lse, Tensor d_out)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_session_attn_train = register_op(
    f"session_attn_train({_ARGS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_gradients,
    setup_context=_setup_context,
)


def session_attn_train(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    r_TNC: Tensor,
    bank_CR: Tensor,
    *,
    cu_tokens: Tensor,
    visible_end_T: Tensor,
    window: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of whole packed sequences over themselves: (o [T, N * D], lse fp32 [T, N]).

    q_TND [T, N, D], k_TKD and v_TKD [T, K, D], r_TNC [T, N, C], bank_CR [C, R]: normalised and
    log-scaled, all fp32 or all bf16; D a multiple of 16 up to 128. Sequence b is the tokens
    [cu_tokens[b], cu_tokens[b + 1]) at positions 0, 1, ...; ``cu_tokens`` int32 [B + 1].
    ``visible_end_T`` int64 [T]: the last position each token sees, its own (causal) or the end of
    its block. ``window``, ``scale`` and the bias are those of ``session_attn``, whose kernel runs
    on pages filled here: the bits of o are those of serving. Gradients (Inkling's relative bias
    included) flow to the five tensors, never through lse; fp32 sums in an order that depends on
    the sequence alone, one rounding, the same bits for any number of threads.
    On another device than the CPU the reference computes it. Raises InvalidArgument on shapes,
    dtypes and batches.
    """
    shapes = [list(x.shape) for x in (q_TND, k_TKD, v_TKD, r_TNC, bank_CR)]
    if [len(shape) for shape in shapes] != [3, 3, 3, 3, 2]:
        raise InvalidArgument(
            "session_attn_train: q, k, v, r, bank must be [T, N, D], [T, K, D], [T, K, D], "
            f"[T, N, C], [C, R], got {shapes}"
        )
    num_tokens, num_heads, head_dim = q_TND.shape
    num_kv_heads, (rel_dim, rel_len) = k_TKD.shape[1], bank_CR.shape
    if num_kv_heads == 0 or num_heads % num_kv_heads != 0 or 0 in (num_heads, rel_dim, rel_len):
        raise InvalidArgument(
            "session_attn_train: N must be a multiple of K and no size 0, got "
            f"N {num_heads}, K {num_kv_heads}, C {rel_dim}, R {rel_len}"
        )
    for name, x, shape in (
        ("k", k_TKD, [num_tokens, num_kv_heads, head_dim]),
        ("v", v_TKD, [num_tokens, num_kv_heads, head_dim]),
        ("r", r_TNC, [num_tokens, num_heads, rel_dim]),
    ):
        if list(x.shape) != shape:
            raise InvalidArgument(
                f"session_attn_train: {name} must be {shape}, got {list(x.shape)}"
            )
    if q_TND.dtype not in (torch.float32, torch.bfloat16):
        raise InvalidArgument(
            f"session_attn_train: q must be float32 or bfloat16, got {q_TND.dtype}"
        )
    for name, x in (("k", k_TKD), ("v", v_TKD), ("r", r_TNC), ("bank", bank_CR)):
        if x.dtype != q_TND.dtype:
            raise InvalidArgument(
                f"session_attn_train: {name} must be {q_TND.dtype} as q, got {x.dtype}"
            )
    if cu_tokens.ndim != 1 or cu_tokens.shape[0] < 1 or cu_tokens.dtype != torch.int32:
        raise InvalidArgument(
            "session_attn_train: cu_tokens must be int32 [B + 1], got "
            f"{cu_tokens.dtype} {list(cu_tokens.shape)}"
        )
    if list(visible_end_T.shape) != [num_tokens] or visible_end_T.dtype != torch.int64:
        raise InvalidArgument(
            f"session_attn_train: visible_end must be int64 [{num_tokens}], got "
            f"{visible_end_T.dtype} {list(visible_end_T.shape)}"
        )
    factor = 1.0 / head_dim if scale is None else scale
    inputs = (q_TND, k_TKD, v_TKD, r_TNC, bank_CR)
    if q_TND.device.type != "cpu":
        # Scores in fp32, as the kernel has them.
        with q_TND.device:
            out, lse_TN = session_attn_train_reference(
                *(one.float() for one in inputs),
                cu_tokens=cu_tokens,
                visible_end_T=visible_end_T,
                window=window,
                scale=factor,
            )
        return out.to(q_TND.dtype), lse_TN
    out, lse_TN = _session_attn_train(*inputs, cu_tokens, visible_end_T, window, factor)
    return out, lse_TN


def session_attn_train_reference(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    r_TNC: Tensor,
    bank_CR: Tensor,
    *,
    cu_tokens: Tensor,
    visible_end_T: Tensor,
    window: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``session_attn_reference`` sequence by sequence, in the inputs' precision."""
    outs, lses = [], []
    for begin, end in zip(cu_tokens[:-1].tolist(), cu_tokens[1:].tolist(), strict=True):
        rows = slice(begin, end)
        out, lse_TN = session_attn_reference(
            q_TND[rows],
            r_TNC[rows],
            bank_CR,
            k_TKD[rows],
            v_TKD[rows],
            torch.arange(end - begin, device=q_TND.device),
            visible_end_T[rows],
            window=window,
            scale=scale,
        )
        outs.append(out)
        lses.append(lse_TN)
    if not outs:
        return q_TND.flatten(1), q_TND.sum(dim=2)
    return torch.cat(outs), torch.cat(lses)
