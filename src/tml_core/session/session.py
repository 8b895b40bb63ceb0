"""A session: one live conversation on one persistent sequence.

`Session.append` takes 200 ms of input and returns a `Turn` at once; the turn's events come as the
model writes them. A session opened without an engine shares a private one with the other sessions
of its model.
"""

import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from tml_core.engine.host import (
    Host,
    SessionOptions,
    Tool,
    engine_seat,
    loaded_model,
    new_seat,
    require_seed,
)
from tml_core.engine.job import Job
from tml_core.engine.model import Model
from tml_core.engine.sampler import SamplingParams
from tml_core.engine.seat import MAX_PENDING, Attachment, Degrade, Part, Seat, TickRecord
from tml_core.engine.session_file import read_session, write_session
from tml_core.engine.turn import Turn, require_heard
from tml_core.errors import InvalidArgument, Overloaded, SessionClosed, Unsupported
from tml_core.layout.chat_template import ChatLayout
from tml_core.layout.chunk import Chunk, ToolResult, as_chunk
from tml_core.layout.select import layout_for
from tml_core.layout.state import EncodedInput, LayoutState, OutputHalf
from tml_core.media.micro_turns import TICK_MS, MicroTurn
from tml_core.media.segments import Tokens
from tml_core.sequence.values import Retention
from tml_core.session.checks import require_count, require_deadline, require_mark
from tml_core.session.values import SessionInfo, SessionMark, info_of

__all__ = ["Session"]

T = TypeVar("T")


class Runner(Protocol):
    """What `Session.attach` takes: `tml_core.background.BackgroundRunner`."""

    def bind(self, session: Any, seat: Seat) -> Attachment:
        """Tie a session to the runner."""


