"""Tools of an MCP server: a process of ours that speaks over its stdin and stdout, or a URL."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, Final

from tml_core.background.extra import require
from tml_core.background.tools import Report, Tool, ToolFailed
from tml_core.errors import InvalidArgument, InvalidType, TmlError

__all__ = ["McpServer"]

_STDERR_CHARS: Final = 400


class McpServer:
    """The tools of one MCP server (official ``mcp`` package), for `BackgroundRunner`.

    ``command``: program and arguments of a server that is started with the runner and stopped with
    it, its whole process group; it sees a minimal environment and ``env``. Or ``url``: a server
    that speaks streamable HTTP, with ``headers``. ``prefix`` goes before its tools' names.

    The connection is made once. If it breaks, the call that notices fails and the next one makes a
    new one; a tool the new server lacks fails then.
    """

    def __init__(
        self,
        command: Sequence[str] | None = None,
        *,
        url: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        headers: Mapping[str, str] | None = None,
        prefix: str = "",
        connect_timeout_s: float = 30.0,
    ) -> None:
        if (command is None) == (url is None):
            raise InvalidArgument("McpServer: expected either command or url")
        if command is not None and (isinstance(command, str) or not command):
            raise InvalidType("command: expected a list of program and arguments")
        require("mcp", "McpServer")
        self._command = None if command is None else [str(one) for one in command]
        self._url = url
        self._env = dict(env or {})
        self._cwd = cwd
        self._headers = dict(headers or {})
        self._prefix = prefix
        self._connect_timeout_s = connect_timeout_s
        self._client: Any = None
        self._error: Exception | None = None
        self._wanted = asyncio.Event()
        self._settled = asyncio.Event()  # there is a client or an error
        self._broken = asyncio.Event()

    def __repr__(self) -> str:
        return f"McpServer({self._url or ' '.join(self._command or [])})"

    async def serve(self, opened: "asyncio.Future[Sequence[Tool]]", closing: asyncio.Event) -> None:
        """See `ToolSource`."""
        while True:
            try:
                async with self._connected() as client:
                    if not opened.done():
                        opened.set_result(await self._tools(client))
                    self._client = client
                    self._settled.set()
                    await _first(self._broken, closing)
            except Exception as error:
                if not opened.done():
                    raise
                self._error = error
            self._client = None
            if closing.is_set():
                self._settled.set()
                return
            if self._error is not None:
                self._settled.set()
            await _first(self._wanted, closing)
            for event in (self._wanted, self._settled, self._broken):
                event.clear()
            self._error = None
            if closing.is_set():
                self._settled.set()
                return

    async def call(self, name: str, arguments: dict[str, Any], report: Report) -> str:
        """Call the server's tool ``name``; raises ToolFailed with what the server says."""
        mcp = require("mcp", "McpServer")
        client = await self._ready_client()

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            whole = "" if total is None else f" of {total:g}"
            report(message or f"{name}: {progress:g}{whole}")

        try:
            result = await client.call_tool(name, arguments, progress_callback=on_progress)
        except mcp.MCPError as error:
            if not await self._is_alive(client):
                self._broken.set()
                raise ToolFailed(f"{name}: the connection to {self} broke: {error}") from error
            raise ToolFailed(f"{name}: {error}") from error
        text = _text(result)
        if result.is_error:
            raise ToolFailed(text or f"{name} failed without a word")
        return text

    async def _is_alive(self, client: Any) -> bool:
        try:
            async with asyncio.timeout(1.0):
                await client.list_tools(cache_mode="bypass")
        except Exception:
            return False
        return True

    async def _ready_client(self) -> Any:
        if self._broken.is_set() or self._error is not None:
            self._broken.set()
            self._wanted.set()
            # The serving task clears it when it begins anew.
            while self._wanted.is_set():
                await asyncio.sleep(0.01)
        await self._settled.wait()
        if self._client is None:
            raise ToolFailed(f"{self} cannot be reached: {self._error}")
        return self._client

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        mcp = require("mcp", "McpServer")
        with tempfile.TemporaryFile("w+", errors="replace") as stderr:
            transport = self._transport(stderr)
            client = mcp.Client(transport)
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    await client.__aenter__()
            except Exception as error:
                raise TmlError(f"{self}: no connection: {_flat(error)}{_tail(stderr)}") from error
            try:
                yield client
            finally:
                await client.__aexit__(None, None, None)

    def _transport(self, stderr: IO[str]) -> Any:
        if self._command is not None:
            stdio = require("mcp.client.stdio", "McpServer")
            return stdio.stdio_client(
                stdio.StdioServerParameters(
                    command=self._command[0],
                    args=self._command[1:],
                    env=self._env,
                    cwd=self._cwd,
                ),
                errlog=stderr,
            )
        http = require("mcp.client.streamable_http", "McpServer")
        if not self._headers:
            return http.streamable_http_client(self._url)
        client = require("httpx2", "McpServer").AsyncClient(headers=self._headers, timeout=30.0)
        return http.streamable_http_client(self._url, http_client=client)

    async def _tools(self, client: Any) -> list[Tool]:
        tools: list[Tool] = []
        cursor: str | None = None
        while True:
            page = await client.list_tools(cursor=cursor)
            tools += (_McpTool(self, one, self._prefix) for one in page.tools)
            cursor = page.next_cursor
            if not cursor:
                return tools


class _McpTool:
    def __init__(self, server: McpServer, declared: Any, prefix: str) -> None:
        self._server = server
        self._declared: str = declared.name
        self.name: Final = prefix + self._declared
        self.description: Final[str] = declared.description or ""
        self.parameters: Final[dict[str, Any]] = dict(declared.input_schema)

    async def __call__(self, arguments: dict[str, Any], report: Report, /) -> str:
        return await self._server.call(self._declared, arguments, report)


async def _first(*events: asyncio.Event) -> None:
    """Wait for any of ``events``."""
    tasks = [asyncio.ensure_future(one.wait()) for one in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _text(result: Any) -> str:
    parts = []
    for block in result.content:
        text = getattr(block, "text", None)
        if isinstance(text, str):
            parts.append(text)
        else:
            size = len(getattr(block, "data", "") or "")
            parts.append(f"[{block.type}, {size} characters of base64]")
    if not parts and result.structured_content is not None:
        pydantic_core = require("pydantic_core", "McpServer")
        parts.append(pydantic_core.to_json(result.structured_content).decode())
    return "\n".join(parts)


def _flat(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return f"{type(error).__name__}: {error}"


def _tail(stderr: IO[str]) -> str:
    stderr.flush()
    stderr.seek(0)
    said = stderr.read()[-_STDERR_CHARS:].strip()
    return f"; its stderr ends with: {said}" if said else ""
