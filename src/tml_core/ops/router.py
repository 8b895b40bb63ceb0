"""router: the experts a token visits and their weights, in fp32.

Shape suffixes: T tokens, H hidden, E routed experts, S shared experts, N = E + S, k chosen.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tml_core import _ext
from tml_core.errors import InvalidArgument
from tml_core.ops._common import num_threads, refuse_grad
from tml_core.ops._library import register_op
from tml_core.ops.linear import PackedWeight, packed_shape

__all__ = [
    "Routing",
    "load_balance_counts",
    "router",
    "router_reference",
    "update_router_bias",
]


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
    weight: PackedWeight | Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    scale: float | Tensor,
    return_logits: bool = False,
) -> Routing:
    """Choose ``top_k`` experts by sigmoid score + bias; weigh them against the shared experts.

    x_TH: [T, H] fp32 or bf16, rows dense. weight: fp32 [E + S, H] packed (``pack_weight`` of the
    fp32 upcast), shared rows last; to train, the fp32 [E + S, H] tensor itself. bias_E: fp32 [E],
    used for the choice only. scale: route scale times global scale; to train, it may be a fp32 [1]
    tensor. Equal scores go to the lower
    id. A NaN score loses to every number. Weights are the softmax of the log-sigmoids over chosen
    and shared experts, times ``scale``, rounded to the type of x: the same bits in both forms.

    The training form is differentiable in x, weight and a tensor of the scale, through weights,
    gammas and logits; the choice and the bias get no gradient. On a device without kernels it runs
    ``router_reference``. Raises InvalidArgument on other shapes or dtypes, E + S > 512 or
    ``top_k`` outside [1, min(E, 32)].
    """
    if isinstance(weight, Tensor):
        if weight.ndim != 2:
            raise InvalidArgument(f"router: weight must be [E + S, H], got {list(weight.shape)}")
        out_dim, in_dim = weight.shape
        refuse_grad("router", bias=bias_E)
    else:
        out_dim, in_dim = weight.out_dim, weight.in_dim
        refuse_grad("router", x=x_TH, bias=bias_E)
    if x_TH.ndim != 2 or x_TH.shape[1] != in_dim:
        raise InvalidArgument(f"router: x must be [T, {in_dim}], got {list(x_TH.shape)}")
    num_shared = out_dim - bias_E.numel()
    if num_shared < 0:
        raise InvalidArgument(
            f"router: bias must have at most {out_dim} entries (the weight's outputs), "
            f"got {bias_E.numel()}"
        )
    if top_k < 1:
        raise InvalidArgument(f"router: top_k must be at least 1, got {top_k}")
    if isinstance(weight, Tensor):
        if weight.dtype != torch.float32:
            raise InvalidArgument(f"router: weight must be float32, got {weight.dtype}")
        if not isinstance(scale, Tensor):
            scale = torch.full((1,), scale, dtype=torch.float32, device=x_TH.device)
        if scale.dtype != torch.float32 or list(scale.shape) != [1]:
            raise InvalidArgument(
                f"router: scale must be float32 [1], got {scale.dtype} {list(scale.shape)}"
            )
        if x_TH.device.type != "cpu":
            out = router_reference(x_TH, weight, bias_E, top_k=top_k, scale=scale)
        else:
            weights_Tk, gammas_TS, logits_TN, ids_Tk = _router(x_TH, weight, bias_E, scale, top_k)
            out = Routing(ids_Tk, weights_Tk, gammas_TS, logits_TN)
        return out if return_logits else out._replace(logits=None)
    if isinstance(scale, Tensor):
        raise InvalidArgument("router: scale must be a number with a packed weight, got a tensor")
    out = _empty_routing(x_TH, top_k, num_shared, out_dim if return_logits else None)
    _run(x_TH, weight.data, bias_E, out, scale)
    return out


def _empty_routing(x_TH: Tensor, top_k: int, num_shared: int, num_logits: int | None) -> Routing:
    num_tokens = x_TH.shape[0]
    return Routing(
        x_TH.new_empty(num_tokens, top_k, dtype=torch.int32),
        x_TH.new_empty(num_tokens, top_k, dtype=torch.float32),
        x_TH.new_empty(num_tokens, num_shared, dtype=torch.float32),
        None if num_logits is None else x_TH.new_empty(num_tokens, num_logits, dtype=torch.float32),
    )


def _run(x_TH: Tensor, packed: Tensor, bias_E: Tensor, out: Routing, scale: float) -> None:
    _ext.router(
        x_TH,
        packed,
        bias_E,
        out.expert_ids,
        out.weights,
        out.gammas,
        out.logits,
        scale,
        num_threads(),
    )


def load_balance_counts(expert_ids_Tk: Tensor, num_experts: int) -> Tensor:
    """Tokens that chose each expert: int64 [num_experts], from integer ids of any shape."""
    ids = expert_ids_Tk.reshape(-1).long()
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
        raise InvalidArgument(
            f"load_balance_counts: expert_ids must be in [0, {num_experts}), "
            f"got {int(ids.min())} to {int(ids.max())}"
        )
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
    return counts_E.index_add_(0, ids, torch.ones_like(ids))


def update_router_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The choice bias after a step: up by ``rate`` for experts below the mean load, else down.

    bias_E: fp32 [E]. counts_E: int64 [E], ``load_balance_counts`` summed over the step's tokens
    in any order: they are compared with their mean in integers, exactly, and an expert at the
    mean keeps its bias. Returns a new fp32 [E] without gradient.
    Aux-loss-free load balancing: Wang et al., arXiv 2408.15664.
    """
    if bias_E.dtype != torch.float32 or bias_E.ndim != 1:
        raise InvalidArgument(
            f"update_router_bias: bias must be float32 [E], got {bias_E.dtype} {list(bias_E.shape)}"
        )
    if counts_E.dtype != torch.int64 or counts_E.shape != bias_E.shape:
        raise InvalidArgument(
            f"update_router_bias: counts must be int64 {list(bias_E.shape)}, "
            f"got {counts_E.dtype} {list(counts_E.shape)}"
        )
    sign_E = (counts_E.sum() - counts_E * counts_E.numel()).sign()
    return bias_E.detach() + sign_E.float() * rate


