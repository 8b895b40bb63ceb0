"""What the clients of a load run saw: latency, misses, slack, and how many clients fit.

Percentiles and misses are over every tick that was to be answered: one that was given up, refused
or failed has no latency and stands behind all others, so a percentile may be "never" (None in
dictionaries). Ticks that the client itself ended (a barge-in, a disconnect) are counted apart.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, NamedTuple, Self

import numpy as np

from tml_core.engine.stats import EngineStats
from tml_core.engine.turn import TurnStats
from tml_core.errors import InvalidArgument
from tml_core.load.plan import ClientPlan, LoadSpec

__all__ = [
    "MISS_LIMIT",
    "Capacity",
    "EngineWork",
    "Histogram",
    "Kind",
    "LoadReport",
    "Outcomes",
    "Spread",
    "TickOutcome",
    "find_capacity",
]

# served: answered, late or not; barged, left: ended by the client; dropped: given up because the
# turns before it were too slow; refused: there was no session for it; failed: its turn raised.
Kind = Literal["served", "barged", "left", "dropped", "refused", "failed"]

MISS_LIMIT: Final = 0.001
_PERMILLES: Final = (500, 900, 990, 999, 1000)
_BIN_MS: Final = 20
_LATE_GENERATOR_MS: Final = 20.0
_BY_CLIENT: Final = ("barged", "left")


class TickOutcome(NamedTuple):
    """One tick of one client. ``latency_ms``: arrival to end, infinite without an answer.
    ``late_ms``: how long after the arrival the chunk was sent, ``is_held`` because the turn before
    was still open. ``append_ms``: the client's time in `Session.append`. ``is_degraded``: a policy
    answered, in part or not at all. ``stats``: of the turn, if there was one."""

    client: int
    tick: int
    at_s: float
    kind: Kind
    latency_ms: float
    late_ms: float = 0.0
    append_ms: float = 0.0
    is_held: bool = False
    is_degraded: bool = False
    stats: TurnStats | None = None


@dataclass(frozen=True)
class Spread:
    """Percentiles of some times in ms; infinite where that share has no answer."""

    p50: float
    p90: float
    p99: float
    p99_9: float
    max: float

    @classmethod
    def of(cls, values: SequenceOf[float]) -> Self | None:
        """Of ``values``, each percentile one of them; None of nothing."""
        if not values:
            return None
        ordered = sorted(values)
        # The smallest value that at least that share does not exceed.
        ranks = (-(-permille * len(ordered) // 1000) for permille in _PERMILLES)
        return cls(*(ordered[rank - 1] for rank in ranks))

    def to_dict(self) -> dict[str, float | None]:
        """As JSON values, "never" as None."""
        return {name: _finite(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` values in [edges[i], edges[i + 1]) ms; the outer edges are infinite."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of_slack(cls, slack_ms: SequenceOf[float], deadline_ms: float) -> Self:
        """In bins of 20 ms, from one deadline late to the whole deadline left."""
        reach = math.ceil(deadline_ms / _BIN_MS) * _BIN_MS
        inner = np.arange(-reach, reach + 1, _BIN_MS, dtype=np.float64)
        bins = np.searchsorted(inner, np.asarray(slack_ms, np.float64), side="right")
        counts = np.bincount(bins, minlength=len(inner) + 1)
        return cls((-math.inf, *inner.tolist(), math.inf), tuple(counts.tolist()))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: the inner edges; the first and last count are of what lies outside."""
        return {"edges_ms": list(self.edges[1:-1]), "counts": list(self.counts)}


@dataclass(frozen=True)
class EngineWork:
    """What the engine thread did over a whole run. ``host_us_per_turn``: its work outside kernels,
    encoders and sampler. ``kernel_share``: of its working time. ``tokens_per_step``: positions."""

    num_turns: int
    host_us_per_turn: float
    kernel_share: float
    tokens_per_step: float

    @classmethod
    def between(cls, before: EngineStats, after: EngineStats) -> Self:
        """From two readings of the engine's counters."""
        num_turns = sum(after.turns.values()) - sum(before.turns.values())
        host_s, kernel_s = after.host_s - before.host_s, after.kernel_s - before.kernel_s
        num_steps = after.steps - before.steps
        return cls(
            num_turns=num_turns,
            host_us_per_turn=1e6 * host_s / max(1, num_turns),
            kernel_share=kernel_s / max(1e-9, kernel_s + host_s),
            tokens_per_step=(after.step_tokens - before.step_tokens) / max(1, num_steps),
        )


