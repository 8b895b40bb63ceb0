"""The flow head: a hidden state, and what was just said, to the next 50 ms of mel frames.

Flow matching (Lipman et al., arXiv 2210.02747) along straight lines: from noise at time 0 to a
block at time 1, by fixed Euler steps. The network says where the line ends, x, and (x - z) /
(1 - time) is the velocity at z: a block has more numbers than the network is wide, so noise does
not fit through it, but sound does (Li and He, arXiv 2511.13720).

Matrix products and norms are the package's ops, what is between them adds or multiplies
elementwise, so a row's bits do not depend on the batch, the threads or on whether weights are
packed (serving) or plain (training).

Shape suffixes: B rows, D hidden size of the model, K = F * M numbers of a block, F frames, M mel
channels, W width, P time features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tml_core.errors import InvalidArgument
from tml_core.media.dmel import DmelConfig
from tml_core.media.mel import Mel, dmel_of_mel
from tml_core.model.audio_out_config import AudioOutConfig
from tml_core.model.config import AudioConfig
from tml_core.ops.flow_noise import flow_noise
from tml_core.ops.linear import PackedWeight, linear, pack_weight
from tml_core.ops.rms_norm import rms_norm

__all__ = [
    "FLOW_PREFIX",
    "SELF_EMBED",
    "FlowHead",
    "FlowWeights",
    "flow_condition",
    "flow_end",
    "flow_shapes",
    "flow_weights",
    "normalise",
    "own_bins",
    "own_table",
    "time_features",
]

FLOW_PREFIX: Final = "model.audio_out."
SELF_EMBED: Final = FLOW_PREFIX + "self_embed.weight"
_NUM_TIME_FEATURES: Final = 16
_NORM_EPS: Final = 1e-6


@dataclass(frozen=True)
class FlowWeights:
    """Projections are packed, or plain [out, in] tensors, then everything is differentiable.

    ``condition`` [W, D + M] and its norm [W]; ``time`` [W, P]; ``block`` [W, K]; of each layer a
    norm [W], ``up`` [2W, 2W], a norm [2W] and ``down`` [W, 2W]; ``norm`` [W]; ``out`` [K, W].
    """

    condition: PackedWeight | Tensor
    condition_norm: Tensor
    time: PackedWeight | Tensor
    block: PackedWeight | Tensor
    layers: tuple[tuple[Tensor, PackedWeight | Tensor, Tensor, PackedWeight | Tensor], ...]
    norm: Tensor
    out: PackedWeight | Tensor


def flow_shapes(config: AudioOutConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the head, and of the embedding that marks own sound."""
    width, size = config.width, config.block_size
    shapes: dict[str, tuple[int, ...]] = {
        "self_embed.weight": (hidden_size,),
        "condition_proj.weight": (width, hidden_size + config.num_mel_bins),
        "condition_norm.weight": (width,),
        "time_proj.weight": (width, _NUM_TIME_FEATURES),
        "block_proj.weight": (width, size),
    }
    for layer in range(config.num_layers):
        shapes[f"layers.{layer}.input_norm.weight"] = (width,)
        shapes[f"layers.{layer}.up_proj.weight"] = (2 * width, 2 * width)
        shapes[f"layers.{layer}.inner_norm.weight"] = (2 * width,)
        shapes[f"layers.{layer}.down_proj.weight"] = (width, 2 * width)
    shapes["norm.weight"] = (width,)
    shapes["out_proj.weight"] = (size, width)
    return {FLOW_PREFIX + name: shape for name, shape in shapes.items()}


def flow_weights(
    config: AudioOutConfig, get: Callable[[str], Tensor], *, is_packed: bool
) -> FlowWeights:
    """The head's weights, taken from ``get`` by their canonical names."""

    def vector(name: str) -> Tensor:
        return get(f"{FLOW_PREFIX}{name}.weight")

    def matrix(name: str) -> PackedWeight | Tensor:
        weight = vector(f"{name}_proj")
        return pack_weight(weight) if is_packed else weight

    return FlowWeights(
        condition=matrix("condition"),
        condition_norm=vector("condition_norm"),
        time=matrix("time"),
        block=matrix("block"),
        layers=tuple(
            (
                vector(f"layers.{layer}.input_norm"),
                matrix(f"layers.{layer}.up"),
                vector(f"layers.{layer}.inner_norm"),
                matrix(f"layers.{layer}.down"),
            )
            for layer in range(config.num_layers)
        ),
        norm=vector("norm"),
        out=matrix("out"),
    )


def flow_condition(weights: FlowWeights, h_BD: Tensor, before_BM: Tensor) -> Tensor:
    """What the end of a line depends on beside block and time: [B, W] in the dtype of ``h_BD``.

    ``h_BD``: hidden states after the final norm. ``before_BM``: the last mel frame said before,
    normalised, float32; silence where nothing was.
    """
    x_BC = torch.cat((h_BD, before_BM.to(h_BD.dtype)), dim=1)
    return rms_norm(
        linear(x_BC, weights.condition), weights.condition_norm, _NORM_EPS, activation="gelu"
    )


