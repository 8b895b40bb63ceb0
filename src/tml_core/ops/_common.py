"""What every op module needs at the boundary to the kernels."""

import torch
from torch import Tensor

from tml_core import _ext
from tml_core.errors import InvalidArgument

__all__ = ["huge_empty", "num_threads", "refuse_grad"]


def num_threads() -> int:
    """Threads a kernel may use: torch's own setting (one pool, one knob)."""
    return torch.get_num_threads()


def refuse_grad(op: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that expect a gradient: these functions record none."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise InvalidArgument(
                f"{op}: {name} requires grad, which this op does not record; "
                "call it under torch.no_grad() or pass a detached tensor"
            )


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A zeroed tensor in huge-page memory, 2 MB aligned, committed on first touch."""
    numel = 1
    for size in shape:
        numel *= size
    data: Tensor = _ext.huge_empty(numel * dtype.itemsize)
    return data.view(dtype).view(shape)
