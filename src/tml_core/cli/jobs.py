"""``tml-core run --background``: which background model, and its jobs as lines of the timeline."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from tml_core.background.delivery import DeliveryPolicy
from tml_core.background.endpoint import OpenAIBackend
from tml_core.background.job import Job
from tml_core.background.llama_server import LlamaServer
from tml_core.background.runner import BackgroundRunner
from tml_core.background.updates import Cancelled, Failed, ToolCall, ToolOutput, Update
from tml_core.background.updates import Final as FinalUpdate
from tml_core.errors import InvalidArgument
from tml_core.layout.chunk import Chunk

__all__ = ["DEFAULT_REQUEST", "JobLines", "background_runner", "idle_chunks"]

DEFAULT_REQUEST: Final = "Name one good thing to do on a rainy afternoon."
_MAX_TOKENS: Final = 64
_ANSWER_S: Final = 180.0  # more than a job may take
# Ticks after the recording in which a result may still enter: a pause, and a long answer's pieces.
_MAX_EXTRA_TICKS: Final = 50


@contextmanager
def background_runner(
    where: str, model: str | None, *, heeds_model: bool
) -> Iterator[BackgroundRunner]:
    """A runner on a llama.cpp server of our own ("local") or on an endpoint (a URL)."""
    with ExitStack() as stack:
        if where == "local":
            server = stack.enter_context(LlamaServer())
            backend = server.backend(max_tokens=_MAX_TOKENS, options={"temperature": 0})
        elif where.startswith(("http://", "https://")):
            backend = OpenAIBackend(model or "default", base_url=where, max_tokens=_MAX_TOKENS)
        else:
            raise InvalidArgument(f"background: expected 'local' or a URL, got {where!r}")
        policy = DeliveryPolicy(heeds_model=heeds_model)
        yield stack.enter_context(BackgroundRunner(backend, policy=policy))


class JobLines:
    """What the jobs of a runner did since it was last asked."""

    def __init__(self, runner: BackgroundRunner) -> None:
        self._runner = runner
        self._seen: dict[Job, tuple[int, str]] = {}

    def new(self) -> list[str]:
        """One line for each thing worth showing, oldest first."""
        lines: list[str] = []
        for job in self._runner.jobs:
            num_seen, delivery = self._seen.get(job, (0, "none"))
            if job not in self._seen:
                lines.append(f"{job.id}  asked: {job.request}")
            updates = job.updates()
            told = (_told(one) for one in updates[num_seen:])
            lines += (f"{job.id}  {one}" for one in told if one)
            if job.delivery != delivery:
                lines.append(f"{job.id}  {job.delivery}")
            self._seen[job] = len(updates), job.delivery
        return lines


def idle_chunks(runner: BackgroundRunner) -> Iterator[Chunk]:
    """Empty ticks after the end of a recording, until the results of all jobs have entered."""
    for job in runner.jobs:
        job.result(_ANSWER_S)
    runner.drain(_ANSWER_S)
    for _ in range(_MAX_EXTRA_TICKS):
        if all(job.delivery not in ("waiting", "entering") for job in runner.jobs):
            return
        yield Chunk(is_idle=True)


def _told(update: Update) -> str:
    match update:
        case ToolCall():
            return f"calls {update.name}({update.arguments})"
        case ToolOutput():
            kind = "error" if update.is_error else "got"
            return f"{kind}: {' '.join(update.content.split())}"
        case FinalUpdate():
            return f"answer: {' '.join(update.text.split())}"
        case Failed():
            return f"failed: {update.reason}"
        case Cancelled():
            return f"cancelled: {update.reason}"
        case _:
            return ""
