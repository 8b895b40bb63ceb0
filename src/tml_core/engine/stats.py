"""What an engine counts: plain numbers, written by its thread, read by anybody at any time."""

from dataclasses import dataclass, field
from typing import Final, Literal

__all__ = ["EngineCounters", "EngineStats", "Outcome"]

Outcome = Literal["done", "cancelled", "failed"]
_KEEP: Final = 0.02
_POLICIES: Final = ("emit_silence", "shrink_output", "coalesce_input")


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment. Gauges: what is there now; counters: since it was made.

    ``num_sessions``, ``num_parked``: open sessions, and those of them whose memory is in a file.
    ``num_turns``: open turns. ``*_pages_free`` and ``*_pages_held``: of the two pools. ``turns``:
    ended ones by outcome. ``misses``: of those, ended after their deadline. ``degraded``: turns by
    the policy applied. ``refused``: sessions and appends turned away. ``parked``, ``resumed``: how
    often. ``steps``, ``step_tokens``: model steps and the positions in them. ``kernel_s``: time in
    them and in the encoders and the sampler; ``host_s``: the rest of the engine thread's work.
    ``capacity``: sessions whose ticks, all at once, would be over within 200 ms in 99 of 100 cases,
    going by the steps and ticks of late; None before there were any.
    """

    num_sessions: int
    num_parked: int
    num_turns: int
    global_pages_free: int
    global_pages_held: int
    sliding_pages_free: int
    sliding_pages_held: int
    turns: dict[Outcome, int]
    misses: int
    degraded: dict[str, int]
    refused: int
    parked: int
    resumed: int
    steps: int
    step_tokens: int
    kernel_s: float
    host_s: float
    capacity: int | None

    @property
    def host_us_per_turn(self) -> float:
        """Mean work of the engine thread outside kernels a turn, in microseconds."""
        return 1e6 * self.host_s / max(1, sum(self.turns.values()))


@dataclass
class EngineCounters:
    """The counters of `EngineStats` as they grow; the engine thread alone adds to them, but for
    ``refused``."""

    turns: dict[Outcome, int] = field(
        default_factory=lambda: {"done": 0, "cancelled": 0, "failed": 0}
    )
    misses: int = 0
    degraded: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_POLICIES, 0))
    refused: int = 0
    parked: int = 0
    resumed: int = 0
    steps: int = 0
    step_tokens: int = 0
    kernel_s: float = 0.0
    host_s: float = 0.0
    tick_input: float = 0.0  # positions of a tick's input half, lately
    tick_output: float = 0.0  # tokens of its output half, near the most seen lately

    def note_tick(self, num_input: int, num_output: int) -> None:
        """Take in what a tick was made of."""
        self.tick_input += _KEEP * (num_input - self.tick_input) if self.tick_input else num_input
        self.tick_output = max(num_output, self.tick_output * (1 - _KEEP))
