"""Sixteen conversations in one process: one engine, one background runner, sixteen 200 ms clocks.

The background model is a function of this file: any object with an async ``run`` is a backend.
Run it: ``python examples/background_sixteen.py``.
"""

import asyncio
from collections.abc import AsyncGenerator

import tml_core as tml
from tml_core.background import (
    BackgroundRunner,
    DeliveryPolicy,
    Final,
    JobContext,
    Partial,
    Progress,
)

NUM_SESSIONS = 16
NUM_TICKS = 30


class Counting:
    """Thinks for a while and says how much it was told."""

    async def run(self, job: JobContext) -> AsyncGenerator[Progress | Partial | Final, None]:
        for step in range(3):
            await asyncio.sleep(0.2)
            yield Progress(f"step {step + 1} of 3")
        package = job.package
        yield Final(f"{package.request}: {len(package.items)} items in {package.now_ms} ms")


async def converse(engine: tml.Engine, runner: BackgroundRunner, number: int) -> tuple[int, str]:
    """One conversation at its own pace: (late ticks, where its job's result is)."""
    session = await asyncio.to_thread(engine.open, seed=number)
    late = 0
    try:
        session.attach(runner)
        job = None
        loop = asyncio.get_running_loop()
        start_s = loop.time() + 0.2 * number / NUM_SESSIONS  # nobody's clock is another's
        audio, _ = tml.media.clips()
        for tick, chunk in enumerate(tml.media.micro_turns(audio, duration_s=NUM_TICKS * 0.2)):
            await asyncio.sleep(max(0.0, start_s + 0.2 * tick - loop.time()))
            turn = session.append(chunk)
            async for _event in turn:
                pass  # here a service sends what the model says
            late += (turn.stats.total_ms or 0.0) > 200.0
            if tick == 5:
                job = runner.submit(f"session {number}", session=session)
        assert job is not None
        await job
        return late, job.delivery
    finally:
        await asyncio.to_thread(session.close)


async def main() -> None:
    model = await asyncio.to_thread(tml.load_model, "nano", max_sequences=NUM_SESSIONS)
    policy = DeliveryPolicy(heeds_model=False)  # the model is untrained: its words are noise
    with tml.Engine(model) as engine:
        async with BackgroundRunner(Counting(), max_jobs=NUM_SESSIONS, policy=policy) as runner:
            conversations = (converse(engine, runner, one) for one in range(NUM_SESSIONS))
            reports = await asyncio.gather(*conversations)
            late = sum(one for one, _ in reports)
            delivered = sum(where == "delivered" for _, where in reports)
            print(f"{NUM_SESSIONS} sessions, {NUM_TICKS} ticks each, {late} ticks late")
            print(f"results delivered: {delivered} of {len(reports)}")
        print(f"sessions still open: {engine.num_sessions}")


if __name__ == "__main__":
    asyncio.run(main())
