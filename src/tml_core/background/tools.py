"""Tools of a background model: functions called with checked arguments, a time and a size.

A call never raises: what goes wrong is a `ToolOutput` with ``is_error`` that tells the model why,
so that it can do better. Functions that are not ``async`` run in threads of their own. A thread
cannot be stopped: after its time the call is answered, the thread is left behind and keeps its
place among ``max_threads`` until it ends; when all places are taken, calls are refused.
"""

import asyncio
import contextvars
import inspect
import json
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol, cast

from tml_core.background.extra import require
from tml_core.background.updates import ToolOutput
from tml_core.errors import InvalidArgument, InvalidType

__all__ = ["PythonTool", "Tool", "ToolFailed", "ToolSource", "Toolbox"]

Report = Callable[[str], None]

_ABANDON_S: Final = 1.0  # what a cancelled async tool gets to clean up


class ToolFailed(Exception):
    """Raised by a tool to tell the model what went wrong, in its own words."""


class Tool(Protocol):
    """A tool as a model sees it. ``parameters``: the JSON Schema of its arguments."""

    @property
    def name(self) -> str:
        """Unique among the tools of a runner."""

    @property
    def description(self) -> str:
        """What it does."""

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON Schema, of type object."""

    def __call__(self, arguments: dict[str, Any], report: Report, /) -> Coroutine[Any, Any, str]:
        """Run it; ``report`` shows progress. May raise anything."""


class ToolSource(Protocol):
    """Where tools come from that must be connected to first, an MCP server for one."""

    async def serve(self, opened: "asyncio.Future[Sequence[Tool]]", closing: asyncio.Event) -> None:
        """Connect, give the tools, stay until ``closing``, disconnect. What is raised before the
        tools are given is raised by the runner's start."""


class PythonTool:
    """A function or coroutine function as a tool; JSON Schema and checks from its type hints."""

    def __init__(self, function: Callable[..., Any], places: threading.Semaphore) -> None:
        name = getattr(function, "__name__", "")
        if not name.isidentifier():
            raise InvalidArgument(f"tools: expected a named function, got {function!r}")
        self.name: Final = name
        self.description: Final = inspect.getdoc(function) or ""
        self._function = function
        self._is_async = inspect.iscoroutinefunction(function)
        self._places = places
        self._model = _arguments_model(function, name)
        schema = self._model.model_json_schema()
        self.parameters: Final[dict[str, Any]] = cast(dict[str, Any], _without_titles(schema))

    async def __call__(self, arguments: dict[str, Any], _report: Report, /) -> str:
        checked = self._model.model_validate(arguments)
        values = {name: getattr(checked, name) for name in type(checked).model_fields}
        if self._is_async:
            return _text(await self._function(**values))
        return _text(await _in_thread(lambda: self._function(**values), self.name, self._places))


class Toolbox:
    """All tools of a runner, by name.

    ``timeout_s`` and ``max_output_bytes`` hold for each call, ``max_parallel`` for all together.
    ``reserved``: names no tool may have.
    """

    def __init__(
        self,
        tools: Sequence[Any],
        *,
        timeout_s: float,
        max_output_bytes: int,
        max_parallel: int,
        max_threads: int,
        reserved: Sequence[str] = (),
    ) -> None:
        self._reserved = reserved
        self._timeout_s = timeout_s
        self._max_output_bytes = max_output_bytes
        self._slots = asyncio.Semaphore(max_parallel)
        places = threading.Semaphore(max_threads)
        self._tools: dict[str, Tool] = {}
        self.sources: list[ToolSource] = []
        self.num_abandoned = 0
        for tool in tools:
            if hasattr(tool, "serve"):
                self.sources.append(tool)
            elif hasattr(tool, "parameters") and callable(tool):
                self.add([tool])
            elif callable(tool):
                self.add([PythonTool(tool, places)])
            else:
                raise InvalidType(
                    f"tools: expected functions or tool sources, got {type(tool).__name__}"
                )

    def add(self, tools: Sequence[Tool]) -> None:
        """Make tools known; raises InvalidArgument for a name that is taken."""
        for tool in tools:
            if tool.name in self._reserved:
                raise InvalidArgument(
                    f"tools: the name {tool.name!r} is taken by the runner itself"
                )
            if tool.name in self._tools:
                raise InvalidArgument(f"tools: expected distinct names, got {tool.name!r} twice")
            self._tools[tool.name] = tool

    def __contains__(self, name: str) -> bool:
        return name in self._tools

    @property
    def schemas(self) -> tuple[dict[str, Any], ...]:
        """The declarations, as `tml_core.Session` takes them."""
        return tuple(
            {
                "type": "function",
                "name": one.name,
                "description": one.description,
                "parameters": one.parameters,
            }
            for one in self._tools.values()
        )

    async def call(self, call_id: str, name: str, arguments: str, report: Report) -> ToolOutput:
        """Call a tool with arguments as a model wrote them; raises only CancelledError."""
        try:
            text = await self._call(name, arguments, report)
            is_error = False
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # SystemExit of a tool must not end the loop
            text, is_error = _reason(error), True
        num_bytes, content = _cut(text, self._max_output_bytes)
        return ToolOutput(call_id, name, content, is_error, num_bytes)

    async def _call(self, name: str, arguments: str, report: Report) -> str:
        tool = self._tools.get(name)
        if tool is None:
            raise ToolFailed(f"there is no tool {name!r}; there are {sorted(self._tools)}")
        try:
            values = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ToolFailed(f"the arguments of {name} are not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ToolFailed(
                f"the arguments of {name} must be a JSON object, got {type(values).__name__}"
            )
        async with self._slots:
            return await self._timed(tool, values, report)

    async def _timed(self, tool: Tool, values: dict[str, Any], report: Report) -> str:
        """Run a tool in a task of its own, so that one that swallows its cancel holds up nobody."""
        task = asyncio.ensure_future(_contained(tool(values, report)))
        try:
            done, _ = await asyncio.wait({task}, timeout=self._timeout_s)
        except asyncio.CancelledError:
            await self._abandon(task)
            raise
        if not done:
            await self._abandon(task)
            raise ToolFailed(f"{tool.name} did not answer within {self._timeout_s:g} s")
        if task.cancelled():
            raise ToolFailed(f"{tool.name} cancelled itself")
        return task.result()

    async def _abandon(self, task: "asyncio.Future[str]") -> None:
        task.cancel()
        # Once more, for a cancel that is swallowed once.
        for _ in range(2):
            done, _ = await asyncio.wait({task}, timeout=_ABANDON_S)
            if done:
                if not task.cancelled():
                    task.exception()  # read, so that nobody logs it
                return
            task.cancel()
        self.num_abandoned += 1