@dataclass(frozen=True)
class LoadReport:
    """A run in numbers. ``num_ticks``: those that were to be answered, ``num_missed`` of them late
    or never; ``kinds``: all ticks of the window by how they ended; ``num_degraded``: of those, the
    ones a policy answered. ``num_lost``, ``num_away``: chunks that never left a stalled or absent
    client. ``latency``: arrival to the client having the end; ``phases``: where the engine's part
    of it went. ``generator``: how late chunks were sent through the generator's own fault.
    ``cancel``: from a barge-in to the end of the turn. ``work``: the engine thread's."""

    spec: LoadSpec
    num_sessions_opened: int
    num_ticks: int
    num_missed: int
    kinds: dict[str, int]
    num_degraded: int
    num_lost: int
    num_away: int
    num_output_tokens: int
    latency: Spread | None
    slack: Histogram
    phases: dict[str, Spread]
    append: Spread | None
    generator: Spread | None
    cancel: Spread | None
    work: EngineWork | None
    outcomes: tuple[TickOutcome, ...] = field(repr=False)

    @property
    def miss_rate(self) -> float:
        """Share of the ticks that were late or never answered; 1 if there was none to answer."""
        return self.num_missed / self.num_ticks if self.num_ticks else 1.0

    @property
    def miss_rate_bound(self) -> float:
        """What the true rate is below with 95 % confidence, if ticks miss independently."""
        return _upper_bound(self.num_missed, self.num_ticks)

    @property
    def is_generator_late(self) -> bool:
        """Whether the generator itself was too late for the run to be fair to the engine."""
        return self.generator is not None and self.generator.p99 > _LATE_GENERATOR_MS

    def to_dict(self) -> dict[str, Any]:
        """All but the single ticks as JSON values, times in ms."""
        spreads = {
            "latency_ms": self.latency,
            "append_ms": self.append,
            "generator_late_ms": self.generator,
            "cancel_ms": self.cancel,
        }
        return {
            "spec": asdict(self.spec),
            "num_sessions_opened": self.num_sessions_opened,
            "num_ticks": self.num_ticks,
            "num_missed": self.num_missed,
            "miss_rate": self.miss_rate,
            "miss_rate_bound": self.miss_rate_bound,
            "kinds": self.kinds,
            "num_degraded": self.num_degraded,
            "num_lost": self.num_lost,
            "num_away": self.num_away,
            "num_output_tokens": self.num_output_tokens,
            **{name: one and one.to_dict() for name, one in spreads.items()},
            "phases_ms": {name: one.to_dict() for name, one in self.phases.items()},
            "slack": self.slack.to_dict(),
            "engine": self.work and asdict(self.work),
            "is_generator_late": self.is_generator_late,
        }


