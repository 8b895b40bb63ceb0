"""moe: chosen and shared SwiGLU experts, each hit expert's weights streamed once.

Shape suffixes: T tokens, H hidden, I expert width, J = 2I, E experts (shared ones last), S shared
experts, k chosen, P = k + S.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from tml_core import _ext
from tml_core.errors import InvalidArgument
from tml_core.ops._common import huge_empty, num_threads, refuse_grad
from tml_core.ops._library import register_op
from tml_core.ops.linear import packed_shape

__all__ = ["PackedExperts", "moe", "moe_reference", "pack_experts"]

_HALF_PANEL = 16  # gate rows of a w13 panel; as many up rows follow


@dataclass(frozen=True)
class PackedExperts:
    """SwiGLU experts in the kernel's layout; the last ``num_shared`` serve every token.

    ``w13``: packed [E] gate and up matrices, sixteen rows of each to a panel.
    ``w2``: packed [E] down matrices. ``hidden`` H, ``width`` I.
    """

    w13: Tensor
    w2: Tensor
    num_shared: int
    hidden: int
    width: int

    @property
    def dtype(self) -> torch.dtype:
        return self.w13.dtype


def _check_experts(op: str, gate_up_EJH: Tensor, down_EHI: Tensor) -> None:
    if gate_up_EJH.ndim != 3 or gate_up_EJH.shape[1] % 2:
        raise InvalidArgument(f"{op}: gate_up must be [E, 2I, H], got {list(gate_up_EJH.shape)}")
    experts, width, hidden = gate_up_EJH.shape[0], gate_up_EJH.shape[1] // 2, gate_up_EJH.shape[2]
    if down_EHI.shape != (experts, hidden, width) or down_EHI.dtype != gate_up_EJH.dtype:
        raise InvalidArgument(
            f"{op}: down must be {gate_up_EJH.dtype} [{experts}, {hidden}, {width}], "
            f"got {down_EHI.dtype} {list(down_EHI.shape)}"
        )


def _packed_shapes(gate_up_EJH: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    experts, width, hidden = gate_up_EJH.shape[0], gate_up_EJH.shape[1] // 2, gate_up_EJH.shape[2]
    rows = 2 * _HALF_PANEL * -(-width // _HALF_PANEL)
    dtype = gate_up_EJH.dtype
    return (
        (experts, *packed_shape(rows, hidden, dtype)),
        (experts, *packed_shape(hidden, width, dtype)),
    )


def pack_experts(gate_up_EJH: Tensor, down_EHI: Tensor, num_shared: int = 0) -> PackedExperts:
    """Pack [E, 2I, H] gate-then-up and [E, H, I] down weights, shared experts last."""
    refuse_grad("pack_experts", gate_up=gate_up_EJH, down=down_EHI)
    _check_experts("pack_experts", gate_up_EJH, down_EHI)
    experts, hidden, width = down_EHI.shape
    if not 0 <= num_shared <= experts:
        raise InvalidArgument(
            f"pack_experts: num_shared must be in [0, {experts}], got {num_shared}"
        )
    w13, w2 = (huge_empty(shape, gate_up_EJH.dtype) for shape in _packed_shapes(gate_up_EJH))
    _ext.pack_experts(gate_up_EJH.contiguous(), down_EHI.contiguous(), w13, w2, num_threads())
    return PackedExperts(w13, w2, num_shared, hidden, width)


def moe(
    x_TH: Tensor,
    expert_ids_Tk: Tensor,
    weights_Tk: Tensor,
    gammas_TS: Tensor,
    experts: PackedExperts | Tensor,
    down_EHI: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts and of the shared ones.

    x_TH: [T, H] of the experts' dtype. expert_ids_Tk: int32, ascending in each row. weights_Tk:
    fp32, applied after the down projection. gammas_TS: fp32, applied to the shared experts'
    activations before it. experts: packed for inference; to train, the matrices gate_up
    [E, 2I, H], and in ``down_EHI`` [E, H, I], shared experts last. Returns [T, H]: fp32 sums in
    ascending expert id, shared last, rounded once: the same bits in both forms.

    The training form is differentiable in all but the ids, and keeps gate and up of every (token,
    expert) for the backward pass, [T, k + S, 2I] of x's dtype (csrc/ops/moe_bwd.h has the sums).
    On a device without kernels it runs ``moe_reference``. A dense MLP is one expert for every
    token. Raises InvalidArgument on any other shape, dtype or order.
    """
    if isinstance(experts, PackedExperts):
        if down_EHI is not None:
            raise InvalidArgument("moe: down must be None with packed experts, got a tensor")
        return _moe_packed(x_TH, expert_ids_Tk, weights_Tk, gammas_TS, experts)
    if down_EHI is None:
        raise InvalidArgument("moe: down must be given with unpacked experts, got None")
    _check_experts("moe", experts, down_EHI)
    num_tokens, (num_experts, hidden, _) = x_TH.shape[0] if x_TH.ndim else 0, down_EHI.shape
    if x_TH.shape != (num_tokens, hidden) or x_TH.dtype != experts.dtype:
        raise InvalidArgument(
            f"moe: x must be {experts.dtype} [T, {hidden}], got {x_TH.dtype} {list(x_TH.shape)}"
        )
    if expert_ids_Tk.ndim != 2 or weights_Tk.shape != expert_ids_Tk.shape:
        raise InvalidArgument(
            f"moe: weights must be shaped like expert_ids {list(expert_ids_Tk.shape)}, "
            f"got {list(weights_Tk.shape)}"
        )
    if gammas_TS.ndim != 2 or gammas_TS.shape[1] > num_experts:
        raise InvalidArgument(
            f"moe: gammas must be [T, at most {num_experts}], got {list(gammas_TS.shape)}"
        )
    if x_TH.device.type != "cpu":
        return moe_reference(x_TH, expert_ids_Tk, weights_Tk, gammas_TS, experts, down_EHI)
    inputs = (x_TH, weights_Tk, gammas_TS, experts, down_EHI)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    y_TH: Tensor = _moe(x_TH, expert_ids_Tk, weights_Tk, gammas_TS, experts, down_EHI, save)[0]
    return y_TH


