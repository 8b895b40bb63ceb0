"""Any OpenAI-compatible endpoint as the background model: streaming, tools, retries, timeouts."""

import base64
import fractions
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

import av
import numpy as np
from numpy.typing import NDArray

from tml_core.background.backend import JobContext
from tml_core.background.extra import require
from tml_core.background.updates import Final as FinalUpdate
from tml_core.background.updates import Partial, Progress
from tml_core.errors import InvalidArgument, TmlError

__all__ = ["SYSTEM", "OpenAIBackend", "task_text"]

SYSTEM: Final = (
    "You work in the background of a live conversation. Do what is requested, with tools where "
    "they help, and answer in one or two plain sentences that can be spoken."
)
_MAX_ANSWER_CHARS: Final = 100_000


class OpenAIBackend:
    """A chat model behind an OpenAI-compatible endpoint (official ``openai`` client).

    ``model``, ``base_url``, ``api_key``: as for the client; None takes its environment variables.
    ``max_rounds``: requests a job may make, tool rounds included. ``max_tokens``: of an answer.
    ``timeout_s``: silence of the endpoint after which a request fails. ``max_retries``: of requests
    that fail before their first word; a stream that breaks later fails the job. ``first_tools``:
    {tool: parameter} of tools that are called with the request itself before the model is asked,
    for models that call none. ``sends_frames``: the last pictures go along. ``options``: more
    fields of the request, as ``{"temperature": 0}``.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        system: str = SYSTEM,
        max_rounds: int = 8,
        max_tokens: int = 512,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        first_tools: Mapping[str, str] | None = None,
        sends_frames: bool = False,
        max_context_chars: int = 8000,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        require("openai", "OpenAIBackend")
        if max_rounds < 1:
            raise InvalidArgument(f"max_rounds: expected at least 1, got {max_rounds}")
        self._model = model
        self._client_options = {
            "base_url": base_url,
            "api_key": api_key,
            "timeout": timeout_s,
            "max_retries": max_retries,
        }
        self._system = system
        self._max_rounds = max_rounds
        self._first_tools = dict(first_tools or {})
        self._sends_frames = sends_frames
        self._max_context_chars = max_context_chars
        self._request = {"max_tokens": max_tokens, **(options or {})}

    async def run(self, job: JobContext) -> AsyncGenerator[Progress | Partial | FinalUpdate, None]:
        """See `Backend`."""
        openai = require("openai", "OpenAIBackend")
        found = await self._first(job)
        messages = self._messages(job, found)
        # A client of its own: it belongs to this loop and is closed with the job.
        async with openai.AsyncOpenAI(**self._client_options) as client:
            for _ in range(self._max_rounds):
                messages += ({"role": "user", "content": text} for text in job.take_steering())
                answer = _Answer()
                pieces = self._stream(client, messages, job.tools, answer)
                async with aclosing(pieces):
                    async for piece in pieces:
                        yield Partial(piece)
                if answer.calls:
                    messages.append(answer.message)
                    outputs = await job.call_tools(answer.calls)
                    messages += (
                        {"role": "tool", "tool_call_id": one.call_id, "content": one.content}
                        for one in outputs
                    )
                    continue
                told = job.finish()
                if not told:
                    yield FinalUpdate(answer.text)
                    return
                messages.append({"role": "assistant", "content": answer.text})
                messages += ({"role": "user", "content": text} for text in told)
        raise TmlError(f"no answer within {self._max_rounds} requests (max_rounds)")

    async def _first(self, job: JobContext) -> list[str]:
        outputs = [
            await job.call_tool(name, json.dumps({parameter: job.package.request}))
            for name, parameter in self._first_tools.items()
        ]
        return [f"{one.name}: {one.content}" for one in outputs]

    def _messages(self, job: JobContext, found: Sequence[str]) -> list[dict[str, Any]]:
        text = task_text(job, found, self._max_context_chars)
        content: Any = text
        if self._sends_frames and job.package.frames:
            pictures = (
                {"type": "image_url", "image_url": {"url": _data_url(one.rgb)}}
                for one in job.package.frames
            )
            content = [{"type": "text", "text": text}, *pictures]
        return [
            {"role": "system", "content": self._system},
            {"role": "user", "content": content},
        ]

    async def _stream(
        self,
        client: Any,
        messages: list[dict[str, Any]],
        tools: tuple[dict[str, Any], ...],
        answer: "_Answer",
    ) -> AsyncGenerator[str, None]:
        request = {**self._request, "model": self._model, "messages": messages, "stream": True}
        if tools:
            request["tools"] = [_declaration(one) for one in tools]
        async with await client.chat.completions.create(**request) as stream:
            async for chunk in stream:
                for choice in chunk.choices[:1]:
                    piece = answer.take(choice)
                    if piece:
                        yield piece
        if answer.finish_reason is None:
            raise ConnectionError(
                f"the endpoint ended its stream after {len(answer.text)} characters, unfinished"
            )


class _Answer:
    """One streamed answer, put together."""

    def __init__(self) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self._calls: dict[int, list[str]] = {}

    def take(self, choice: Any) -> str:
        """Add what a chunk brings; its text."""
        self.finish_reason = choice.finish_reason or self.finish_reason
        delta = choice.delta
        for part in delta.tool_calls or ():
            call = self._calls.setdefault(part.index, ["", "", ""])
            call[0] = part.id or call[0]
            if part.function is not None:
                call[1] += part.function.name or ""
                call[2] += part.function.arguments or ""
        piece: str = delta.content or ""
        self.text += piece
        if len(self.text) + sum(len(one[2]) for one in self._calls.values()) > _MAX_ANSWER_CHARS:
            raise TmlError(f"the answer is longer than {_MAX_ANSWER_CHARS} characters")
        return piece

    @property
    def calls(self) -> list[tuple[str, str, str]]:
        """(call_id, name, arguments) of the tool calls, in order."""
        return [
            (call_id or f"call-{index}", name, arguments)
            for index, (call_id, name, arguments) in sorted(self._calls.items())
        ]

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of the conversation."""
        calls = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, name, arguments in self.calls
        ]
        return {"role": "assistant", "content": self.text or None, "tool_calls": calls}


def task_text(job: JobContext, found: Sequence[str], max_chars: int) -> str:
    """The job as one user message: conversation, what tools found, request."""
    parts = []
    conversation = job.package.conversation(max_chars)
    if conversation:
        parts.append(f"The conversation so far:\n{conversation}")
    parts += found
    parts.append(f"Request: {job.package.request}" if parts else job.package.request)
    return "\n\n".join(parts)


def _declaration(tool: dict[str, Any]) -> dict[str, Any]:
    function = {name: tool[name] for name in ("name", "description", "parameters")}
    return {"type": "function", "function": function}


def _data_url(rgb: NDArray[np.uint8]) -> str:
    """A picture as a PNG data URL."""
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height = rgb.shape[1], rgb.shape[0]
    encoder.pix_fmt, encoder.time_base = "rgb24", fractions.Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    data = b"".join(bytes(one) for one in (*encoder.encode(frame), *encoder.encode(None)))
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