async def _contained(work: Coroutine[Any, Any, str]) -> str:
    """What would end the loop if it left a task, a tool may raise too."""
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as error:
        raise ToolFailed(_reason(error)) from error


async def _in_thread(function: Callable[[], Any], name: str, places: threading.Semaphore) -> Any:
    """Run ``function`` in a daemon thread; a cancel leaves the thread to itself."""
    if not places.acquire(blocking=False):
        raise ToolFailed(f"{name} cannot run now: too many tools have not come back")
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(value: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def run() -> None:
        value, failure = None, None
        try:
            value = context.run(function)
        except BaseException as error:
            # A StopIteration cannot be set on a future, a SystemExit would end the loop.
            failure = error if isinstance(error, Exception) else ToolFailed(_reason(error))
            if isinstance(error, StopIteration):
                failure = ToolFailed(_reason(error))
        finally:
            places.release()
        try:
            loop.call_soon_threadsafe(settle, value, failure)
        except RuntimeError:
            return  # the loop has ended; nobody waits

    threading.Thread(target=run, name=f"tml-tool-{name}", daemon=True).start()
    return await future


def _arguments_model(function: Callable[..., Any], name: str) -> Any:
    pydantic = require("pydantic", "tools")
    fields: dict[str, Any] = {}
    try:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
    except (NameError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{name}: annotations cannot be resolved: {error}") from error
    for parameter in parameters:
        where = f"{name}: parameter {parameter.name!r}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise InvalidArgument(f"{where}: expected one that can be given by name")
        if parameter.annotation is parameter.empty:
            raise InvalidArgument(f"{where}: expected a type annotation, got none")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (parameter.annotation, default)
    try:
        return pydantic.create_model(name, __config__=pydantic.ConfigDict(extra="forbid"), **fields)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InvalidArgument(f"{name}: no JSON Schema for its annotations: {reason}") from error


def _without_titles(schema: Any) -> Any:
    """The titles pydantic makes of field names tell a model nothing."""
    if isinstance(schema, dict):
        return {
            key: _without_titles(value)
            for key, value in schema.items()
            if not (key == "title" and isinstance(value, str))
        }
    return [_without_titles(one) for one in schema] if isinstance(schema, list) else schema


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "null"
    pydantic_core = require("pydantic_core", "tools")
    return cast(bytes, pydantic_core.to_json(value)).decode()


def _cut(text: str, max_bytes: int) -> tuple[int, str]:
    """The size of ``text`` in UTF-8, and as much of it as the cap allows."""
    data = text.encode("utf-8", "replace")
    if len(data) <= max_bytes:
        return len(data), data.decode()
    kept = data[:max_bytes].decode("utf-8", "ignore")
    return len(data), f"{kept}\n[cut: the first {max_bytes} of {len(data)} bytes]"


def _reason(error: BaseException) -> str:
    if isinstance(error, ToolFailed):
        return str(error)
    return f"{type(error).__name__}: {error}"
