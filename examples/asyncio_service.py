"""Sessions inside an asyncio service: several clients share one engine, one step, one event loop.

Each client streams its own recording in 200 ms pieces and reads the answer of each piece while
the others do the same. Run it: ``python examples/asyncio_service.py``.
"""

import asyncio
from dataclasses import dataclass

import tml_core as tml

NUM_CLIENTS = 4
SECONDS = 2.0


@dataclass
class Report:
    """What one client got."""

    name: str
    num_ticks: int = 0
    num_tokens: int = 0
    slowest_ms: float = 0.0


async def serve(engine: tml.Engine, name: str, seed: int) -> Report:
    """One client from connect to hang-up."""
    report = Report(name)
    audio, video = tml.media.clips()
    # Opening runs the instructions through the model: off the event loop.
    session = await asyncio.to_thread(engine.open, seed=seed, system=f"You talk to {name}.")
    try:
        for chunk in tml.media.micro_turns(audio, video, duration_s=SECONDS):
            turn = session.append(chunk)  # returns at once
            async for event in turn:
                if isinstance(event, tml.TextToken):
                    report.num_tokens += 1  # here a service would send event.text on
            report.num_ticks += 1
            report.slowest_ms = max(report.slowest_ms, turn.stats.total_ms or 0.0)
    finally:
        # Also when the client hangs up in the middle: an open turn ends, the slot is free.
        await asyncio.to_thread(session.close)
    return report


async def main() -> None:
    model = await asyncio.to_thread(tml.load_model, "nano", max_sequences=NUM_CLIENTS)
    with tml.Engine(model) as engine:
        clients = (serve(engine, f"client {i}", seed=i) for i in range(NUM_CLIENTS))
        for report in await asyncio.gather(*clients):
            print(
                f"{report.name}: {report.num_ticks} ticks, {report.num_tokens} tokens, "
                f"slowest tick {report.slowest_ms:.0f} ms of 200"
            )
        print(f"sessions still open: {engine.num_sessions}")


if __name__ == "__main__":
    asyncio.run(main())
