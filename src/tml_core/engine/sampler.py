"""How tokens are drawn: the options of a session, and the rows of one sampling call.

Legend: B rows, V vocabulary, W = ceil(V / 32).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.ops.lm_head import SampleRows

__all__ = [
    "RowBuffers",
    "SampleRequest",
    "SamplingParams",
    "SoundRequest",
    "sample_rows",
    "signed",
]

_MIN_TEMPERATURE: Final = 1e-6


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen among those the layout allows.

    ``temperature``: 0 takes the most likely token, 1 draws from the model's distribution.
    ``top_k``: only the k most likely (0: all). ``top_p``: only the most likely whose probabilities
    reach p (1: all), after ``top_k``. Draws are a function of (session seed, position), so equal
    prefixes and seeds give equal tokens. Raises InvalidArgument or InvalidType naming the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidType(f"{name}: expected a number, got {type(value).__name__}")
        is_drawn = math.isfinite(self.temperature) and self.temperature >= _MIN_TEMPERATURE
        if self.temperature != 0 and not is_drawn:
            raise InvalidArgument(
                f"temperature: expected 0 or at least {_MIN_TEMPERATURE:g}, got {self.temperature}"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
            raise InvalidType(f"top_k: expected an int, got {type(self.top_k).__name__}")
        if not 0 <= self.top_k < 2**31:
            raise InvalidArgument(f"top_k: expected at least 0, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidArgument(f"top_p: expected more than 0 and at most 1, got {self.top_p}")


class SampleRequest(NamedTuple):
    """One row to draw: ``allowed`` int32 [W] masks the ids, ``position`` is the new token's."""

    params: SamplingParams
    seed: int
    position: int
    allowed: Tensor


class SoundRequest(NamedTuple):
    """One block of sound to draw: the frame said before it, log10 float32 [M]; ``position`` is the
    block's."""

    before_M: Tensor
    seed: int
    position: int


class RowBuffers:
    """The rows of sampling calls in fixed memory: what a row keeps from one call to the next is not
    written again. ``num_words``: W of the masks."""

    def __init__(self, max_rows: int, num_words: int) -> None:
        self._all = SampleRows(
            temperature_B=torch.zeros(max_rows),
            top_k_B=torch.zeros(max_rows, dtype=torch.int32),
            top_p_B=torch.ones(max_rows),
            seed_B=torch.zeros(max_rows, dtype=torch.int64),
            position_B=torch.zeros(max_rows, dtype=torch.int64),
            allowed_BW=torch.zeros(max_rows, num_words, dtype=torch.int32),
        )
        self._position_B: NDArray[np.int64] = self._all.position_B.numpy()
        self._params: list[SamplingParams | None] = [None] * max_rows
        self._seeds = [0] * max_rows
        self._masks: list[Tensor | None] = [None] * max_rows
        self._views: dict[int, SampleRows] = {}

    def fill(self, requests: Sequence[SampleRequest]) -> SampleRows:
        """The rows of one sampling call, in order; valid until the next one."""
        rows = self._all
        params_at, seeds, masks = self._params, self._seeds, self._masks
        for row, (params, seed, _, allowed) in enumerate(requests):
            if params_at[row] is not params:
                params_at[row] = params
                rows.temperature_B[row] = params.temperature
                rows.top_k_B[row] = params.top_k
                rows.top_p_B[row] = params.top_p
            if seeds[row] != seed:
                seeds[row] = seed
                rows.seed_B[row] = signed(seed)
            if masks[row] is not allowed:
                masks[row] = allowed
                assert rows.allowed_BW is not None  # made above
                rows.allowed_BW[row] = allowed
        count = len(requests)
        self._position_B[:count] = [one.position for one in requests]
        view = self._views.get(count)
        if view is None:
            view = self._views[count] = _first(rows, count)
        return view


def _first(rows: SampleRows, count: int) -> SampleRows:
    allowed_BW = rows.allowed_BW
    return SampleRows(
        rows.temperature_B[:count],
        rows.top_k_B[:count],
        rows.top_p_B[:count],
        rows.seed_B[:count],
        rows.position_B[:count],
        None if allowed_BW is None else allowed_BW[:count],
    )


def signed(seed: int) -> int:
    """The seed's 64 bits as the kernel takes them."""
    return seed - 2**64 if seed >= 2**63 else seed


def sample_rows(requests: Sequence[SampleRequest]) -> SampleRows:
    """The rows of one sampling call, in order."""
    params = [one.params for one in requests]
    seeds = [signed(one.seed) for one in requests]
    return SampleRows(
        temperature_B=torch.tensor([one.temperature for one in params], dtype=torch.float32),
        top_k_B=torch.tensor([one.top_k for one in params], dtype=torch.int32),
        top_p_B=torch.tensor([one.top_p for one in params], dtype=torch.float32),
        seed_B=torch.tensor(seeds, dtype=torch.int64),
        position_B=torch.tensor([one.position for one in requests], dtype=torch.int64),
        allowed_BW=torch.stack([one.allowed for one in requests]),
    )
