"""hmlp: the patch encoder: cells folded into channels, projected, normalised; a patch is a token.

Shape suffixes: P patches, T frames, S side in cells, C channels, H hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tml_core.errors import InvalidArgument
from tml_core.ops._common import refuse_grad
from tml_core.ops.linear import PackedWeight, linear, linear_reference
from tml_core.ops.rms_norm import rms_norm, rms_norm_reference

__all__ = ["HmlpWeights", "fold_timespace", "hmlp", "hmlp_reference"]

_CHUNK = 256  # patches at a time, so that a large image needs no more workspace than a small one


@dataclass(frozen=True)
class HmlpWeights:
    """The encoder's layers, first to last.

    ``folds``: (frames, side) of the cells merged before each projection; ``projections``: packed,
    or plain [out, in] tensors (then ``hmlp`` is differentiable in them and in the norms);
    ``norms``: [out_dim] after every projection but the last; ``final_norm``: [H]; ``eps`` of all.
    """

    folds: tuple[tuple[int, int], ...]
    projections: tuple[PackedWeight | Tensor, ...]
    norms: tuple[Tensor, ...]
    final_norm: Tensor
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not 1 <= len(self.folds) == len(self.projections) == len(self.norms) + 1:
            raise InvalidArgument(
                "hmlp: expected as many folds as projections and one norm fewer, got "
                f"{len(self.folds)}, {len(self.projections)} and {len(self.norms)}"
            )
        for index in range(1, len(self.folds)):
            frames, side = self.folds[index]
            want = _dims(self.projections[index - 1])[0] * frames * side * side
            got = _dims(self.projections[index])[1]
            if got != want:
                raise InvalidArgument(
                    f"hmlp: projection {index} must take {want} channels, got {got}"
                )

    @property
    def dtype(self) -> torch.dtype:
        return self.projections[0].dtype

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """(frames, height, width, channels) of a patch."""
        frames = side = 1
        for t_fold, hw_fold in self.folds:
            frames, side = frames * t_fold, side * hw_fold
        first_frames, first_side = self.folds[0]
        channels = _dims(self.projections[0])[1] // (first_frames * first_side * first_side)
        return frames, side, side, channels


def _dims(projection: PackedWeight | Tensor) -> tuple[int, int]:
    """(out, in)."""
    if isinstance(projection, PackedWeight):
        return projection.out_dim, projection.in_dim
    return projection.shape[0], projection.shape[1]


def fold_timespace(x_PTSSC: Tensor, t_fold: int, hw_fold: int) -> Tensor:
    """Merge cells of ``t_fold`` frames x ``hw_fold`` x ``hw_fold`` into channels.

    [P, T, S, S, C] -> [P, T / t_fold, S / hw_fold, S / hw_fold, t_fold * hw_fold^2 * C], the
    channel order being frame, row, column, channel of the cell.
    """
    patches, frames, height, width, channels = x_PTSSC.shape
    t, h, w = frames // t_fold, height // hw_fold, width // hw_fold
    cells = x_PTSSC.reshape(patches, t, t_fold, h, hw_fold, w, hw_fold, channels)
    return cells.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(
        patches, t, h, w, t_fold * hw_fold * hw_fold * channels
    )


def hmlp(patches_PTSSC: Tensor, weights: HmlpWeights) -> Tensor:
    """Encode patches: [P, T, S, S, C] fp32 (normalised pixels) -> [P, H] in the weights' dtype.

    Patches are rounded to the weights' dtype first; each layer is linear, then rms_norm and gelu
    (not after the last), then the final rms_norm, rounded where those ops round. A patch's bits do
    not depend on the other patches. With packed projections no gradient is recorded; with plain
    ones there is one for the patches and every weight, and the bits are the same.
    Raises InvalidArgument on another shape.
    """
    is_packed = all(isinstance(weight, PackedWeight) for weight in weights.projections)
    if is_packed:
        refuse_grad(
            "hmlp",
            patches=patches_PTSSC,
            final_norm=weights.final_norm,
            **{f"norm {index}": norm for index, norm in enumerate(weights.norms)},
        )
    if tuple(patches_PTSSC.shape[1:]) != weights.patch_shape:
        want = ", ".join(map(str, weights.patch_shape))
        raise InvalidArgument(f"hmlp: patches must be [P, {want}], got {list(patches_PTSSC.shape)}")
    if not is_packed:  # a chunk would end a block of the gradients' sums
        return _encode(patches_PTSSC.to(weights.dtype), weights)
    out_PH = torch.empty(
        patches_PTSSC.shape[0], _dims(weights.projections[-1])[0], dtype=weights.dtype
    )
    for start in range(0, patches_PTSSC.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        out_PH[part] = _encode(patches_PTSSC[part].to(weights.dtype), weights)
    return out_PH


def _encode(x_PTSSC: Tensor, weights: HmlpWeights) -> Tensor:
    for index, (fold, projection) in enumerate(
        zip(weights.folds, weights.projections, strict=True)
    ):
        out_dim, in_dim = _dims(projection)
        x_PTSSC = fold_timespace(x_PTSSC, *fold)
        y_NC = linear(x_PTSSC.view(-1, in_dim), projection)
        if index < len(weights.norms):
            y_NC = rms_norm(y_NC, weights.norms[index], weights.eps, activation="gelu")
        x_PTSSC = y_NC.view(*x_PTSSC.shape[:-1], out_dim)
    x_PH = x_PTSSC.flatten(1)
    return rms_norm(x_PH, weights.final_norm, weights.eps)


def hmlp_reference(
    patches_PTSSC: Tensor,
    folds: tuple[tuple[int, int], ...],
    projections: list[Tensor],
    norms: list[Tensor],
    final_norm: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """The same encoder in torch, from unpacked [out, in] projections."""
    x_PTSSC = patches_PTSSC.to(projections[0].dtype)
    for index, (fold, w_NK) in enumerate(zip(folds, projections, strict=True)):
        x_PTSSC = linear_reference(fold_timespace(x_PTSSC, *fold), w_NK)
        if index < len(norms):
            x_PTSSC = rms_norm_reference(x_PTSSC, norms[index], eps, activation="gelu")
    return rms_norm_reference(x_PTSSC.flatten(1), final_norm, eps)