# ---- the training form ----


def _router_kernel(
    x_TH: Tensor, weight_NH: Tensor, bias_E: Tensor, scale_1: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_outputs, in_dim = weight_NH.shape
    packed = torch.empty(packed_shape(num_outputs, in_dim, torch.float32))
    _ext.pack_weight(weight_NH.contiguous(), packed, num_threads())
    num_shared = num_outputs - bias_E.shape[0]
    out = _empty_routing(x_TH, top_k, num_shared, num_outputs)
    dense = x_TH if x_TH.stride(-1) == 1 else x_TH.contiguous()
    _run(dense, packed, bias_E.contiguous(), out, float(scale_1))
    return _float_first(out)


def _router_fake(
    x_TH: Tensor,
    weight_NH: Tensor,
    bias_E: Tensor,
    scale_1: Tensor,  # noqa: ARG001
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_outputs = weight_NH.shape[0]
    return _float_first(_empty_routing(x_TH, top_k, num_outputs - bias_E.shape[0], num_outputs))


def _float_first(out: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert out.logits is not None
    return out.weights, out.gammas, out.logits, out.expert_ids


def _router_bwd_kernel(
    x_TH: Tensor,
    weight_NH: Tensor,
    expert_ids_Tk: Tensor,
    logits_TN: Tensor,
    dweights_Tk: Tensor,
    dgammas_TS: Tensor,
    dlogits_TN: Tensor | None,
    scale_1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dx_TH, dw_NH, dscale_1 = _router_bwd_fake(x_TH, weight_NH)
    _ext.router_bwd(
        x_TH if x_TH.stride(-1) == 1 else x_TH.contiguous(),
        weight_NH.contiguous(),
        expert_ids_Tk,
        logits_TN,
        dweights_Tk.contiguous(),
        dgammas_TS.contiguous(),
        None if dlogits_TN is None else dlogits_TN.contiguous(),
        dx_TH,
        dw_NH,
        dscale_1,
        float(scale_1),
        num_threads(),
    )
    return dx_TH, dw_NH, dscale_1


def _router_bwd_fake(x_TH: Tensor, weight_NH: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x_TH.new_empty(x_TH.shape), weight_NH.new_empty(weight_NH.shape), weight_NH.new_empty(1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TH, weight_NH, _, scale_1, _ = inputs
    _, gammas_TS, logits_TN, ids_Tk = output
    ctx.save_for_backward(x_TH, weight_NH, scale_1, ids_Tk, logits_TN)
    ctx.num_shared = gammas_TS.shape[1]
    ctx.mark_non_differentiable(ids_Tk)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    dweights_Tk: Tensor | None,
    dgammas_TS: Tensor | None,
    dlogits_TN: Tensor | None,
    _: Tensor | None,
) -> tuple[Tensor | None, ...]:
    x_TH, weight_NH, scale_1, ids_Tk, logits_TN = ctx.saved_tensors
    if dweights_Tk is None:
        dweights_Tk = torch.zeros_like(ids_Tk, dtype=torch.float32)
    if dgammas_TS is None:
        dgammas_TS = dweights_Tk.new_zeros(x_TH.shape[0], ctx.num_shared)
    dx_TH, dw_NH, dscale_1 = _router_bwd(
        x_TH, weight_NH, ids_Tk, logits_TN, dweights_Tk, dgammas_TS, dlogits_TN, scale_1
    )
    grads = (dx_TH, dw_NH, None, dscale_1, None)
    return tuple(
        grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True)
    )


_router_bwd = register_op(
    "router_bwd(Tensor x, Tensor weight, Tensor expert_ids, Tensor logits, Tensor dweights,"
    " Tensor dgammas, Tensor? dlogits, Tensor scale) -> (Tensor, Tensor, Tensor)",
    _router_bwd_kernel,
    _router_bwd_fake,
)
_router = register_op(
    "router(Tensor x, Tensor weight, Tensor bias, Tensor scale, int top_k)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _router_kernel,
    _router_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def router_reference(
    x_TH: Tensor, weight_NH: Tensor, bias_E: Tensor, *, top_k: int, scale: float | Tensor
) -> Routing:
    """The same routing in plain torch (float64 for float64), from an unpacked weight."""
    wide = torch.float64 if x_TH.dtype == torch.float64 else torch.float32
    num_experts = bias_E.numel()
    logits_TN = x_TH.to(wide) @ weight_NH.to(wide).T
    choice_TE = logits_TN[:, :num_experts].sigmoid() + bias_E
    order_TE = choice_TE.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    ids_Tk = order_TE[:, :top_k].sort(dim=1).values
    terms = torch.cat([logits_TN.gather(1, ids_Tk), logits_TN[:, num_experts:]], dim=1)
    shares = logsigmoid(terms).softmax(dim=1) * scale
    rounded = shares.to(x_TH.dtype).to(wide)
    return Routing(ids_Tk.int(), rounded[:, :top_k], rounded[:, top_k:], logits_TN)
