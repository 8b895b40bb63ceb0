"""`BackgroundRunner`: what thinks and uses tools while the live session goes on."""

import asyncio
import inspect
import itertools
import json
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Self

from tml_core.background.attachment import DELEGATE, Attachment, Calls
from tml_core.background.backend import Backend
from tml_core.background.context import ContextPackage
from tml_core.background.delivery import DeliveryPolicy, Entry
from tml_core.background.job import Deliver, Job
from tml_core.background.loop import RunnerLoop
from tml_core.background.tools import Toolbox
from tml_core.background.updates import Failed
from tml_core.background.updates import Final as FinalUpdate
from tml_core.engine.seat import Seat
from tml_core.errors import InvalidArgument, InvalidType, Overloaded, SessionClosed
from tml_core.layout.tool_call import parse_call

__all__ = ["BackgroundRunner", "OnDuplicate", "Recheck"]

OnDuplicate = Literal["reject", "steer", "allow"]
Recheck = Callable[[Job, ContextPackage], "str | Awaitable[str | None] | None"]

CANCEL: Final = "background_cancel"
STEER: Final = "background_steer"

_DELIVER: Final = ("when_idle", "interrupt", "silent")
_NUM_FINISHED: Final = 64
_MAX_RECHECKS: Final = 3
_RECHECK_S: Final = 10.0
_RETRY_MS: Final = 1000

_DECLARATIONS: Final[tuple[dict[str, Any], ...]] = (
    {
        "type": "function",
        "name": DELEGATE,
        "description": (
            "Hand a task that needs thought, search or tools to a background model, which knows "
            "this conversation. Go on talking; its result comes later."
        ),
        "parameters": {
            "type": "object",
            "properties": {
                "request": {"type": "string", "description": "What is to be done."},
                "deliver": {"type": "string", "enum": list(_DELIVER)},
            },
            "required": ["request"],
        },
    },
    {
        "type": "function",
        "name": STEER,
        "description": "Tell the background task something more.",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "call_id": {"type": "string"}},
            "required": ["text"],
        },
    },
    {
        "type": "function",
        "name": CANCEL,
        "description": "Stop the background task.",
        "parameters": {"type": "object", "properties": {"call_id": {"type": "string"}}},
    },
)


