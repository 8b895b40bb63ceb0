"""What a flow head learns from: where noise has to go to become the sound that was said.

Shape suffixes: A blocks, D hidden size, F frames, M mel channels, K = F * M.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.random import Philox
from torch import Tensor

from tml_core.errors import InvalidArgument
from tml_core.model.audio_out_config import AudioOutConfig
from tml_core.model.flow import (
    FlowWeights,
    flow_condition,
    flow_end,
    normalise,
    time_features,
)
from tml_core.ops.flow_noise import flow_noise, flow_uniform
from tml_core.ops.philox import FLOW_TRAIN_STREAM

__all__ = ["flow_loss", "flow_seed"]

# Nearer to the end of a line no Euler step begins, and a small error would be a large velocity.
_LEAST_LEFT: Final = 0.1


def flow_loss(
    config: AudioOutConfig,
    weights: FlowWeights,
    h_AD: Tensor,
    mel_AFM: Tensor,
    before_AM: Tensor,
    *,
    seed: int,
    draw_ids: Sequence[int],
) -> Tensor:
    """The squared error of the velocity, a mean over each block's numbers: float32 [A].

    ``h_AD``: hidden states of the positions before the blocks, in the model's dtype. ``mel_AFM``:
    log10 frames that were said, float32; ``before_AM``: the frame before each block, silence where
    an utterance begins. Block a is taken at a time in (0, 1) on the line from its noise to its
    frames, both a function of ``seed`` and ``draw_ids[a]``: name them anew at every step. Times are
    spread over the blocks of a call, one in each of A equal parts, in an order of their own.

    Differentiable in ``h_AD`` and in plain ``weights``. Lipman et al., arXiv 2210.02747.
    Raises InvalidArgument where the shapes do not fit each other.
    """
    num_blocks = len(h_AD)
    want = [num_blocks, config.num_frames, config.num_mel_bins]
    if list(mel_AFM.shape) != want:
        raise InvalidArgument(f"mel: expected {want}, got {list(mel_AFM.shape)}")
    if list(before_AM.shape) != [num_blocks, config.num_mel_bins]:
        raise InvalidArgument(
            f"before: expected {[num_blocks, config.num_mel_bins]}, got {list(before_AM.shape)}"
        )
    if len(draw_ids) != num_blocks:
        raise InvalidArgument(f"draw_ids: expected {num_blocks}, got {len(draw_ids)}")
    if not num_blocks:
        return h_AD.new_zeros(0, dtype=torch.float32)
    uniform_A = flow_uniform(seed, draw_ids, FLOW_TRAIN_STREAM)
    # Ranks of random numbers are a random order of the parts.
    time_A = (uniform_A.argsort(kind="stable").argsort(kind="stable") + uniform_A) / num_blocks
    noise_AK = flow_noise([seed] * num_blocks, draw_ids, config.block_size, FLOW_TRAIN_STREAM)
    device = h_AD.device
    noise_AK, time_A1 = noise_AK.to(device), torch.from_numpy(time_A).float().to(device)[:, None]
    target_AK = normalise(config, mel_AFM.reshape(num_blocks, -1))
    condition_AW = flow_condition(weights, h_AD, normalise(config, before_AM))
    between_AK = (1.0 - time_A1) * noise_AK + time_A1 * target_AK
    end_AK = flow_end(weights, between_AK, condition_AW, time_features(time_A).to(device))
    # Of the velocities (end - between) / left and (target - between) / left.
    left_A1 = (1.0 - time_A1).clamp(min=_LEAST_LEFT)
    return ((end_AK - target_AK) / left_A1).square().mean(dim=1)


def flow_seed(seed: int, step: int, batch: int) -> int:
    """A seed for `flow_loss` that is a function of a run's seed and a place in it, 64 bits."""
    # The 1 keeps it apart from what else is drawn for that place.
    place = np.array([0, 0, 1, batch], np.uint64)
    return int(Philox(key=np.array([seed, step], np.uint64), counter=place).random_raw())
