"""What a background model is to the runner, and what the runner is to it."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Protocol, runtime_checkable

from tml_core.background.context import ContextPackage
from tml_core.background.job import Job
from tml_core.background.tools import Toolbox
from tml_core.background.updates import Final, Partial, Progress, ToolCall, ToolOutput

__all__ = ["Backend", "JobContext"]


class JobContext:
    """One job as its backend sees it; lives in the runner's event loop."""

    def __init__(self, job: Job, toolbox: Toolbox, max_tool_calls: int) -> None:
        self._job = job
        self._toolbox = toolbox
        self._num_left = max_tool_calls
        self._max_tool_calls = max_tool_calls

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self._job.id

    @property
    def package(self) -> ContextPackage:
        """The request and the conversation it comes from."""
        return self._job.context

    @property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """Declarations of the tools that may be called."""
        return self._toolbox.schemas

    async def call_tool(self, name: str, arguments: str, call_id: str = "") -> ToolOutput:
        """Call a tool with JSON arguments as the model wrote them; never raises for a bad call.

        The job reports the call and its output. Calls may run side by side.
        """
        number = self._max_tool_calls - self._num_left
        call_id = call_id or f"{self.job_id}-tool-{number}"
        if self._num_left <= 0:
            text = f"this job has made its {self._max_tool_calls} tool calls; answer without"
            return ToolOutput(call_id, name, text, is_error=True, num_bytes=len(text))
        self._num_left -= 1
        self._job.put(ToolCall(call_id, name, arguments))
        output = await self._toolbox.call(call_id, name, arguments, self._report)
        self._job.put(output)
        return output

    async def call_tools(self, calls: list[tuple[str, str, str]]) -> list[ToolOutput]:
        """`call_tool` for (call_id, name, arguments), side by side; outputs in the same order."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.call_tool(name, arguments, call_id))
                for call_id, name, arguments in calls
            ]
        return [task.result() for task in tasks]

    def take_steering(self) -> tuple[str, ...]:
        """What the job was told since it was last asked; add it before the next request."""
        return self._job.take_steering(is_last=False)

    def finish(self) -> tuple[str, ...]:
        """Call it before `Final`: what the job was told meanwhile, and then there is one more
        round to do; or nothing, and from then on `Job.steer` says that it is too late."""
        return self._job.take_steering(is_last=True)

    def _report(self, text: str) -> None:
        self._job.put(Progress(text))


@runtime_checkable
class Backend(Protocol):
    """A background model. One backend runs many jobs, side by side, in one event loop."""

    def run(self, job: JobContext) -> AsyncGenerator[Progress | Partial | Final, None]:
        """Answer ``job.package.request``: an async generator that ends with one `Final`.

        It is cancelled with CancelledError at whatever it awaits, must clean up and let that pass.
        What it raises becomes `Failed`. It must not block the loop.
        """
