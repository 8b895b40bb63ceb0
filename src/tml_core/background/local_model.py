"""A plain chat checkpoint in this process as the background model."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

from tml_core.background.backend import JobContext
from tml_core.background.endpoint import SYSTEM, task_text
from tml_core.background.updates import Final, Partial, Progress
from tml_core.engine.model import Model, load_model
from tml_core.engine.sampler import SamplingParams
from tml_core.errors import TmlError, Unsupported
from tml_core.layout.chunk import Chunk
from tml_core.layout.events import TextToken, ToolCall
from tml_core.session import Session

__all__ = ["LocalBackend", "answer_calls", "answer_in", "closed", "opened"]


class LocalBackend:
    """Answers with a plain chat checkpoint (`load_model`), a session for each job.

    ``model``: a loaded `Model` with room for ``max_jobs`` sequences, or a directory. Raises
    Unsupported for a model that knows ticks; `ForkBackend` is for those.
    """

    def __init__(
        self,
        model: Model | str | Path,
        *,
        system: str = SYSTEM,
        max_rounds: int = 8,
        max_tokens: int = 512,
        sampling: SamplingParams | None = None,
        seed: int = 0,
        max_context_chars: int = 8000,
    ) -> None:
        self._model = model if isinstance(model, Model) else load_model(model, max_sequences=4)
        if self._model.config.interaction is not None:
            raise Unsupported("model: expected a plain chat checkpoint, got one that knows ticks")
        self._system = system
        self._max_rounds = max_rounds
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._seed = seed
        self._max_context_chars = max_context_chars

    async def run(self, job: JobContext) -> AsyncGenerator[Progress | Partial | Final, None]:
        """See `Backend`."""

        def make() -> Session:
            return Session(
                self._model,
                system=self._system,
                tools=job.tools,
                seed=self._seed,
                sampling=self._sampling,
            )

        session = await opened(make)
        try:
            text = task_text(job, (), self._max_context_chars)
            answer = answer_in(session, job, text, self._max_rounds, self._max_tokens)
            async with aclosing(answer):
                async for update in answer:
                    yield update
        finally:
            await closed(session)


async def answer_in(
    session: Session, job: JobContext, text: str, max_rounds: int, max_tokens: int
) -> AsyncGenerator[Partial | Final, None]:
    """Put ``text`` to a chat session and stream its answer, tool rounds included."""
    chunk = Chunk(text=text)
    for _ in range(max_rounds):
        await session.append(chunk)
        said = ""
        calls: list[ToolCall] = []
        async for event in session.commit(max_tokens=max_tokens):
            if isinstance(event, ToolCall):
                calls.append(event)
            elif isinstance(event, TextToken) and event.channel == "text" and event.text:
                said += event.text
                yield Partial(event.text)
        if calls:
            await answer_calls(session, job, calls)
            told = "\n".join(job.take_steering())
        else:
            told = "\n".join(job.finish())
            if not told:
                yield Final(said)
                return
        chunk = Chunk(text=told) if told else Chunk(is_idle=True)
    raise TmlError(f"no answer within {max_rounds} rounds (max_rounds)")


async def answer_calls(session: Session, job: JobContext, calls: list[ToolCall]) -> None:
    """Run the tools a session's model called and give it the results."""
    well_formed = [one for one in calls if one.error is None]
    for call in calls:
        if call.error is not None:
            session.add_tool_result(call.call_id, call.error, is_error=True)
    wanted = [(one.call_id, one.name, json.dumps(dict(one.args))) for one in well_formed]
    for output in await job.call_tools(wanted):
        session.add_tool_result(output.call_id, output.content, is_error=output.is_error)


async def opened(make: Callable[[], Session]) -> Session:
    """A session made in a thread; after a cancel the thread closes what it makes."""
    gate = threading.Lock()
    made: list[Session] = []
    is_unwanted = False

    def work() -> Session:
        session = make()
        with gate:
            if not is_unwanted:
                made.append(session)
                return session
        session.close()
        return session

    try:
        return await asyncio.to_thread(work)
    except asyncio.CancelledError:
        with gate:
            is_unwanted = True
        for session in made:
            await closed(session)
        raise


async def closed(session: Session) -> None:
    """Close a session off the event loop; a cancel does not get in between."""
    await asyncio.shield(asyncio.to_thread(session.close))
