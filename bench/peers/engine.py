"""What a bench asks of an engine, ours or a peer: build up a context, run a micro-turn on it."""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from shape_s import random_ids

__all__ = [
    "NUM_DECODED",
    "NUM_PREFILLED",
    "REAL_CONTEXT_LEN",
    "Engine",
    "TurnTime",
    "real_context",
    "timed_turn",
]

NUM_PREFILLED = 12
NUM_DECODED = 8

# So many positions of a context are computed. What a longer context adds is random K and V written
# into each engine's cache: a step takes the same time over them, and computing 32k positions takes
# the peers many minutes.
REAL_CONTEXT_LEN = 1024


class TurnTime(NamedTuple):
    """Seconds of a micro-turn: one step over its input and the first token's choice, then eight
    steps of one token with a choice after each. ``tokens``: the nine chosen ids."""

    prefill_s: float
    decode_s: float
    tokens: list[int]

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s


class Engine(Protocol):
    """One sequence of one engine, at two threads."""

    name: str

    @property
    def context_len(self) -> int:
        """Positions appended so far."""

    def grow(self, context_len: int) -> None:
        """Make the context at least that long."""

    def turn(self, ids: Tensor) -> TurnTime:
        """Append ``ids`` in one step and decode eight tokens greedily; 20 positions in all."""


def real_context(start: int, stop: int) -> Tensor:
    """Ids of the positions [start, stop) that every engine computes; none beyond the real part."""
    return random_ids(REAL_CONTEXT_LEN)[start:stop]


def timed_turn(ids: Tensor, step: Callable[[Tensor], Tensor]) -> TurnTime:
    """A micro-turn of an engine in this process; ``step`` appends ids and returns the next [1]."""
    start = time.perf_counter()
    token = step(ids)
    middle = time.perf_counter()
    tokens = [token]
    for _ in range(NUM_DECODED):
        token = step(token)
        tokens.append(token)
    end = time.perf_counter()
    return TurnTime(middle - start, end - middle, [int(one) for one in tokens])
