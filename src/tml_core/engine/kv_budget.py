"""How many pages the sequences of a model get of the memory there is."""

from typing import NamedTuple

import torch

from tml_core.contract import PAGE_LEN
from tml_core.errors import InvalidArgument
from tml_core.model.config import TextConfig
from tml_core.model.kv_store import kv_sizes

__all__ = ["KvBudget", "KvLimits", "kv_budget", "least_bytes"]


class KvLimits(NamedTuple):
    """What sequences a model is to have room for.

    ``max_positions``: None for the model's own limit. ``kv_memory_bytes``: what all of them may
    take, None for a part of what is free.
    """

    max_sequences: int
    max_positions: int | None
    kv_memory_bytes: int | None
    max_step_tokens: int

    def check(self, config: TextConfig) -> int:
        """The positions of a sequence. Raises InvalidArgument naming a limit out of range."""
        for name, value in self._asdict().items():
            if value is not None and value < 1:
                raise InvalidArgument(f"{name}: expected at least 1, got {value}")
        if self.max_positions is None:
            return config.max_positions
        if self.max_positions > config.max_positions:
            raise InvalidArgument(
                f"max_positions: expected at most the model's {config.max_positions}, "
                f"got {self.max_positions}"
            )
        return self.max_positions

    def window_pages(self, config: TextConfig, positions: int, windows: int = 1) -> int:
        """Pages of sliding layers for one sequence: so many windows, and the step it is in."""
        sizes = kv_sizes(config, torch.bfloat16)
        step_pages = -(-self.max_step_tokens // PAGE_LEN) + 1
        return min(windows * sizes.window_pages + step_pages, -(-positions // PAGE_LEN))


class KvBudget(NamedTuple):
    """Sizes of a KvStore."""

    positions: int
    num_global_pages: int
    num_sliding_pages: int


def least_bytes(config: TextConfig, dtype: torch.dtype, limits: KvLimits) -> int:
    """What the sequences need before they can hold anything."""
    sizes = kv_sizes(config, dtype)
    fewest = limits.window_pages(config, limits.check(config))
    fixed = limits.max_sequences * (fewest * sizes.sliding_page_bytes + sizes.conv_bytes)
    return fixed + sizes.global_page_bytes


def kv_budget(
    config: TextConfig, dtype: torch.dtype, limits: KvLimits, budget_bytes: int
) -> KvBudget:
    """Pages for ``budget_bytes``. Raises InvalidArgument when they are too few."""
    positions = limits.check(config)
    sizes = kv_sizes(config, dtype)
    least = least_bytes(config, dtype, limits)
    if budget_bytes < least:
        raise InvalidArgument(
            f"kv_memory_bytes: {limits.max_sequences} sequences need at least {least}, "
            f"got {budget_bytes}"
        )
    fixed = least - sizes.global_page_bytes
    # Marks and a step of a long block take more than the window: three times that where there is
    # room.
    fewest = limits.window_pages(config, positions)
    most = limits.window_pages(config, positions, windows=4)
    spare = (budget_bytes - fixed) // 4
    extra = min(spare // max(1, sizes.sliding_page_bytes), limits.max_sequences * (most - fewest))
    left = budget_bytes - fixed - extra * sizes.sliding_page_bytes
    num_global = min(
        left // max(1, sizes.global_page_bytes),
        limits.max_sequences * -(-positions // PAGE_LEN),
    )
    return KvBudget(positions, num_global, limits.max_sequences * fewest + extra)