def _moe_packed(
    x_TH: Tensor,
    expert_ids_Tk: Tensor,
    weights_Tk: Tensor,
    gammas_TS: Tensor,
    experts: PackedExperts,
) -> Tensor:
    refuse_grad("moe", x=x_TH, weights=weights_Tk, gammas=gammas_TS)
    if x_TH.ndim != 2 or x_TH.shape[1] != experts.hidden:
        raise InvalidArgument(f"moe: x must be [T, {experts.hidden}], got {list(x_TH.shape)}")
    if gammas_TS.ndim != 2 or gammas_TS.shape[1] != experts.num_shared:
        raise InvalidArgument(
            f"moe: gammas must be [T, {experts.num_shared}], got {list(gammas_TS.shape)}"
        )
    y_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype)
    _ext.moe(
        x_TH, expert_ids_Tk, weights_Tk, gammas_TS, experts.w13, experts.w2, experts.width, y_TH,
        None, num_threads(),
    )  # fmt: skip
    return y_TH


# ---- the training form ----


def _moe_kernel(
    x_TH: Tensor,
    expert_ids_Tk: Tensor,
    weights_Tk: Tensor,
    gammas_TS: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor]:
    # Packed anew in every call: at 4096 tokens it is some 4 % of this pass, and writes through
    # `.data` or raw pointers would leave a cache keyed on version counters stale.
    w13, w2 = (torch.empty(s, dtype=gate_up_EJH.dtype) for s in _packed_shapes(gate_up_EJH))
    _ext.pack_experts(gate_up_EJH.contiguous(), down_EHI.contiguous(), w13, w2, num_threads())
    y_TH, saved_TPJ = _moe_fake(
        x_TH, expert_ids_Tk, weights_Tk, gammas_TS, gate_up_EJH, down_EHI, save
    )
    _ext.moe(
        _dense_rows(x_TH), expert_ids_Tk.contiguous(), weights_Tk.contiguous(),
        gammas_TS.contiguous(), w13, w2, down_EHI.shape[2], y_TH,
        saved_TPJ if save else None, num_threads(),
    )  # fmt: skip
    return y_TH, saved_TPJ


def _moe_fake(
    x_TH: Tensor,
    expert_ids_Tk: Tensor,
    weights_Tk: Tensor,  # noqa: ARG001
    gammas_TS: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,  # noqa: ARG001
    save: bool,
) -> tuple[Tensor, Tensor]:
    pairs = expert_ids_Tk.shape[1] + gammas_TS.shape[1]
    saved_TPJ = x_TH.new_empty(x_TH.shape[0] if save else 0, pairs, gate_up_EJH.shape[1])
    return x_TH.new_empty(x_TH.shape), saved_TPJ


