"""What the clients of a load run do, and when: a function of the spec alone.

Clients are open loop: each has a clock of 200 ms that does not wait for answers, and times are
absolute, so a generator that is late once does not send a burst to catch up. Faults are drawn
for every tick whether they are switched on or not; switching one on leaves the others in place.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal, TypeVar, get_args

import numpy as np

from tml_core.engine.seat import Degrade
from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media.micro_turns import TICK_MS

__all__ = ["Arrival", "ClientPlan", "LoadSpec", "Phase", "as_degrade", "as_phase", "make_plan"]

Phase = Literal["random", "spread", "aligned"]
Word = TypeVar("Word", bound=str)

_TICK_S: Final = TICK_MS / 1000
_TICKS_PER_MINUTE: Final = 60_000 // TICK_MS
# After the window the load goes on, so that its last ticks are answered under the same load.
_TAIL_S: Final = 5 * _TICK_S
_STALL_S: Final = (0.3, 2.0)
_AWAY_S: Final = (0.5, 3.0)
_BARGE_IN_S: Final = (0.0, 0.18)
_LEAVE_S: Final = (0.0, 0.18)


@dataclass(frozen=True)
class LoadSpec:
    """A load to put on an engine.

    ``duration_s``: the window that is measured, after ``warmup_s`` of the same load. ``phase``:
    how the clients' clocks lie to one another; "aligned" is the worst case. ``jitter_ms``: each
    chunk comes up to that much late. ``stalls``, ``disconnects``, ``barge_ins``: how often per
    client and minute; a stalled client loses all but the newest chunk, one that disconnects closes
    its session in the middle of a turn and comes back with a new one, a barge-in cancels a turn.
    ``deadline_ms``: from arrival; a later answer is a miss. ``degrade``: what sessions do when they
    cannot keep it (see `Session`).

    Raises InvalidArgument or InvalidType naming the field.
    """

    num_sessions: int = 1
    duration_s: float = 20.0
    warmup_s: float = 2.0
    phase: Phase = "random"
    jitter_ms: float = 0.0
    stalls: float = 0.0
    disconnects: float = 0.0
    barge_ins: float = 0.0
    deadline_ms: float = float(TICK_MS)
    degrade: Degrade = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("num_sessions", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidType(f"{name}: expected an int, got {type(value).__name__}")
            if value < low:
                raise InvalidArgument(f"{name}: expected at least {low}, got {value}")
        as_phase(self.phase)
        as_degrade(self.degrade)
        limits = {
            "duration_s": (_TICK_S, 86_400),
            "warmup_s": (0, 3600),
            "jitter_ms": (0, 60_000),
            "stalls": (0, _TICKS_PER_MINUTE),
            "disconnects": (0, _TICKS_PER_MINUTE),
            "barge_ins": (0, _TICKS_PER_MINUTE),
            "deadline_ms": (1, 60_000),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidType(f"{name}: expected a number, got {type(value).__name__}")
            if not (math.isfinite(value) and least <= value <= most):
                raise InvalidArgument(f"{name}: expected {least:g} to {most:g}, got {value}")

    @property
    def total_s(self) -> float:
        """Length of the whole run."""
        return self.warmup_s + self.duration_s + _TAIL_S

    def is_counted(self, at_s: float) -> bool:
        """Whether an arrival at that time of the run is inside the measured window."""
        return self.warmup_s <= at_s < self.warmup_s + self.duration_s


@dataclass(frozen=True)
class Arrival:
    """One chunk of one client, ``at_s`` seconds into the run.

    ``barge_in_s``: cancel the turn that long after. ``leave_s``: close the session that long
    after, and open a new one at ``back_s`` of the run.
    """

    tick: int
    at_s: float
    barge_in_s: float | None = None
    leave_s: float | None = None
    back_s: float | None = None


@dataclass(frozen=True)
class ClientPlan:
    """All that one client does. ``offset``: where in the recording it begins. ``num_lost``: chunks
    of the window that a stall swallowed; ``num_away``: those that fell into a disconnect."""

    client: int
    seed: int
    offset: int
    arrivals: tuple[Arrival, ...]
    num_lost: int
    num_away: int


def as_phase(word: str) -> Phase:
    """``word`` as one of the known phases; raises InvalidArgument for another one."""
    return _one_of("phase", word, get_args(Phase))


def as_degrade(word: str) -> Degrade:
    """``word`` as one of the known policies; raises InvalidArgument for another one."""
    return _one_of("degrade", word, get_args(Degrade))


def make_plan(spec: LoadSpec) -> tuple[ClientPlan, ...]:
    """The plan of every client; client i's is the same however many there are, but for the phase
    of a "spread" one."""
    return tuple(_client_plan(spec, client) for client in range(spec.num_sessions))


def _one_of(name: str, word: str, known: tuple[Word, ...]) -> Word:
    for one in known:
        if one == word:
            return one
    raise InvalidArgument(f"{name}: expected one of {list(known)}, got {word!r}")


def _client_plan(spec: LoadSpec, client: int) -> ClientPlan:
    random = np.random.default_rng([spec.seed, client])
    offset, random_phase = int(random.integers(1 << 30)), float(random.uniform())
    phases = {"aligned": 0.0, "spread": client / spec.num_sessions, "random": random_phase}
    first_s = phases[spec.phase] * _TICK_S
    num_ticks = math.ceil((spec.total_s - first_s) / _TICK_S)
    # Columns: jitter; stall, its length; disconnect, its moment, its length; barge-in, its moment.
    drawn = random.uniform(size=(num_ticks, 8)).tolist()
    arrivals: list[Arrival] = []
    stalled: Arrival | None = None  # the newest chunk that a stall holds back
    stall_end_s = away_end_s = -1.0
    num_lost = num_away = 0
    for tick, draw in enumerate(drawn):
        due_s = first_s + tick * _TICK_S
        if due_s < away_end_s:
            num_away += spec.is_counted(due_s)
            continue
        if stalled is not None and due_s >= stall_end_s:
            arrivals.append(stalled)
            stalled = None
        if stalled is None and _happens(draw[1], spec.stalls):
            stall_end_s = due_s + _between(draw[2], _STALL_S)
            stalled = Arrival(tick, stall_end_s)
            continue
        if stalled is not None:
            num_lost += spec.is_counted(due_s - _TICK_S)
            stalled = Arrival(tick, stall_end_s)
            continue
        at_s = due_s + draw[0] * spec.jitter_ms / 1000
        if arrivals:
            at_s = max(at_s, arrivals[-1].at_s)  # a network keeps the order
        if _happens(draw[3], spec.disconnects):
            away_end_s = at_s + _between(draw[5], _AWAY_S)
            leave_s = _between(draw[4], _LEAVE_S)
            arrivals.append(Arrival(tick, at_s, leave_s=leave_s, back_s=away_end_s))
        elif _happens(draw[6], spec.barge_ins):
            arrivals.append(Arrival(tick, at_s, barge_in_s=_between(draw[7], _BARGE_IN_S)))
        else:
            arrivals.append(Arrival(tick, at_s))
    return ClientPlan(client, spec.seed + client, offset, tuple(arrivals), num_lost, num_away)


def _happens(draw: float, per_minute: float) -> bool:
    return draw < per_minute / _TICKS_PER_MINUTE


def _between(draw: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return low + draw * (high - low)
