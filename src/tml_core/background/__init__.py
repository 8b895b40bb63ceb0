"""The second model: jobs that think, search and use tools while a live session goes on.

    runner = tml.BackgroundRunner(backend, tools=[search])
    session.attach(runner)                    # its delegate calls become jobs, results enter it
    job = runner.submit("Compare the two offers.", session=session)
    for update in job: ...                    # or: async for

What a job reports (updates), what it is told (context), the job itself (job), when results enter a
session (delivery, attachment), tools (tools, mcp_server), backends (backend, endpoint, local_model,
forked), a llama.cpp server of our own (llama_server), and the runner (runner, loop).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tml_core.background.backend import Backend, JobContext
    from tml_core.background.context import (
        CallItem,
        ContextPackage,
        Frame,
        ResultItem,
        SoundItem,
        TextItem,
    )
    from tml_core.background.delivery import DeliveryPolicy
    from tml_core.background.endpoint import OpenAIBackend
    from tml_core.background.forked import ForkBackend
    from tml_core.background.job import Job
    from tml_core.background.llama_server import LlamaServer
    from tml_core.background.local_model import LocalBackend
    from tml_core.background.mcp_server import McpServer
    from tml_core.background.runner import BackgroundRunner
    from tml_core.background.tools import ToolFailed
    from tml_core.background.updates import (
        Cancelled,
        Failed,
        Final,
        Partial,
        Progress,
        ToolCall,
        ToolOutput,
    )

__all__ = [
    "Backend",
    "BackgroundRunner",
    "CallItem",
    "Cancelled",
    "ContextPackage",
    "DeliveryPolicy",
    "Failed",
    "Final",
    "ForkBackend",
    "Frame",
    "Job",
    "JobContext",
    "LlamaServer",
    "LocalBackend",
    "McpServer",
    "OpenAIBackend",
    "Partial",
    "Progress",
    "ResultItem",
    "SoundItem",
    "TextItem",
    "ToolCall",
    "ToolFailed",
    "ToolOutput",
]

_HOME = {
    "backend": (
        "Backend",
        "JobContext",
    ),
    "context": (
        "CallItem",
        "ContextPackage",
        "Frame",
        "ResultItem",
        "SoundItem",
        "TextItem",
    ),
    "delivery": ("DeliveryPolicy",),
    "endpoint": ("OpenAIBackend",),
    "forked": ("ForkBackend",),
    "job": ("Job",),
    "llama_server": ("LlamaServer",),
    "local_model": ("LocalBackend",),
    "mcp_server": ("McpServer",),
    "runner": ("BackgroundRunner",),
    "tools": ("ToolFailed",),
    "updates": (
        "Cancelled",
        "Failed",
        "Final",
        "Partial",
        "Progress",
        "ToolCall",
        "ToolOutput",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tml_core.background' has no attribute {name!r}")
    value = getattr(import_module(f"tml_core.background.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
