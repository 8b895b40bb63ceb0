"""A real MCP server for the tests: ``python mcp_tools_server.py stdio|http``.

With http it prints its port on stderr's first line.
"""

import asyncio
import os
import socket
import sys
from pathlib import Path

from mcp.server.mcpserver import Context, MCPServer

server = MCPServer("test tools")


@server.tool()
def search_files(query: str, folder: str) -> str:
    """Find lines of text files that hold all words of the query."""
    words = query.lower().split()
    found = [
        f"{path.name}: {line}"
        for path in sorted(Path(folder).glob("*.txt"))
        for line in path.read_text().splitlines()
        if all(word in line.lower() for word in words)
    ]
    return "\n".join(found) or "nothing found"


@server.tool()
def fail(reason: str) -> str:
    """Raise."""
    raise ValueError(reason)


@server.tool()
async def hang() -> str:
    """Never come back."""
    await asyncio.Event().wait()
    return ""


@server.tool()
def big(num_bytes: int) -> str:
    """Return much."""
    return "x" * num_bytes


@server.tool()
async def flood(count: int, ctx: Context) -> str:
    """Report progress over and over."""
    for index in range(count):
        await ctx.report_progress(index, count, f"step {index}")
    return "over"


@server.tool()
def die() -> str:
    """End the process in the middle of a call."""
    os._exit(7)


@server.tool()
def pid() -> int:
    """The server's process id."""
    return os.getpid()


@server.tool()
def environment(name: str) -> str:
    """One of the server's environment variables."""
    return os.environ.get(name, "unset")


if __name__ == "__main__":
    if sys.argv[1] == "http":
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        print(port, file=sys.stderr, flush=True)
        server.run("streamable-http", port=port)
    else:
        server.run("stdio")