class Session:
    """One live conversation on one persistent sequence.

    ``model``: "nano" (bundled, untrained), a checkpoint directory, or a loaded `Model`.
    ``tools``: functions or declarations the model is told about. The session does not run them: a
    `ToolCall` event carries the call, `add_tool_result` or ``Chunk(items=...)`` the answer.
    ``system``: instructions before the first turn. ``seed``: of everything sampled, unsigned 64
    bits. ``retention``: bounds an endless session; instructions and tools always stay.
    ``effort``: thinking effort of a plain chat checkpoint, 0 to 0.99 or "none" to "max".
    ``degrade``: what to do when a turn cannot keep its deadline: "none" (it ends late),
    "emit_silence" (its output is not begun if the first token would be late), "shrink_output" (its
    output is closed when the next token would be late), "coalesce_input" (ticks that wait while a
    turn is open go in together, and only the last is answered). It is always reported, by a
    `Notice` of kind "degraded" and `TurnDone` with that reason.

    Any thread may call any method. Those that look at or move the sequence wait for the model step
    that is running; in asyncio code call them with ``asyncio.to_thread`` where that matters.
    A session is a context manager that closes. One that is collected is closed too.
    """

    _host: Host
    _seat: Seat

    def __init__(
        self,
        model: str | Path | Model = "nano",
        *,
        system: str | None = None,
        tools: SequenceOf[Tool] = (),
        seed: int = 0,
        sampling: SamplingParams | None = None,
        retention: Retention | None = None,
        effort: float | str | None = None,
        degrade: Degrade = "none",
    ) -> None:
        loaded = loaded_model(model)
        layout = layout_for(loaded.config, loaded.tokenizer)
        options = SessionOptions.checked(
            layout, system, tools, seed, sampling, retention, effort, degrade
        )
        host, seat = engine_seat(loaded, layout, lambda host: new_seat(host, options))
        self._attach(host, seat, None)
        self._put_prefix(options.prefix)

    @classmethod
    def restore(cls, path: str | Path, model: str | Path | Model = "nano") -> "Session":
        """Go on with the session that `snapshot` wrote, bit for bit.

        Raises SnapshotError naming what differs if the file is damaged or belongs to another
        model, dtype or contract.
        """
        loaded = loaded_model(model)
        layout = layout_for(loaded.config, loaded.tokenizer)
        host, seat = engine_seat(loaded, layout, lambda host: read_session(host, Path(path)))
        return cls._over(host, seat, None)

    # Turns.

    def append(
        self,
        chunk: Chunk | MicroTurn,
        *,
        seq: int | None = None,
        deadline_ms: float | None = TICK_MS,
        expect_tip: int | None = None,
        answer: bool = True,
    ) -> Turn:
        """Put in 200 ms of input; returns at once, the turn runs in the engine.

        A model that knows ticks answers every one, unless ``answer`` is False; a plain chat
        checkpoint takes the input in and answers on `commit`. ``seq`` numbers the appends one by
        one: a number that was used already (one of the last few) gets the turn it got then, and
        nothing is put in twice. ``deadline_ms``: from now to the turn's end; what comes first goes
        first, and what happens when it cannot be kept says the session's ``degrade``; None: no
        hurry. ``expect_tip``: the `tip` the caller takes the session to stand at.

        Raises, with nothing changed: SessionBusy while a turn is open (where input is coalesced, up
        to `MAX_PENDING` appends wait their turn, and then Overloaded comes), Conflict for a gap in
        ``seq`` or another tip, SessionClosed, and InvalidArgument, InvalidType or Unsupported for a
        chunk it cannot take (of one that waits: where its turn is read). What goes wrong later
        (PoolExhausted, for one) is raised where the turn is read, and the session then stands where
        it stood before the append.
        """
        taken = as_chunk(chunk)
        require_deadline(deadline_ms)
        require_count("seq", seq)
        require_count("expect_tip", expect_tip)
        seat = self._seat
        with seat.lock:
            seat.require_open("append")
            if seq is not None:
                known = seat.known_turn(seq)
                if known is not None:
                    return known
            if expect_tip is not None:
                seat.require_tip(expect_tip)
            is_waiting = seat.is_busy and seat.degrade == "coalesce_input"
            if not is_waiting:
                seat.require_idle("append")
            elif len(seat.parts) >= MAX_PENDING:
                raise Overloaded(
                    f"append: {MAX_PENDING} appends wait already",
                    reason="pending",
                    retry_after_ms=TICK_MS,
                )
            part = Part(self._new_turn(deadline_ms), seat.layout.begin_output, taken, answer)
            if not is_waiting:
                try:
                    seat.encode(part, seat.state)
                    self._submit(part)
                except BaseException:
                    # A Ctrl-C between the two, for one.
                    if part.turn not in seat.turns:
                        seat.take_back(part)
                    raise
            else:
                # The turn that runs is followed by this one; the engine sees it when that ends.
                seat.parts.append(part)
                seat.turns.append(part.turn)
            if seq is not None:
                seat.last_seq = seq
                seat.numbered.append((seq, part.turn))
        return part.turn

    def commit(self, *, max_tokens: int = 512) -> Turn:
        """Ask a plain chat checkpoint to answer what has been put in; at most ``max_tokens``.

        Raises Unsupported for a model that knows ticks, InvalidArgument if nothing came in since
        the last answer, and as `append`.
        """
        seat, layout = self._seat, self._host.layout
        if not isinstance(layout, ChatLayout):
            raise Unsupported("commit: this model answers every tick; it has nothing to commit")
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise InvalidArgument(f"max_tokens: expected an int of at least 1, got {max_tokens!r}")
        with seat.lock:
            seat.require_idle("commit")
            encoded = layout.encode_commit(seat.state)

            def begin(state: LayoutState, epoch: int) -> OutputHalf | None:
                return layout.begin_output(state, epoch, max_tokens)

            return self._submit(Part(self._new_turn(), begin, encoded=encoded))

    def add_tool_result(self, call_id: str, content: Any, *, is_error: bool = False) -> None:
        """Answer a tool call; it goes in with the next append. May be called during a turn.

        ``content``: text or a JSON value. Raises InvalidArgument for a call that is not known.
        """
        item = ToolResult(call_id, content, is_error)
        seat = self._seat
        with seat.lock:
            if seat.is_closed:
                raise SessionClosed("add_tool_result: the session is closed")
            # A call of the turn under way is known to its output half only.
            state = seat.state if seat.output is None else seat.output.state
            state.name_of(call_id)
            seat.waiting_items = (*seat.waiting_items, item)

    def attach(self, runner: Runner) -> None:
        """Let a `BackgroundRunner` take the calls this session's model makes and put results in.

        Calls of the runner's names become jobs; other names stay the caller's, and malformed calls
        are answered with what is wrong. Closing the session ends its jobs. Forks and restored
        sessions are not attached. Raises InvalidArgument if one is attached already.
        """
        seat = self._seat
        seat.require_open("attach")
        attachment = runner.bind(self, seat)
        with seat.lock:
            seat.require_open("attach")
            if seat.attachment is not None:
                raise InvalidArgument("attach: expected a session without a runner, it has one")
            seat.attachment = attachment

    # Moving.

    def mark(self) -> SessionMark:
        """Remember this point; costs the same however long the session is."""
        seat = self._seat
        with self._idle("mark"):
            mark = self._host.loop.call(lambda: self._host.loop.memory.awake(seat).mark())
            return SessionMark(
                position=mark.tip + len(seat.state.unsent),
                tick=seat.state.tick,
                _mark=mark,
                _state=seat.state,
                _items=seat.waiting_items,
            )

    def rewind(self, mark: SessionMark) -> None:
        """Go back to a mark, which stays usable; everything since is as if it had not been.

        Raises InvalidArgument for a mark of another session, one left behind by an earlier rewind,
        or one whose positions retention has dropped since.
        """
        require_mark("mark", mark)
        seat = self._seat

        def move() -> None:
            # All of it in the engine thread: an interrupted caller leaves no half of it undone.
            self._host.loop.memory.awake(seat).rewind(mark._mark)
            seat.state, seat.waiting_items = mark._state, mark._items
            seat.position = mark.position
            seat.epoch += 1
            while seat.transcript and seat.transcript[-1].tick >= mark.tick:
                seat.transcript.pop()
            while seat.recent and seat.recent[-1].tick >= mark.tick:
                seat.recent.pop()

        with self._idle("rewind"):
            self._host.loop.call(move)

    def truncate(self, heard_ms: float) -> int | None:
        """Drop what the user has not heard at ``heard_ms`` of media time; keep all that came in.

        Text is heard when its tick begins. The output of the first tick that was not heard is
        closed empty, every later tick keeps its input with a silent output, and calls made in them
        are undone too. What was said more than `MAX_UNHEARD` ticks ago, before a fork or a restore,
        or before a point that retention has dropped counts as heard. Returns the tick from which
        on output was dropped, None if there was none. The session is then bit for bit one that
        really went so. Raises SessionBusy during a turn (``turn.cancel(keep="heard")`` is for
        that). If it fails for want of memory it stands right after that tick.
        """
        require_heard("heard", heard_ms)
        seat = self._seat
        with self._idle("truncate"):

            def forget() -> tuple[int, list[Part]] | None:
                first = seat.first_unheard(heard_ms)
                if first is None:
                    return None
                return first.tick, seat.forget_output(first)

            try:
                found = self._host.loop.call(forget)
            except InvalidArgument:
                return None  # retention
            if found is None:
                return None
            tick, parts = found
            seat.epoch += 1
            if not parts:
                return tick
            seat.turns.extend(part.turn for part in parts)
            seat.parts.extend(parts)
            self._host.loop.begin_waiting(seat)
        parts[-1].turn.result()
        return tick

    def fork(self, at: SessionMark | None = None, *, seed: int | None = None) -> "Session":
        """A session that goes on from here, or from a mark, on its own; memory is shared.

        With the same ``seed`` (the default) equal input gives equal output. Raises PoolExhausted
        without room, and as `rewind` for the mark.
        """
        if at is not None:
            require_mark("at", at)
        require_seed(seed)
        parent = self._seat
        with self._idle("fork"):

            def make() -> Seat:
                mark = None if at is None else at._mark
                sequence = self._host.loop.memory.awake(parent).fork(mark, seed=seed)
                seat = Seat(sequence, parent.layout, parent.sampling, parent.degrade)
                seat.state = parent.state if at is None else at._state
                seat.position = sequence.tip + len(seat.state.unsent)
                seat.waiting_items = parent.waiting_items if at is None else at._items
                seat.epoch = parent.epoch
                tick = seat.state.tick
                seat.transcript.extend(one for one in parent.transcript if one.tick < tick)
                return seat

            seat = self._host.loop.add_seat(make)
        return Session._over(self._host, seat, self._engine)

    def snapshot(self, path: str | Path) -> None:
        """Write the whole session to one file; an existing file is replaced once it is complete.

        The file is safetensors: the sequence, and the layout's state as JSON.
        """
        with self._idle("snapshot"):
            write_session(self._host, self._seat, Path(path))

    def park(self) -> None:
        """Put the session's memory into a file until it is used again, with the same bits.

        Its slot and pages are free for others meanwhile; what was said counts as heard. Raises
        SessionBusy during a turn or while marks are held (they would be lost), OSError if the file
        cannot be written.
        """
        seat = self._seat
        with self._idle("park"):
            self._host.loop.call(lambda: self._host.loop.memory.park(seat))

    # Looking.

    def info(self) -> SessionInfo:
        """Where the session stands. During a turn the counts are those of its last step."""
        seat, store = self._seat, self._host.model.store
        return self._look("info", lambda: info_of(seat, store))

    def token_ids(self) -> NDArray[np.int64]:
        """The whole sequence as ids, those still unsent included: -1 for sound, -2 for pictures."""
        seat = self._seat

        def look() -> NDArray[np.int64]:
            unsent = np.array(seat.state.unsent, np.int64)
            return np.concatenate((self._host.loop.memory.awake(seat).token_ids(), unsent))

        with self._idle("token_ids"):
            return self._host.loop.call(look)

    def transcript(self) -> tuple[TickRecord, ...]:
        """The last hour of ticks in words, oldest first."""
        with self._seat.lock:
            return tuple(self._seat.transcript)

    def recent(self, count: int) -> tuple[TickRecord, ...]:
        """The last ``count`` of `transcript`, oldest first; costs no more than that many."""
        with self._seat.lock:
            last = islice(reversed(self._seat.transcript), max(0, count))
            return tuple(last)[::-1]

    @property
    def model(self) -> Model:
        """The model it runs on."""
        return self._host.model

    @property
    def tip(self) -> int:
        """Positions in the sequence, those still unsent included, after the last turn that ended;
        what ``expect_tip`` is held against."""
        return self._seat.position

    @property
    def epoch(self) -> int:
        """Raised by every cancel and rewind; events of a lower epoch were undone."""
        return self._seat.epoch

    @property
    def is_busy(self) -> bool:
        """Whether a turn is open."""
        return self._seat.is_busy

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._seat.is_closed

    def close(self) -> None:
        """Cancel an open turn and free what the session holds; a second time does nothing."""
        self._finalizer.detach()
        self._host.loop.close_seat(self._seat)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"tick {self._seat.state.tick}"
        return f"Session({self._seat.layout.name}, {state})"

    @classmethod
    def _over(cls, host: Host, seat: Seat, engine: object) -> "Session":
        session = cls.__new__(cls)
        session._attach(host, seat, engine)
        return session

    def _attach(self, host: Host, seat: Seat, engine: object) -> None:
        self._host = host
        self._seat = seat
        # An engine that nobody else holds must not end before its sessions.
        self._engine = engine
        self._finalizer = weakref.finalize(self, host.loop.abandon_seat, seat)

    def _put_prefix(self, ids: tuple[int, ...]) -> None:
        """Run instructions and tools through the model, so that the first tick is not late."""
        if not ids:
            return
        seat = self._seat
        encoded = EncodedInput((Tokens(ids),), seat.state, len(ids))
        try:
            with seat.lock:
                turn = self._submit(Part(self._new_turn(), _no_output, encoded=encoded))
            turn.result()
        except BaseException:
            self.close()
            raise

    def _submit(self, part: Part) -> Turn:
        """Hand over a turn that nothing is ahead of; the lock is held."""
        seat = self._seat
        part.tick = seat.state.tick
        job = Job(seat, [part])
        try:
            seat.turns.append(part.turn)
            self._host.loop.submit(job)
        except SessionClosed:
            seat.turns.remove(part.turn)
            seat.take_back(part)
            raise
        except BaseException:
            # A Ctrl-C: the engine may have it already, and nobody would read it.
            if part.turn in seat.turns:
                self._host.loop.retract(job)
            raise
        return part.turn

    def _new_turn(self, deadline_ms: float | None = None) -> Turn:
        turn = Turn(self._host.loop.wake, self._seat.raise_epoch, deadline_ms)
        turn.owner = self
        return turn

    @contextmanager
    def _idle(self, what: str) -> Iterator[None]:
        with self._seat.lock:
            self._seat.require_idle(what)
            yield

    def _look(self, what: str, look: Callable[[], T]) -> T:
        if self._seat.is_closed:
            raise SessionClosed(f"{what}: the session is closed")
        return self._host.loop.call(look)


def _no_output(_state: LayoutState, _epoch: int) -> OutputHalf | None:
    return None
