"""Who plays items: a model through the live engine, or nobody.

A player is given items as they are made, and hands each back with what it did, in any order.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from tml_core.engine.model import Model
from tml_core.engine.sampler import SamplingParams
from tml_core.engine.turn import Turn, TurnResult
from tml_core.errors import InvalidArgument
from tml_core.evals.item import Item
from tml_core.evals.played import Call, Played
from tml_core.layout.chunk import ToolResult
from tml_core.media.micro_turns import TICK_SAMPLES
from tml_core.session import Engine, Session
from tml_core.session.values import SessionMark

__all__ = ["ModelPlayer", "Player", "SilentPlayer"]

_HANGOVER_TICKS: Final = 2  # after speech, in which a model without a clock still listens


class Player(Protocol):
    """What `evaluate` takes."""

    @property
    def name(self) -> str:
        """What it is called in tables."""

    def play(self, items: Iterable[Item]) -> Iterator[tuple[Item, Played]]:
        """Play each item to its end; each comes back once, without its media."""


class SilentPlayer:
    """Never says anything: what a score is worth that nobody has worked for."""

    name = "silent"

    def play(self, items: Iterable[Item]) -> Iterator[tuple[Item, Played]]:
        """Each item, in silence."""
        for item in items:
            results = tuple(None for _ in item.script.results)
            yield item.without_media(), Played(("",) * item.script.num_ticks, (), results)


class ModelPlayer:
    """A model in live sessions, ``num_sessions`` of them in common steps, as fast as they go.

    The most likely token is taken; the bits of an item do not depend on who shared its steps.
    ``has_clock=False`` takes time out of the sequence: the model is asked in every tick all the
    same, but a tick in which nothing is heard or seen and nothing is said is rewound, so that it
    leaves no trace. What this model then does, it does without knowing how much time has passed.

    Raises InvalidArgument for more sessions than the model was loaded for.
    """

    def __init__(
        self,
        model: Model,
        *,
        name: str = "model",
        num_sessions: int | None = None,
        has_clock: bool = True,
    ) -> None:
        most = model.store.kv.num_slots
        if num_sessions is not None and not 1 <= num_sessions <= most:
            raise InvalidArgument(
                f"num_sessions: expected 1 to {most} (load_model(max_sequences=...)), "
                f"got {num_sessions}"
            )
        self.name = name
        self.model = model
        self._num_sessions = num_sessions or most
        self._has_clock = has_clock

    def without_clock(self) -> "ModelPlayer":
        """The same model with time taken out."""
        name = f"{self.name} without clock"
        return ModelPlayer(self.model, name=name, num_sessions=self._num_sessions, has_clock=False)

    def play(self, items: Iterable[Item]) -> Iterator[tuple[Item, Played]]:
        """Each item in a session of its own."""
        waiting = iter(items)
        running: deque[_Playing] = deque()
        with Engine(self.model, max_sessions=self._num_sessions) as engine:
            while True:
                while len(running) < self._num_sessions:
                    item = next(waiting, None)
                    if item is None:
                        break
                    session = engine.open(sampling=SamplingParams(temperature=0.0))
                    running.append(_Playing(item, session, self._has_clock))
                if not running:
                    return
                # The oldest turn first: meanwhile the engine goes on with all the others.
                playing = running.popleft()
                playing.step()
                if playing.is_done:
                    playing.session.close()
                    yield playing.item.without_media(), playing.played()
                else:
                    running.append(playing)


@dataclass
class _Playing:
    """A session under way; a turn is open between steps."""

    item: Item
    session: Session
    has_clock: bool
    texts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    call_ids: set[str] = field(default_factory=set)
    results: list[int | None] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    turn: Turn | None = None
    mark: SessionMark | None = None

    def __post_init__(self) -> None:
        self.results = [None] * len(self.item.script.results)
        self.waiting = list(range(len(self.results)))
        self._append()

    @property
    def is_done(self) -> bool:
        return self.turn is None

    def step(self) -> None:
        """Read the open turn, and put in the next tick if there is one."""
        assert self.turn is not None
        self._note(self.turn.result())
        self.turn = None
        if len(self.texts) < len(self.item.chunks):
            self._append()

    def played(self) -> Played:
        return Played(tuple(self.texts), tuple(self.calls), tuple(self.results))

    def _append(self) -> None:
        tick = len(self.texts)
        chunk = self.item.chunks[tick]
        due = self._due_results(tick)
        self.mark = None
        if not self.has_clock and not due and self._is_idle(tick):
            self.mark = self.session.mark()
        is_empty = chunk.audio is None and not chunk.frames and not chunk.text and not due
        self.turn = self.session.append(
            replace(chunk, items=due, is_idle=is_empty), deadline_ms=None
        )

    def _note(self, result: TurnResult) -> None:
        tick = len(self.texts)
        self.texts.append(result.text)
        for call in result.tool_calls:
            self.call_ids.add(call.call_id)
            if call.error is None:
                self.calls.append(Call(tick, call.name, dict(call.args)))
        if self.mark is not None and result.done.reason == "silence":
            self.session.rewind(self.mark)

    def _due_results(self, tick: int) -> tuple[ToolResult, ...]:
        """Those whose time has come, and whose call has been made where they answer one."""
        due = []
        for index in list(self.waiting):
            at, result = self.item.script.results[index]
            if at <= tick and (result.name is not None or result.call_id in self.call_ids):
                due.append(result)
                self.waiting.remove(index)
                self.results[index] = tick
        return tuple(due)

    def _is_idle(self, tick: int) -> bool:
        """Whether nothing is heard, seen or typed in ``tick``."""
        script, chunk = self.item.script, self.item.chunks[tick]
        if script.scene is not None or chunk.frames or chunk.text:
            return False
        begin, end = tick * TICK_SAMPLES, (tick + 1) * TICK_SAMPLES
        hangover = _HANGOVER_TICKS * TICK_SAMPLES
        return not any(start < end and begin < stop + hangover for start, stop in self.item.spans)