def _dense_rows(x_TH: Tensor) -> Tensor:
    return x_TH if x_TH.stride(-1) == 1 else x_TH.contiguous()


def _moe_bwd_kernel(
    dy_TH: Tensor,
    x_TH: Tensor,
    expert_ids_Tk: Tensor,
    weights_Tk: Tensor,
    gammas_TS: Tensor,
    saved_TPJ: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    need_x: bool,
    need_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = _moe_bwd_fake(
        dy_TH, x_TH, expert_ids_Tk, weights_Tk, gammas_TS, saved_TPJ, gate_up_EJH, down_EHI,
        need_x, need_experts,
    )  # fmt: skip
    dx_TH, dweights_Tk, dgammas_TS, dgate_up_EJH, ddown_EHI = out
    dx_sum = dx_TH if x_TH.dtype == torch.float32 else torch.empty(dx_TH.shape)
    _ext.moe_bwd(
        _dense_rows(dy_TH), _dense_rows(x_TH), expert_ids_Tk.contiguous(), weights_Tk.contiguous(),
        gammas_TS.contiguous(), saved_TPJ, gate_up_EJH.contiguous(), down_EHI.contiguous(),
        dx_TH if need_x else None, dx_sum if need_x else None, dweights_Tk, dgammas_TS,
        dgate_up_EJH if need_experts else None, ddown_EHI if need_experts else None, num_threads(),
    )  # fmt: skip
    return out


def _moe_bwd_fake(
    dy_TH: Tensor,  # noqa: ARG001
    x_TH: Tensor,
    expert_ids_Tk: Tensor,  # noqa: ARG001
    weights_Tk: Tensor,
    gammas_TS: Tensor,
    saved_TPJ: Tensor,  # noqa: ARG001
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    need_x: bool,
    need_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor, needed: bool = True) -> Tensor:
        return tensor.new_empty(tensor.shape if needed else (0,))

    return (
        like(x_TH, need_x),
        like(weights_Tk),
        like(gammas_TS),
        like(gate_up_EJH, need_experts),
        like(down_EHI, need_experts),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _save = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy_TH: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x_TH, ids, weights, gammas, gate_up, down, saved = ctx.saved_tensors
    if dy_TH is None:
        return (None,) * 7
    need_x, need_experts = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:6])
    dx, dweights, dgammas, dgate_up, ddown = _moe_bwd(
        dy_TH, x_TH, ids, weights, gammas, saved, gate_up, down, need_x, need_experts
    )
    grads = (dx, None, dweights, dgammas, dgate_up, ddown, None)
    return tuple(
        grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True)
    )


_moe_bwd = register_op(
    "moe_bwd(Tensor dy, Tensor x, Tensor expert_ids, Tensor weights, Tensor gammas, Tensor saved,"
    " Tensor gate_up, Tensor down, bool need_x, bool need_experts)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _moe_bwd_kernel,
    _moe_bwd_fake,
)
_moe = register_op(
    "moe(Tensor x, Tensor expert_ids, Tensor weights, Tensor gammas, Tensor gate_up, Tensor down,"
    " bool save) -> (Tensor, Tensor)",
    _moe_kernel,
    _moe_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def moe_reference(
    x_TH: Tensor,
    expert_ids_Tk: Tensor,
    weights_Tk: Tensor,
    gammas_TS: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
) -> Tensor:
    """The same sum expert by expert in fp32 torch (float64 for float64), the same roundings."""
    wide = torch.float64 if x_TH.dtype == torch.float64 else torch.float32
    num_routed = gate_up_EJH.shape[0] - gammas_TS.shape[1]

    def hidden(expert: int, x: Tensor) -> Tensor:
        gate, up = (x.to(wide) @ gate_up_EJH[expert].to(wide).T).chunk(2, dim=-1)
        return silu(gate) * up

    def project(expert: int, h: Tensor) -> Tensor:
        return h.to(x_TH.dtype).to(wide) @ down_EHI[expert].to(wide).T

    y_TH = torch.zeros(x_TH.shape, dtype=wide, device=x_TH.device)
    for expert in range(num_routed):
        token, choice = (expert_ids_Tk == expert).nonzero(as_tuple=True)
        out = project(expert, hidden(expert, x_TH[token]))
        y_TH = y_TH.index_add(0, token, weights_Tk[token, choice, None] * out)
    for s in range(gammas_TS.shape[1]):
        expert = num_routed + s
        y_TH = y_TH + project(expert, hidden(expert, x_TH) * gammas_TS[:, s, None])
    return y_TH.to(x_TH.dtype)
