"""moe: chosen and shared SwiGLU experts, each hit expert's weights streamed once.

Shape suffixes: T tokens, H hidden, I expert width, E routed experts, S shared experts, k chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.errors import InvalidArgument
from tml_core.ops._common import huge_empty, num_threads, refuse_grad
from tml_core.ops.linear import packed_shape

__all__ = ["PackedExperts", "moe", "moe_reference", "pack_experts"]

_HALF_PANEL = 16  # gate rows of a w13 panel; as many up rows follow


@dataclass(frozen=True)
class PackedExperts:
    """SwiGLU experts in the kernel's layout; the last ``num_shared`` serve every token.

    ``w13``: packed [E + S] gate and up matrices, sixteen rows of each to a panel.
    ``w2``: packed [E + S] down matrices. ``hidden`` H, ``width`` I.
    """

    w13: Tensor
    w2: Tensor
    num_shared: int
    hidden: int
    width: int

    @property
    def dtype(self) -> torch.dtype:
        return self.w13.dtype


def _panel_order(width: int) -> Tensor:
    """Row order of a [2I, H] gate-then-up matrix, with -1 where the last panel is padded."""
    padded = -(-width // _HALF_PANEL) * _HALF_PANEL
    rows = torch.arange(padded)
    gate = torch.where(rows < width, rows, -1).view(-1, _HALF_PANEL)
    up = torch.where(rows < width, rows + width, -1).view(-1, _HALF_PANEL)
    return torch.stack([gate, up], dim=1).flatten()


def pack_experts(gate_up_EJH: Tensor, down_EHI: Tensor, num_shared: int = 0) -> PackedExperts:
    """Pack [E + S, 2I, H] gate-then-up and [E + S, H, I] down weights, shared experts last."""
    refuse_grad("pack_experts", gate_up=gate_up_EJH, down=down_EHI)
    if gate_up_EJH.ndim != 3 or gate_up_EJH.shape[1] % 2:
        raise InvalidArgument(
            f"pack_experts: gate_up must be [E, 2I, H], got {list(gate_up_EJH.shape)}"
        )
    experts, width, hidden = gate_up_EJH.shape[0], gate_up_EJH.shape[1] // 2, gate_up_EJH.shape[2]
    if down_EHI.shape != (experts, hidden, width) or down_EHI.dtype != gate_up_EJH.dtype:
        raise InvalidArgument(
            f"pack_experts: down must be {gate_up_EJH.dtype} [{experts}, {hidden}, {width}], "
            f"got {down_EHI.dtype} {list(down_EHI.shape)}"
        )
    if not 0 <= num_shared <= experts:
        raise InvalidArgument(
            f"pack_experts: num_shared must be in [0, {experts}], got {num_shared}"
        )
    dtype = gate_up_EJH.dtype
    order = _panel_order(width)
    w13 = huge_empty((experts, *packed_shape(order.numel(), hidden, dtype)), dtype)
    w2 = huge_empty((experts, *packed_shape(hidden, width, dtype)), dtype)
    padding = (order < 0).nonzero().flatten()
    for e in range(experts):
        rows = gate_up_EJH[e].index_select(0, order.clamp_min(0))
        rows[padding] = 0
        _ext.pack_weight(rows, w13[e], num_threads())
        _ext.pack_weight(down_EHI[e], w2[e], num_threads())
    return PackedExperts(w13, w2, num_shared, hidden, width)


def moe(
    x_TH: Tensor,
    expert_ids_Tk: Tensor,
    weights_Tk: Tensor,
    gammas_TS: Tensor,
    experts: PackedExperts,
) -> Tensor:
    """Weighted sum of the chosen experts and of the shared ones.

    x_TH: [T, H] of the experts' dtype. expert_ids_Tk: int32, ascending in each row. weights_Tk:
    fp32, applied after the down projection. gammas_TS: fp32, applied to the shared experts'
    activations before it. Returns [T, H]: fp32 sums in ascending expert id, shared last, rounded
    once. Raises InvalidArgument on any other shape, dtype or order.
    """
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
        num_threads(),
    )  # fmt: skip
    return y_TH


def moe_reference(
    x_TH: Tensor,
    expert_ids_Tk: Tensor,
    weights_Tk: Tensor,
    gammas_TS: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
) -> Tensor:
    """The same sum token by token in fp32 torch, with the same two roundings."""
    num_experts = gate_up_EJH.shape[0] - gammas_TS.shape[1]
    width = down_EHI.shape[2]
    y_TH = torch.zeros(x_TH.shape)
    for t in range(x_TH.shape[0]):
        chosen = [(int(e), float(w), 1.0) for e, w in zip(expert_ids_Tk[t], weights_Tk[t], strict=True)]
        shared = [(num_experts + s, 1.0, float(g)) for s, g in enumerate(gammas_TS[t])]
        for expert, weight, gamma in chosen + shared:
            gate_up = gate_up_EJH[expert].float() @ x_TH[t].float()
            gate, up = gate_up[:width], gate_up[width:]
            h = (torch.nn.functional.silu(gate) * up * gamma).to(x_TH.dtype)
            y_TH[t] += weight * (down_EHI[expert].float() @ h.float())
    return y_TH.to(x_TH.dtype)
