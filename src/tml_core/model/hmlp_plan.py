"""Sizes of the hMLP patch encoder's layers, from the few numbers a config gives."""

import functools
import itertools
from dataclasses import dataclass

import torch

from tml_core.errors import CheckpointError

__all__ = ["HmlpLayer", "plan_hmlp"]


@dataclass(frozen=True)
class HmlpLayer:
    """One layer of the patch encoder: fold ``t_fold x hw_fold x hw_fold``, project, normalise."""

    t_fold: int
    hw_fold: int
    in_width: int
    out_width: int
    has_norm: bool


def plan_hmlp(
    temporal_size: int, patch_size: int, num_channels: int, num_layers: int, hidden_size: int
) -> tuple[HmlpLayer, ...]:
    """The layers that take a patch of these sizes to one vector of ``hidden_size``.

    Only the last layer, which projects to ``hidden_size``, has no norm. Raises `CheckpointError`
    when no whole folds connect the planned sizes.
    """
    scales = _scales(temporal_size, patch_size, num_channels, num_layers)
    layers = []
    for index, (start, end) in enumerate(itertools.pairwise(scales)):
        if end[0] % start[0] or end[1] % start[1]:
            raise CheckpointError(
                f"vision_config: {num_layers} layers do not divide patch_size {patch_size}"
            )
        t_fold, hw_fold = end[0] // start[0], end[1] // start[1]
        is_last = index == num_layers - 1
        layers.append(
            HmlpLayer(
                t_fold=t_fold,
                hw_fold=hw_fold,
                in_width=start[2] * t_fold * hw_fold * hw_fold,
                out_width=hidden_size if is_last else end[2],
                has_norm=not is_last,
            )
        )
    return tuple(layers)


def _prime_factors(number: int) -> list[int]:
    factors = []
    divisor = 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


@functools.cache
def _scales(
    temporal_size: int, patch_size: int, num_channels: int, num_layers: int
) -> tuple[tuple[int, int, int], ...]:
    """(frames, side, channels) folded into one cell after 0, 1, ... ``num_layers`` layers.

    The sides are the cumulative products of the patch's prime factors, largest first, then the
    frames; with fewer layers than such scales, the subset nearest to geometric growth is taken
    (transformers: ``plan_out_scales``, whose float32 logarithms are repeated here bit for bit).
    """
    scales = [(1, 1, num_channels)]
    side = 1
    for factor in reversed(_prime_factors(patch_size)):
        side *= factor
        scales.append((1, side, -(-side * side * num_channels // 64) * 64))
    frames = 1
    for factor in reversed(_prime_factors(temporal_size)):
        frames *= factor
        # The published formula multiplies by 64 without dividing by it. Only plans that repeat the
        # last scale see this width: elsewhere the last layer's output is the hidden size.
        scales.append((frames, side, side * side * num_channels * frames * 64))

    total = torch.tensor(temporal_size * patch_size * patch_size * num_channels)
    ideal_log = torch.linspace(0, float(torch.log(total)), num_layers + 1)
    sizes = torch.tensor([frames * side * side for frames, side, _ in scales])
    cost = (ideal_log[:, None] - torch.log(sizes.float())[None, :]).abs()
    if num_layers >= len(scales):
        picked = tuple(cost.argmin(dim=1).tolist())
    else:
        rows = cost.double().tolist()
        picked = min(
            itertools.combinations(range(len(scales)), num_layers + 1),
            key=lambda columns: sum(row[column] for row, column in zip(rows, columns, strict=True)),
        )
    return (scales[0], *(scales[index] for index in picked[1:-1]), scales[-1])