class Outcomes:
    """Collects ticks while a run goes on; those outside the window are left out."""

    def __init__(self, spec: LoadSpec) -> None:
        self._spec = spec
        self._all: list[TickOutcome] = []
        self.served_ms: list[float] = []
        self.cancel_ms: list[float] = []
        self.num_ticks = 0
        self.num_missed = 0

    def add(self, outcome: TickOutcome) -> None:
        """Take one tick in."""
        if not self._spec.is_counted(outcome.at_s):
            return
        self._all.append(outcome)
        if outcome.kind in _BY_CLIENT:
            return
        self.num_ticks += 1
        self.num_missed += int(outcome.latency_ms > self._spec.deadline_ms)
        if outcome.kind == "served":
            self.served_ms.append(outcome.latency_ms)

    def report(
        self, plans: SequenceOf[ClientPlan], work: EngineWork | None, num_opened: int
    ) -> LoadReport:
        """What was collected, in numbers."""
        wanted = [one for one in self._all if one.kind not in _BY_CLIENT]
        served = [one for one in wanted if one.kind == "served"]
        latencies = [one.latency_ms for one in wanted]
        deadline_ms = self._spec.deadline_ms
        stats = [one.stats for one in served if one.stats is not None]
        phases = {
            "queued": [one.queued_ms for one in stats],
            "prefill": [one.prefill_ms for one in stats],
            "first_token": [one.first_token_ms for one in stats],
            "decode": [one.decode_ms for one in stats],
            "engine_total": [one.total_ms for one in stats],
        }
        spreads = {
            name: Spread.of([one for one in values if one is not None])
            for name, values in phases.items()
        }
        kinds = [one.kind for one in self._all]
        return LoadReport(
            spec=self._spec,
            num_sessions_opened=num_opened,
            num_ticks=self.num_ticks,
            num_missed=self.num_missed,
            kinds={kind: kinds.count(kind) for kind in sorted(set(kinds))},
            num_degraded=sum(one.is_degraded for one in self._all),
            num_lost=sum(plan.num_lost for plan in plans),
            num_away=sum(plan.num_away for plan in plans),
            num_output_tokens=sum(one.num_output_tokens for one in stats),
            latency=Spread.of(latencies),
            slack=Histogram.of_slack([deadline_ms - one for one in latencies], deadline_ms),
            phases={name: one for name, one in spreads.items() if one is not None},
            append=Spread.of([one.append_ms for one in served]),
            # A chunk held back behind a slow turn is the engine's doing.
            generator=Spread.of([one.late_ms for one in served if not one.is_held]),
            cancel=Spread.of(self.cancel_ms),
            work=work,
            outcomes=tuple(self._all),
        )


@dataclass(frozen=True)
class Capacity:
    """The outcome of a search: ``num_sessions`` is the most that kept the miss rate under
    ``limit`` (0 if one session did not), ``levels`` all that were tried, by number of sessions.
    ``is_open_ended``: it is the most that was asked for, more were not tried."""

    num_sessions: int
    is_open_ended: bool
    limit: float
    levels: tuple[LoadReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "num_sessions": self.num_sessions,
            "is_open_ended": self.is_open_ended,
            "limit": self.limit,
            "levels": [one.to_dict() for one in self.levels],
        }


def find_capacity(
    run: Callable[[int], LoadReport],
    max_sessions: int,
    *,
    start: int = 1,
    limit: float = MISS_LIMIT,
) -> Capacity:
    """Double the sessions from ``start`` until ``run`` of so many misses too much, then halve the
    gap. Each level should see well over ``1 / limit`` ticks. Raises InvalidArgument for bad bounds.
    """
    if not 1 <= start <= max_sessions:
        raise InvalidArgument(f"start: expected 1 to {max_sessions}, got {start}")
    if not 0 < limit <= 1:
        raise InvalidArgument(f"limit: expected more than 0 and at most 1, got {limit}")
    levels: dict[int, LoadReport] = {}

    def holds(count: int) -> bool:
        levels[count] = run(count)
        return levels[count].miss_rate < limit

    best, worst = 0, max_sessions + 1
    count = start
    while best < count < worst:
        if holds(count):
            best = count
            count = min(2 * count, max_sessions)
        else:
            worst = count
    while worst - best > 1 and best < max_sessions:
        middle = (best + worst) // 2
        if holds(middle):
            best = middle
        else:
            worst = middle
    ordered = tuple(levels[count] for count in sorted(levels))
    return Capacity(best, best == max_sessions, limit, ordered)


def _upper_bound(num_missed: int, num_ticks: int) -> float:
    """The rate at which so few misses would be a one-in-twenty event (Clopper and Pearson)."""
    if num_missed >= num_ticks:
        return 1.0
    low, high = num_missed / num_ticks, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        if _binomial_at_most(num_missed, num_ticks, rate) > 0.05:
            low = rate
        else:
            high = rate
    return high


def _binomial_at_most(count: int, num: int, rate: float) -> float:
    terms = (
        math.lgamma(num + 1)
        - math.lgamma(k + 1)
        - math.lgamma(num - k + 1)
        + k * math.log(rate)
        + (num - k) * math.log1p(-rate)
        for k in range(count + 1)
    )
    return math.fsum(math.exp(term) for term in terms)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
