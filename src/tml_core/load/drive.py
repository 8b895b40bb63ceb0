"""Does what a plan says: all clients on one asyncio loop, every tick recorded.

The time of a tick counts from when its chunk was to arrive, not from when the generator got round
to it, to when the client's task has the end of the turn. A client whose turn is still open when the
next chunk comes holds that chunk back and sends it when the turn ends; if yet another comes, the
older one is given up and counts as missed. Where sessions coalesce their input it is sent at once.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Final

from tml_core.engine.turn import Turn
from tml_core.errors import InvalidArgument, Overloaded, SessionClosed, TmlError
from tml_core.layout.chunk import Chunk
from tml_core.load.plan import Arrival, ClientPlan, LoadSpec, make_plan
from tml_core.load.report import EngineWork, Kind, LoadReport, Outcomes, TickOutcome
from tml_core.session import Engine, Session

__all__ = ["Progress", "TickOutcome", "run_load"]

_WATCH_S: Final = 0.2
# A turn that takes longer than this after the end of the run is lost, not late.
_PATIENCE_S: Final = 60.0


@dataclass(frozen=True)
class Progress:
    """How far a run is: ``elapsed_s`` of ``total_s``, counted ticks so far and misses among them;
    ``recent_ms``: the slowest answer since the last report, None without one."""

    elapsed_s: float
    total_s: float
    num_ticks: int
    num_missed: int
    recent_ms: float | None


def run_load(
    engine: Engine,
    spec: LoadSpec,
    chunks: SequenceOf[Chunk],
    *,
    watch: Callable[[Progress], None] | None = None,
) -> LoadReport:
    """Put the load on ``engine`` and report what its clients saw; takes ``spec.total_s``.

    ``chunks``: the recording all clients feed, each from a place of its own, round and round.
    ``watch`` is called some times a second. Sessions are opened before the clock starts and closed
    before it returns. Raises InvalidArgument without chunks, and what `Engine.open` raises for
    anything but a lack of room.
    """
    if not chunks:
        raise InvalidArgument("chunks: expected at least one, got none")
    return asyncio.run(_Run(engine, spec, chunks, watch).run())


@dataclass
class _Client:
    plan: ClientPlan
    session: Session | None = None
    num_opened: int = 0
    serving: list[Arrival] = field(default_factory=list)
    held: Arrival | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class _Run:
    def __init__(
        self,
        engine: Engine,
        spec: LoadSpec,
        chunks: SequenceOf[Chunk],
        watch: Callable[[Progress], None] | None,
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._chunks = chunks
        self._watch = watch
        self._outcomes = Outcomes(spec)
        self._start_s = 0.0
        self._group = asyncio.TaskGroup()

    async def run(self) -> LoadReport:
        clients = [_Client(plan) for plan in make_plan(self._spec)]
        try:
            for client in clients:
                await self._open(client)
            before = self._engine.stats()
            self._start_s = time.perf_counter()
            async with self._group as group:
                watching = group.create_task(self._report_progress())
                await asyncio.wait([group.create_task(self._feed(one)) for one in clients])
                await self._settle(clients)
                watching.cancel()
            after = self._engine.stats()
        finally:
            for client in clients:
                await self._close(client)
        plans = [client.plan for client in clients]
        num_opened = sum(one.num_opened for one in clients)
        return self._outcomes.report(plans, EngineWork.between(before, after), num_opened)

    async def _settle(self, clients: list[_Client]) -> None:
        """Wait for the last turns; one that does not end has failed."""
        open_tasks = [task for client in clients for task in client.tasks]
        if open_tasks:
            _, lost = await asyncio.wait(open_tasks, timeout=_PATIENCE_S)
            for task in lost:
                task.cancel()
        for client in clients:
            held = [] if client.held is None else [client.held]
            for arrival in (*client.serving, *held):
                self._note(client, arrival, "failed")

    async def _feed(self, client: _Client) -> None:
        for arrival in client.plan.arrivals:
            await asyncio.sleep(max(0.0, arrival.at_s - self._now()))
            if client.session is None:
                self._note(client, arrival, "refused")
            elif not client.serving or self._spec.degrade == "coalesce_input":
                self._send(client, arrival)
            else:
                if client.held is not None:
                    self._note(client, client.held, "dropped")
                client.held = arrival

    def _send(self, client: _Client, arrival: Arrival, *, is_held: bool = False) -> None:
        session = client.session
        if session is None:
            self._note(client, arrival, "left")
            return
        chunk = self._chunks[(client.plan.offset + arrival.tick) % len(self._chunks)]
        begun_s = self._now()
        try:
            turn = session.append(chunk, deadline_ms=self._spec.deadline_ms)
        except Overloaded:
            self._note(client, arrival, "dropped")
            return
        except TmlError:
            self._note(client, arrival, "failed")
            return
        client.serving.append(arrival)
        sent = TickOutcome(
            client.plan.client,
            arrival.tick,
            arrival.at_s,
            "served",
            math.inf,
            late_ms=1000 * (begun_s - arrival.at_s),
            append_ms=1000 * (self._now() - begun_s),
            is_held=is_held,
        )
        self._spawn(client, self._serve(client, arrival, turn, sent))
        if arrival.barge_in_s is not None:
            self._spawn(client, self._barge_in(turn, arrival.barge_in_s))
        if arrival.leave_s is not None:
            self._spawn(client, self._leave(client, arrival))

    async def _serve(
        self, client: _Client, arrival: Arrival, turn: Turn, sent: TickOutcome
    ) -> None:
        self._outcomes.add(await self._outcome(turn, sent))
        client.serving.remove(arrival)
        held, client.held = client.held, None
        if held is not None:
            self._send(client, held, is_held=True)

    async def _outcome(self, turn: Turn, sent: TickOutcome) -> TickOutcome:
        try:
            result = await turn
        except SessionClosed:
            return sent._replace(kind="left", stats=turn.stats)
        except TmlError:
            return sent._replace(kind="failed", stats=turn.stats)
        reason = result.done.reason
        return sent._replace(
            kind="barged" if reason == "cancelled" else "served",
            latency_ms=1000 * (self._now() - sent.at_s),
            is_degraded=reason == "degraded",
            stats=result.stats,
        )

    async def _barge_in(self, turn: Turn, after_s: float) -> None:
        await asyncio.sleep(after_s)
        asked_s = time.perf_counter()
        if turn.cancel("input", wait=False):
            with contextlib.suppress(TmlError):
                await turn
                self._outcomes.cancel_ms.append(1000 * (time.perf_counter() - asked_s))

    async def _leave(self, client: _Client, arrival: Arrival) -> None:
        assert arrival.leave_s is not None and arrival.back_s is not None
        await asyncio.sleep(arrival.leave_s)
        await self._close(client)
        await asyncio.sleep(max(0.0, arrival.back_s - self._now()))
        await self._open(client)

    async def _open(self, client: _Client) -> None:
        # Nothing of a client's that opens twice may depend on how fast the first session ended.
        seed = client.plan.seed + 1_000_003 * client.num_opened
        with contextlib.suppress(MemoryError):  # PoolExhausted: its ticks count as missed
            client.session = await asyncio.to_thread(
                self._engine.open, seed=seed, degrade=self._spec.degrade
            )
            client.num_opened += 1

    async def _close(self, client: _Client) -> None:
        session, client.session = client.session, None
        if session is not None:
            await asyncio.to_thread(session.close)

    def _spawn(self, client: _Client, work: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(work)
        client.tasks.add(task)
        task.add_done_callback(client.tasks.discard)

    def _note(self, client: _Client, arrival: Arrival, kind: Kind) -> None:
        """A tick that got no turn, or whose turn never ended."""
        outcome = TickOutcome(client.plan.client, arrival.tick, arrival.at_s, kind, math.inf)
        self._outcomes.add(outcome)

    async def _report_progress(self) -> None:
        if self._watch is None:
            return
        num_seen = 0
        while True:
            await asyncio.sleep(_WATCH_S)
            served = self._outcomes.served_ms
            recent = served[num_seen:]
            num_seen = len(served)
            self._watch(
                Progress(
                    elapsed_s=min(self._now(), self._spec.total_s),
                    total_s=self._spec.total_s,
                    num_ticks=self._outcomes.num_ticks,
                    num_missed=self._outcomes.num_missed,
                    recent_ms=max(recent, default=None),
                )
            )

    def _now(self) -> float:
        return time.perf_counter() - self._start_s
