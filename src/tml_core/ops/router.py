"""router: the experts a token visits and their weights, in fp32.

Shape suffixes: T tokens, H hidden, E routed experts, S shared experts, N = E + S, k chosen.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tml_core import _ext
from tml_core.errors import InvalidArgument
from tml_core.ops._common import num_threads, refuse_grad
from tml_core.ops.linear import PackedWeight

__all__ = ["Routing", "router", "router_reference"]


class Routing(NamedTuple):
    """Where tokens go: what ``moe`` takes.

    ``expert_ids`` int32 [T, k], ascending in each row; ``weights`` fp32 [T, k] and ``gammas`` fp32
    [T, S], both holding values of the model dtype; ``logits`` fp32 [T, E + S] if asked for.
    """

    expert_ids: Tensor
    weights: Tensor
    gammas: Tensor
    logits: Tensor | None


def router(
    x_TH: Tensor,
    weight: PackedWeight,
    bias_E: Tensor,
    *,
    top_k: int,
    scale: float,
    return_logits: bool = False,
) -> Routing:
    """Choose ``top_k`` experts by sigmoid score + bias; weigh them against the shared experts.

    x_TH: [T, H] fp32 or bf16, rows dense. weight: fp32 [E + S, H] packed (``pack_weight`` of the
    fp32 upcast), shared rows last. bias_E: fp32 [E], used for the choice only. scale: route scale
    times global scale. Equal scores go to the lower id. A NaN score loses to every number.
    Weights are the softmax of the log-sigmoids over chosen and shared experts, times ``scale``,
    rounded to the type of x. Raises InvalidArgument on other shapes or dtypes, E + S > 512 or
    ``top_k`` outside [1, min(E, 32)].
    """
    refuse_grad("router", x=x_TH, bias=bias_E)
    if x_TH.ndim != 2 or x_TH.shape[1] != weight.in_dim:
        raise InvalidArgument(f"router: x must be [T, {weight.in_dim}], got {list(x_TH.shape)}")
    num_tokens, num_shared = x_TH.shape[0], weight.out_dim - bias_E.numel()
    if num_shared < 0:
        raise InvalidArgument(
            f"router: bias must have at most {weight.out_dim} entries (the weight's outputs), "
            f"got {bias_E.numel()}"
        )
    if top_k < 1:
        raise InvalidArgument(f"router: top_k must be at least 1, got {top_k}")
    out = Routing(
        torch.empty(num_tokens, top_k, dtype=torch.int32),
        torch.empty(num_tokens, top_k),
        torch.empty(num_tokens, num_shared),
        torch.empty(num_tokens, weight.out_dim) if return_logits else None,
    )
    _ext.router(
        x_TH,
        weight.data,
        bias_E,
        out.expert_ids,
        out.weights,
        out.gammas,
        out.logits,
        scale,
        num_threads(),
    )
    return out


def router_reference(
    x_TH: Tensor, weight_NH: Tensor, bias_E: Tensor, *, top_k: int, scale: float
) -> Routing:
    """The same routing in plain torch, from an unpacked [E + S, H] weight."""
    num_experts = bias_E.numel()
    logits_TN = x_TH.float() @ weight_NH.float().T
    choice_TE = logits_TN[:, :num_experts].sigmoid() + bias_E
    order_TE = choice_TE.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    ids_Tk = order_TE[:, :top_k].sort(dim=1).values
    terms = torch.cat([logits_TN.gather(1, ids_Tk), logits_TN[:, num_experts:]], dim=1)
    shares = logsigmoid(terms).softmax(dim=1) * scale
    rounded = shares.to(x_TH.dtype).float()
    return Routing(ids_Tk.int(), rounded[:, :top_k], rounded[:, top_k:], logits_TN)
