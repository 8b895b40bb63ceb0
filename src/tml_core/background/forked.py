"""The live session's own model, thinking on a fork of it: the background shares its memory."""

import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from tml_core.background.backend import JobContext
from tml_core.background.local_model import answer_calls, answer_in, closed, opened
from tml_core.background.updates import Final as FinalUpdate
from tml_core.background.updates import Partial, Progress
from tml_core.errors import InvalidArgument, SessionBusy
from tml_core.layout.chunk import Chunk
from tml_core.layout.events import TextToken, ToolCall
from tml_core.session import Session

__all__ = ["ForkBackend"]

_BETWEEN_TRIES_S: Final = 0.0005


class ForkBackend:
    """Answers on a fork of the session a job comes from: it has heard and seen all of it, and its
    pages are shared, not copied.

    The fork is made between two ticks of the live session, within ``fork_timeout_s``, and then goes
    its own way: a chat checkpoint answers at once; a model that knows ticks reads the request as
    typed text and is given up to ``max_ticks`` empty ticks, until it has spoken and been silent for
    ``quiet_ticks``. The model needs room for one more sequence a job (`load_model`).
    """

    def __init__(
        self,
        *,
        max_rounds: int = 8,
        max_tokens: int = 512,
        max_ticks: int = 100,
        quiet_ticks: int = 5,
        fork_timeout_s: float = 5.0,
        seed: int | None = None,
    ) -> None:
        for name, value in (("max_ticks", max_ticks), ("quiet_ticks", quiet_ticks)):
            if value < 1:
                raise InvalidArgument(f"{name}: expected at least 1, got {value}")
        self._max_rounds = max_rounds
        self._max_tokens = max_tokens
        self._max_ticks = max_ticks
        self._quiet_ticks = quiet_ticks
        self._fork_timeout_s = fork_timeout_s
        self._seed = seed

    async def run(self, job: JobContext) -> AsyncGenerator[Progress | Partial | FinalUpdate, None]:
        """See `Backend`."""
        live = job.package.session
        if live is None:
            raise InvalidArgument("session: a ForkBackend needs the session a job comes from")
        twin = await self._fork(live)
        try:
            request = job.package.request
            if twin.model.config.interaction is None:
                answer = answer_in(twin, job, request, self._max_rounds, self._max_tokens)
            else:
                answer = self._listen(twin, job, request)
            async with aclosing(answer):
                async for update in answer:
                    yield update
        finally:
            await closed(twin)

    async def _fork(self, live: Session) -> Session:
        stop = threading.Event()

        def make() -> Session:
            give_up_s = time.monotonic() + self._fork_timeout_s
            while True:
                try:
                    return live.fork(seed=self._seed)
                except SessionBusy:
                    if time.monotonic() > give_up_s:
                        raise TimeoutError(
                            f"fork: the session was busy for {self._fork_timeout_s:g} s"
                        ) from None
                    # The pause between two ticks may be short.
                    if stop.wait(_BETWEEN_TRIES_S):
                        raise

        try:
            return await opened(make)
        finally:
            stop.set()

    async def _listen(
        self, twin: Session, job: JobContext, request: str
    ) -> AsyncGenerator[Partial | FinalUpdate, None]:
        chunk = Chunk(text=request)
        said, num_quiet = "", 0
        for _ in range(self._max_ticks):
            calls: list[ToolCall] = []
            piece = ""
            async for event in twin.append(chunk):
                if isinstance(event, ToolCall):
                    calls.append(event)
                elif isinstance(event, TextToken):
                    piece += event.text
            if piece:
                said += piece
                yield Partial(piece)
            await answer_calls(twin, job, calls)
            num_quiet = 0 if piece or calls else num_quiet + 1
            told = "\n".join(job.take_steering())
            if said and num_quiet >= self._quiet_ticks and not told:
                told = "\n".join(job.finish())
                if not told:
                    break
            chunk = Chunk(text=told) if told else Chunk(is_idle=True)
        yield FinalUpdate(said)