def flow_end(weights: FlowWeights, z_BK: Tensor, condition_BW: Tensor, time_BP: Tensor) -> Tensor:
    """Where the line through block ``z_BK`` (float32) at its time ends: float32 [B, K]."""
    dtype = condition_BW.dtype
    x_BW = linear(z_BK.to(dtype), weights.block) + linear(time_BP.to(dtype), weights.time)
    for input_norm, up, inner_norm, down in weights.layers:
        both_BC = torch.cat((rms_norm(x_BW, input_norm, _NORM_EPS), condition_BW), dim=1)
        inner_BC = rms_norm(linear(both_BC, up), inner_norm, _NORM_EPS, activation="gelu")
        x_BW = x_BW + linear(inner_BC, down)
    return linear(rms_norm(x_BW, weights.norm, _NORM_EPS), weights.out, torch.float32)


def time_features(time_B: NDArray[np.float64]) -> Tensor:
    """cos(pi k t), k = 0 to P - 1, of times in [0, 1]: float32 [B, P]."""
    angles_BP = np.pi * time_B[:, None] * np.arange(_NUM_TIME_FEATURES)
    return torch.from_numpy(np.cos(angles_BP).astype(np.float32))


def own_bins(config: AudioOutConfig, audio: AudioConfig, mel_BFM: Mel | Tensor) -> Tensor:
    """Own sound as the audio encoder takes it: levels int32 [B, M + 1] of blocks float32 [B, F, M].

    The last channel is always 0: its row of `own_table` says whose voice it is.
    """
    mel = torch.as_tensor(mel_BFM).reshape(-1, config.num_mel_bins)
    dmel = DmelConfig(
        num_mel_bins=audio.num_mel_bins,
        num_levels=audio.num_levels,
        min_log10=audio.min_log10,
        max_log10=audio.max_log10,
    )
    return torch.nn.functional.pad(dmel_of_mel(mel, config.mel, dmel), (0, 1))


def own_table(table_VH: Tensor, self_embed_H: Tensor, num_levels: int) -> Tensor:
    """The dMel table with one more channel, whose first row is ``self_embed_H``: a sum over the
    channels of own sound then holds that vector. Differentiable."""
    padding = table_VH.new_zeros(num_levels - 1, table_VH.shape[1])
    return torch.cat((table_VH, self_embed_H[None], padding))


def normalise(config: AudioOutConfig, mel: Tensor) -> Tensor:
    """Log10 frames as the head sees them."""
    return (mel - config.mel_mean) / config.mel_std


class FlowHead:
    """The head as it is served. ``weights``: canonical names of `flow_shapes`; consumed, but for
    the embedding of own sound."""

    def __init__(self, config: AudioOutConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self._weights = flow_weights(config, weights.pop, is_packed=True)
        times = np.arange(config.num_steps) / config.num_steps
        self._times_NP = time_features(times)

    def draw(
        self,
        h_BD: Tensor,
        before_BM: Tensor,
        seeds: Sequence[int],
        positions: Sequence[int],
    ) -> Tensor:
        """A block for each row: log10 frames, float32 [B, F, M], in the range of ``config.mel``.

        ``h_BD``: hidden states in the model's dtype; ``before_BM``: the last frame said before,
        log10 float32, silence in rows that begin to speak. ``seeds`` and ``positions``: of the
        sampler and of the position that takes the block; with the row's inputs they decide its
        bits. Raises InvalidArgument for another number or width of rows.
        """
        config = self.config
        num_rows = h_BD.shape[0]
        if before_BM.shape != (num_rows, config.num_mel_bins):
            raise InvalidArgument(
                f"before: expected [{num_rows}, {config.num_mel_bins}], got {list(before_BM.shape)}"
            )
        if not len(seeds) == len(positions) == num_rows:
            raise InvalidArgument(
                f"seeds: expected a seed and a position for each of {num_rows} rows, "
                f"got {len(seeds)} and {len(positions)}"
            )
        if not num_rows:
            return torch.empty(0, config.num_frames, config.num_mel_bins)
        condition_BW = flow_condition(self._weights, h_BD, normalise(config, before_BM))
        z_BK = flow_noise(seeds, positions, config.block_size)
        for step in range(config.num_steps):
            time_BP = self._times_NP[step : step + 1].repeat(num_rows, 1)
            end_BK = flow_end(self._weights, z_BK, condition_BW, time_BP)
            # 1 / num_steps of the velocity (end - z) / (1 - step / num_steps).
            z_BK = z_BK + (end_BK - z_BK) * (1.0 / (config.num_steps - step))
        mel_BK = z_BK * config.mel_std + config.mel_mean
        mel = config.mel
        # A network that has learned nothing may say anything; NaN is silence.
        mel_BK = mel_BK.nan_to_num(nan=mel.min_log10).clamp(mel.min_log10, mel.max_log10)
        return mel_BK.view(num_rows, config.num_frames, config.num_mel_bins)