class BackgroundRunner:
    """Runs background jobs on ``backend`` and gives their results to live sessions.

    ``tools``: Python functions (``async`` or not, with type hints), `McpServer` and other tool
    sources; the background model and, of an attached session, the interaction model may call them.
    ``max_jobs``: at once; one more is refused. ``on_duplicate``: what a session's request does
    while it has one running: "reject", "steer" (tell the running one) or "allow". ``deliver``,
    ``ttl_s`` (session time a result may wait) and ``deadline_s`` (seconds a job may take) are what
    jobs get unless they say otherwise. With ``streams`` an answer enters its session sentence by
    sentence while it is written, else once it is whole. ``policy``: see `DeliveryPolicy`.
    ``recheck``: asked about a result that newer items have overtaken before it entered; it returns
    the text to give instead, or None to drop it. Without one such a result carries the flag
    "overtaken".
    ``tool_timeout_s``, ``max_output_bytes``, ``max_tool_calls`` (of a job), ``max_parallel_tools``,
    ``max_tool_threads``: bounds of tools.

    One thread with one event loop does all of it, started here: backends, tools and connections
    live in it, callers in any thread and any loop. MCP servers are connected when this returns;
    what connecting raises is raised here. It is a context manager, sync and async; closing cancels
    every job and stops every server. So does the end of the process.
    """

    def __init__(
        self,
        backend: Backend,
        tools: Sequence[Any] = (),
        *,
        max_jobs: int = 4,
        on_duplicate: OnDuplicate = "steer",
        deliver: Deliver = "when_idle",
        ttl_s: float = 120.0,
        deadline_s: float = 120.0,
        streams: bool = False,
        policy: DeliveryPolicy | None = None,
        recheck: Recheck | None = None,
        tool_timeout_s: float = 30.0,
        max_output_bytes: int = 32_768,
        max_tool_calls: int = 32,
        max_parallel_tools: int = 8,
        max_tool_threads: int = 16,
    ) -> None:
        if not isinstance(backend, Backend):
            raise InvalidType(f"backend: expected a Backend, got {type(backend).__name__}")
        _require_one_of("on_duplicate", on_duplicate, ("reject", "steer", "allow"))
        _require_one_of("deliver", deliver, _DELIVER)
        if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
            raise InvalidType(f"tools: expected a list, got {type(tools).__name__}")
        for name, value in (
            ("max_jobs", max_jobs),
            ("max_output_bytes", max_output_bytes),
            ("max_parallel_tools", max_parallel_tools),
            ("max_tool_threads", max_tool_threads),
        ):
            _require_count(name, value, 1)
        _require_count("max_tool_calls", max_tool_calls, 0)
        for name, seconds in (
            ("ttl_s", ttl_s),
            ("deadline_s", deadline_s),
            ("tool_timeout_s", tool_timeout_s),
        ):
            _require_seconds(name, seconds)
        self._max_jobs = max_jobs
        self._on_duplicate: OnDuplicate = on_duplicate
        self._deliver: Deliver = deliver
        self._ttl_s = ttl_s
        self._deadline_s = deadline_s
        self._policy = DeliveryPolicy() if policy is None else policy
        self._recheck = recheck
        self._streams = streams
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._running: dict[Job, _Origin] = {}
        self._finished: deque[Job] = deque(maxlen=_NUM_FINISHED)
        self._attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()
        self._numbers = itertools.count(1)
        self._toolbox = Toolbox(
            tools,
            timeout_s=tool_timeout_s,
            max_output_bytes=max_output_bytes,
            max_parallel=max_parallel_tools,
            max_threads=max_tool_threads,
            reserved=(DELEGATE, STEER, CANCEL),
        )
        # The thread must not keep a runner alive that nobody holds.
        ended, wrote = weakref.WeakMethod(self._ended), weakref.WeakMethod(self._wrote)
        self._loop = RunnerLoop(
            backend, self._toolbox, max_tool_calls, _weakly(ended), _weakly(wrote)
        )
        self._finalizer = weakref.finalize(self, self._loop.close)

    @property
    def declarations(self) -> tuple[dict[str, Any], ...]:
        """What a session's model is told about: ``Session(tools=[*runner.declarations])``."""
        return (*_DECLARATIONS, *self._toolbox.schemas)

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that run, and the last 64 that have ended; oldest first."""
        with self._lock:
            return (*self._finished, *self._running)

    @property
    def num_running(self) -> int:
        """How many jobs run."""
        with self._lock:
            return len(self._running)

    @property
    def num_abandoned(self) -> int:
        """Tool calls that would not end when cancelled and were left behind."""
        return self._toolbox.num_abandoned

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more jobs."""
        return not self._finalizer.alive

    def submit(
        self,
        request: str | ContextPackage,
        *,
        session: Any = None,
        deliver: Deliver | None = None,
        priority: int = 0,
        ttl_s: float | None = None,
        deadline_s: float | None = None,
    ) -> Job:
        """Start a job; returns at once.

        ``session``: an attached session: its conversation goes along, the result enters it, and
        `on_duplicate` holds (with "steer" the job returned may be the one that runs). Of results
        that wait the higher ``priority`` enters first.

        Raises Overloaded when ``max_jobs`` run or a duplicate is rejected, InvalidArgument for a
        session that is not attached here, SessionClosed after `close`.
        """
        attachment = None if session is None else self._attachment(session)
        return self._submit(
            request,
            attachment,
            deliver=self._deliver if deliver is None else deliver,
            priority=priority,
            ttl_s=self._ttl_s if ttl_s is None else ttl_s,
            deadline_s=self._deadline_s if deadline_s is None else deadline_s,
        )

    def drain(self, timeout_s: float | None = None) -> None:
        """Wait until no job runs. Raises TimeoutError; the jobs then go on."""
        with self._idle:
            if not self._idle.wait_for(lambda: not self._running, timeout_s):
                raise TimeoutError(
                    f"drain: {len(self._running)} jobs did not end within {timeout_s} s"
                )

    def close(self) -> None:
        """Cancel every job, stop every tool server, end the thread; a second time does nothing.

        Raises TimeoutError, after 20 s, if a backend does not end when it is cancelled.
        """
        self._finalizer.detach()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A cancel must not leave the jobs to themselves.
        await asyncio.shield(asyncio.to_thread(self.close))

    def bind(self, session: Any, seat: Seat) -> Attachment:
        """For `Session.attach`."""
        if self.is_closed:
            raise SessionClosed("runner: it is closed")
        attachment = Attachment(
            session,
            seat,
            self._policy,
            [one["name"] for one in self.declarations],
            on_calls=self._on_calls,
            on_closed=self._on_closed,
            on_undone=_cancel_all,
            recheck=self._on_overtaken,
        )
        self._attachments.add(attachment)
        return attachment

    # Jobs.

    def _submit(
        self,
        request: str | ContextPackage,
        attachment: Attachment | None,
        *,
        deliver: Deliver,
        priority: int = 0,
        ttl_s: float,
        deadline_s: float,
        call_id: str | None = None,
    ) -> Job:
        _require_one_of("deliver", deliver, _DELIVER)
        _require_seconds("ttl_s", ttl_s)
        _require_seconds("deadline_s", deadline_s)
        if isinstance(request, str):
            plain = ContextPackage(request)  # checks it
            package = plain if attachment is None else attachment.package(request)
        elif isinstance(request, ContextPackage):
            package = request
        else:
            raise InvalidType(
                f"request: expected str or ContextPackage, got {type(request).__name__}"
            )
        with self._lock:
            if self.is_closed:
                raise SessionClosed("submit: the runner is closed")
            if attachment is not None and attachment.is_closed:
                raise SessionClosed("submit: the session is closed")
            running = self._duplicate_of(attachment)
            if running is not None and self._on_duplicate == "reject":
                raise Overloaded(
                    f"submit: {running.id} of this session still runs",
                    reason="duplicate",
                    retry_after_ms=_RETRY_MS,
                )
            if (
                running is not None
                and self._on_duplicate == "steer"
                and running.steer(package.request)
            ):
                return running
            if sum(one.is_delegated for one in self._running.values()) >= self._max_jobs:
                raise Overloaded(
                    f"submit: all {self._max_jobs} jobs (max_jobs) are running",
                    reason="jobs",
                    retry_after_ms=_RETRY_MS,
                )
            job = Job(
                f"job-{next(self._numbers)}",
                package,
                deliver=deliver,
                priority=priority,
                ttl_s=ttl_s,
                deadline_s=deadline_s,
                stop=self._loop.stop_job,
                call_id=call_id,
            )
            seen_tick = -1 if attachment is None else attachment.tick
            self._running[job] = _Origin(attachment, seen_tick, is_delegated=True)
            if attachment is not None:
                attachment.begin(job)
            if not self._loop.start_job(job):
                del self._running[job]
                raise SessionClosed("submit: the runner is closed")
        return job

    def _duplicate_of(self, attachment: Attachment | None) -> Job | None:
        """The newest delegated job of the same session that runs."""
        if attachment is None:
            return None
        for job, origin in reversed(self._running.items()):
            if origin.attachment is attachment and origin.is_delegated:
                return job
        return None

    def _wrote(self, job: Job, text: str) -> None:
        """In the loop: a job has written a piece of its answer."""
        with self._lock:
            origin = self._running[job]
        attachment = origin.attachment
        if self._streams and attachment is not None and not attachment.is_closed:
            attachment.stream(job, text, origin.seen_tick, _name_of(job))

    def _ended(self, job: Job) -> None:
        """In the loop: a job is over."""
        with self._lock:
            origin = self._running[job]
        try:
            if origin.attachment is not None and not origin.attachment.is_closed:
                outcome = job.result()
                origin.attachment.deliver(job, outcome, origin.seen_tick, _name_of(job))
        except InvalidArgument:
            job.delivery = "dropped"  # the session's tokenizer cannot spell it
        finally:
            with self._idle:
                del self._running[job]
                self._finished.append(job)
                self._idle.notify_all()

    def _attachment(self, session: Any) -> Attachment:
        for attachment in list(self._attachments):
            if attachment.session is session:
                return attachment
        raise InvalidArgument("session: expected one with this runner attached")

    # What the engine tells; in its thread, so only passed on.

    def _on_calls(self, attachment: Attachment, calls: Calls) -> None:
        self._loop.post(lambda: self._take_calls(attachment, calls))

    def _on_closed(self, attachment: Attachment) -> None:
        with self._lock:
            jobs = [one for one, origin in self._running.items() if origin.attachment is attachment]
        for job in jobs:
            job.cancel("its session was closed")

    def _on_overtaken(self, attachment: Attachment, entry: Entry) -> bool:
        if self._recheck is None or entry.num_rechecks >= _MAX_RECHECKS:
            return False
        entry.num_rechecks += 1
        return self._loop.post(lambda: self._loop.start_other(self._look_again(attachment, entry)))

    # In the loop.

    async def _look_again(self, attachment: Attachment, entry: Entry) -> None:
        job = entry.job
        assert self._recheck is not None  # its caller has seen to that
        try:
            async with asyncio.timeout(_RECHECK_S):
                text = self._recheck(job, attachment.package(job.request))
                if inspect.isawaitable(text):
                    text = await text
            if text is None:
                attachment.drop(entry)
            else:
                attachment.replace(entry, text, _name_of(job))
        except asyncio.CancelledError:
            raise
        except BaseException:  # SystemExit must not end the loop
            # Rather a result that says it was overtaken than none.
            entry.num_rechecks = _MAX_RECHECKS
            attachment.release(entry, is_seen=False)

    def _take_calls(self, attachment: Attachment, calls: Calls) -> None:
        for _, call_id, raw in calls:
            name, args, error = parse_call(raw)
            if error is not None:
                self._answer(attachment, call_id, error, is_error=True)
            elif name == DELEGATE:
                self._delegate(attachment, call_id, args)
            elif name in (STEER, CANCEL):
                self._control(attachment, call_id, name, args)
            elif name in self._toolbox:
                self._call_tool(attachment, call_id, name, args)

    def _delegate(self, attachment: Attachment, call_id: str, args: Mapping[str, Any]) -> None:
        request, deliver = args.get("request"), args.get("deliver", self._deliver)
        try:
            if not isinstance(request, str):
                raise InvalidType(f"request: expected str, got {type(request).__name__}")
            job = self._submit(
                request,
                attachment,
                deliver=deliver,
                ttl_s=self._ttl_s,
                deadline_s=self._deadline_s,
                call_id=call_id,
            )
        except SessionClosed:
            return
        except (InvalidArgument, InvalidType, Overloaded) as error:
            self._answer(attachment, call_id, str(error), is_error=True)
            return
        if job.call_id != call_id:
            self._answer(attachment, call_id, f"passed on to {job.call_id or job.id}")

    def _control(
        self, attachment: Attachment, call_id: str, name: str, args: Mapping[str, Any]
    ) -> None:
        wanted = args.get("call_id")
        with self._lock:
            jobs = [
                one
                for one, origin in self._running.items()
                if origin.attachment is attachment
                and origin.is_delegated
                and (wanted is None or wanted in (one.call_id, one.id))
            ]
        if not jobs:
            self._answer(attachment, call_id, "no such task is running", is_error=True)
            return
        job = jobs[-1]
        text = args.get("text")
        try:
            if name == CANCEL:
                is_done = job.cancel("by the interaction model")
            elif isinstance(text, str):
                is_done = job.steer(text)
            else:
                raise InvalidType(f"text: expected str, got {type(text).__name__}")
        except (InvalidArgument, InvalidType) as error:
            self._answer(attachment, call_id, str(error), is_error=True)
            return
        answer = "done" if is_done else "too late: its result is on the way"
        self._answer(attachment, call_id, answer)

    def _call_tool(
        self, attachment: Attachment, call_id: str, name: str, args: Mapping[str, Any]
    ) -> None:
        """A tool that the interaction model called itself: it waits for it, so no pause is."""

        async def call(job: Job) -> None:
            arguments = json.dumps(dict(args))
            output = await self._toolbox.call(call_id, name, arguments, lambda _text: None)
            job.put(Failed(output.content) if output.is_error else FinalUpdate(output.content))

        self._small_job(attachment, call_id, f"{name} {json.dumps(dict(args))}", call)

    def _answer(
        self, attachment: Attachment, call_id: str, text: str, *, is_error: bool = False
    ) -> None:
        """An answer that is ready goes the way of all others, so that budgets hold for it too."""

        async def call(job: Job) -> None:
            job.put(Failed(text) if is_error else FinalUpdate(text))

        self._small_job(attachment, call_id, text, call)

    def _small_job(
        self,
        attachment: Attachment,
        call_id: str,
        request: str,
        work: Callable[[Job], Any],
    ) -> None:
        job = Job(
            f"job-{next(self._numbers)}",
            ContextPackage(request),
            deliver="interrupt",
            priority=0,
            ttl_s=self._ttl_s,
            deadline_s=self._deadline_s,
            stop=self._loop.stop_job,
            call_id=call_id,
        )
        with self._lock:
            num_small = sum(not origin.is_delegated for origin in self._running.values())
            if num_small >= _MAX_SMALL or attachment.is_closed:
                return
            self._running[job] = _Origin(attachment, attachment.tick, is_delegated=False)
            attachment.begin(job)
            if not self._loop.start_work(job, lambda: work(job)):
                del self._running[job]


class _Origin:
    """Where a job comes from."""

    __slots__ = ("attachment", "is_delegated", "seen_tick")

    def __init__(
        self, attachment: Attachment | None, seen_tick: int, *, is_delegated: bool
    ) -> None:
        self.attachment = attachment
        self.seen_tick = seen_tick
        self.is_delegated = is_delegated


# Direct tool calls under way; a model that floods calls gets no answer to the rest.
_MAX_SMALL: Final = 64


def _weakly(method: "weakref.WeakMethod[Any]") -> Callable[..., None]:
    def call(*args: Any) -> None:
        bound = method()
        if bound is not None:
            bound(*args)

    return call


def _name_of(job: Job) -> str | None:
    """The tool a result is of, where no call of the model says so."""
    return DELEGATE if job.call_id is None else None


def _cancel_all(jobs: list[Job]) -> None:
    for job in jobs:
        job.cancel("its call was undone")


def _require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidArgument(f"{name}: expected one of {list(allowed)}, got {value!r}")


def _require_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidType(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise InvalidArgument(f"{name}: expected at least {least}, got {value}")


def _require_seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidType(f"{name}: expected seconds, got {type(value).__name__}")
    if not value > 0:
        raise InvalidArgument(f"{name}: expected more than 0, got {value}")
