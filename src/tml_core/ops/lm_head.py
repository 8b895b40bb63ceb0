"""lm_head: logits, log-probabilities and samples over the vocabulary.

Shape suffixes: T tokens, B rows to sample, H hidden, V vocabulary (unpadded), W = ceil(V / 32).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tml_core import _ext
from tml_core.contract import PANEL
from tml_core.errors import InvalidArgument
from tml_core.ops._common import num_threads, refuse_grad
from tml_core.ops.linear import PackedWeight, linear
from tml_core.ops.philox import gumbel_reference

__all__ = [
    "SampleRows",
    "lm_head_logits",
    "lm_head_logprobs",
    "lm_head_logprobs_reference",
    "lm_head_sample",
    "lm_head_sample_reference",
    "pack_allowed",
]


@dataclass(frozen=True)
class SampleRows:
    """How each row is drawn.

    ``temperature_B``: fp32, 0 for the most likely token, else at least 1e-6. ``top_k_B``: int32,
    0 for off. ``top_p_B``: fp32 in (0, 1], 1 for off; taken after top_k, on what it kept.
    ``seed_B``, ``position_B``: int64; the random numbers are a function of them and of the
    vocabulary id alone. ``allowed_BW``: int32 bits of the ids that may be chosen (bit i of word w
    is id 32 w + i), at least one in each row, or None for all.
    """

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    seed_B: Tensor
    position_B: Tensor
    allowed_BW: Tensor | None = None


def lm_head_logits(h_TH: Tensor, weight: PackedWeight, vocab_size: int) -> Tensor:
    """Logits fp32 [T, V] of the first ``vocab_size`` rows of the packed [V_padded, H] weight."""
    _check("lm_head_logits", h_TH, weight, vocab_size)
    panels = -(-vocab_size // PANEL)
    head = PackedWeight(weight.data[:panels], vocab_size, weight.in_dim)
    return linear(h_TH, head, torch.float32)


def lm_head_logprobs(
    h_TH: Tensor, weight: PackedWeight, vocab_size: int, targets_T: Tensor
) -> Tensor:
    """Log-softmax of the logits at ``targets_T`` (int64 [T]): fp32 [T].

    The [T, V] logits are never stored; workspace grows with T * V / 128. A row's bits depend on
    nothing but the row, and are those ``lm_head_sample`` reports for the same token.
    Raises InvalidArgument on shapes, dtypes, or a target outside [0, ``vocab_size``).
    """
    _check("lm_head_logprobs", h_TH, weight, vocab_size)
    logprobs_T = torch.empty(h_TH.shape[0])
    _ext.lm_head_logprobs(h_TH, weight.data, vocab_size, targets_T, logprobs_T, num_threads())
    return logprobs_T


def lm_head_sample(
    h_BH: Tensor,
    weight: PackedWeight,
    vocab_size: int,
    rows: SampleRows,
    *,
    out_B: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row: ids int64 [B] and their log-probabilities fp32 [B], in ``out_B`` if given.

    Gumbel-max with Philox4x32-10 keyed by (seed, position, id): a row draws the same token in any
    batch. Ties go to the lower id. The log-probability is the model's own: temperature 1, nothing
    masked. Raises InvalidArgument on shapes, dtypes and values out of range.
    """
    _check("lm_head_sample", h_BH, weight, vocab_size)
    if out_B is None:
        out_B = torch.empty(h_BH.shape[0], dtype=torch.int64), torch.empty(h_BH.shape[0])
    tokens_B, logprobs_B = out_B
    _ext.lm_head_sample(
        h_BH,
        weight.data,
        vocab_size,
        rows.temperature_B,
        rows.top_k_B,
        rows.top_p_B,
        rows.seed_B,
        rows.position_B,
        rows.allowed_BW,
        tokens_B,
        logprobs_B,
        num_threads(),
    )
    return tokens_B, logprobs_B


def pack_allowed(allowed_BV: Tensor) -> Tensor:
    """``SampleRows.allowed_BW`` from bool [B, V]; InvalidArgument on another shape or dtype."""
    if allowed_BV.ndim != 2 or allowed_BV.dtype != torch.bool:
        raise InvalidArgument(
            f"pack_allowed: allowed must be bool [B, V], got {allowed_BV.dtype} "
            f"{list(allowed_BV.shape)}"
        )
    rows, vocab_size = allowed_BV.shape
    num_words = -(-vocab_size // 32)
    padded = torch.zeros(rows, num_words * 32, dtype=torch.int64)
    padded[:, :vocab_size] = allowed_BV
    words = (padded.view(rows, num_words, 32) << torch.arange(32)).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _check(op: str, h: Tensor, weight: PackedWeight, vocab_size: int) -> None:
    refuse_grad(op, h=h)
    if h.ndim != 2 or h.shape[1] != weight.in_dim:
        raise InvalidArgument(f"{op}: h must be [T, {weight.in_dim}], got {list(h.shape)}")
    if not 1 <= vocab_size <= weight.out_dim:
        raise InvalidArgument(
            f"{op}: vocab_size must be in [1, {weight.out_dim}], got {vocab_size}"
        )


def lm_head_logprobs_reference(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """The log-softmax at the targets in float64."""
    return logits_TV.double().log_softmax(dim=1).gather(1, targets_T[:, None])[:, 0]


def lm_head_sample_reference(logits_BV: Tensor, rows: SampleRows) -> Tensor:
    """The same draw from fp32 logits in float64 numpy: int64 [B]."""
    vocab_size = logits_BV.shape[1]
    tokens = []
    for row in range(logits_BV.shape[0]):
        logits = logits_BV[row].double().numpy()
        allowed = np.arange(vocab_size)
        if rows.allowed_BW is not None:
            words = rows.allowed_BW[row].numpy()
            allowed = allowed[words[allowed // 32] >> (allowed % 32) & 1 == 1]
        temperature = float(rows.temperature_B[row])
        if temperature == 0:
            tokens.append(int(allowed[np.argmax(logits[allowed])]))
            continue
        top_k, top_p = int(rows.top_k_B[row]), float(rows.top_p_B[row])
        kept = np.sort(_kept(logits, allowed, temperature, top_k, top_p))
        noise = gumbel_reference(int(rows.seed_B[row]), int(rows.position_B[row]), vocab_size)
        tokens.append(int(kept[np.argmax(logits[kept] / temperature + noise[kept])]))
    return torch.tensor(tokens, dtype=torch.int64)


def _kept(
    logits: NDArray[np.float64],
    allowed: NDArray[np.intp],
    temperature: float,
    top_k: int,
    top_p: float,
) -> NDArray[np.intp]:
    ranked = allowed[np.argsort(-logits[allowed], kind="stable")]
    if top_k > 0:
        ranked = ranked[:top_k]
    if top_p < 1:
        weights = np.exp((logits[ranked] - logits[ranked[0]]) / temperature)
        reached = np.cumsum(weights)
        ranked = ranked[: int(np.searchsorted(reached, top_p * reached[-1])) + 1]
    return ranked
