"""Live sessions behind a WebSocket, in a FastAPI application of your own.

A client sends 200 ms of 16 kHz 16-bit mono sound as one binary message each, or typed text as a
text message, and gets JSON: what the model said in each tick, its calls, and what background jobs
do. A client that hangs up closes its session, and with it its jobs.

    pip install '.[serve,background]'
    python examples/fastapi_service.py            # serves, and talks to itself once
    uvicorn examples.fastapi_service:app          # serves
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import uvicorn
import websockets
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

import tml_core as tml
from tml_core.background import BackgroundRunner, DeliveryPolicy, Final, JobContext

NUM_SESSIONS = 4


class Echo:
    """Stands for a real backend: OpenAIBackend("model", base_url=...) goes here."""

    async def run(self, job: JobContext) -> AsyncGenerator[Final, None]:
        yield Final(f"I have looked into it: {job.package.request}")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One model, one engine and one runner for all clients, as long as the application lives."""
    model = await asyncio.to_thread(tml.load_model, "nano", max_sequences=NUM_SESSIONS)
    policy = DeliveryPolicy(heeds_model=False)
    with tml.Engine(model) as engine:
        async with BackgroundRunner(Echo(), max_jobs=NUM_SESSIONS, policy=policy) as runner:
            app.state.engine, app.state.runner = engine, runner
            yield


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> dict[str, int]:
    """How many sessions are open and jobs run."""
    return {"sessions": app.state.engine.num_sessions, "jobs": app.state.runner.num_running}


@app.websocket("/live")
async def live(socket: WebSocket) -> None:
    """One client from connect to hang-up."""
    await socket.accept()
    runner: BackgroundRunner = app.state.runner
    try:
        session = await asyncio.to_thread(app.state.engine.open)
    except tml.PoolExhausted as error:
        await socket.close(code=1013, reason=str(error))  # try again later
        return
    try:
        session.attach(runner)
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is not None and text.startswith("/ask "):
                job = runner.submit(text.removeprefix("/ask "), session=session)
                await socket.send_text(json.dumps({"job": job.id, "status": job.status}))
                continue
            result = await session.append(as_chunk(message))
            await socket.send_text(json.dumps(as_json(result, runner, session)))
    except WebSocketDisconnect:
        return
    finally:
        # Whatever happened: the slot is free, an open turn ends, its jobs are cancelled.
        await asyncio.to_thread(session.close)


def as_chunk(message: dict[str, Any]) -> tml.Chunk:
    """What a client sent, as 200 ms of input."""
    if message.get("text") is not None:
        return tml.Chunk(text=message["text"])
    pcm = np.frombuffer(message["bytes"], "<i2").astype(np.float32) / 32768
    return tml.Chunk(audio=pcm)


def as_json(
    result: tml.TurnResult, runner: BackgroundRunner, session: tml.Session
) -> dict[str, Any]:
    """What happened in a tick, for the client."""
    return {
        "tick": result.done.tick,
        "said": result.text,
        "calls": [one.raw for one in result.tool_calls],
        "ms": round(result.stats.total_ms or 0.0, 1),
        "jobs": {one.id: one.delivery for one in runner.jobs if one.context.session is session},
    }


async def talk(url: str) -> None:
    """A client: speaks for a while, asks something, hears when the answer has entered."""
    audio, _ = tml.media.clips()
    async with websockets.connect(url) as socket:
        jobs: dict[str, str] = {}
        num_ticks = 0
        for chunk in tml.media.micro_turns(audio, duration_s=6.0):
            if num_ticks == 3:
                await socket.send("/ask what is on the agenda")
                jobs[json.loads(await socket.recv())["job"]] = "none"
            assert chunk.audio is not None
            await socket.send((chunk.audio * 32767).astype("<i2").tobytes())
            answer = json.loads(await socket.recv())
            num_ticks += 1
            jobs |= answer["jobs"]
        print(f"{num_ticks} ticks answered; jobs: {jobs}")


async def main() -> None:
    config = uvicorn.Config(app, port=0, log_level="warning", ws="websockets-sansio")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    await asyncio.gather(*(talk(f"ws://127.0.0.1:{port}/live") for _ in range(2)))
    while app.state.engine.num_sessions:
        await asyncio.sleep(0.05)
    print(f"sessions still open: {app.state.engine.num_sessions}")
    server.should_exit = True
    await serving


if __name__ == "__main__":
    asyncio.run(main())
