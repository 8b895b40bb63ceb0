"""What the background tests share: small backends, ticks to feed, and what must not be left."""

import asyncio
import functools
import json
import shutil
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import numpy as np

from byte_model import BYTE_MODEL
from session_kit import CALL, END_CALL, SILENCE, WAIT_S, nano
from tml_core import Chunk, Model, Session, load_model
from tml_core.background import Final, JobContext, Partial, Progress
from tml_core.layout.chunk import compact_json
from tml_core.layout.select import layout_for

Updates = AsyncGenerator[Progress | Partial | Final, None]

QUIET = Chunk(is_idle=True)


class Answers:
    """A backend that gives ``answer`` of the request."""

    def __init__(self, answer: Callable[[str], str] = lambda text: f"about {text}") -> None:
        self._answer = answer

    async def run(self, job: JobContext) -> Updates:
        yield Final(self._answer(job.package.request))


class Gate:
    """A backend that waits until the test lets it go; counts what runs and what has ended."""

    def __init__(self) -> None:
        self.num_begun = 0
        self.num_ended = 0
        self.told: list[str] = []
        self._begun = threading.Semaphore(0)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: asyncio.Event | None = None

    async def run(self, job: JobContext) -> Updates:
        if self._open is None:
            self._loop, self._open = asyncio.get_running_loop(), asyncio.Event()
        self.num_begun += 1
        self._begun.release()
        try:
            yield Progress("waiting")
            await self._open.wait()
            while told := job.finish():
                self.told += told
            yield Final("through the gate")
        finally:
            self.num_ended += 1

    def reach(self) -> None:
        """Wait until one more job has begun."""
        assert self._begun.acquire(timeout=WAIT_S)

    def open(self) -> None:
        """Let all go."""
        assert self._loop is not None and self._open is not None
        self._loop.call_soon_threadsafe(self._open.set)


class Steps:
    """A backend made of a function of the job."""

    def __init__(self, run: Callable[[JobContext], Updates]) -> None:
        self.run = run


def feed(session: Session, chunk: Chunk = QUIET, num_ticks: int = 1) -> None:
    """So many ticks of one chunk."""
    for _ in range(num_ticks):
        session.append(chunk).result(WAIT_S)


def speech(seed: int = 0) -> Chunk:
    """200 ms as loud as somebody who speaks."""
    pcm = np.random.default_rng(seed).uniform(-0.5, 0.5, 3200).astype(np.float32)
    return Chunk(audio=pcm)


def call_ids(name: str, **args: Any) -> list[int]:
    """What a model samples that calls a tool."""
    layout: Any = _layout()
    body = layout.codec.encode(compact_json("call", {"name": name, "args": args}))
    return [CALL, *body, END_CALL]


def words_in(session: Session) -> str:
    """All the text of a session's sequence, what went in and what came out."""
    layout: Any = _layout()
    ids = [one for one in session.token_ids().tolist() if one >= 0]
    return str(layout.codec.decode([one for one in ids if layout.codec.is_text[one]]))


def silent(num_ticks: int) -> list[int]:
    """What a model samples that says nothing for so long."""
    return [SILENCE] * num_ticks


def _layout() -> Any:
    return layout_for(nano().config, nano().tokenizer)


def background_threads() -> list[threading.Thread]:
    """Runners' threads that are alive."""
    return [one for one in threading.enumerate() if one.name == "tml-background"]


@functools.cache
def plain() -> Model:
    """Nano without its interaction block: a plain Inkling checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((BYTE_MODEL / "config.json").read_text())
        del config["interaction"]
        (Path(folder) / "config.json").write_text(json.dumps(config))
        shutil.copy(BYTE_MODEL / "tokenizer.json", folder)
        return load_model(folder, max_sequences=4)
