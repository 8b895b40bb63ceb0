"""The ops a trainable model calls: the kernels, or their references in plain torch.

On a device without kernels the public functions run the references by themselves; a set asks for
them anywhere, to check or to compare.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tml_core.ops.attn_prologue_packed import attn_prologue_packed, attn_prologue_packed_reference
from tml_core.ops.embed import dmel_embed, dmel_embed_reference, embed, embed_reference
from tml_core.ops.hmlp import HmlpWeights, hmlp, hmlp_reference
from tml_core.ops.linear import linear, linear_reference
from tml_core.ops.linear_logp import (
    linear_logp,
    linear_logp_reference,
    linear_nll,
    linear_nll_reference,
)
from tml_core.ops.moe import moe, moe_reference
from tml_core.ops.rms_norm import rms_norm, rms_norm_reference
from tml_core.ops.router import router, router_reference
from tml_core.ops.sconv_norm_packed import sconv_norm_packed, sconv_norm_packed_reference
from tml_core.ops.session_attn_train import session_attn_train, session_attn_train_reference

__all__ = ["KERNELS", "REFERENCES", "OpSet"]

Op = Callable[..., Any]


@dataclass(frozen=True)
class OpSet:
    """One function for each op, with the arguments and results of the public one.

    ``linear_logp(h, weight, targets, vocab_size)`` returns log-probabilities and entropy.
    """

    embed: Op
    dmel_embed: Op
    hmlp: Op
    rms_norm: Op
    linear: Op
    attn_prologue: Op
    session_attn: Op
    sconv_norm: Op
    router: Op
    moe: Op
    linear_logp: Op
    linear_nll: Op


def _hmlp_reference(patches: Tensor, weights: HmlpWeights) -> Tensor:
    projections: list[Any] = list(weights.projections)
    return hmlp_reference(
        patches, weights.folds, projections, list(weights.norms), weights.final_norm, weights.eps
    )


def _session_attn_reference(*tensors: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
    """Scores in fp32, as the kernels have them."""
    q_TND = tensors[0]
    with q_TND.device:
        out, lse_TN = session_attn_train_reference(*(one.float() for one in tensors), **named)
    return out.to(q_TND.dtype), lse_TN


def _linear_logp(
    h_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, vocab_size: int, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    if with_entropy:
        return linear_logp(h_TH, weight_VH, targets_T, vocab_size, with_entropy=True)
    return linear_logp(h_TH, weight_VH, targets_T, vocab_size), None


def _linear_logp_reference(
    h_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, vocab_size: int, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logprobs_T, entropy_T = linear_logp_reference(h_TH, weight_VH, targets_T, vocab_size)
    return logprobs_T, entropy_T if with_entropy else None


KERNELS = OpSet(
    embed=embed,
    dmel_embed=dmel_embed,
    hmlp=hmlp,
    rms_norm=rms_norm,
    linear=linear,
    attn_prologue=attn_prologue_packed,
    session_attn=session_attn_train,
    sconv_norm=sconv_norm_packed,
    router=router,
    moe=moe,
    linear_logp=_linear_logp,
    linear_nll=linear_nll,
)
REFERENCES = OpSet(
    embed=embed_reference,
    dmel_embed=dmel_embed_reference,
    hmlp=_hmlp_reference,
    rms_norm=rms_norm_reference,
    linear=linear_reference,
    attn_prologue=attn_prologue_packed_reference,
    session_attn=_session_attn_reference,
    sconv_norm=sconv_norm_packed_reference,
    router=router_reference,
    moe=moe_reference,
    linear_logp=_linear_logp_reference,
    linear_nll=linear_nll_reference,
)
