"""An engine that runs many sessions of one model in common steps."""

import weakref
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from types import TracebackType
from typing import Final, Self, get_args

from tml_core.engine.admission import Admission
from tml_core.engine.host import Host, SessionOptions, Tool, new_loop, new_seat
from tml_core.engine.model import Model
from tml_core.engine.sampler import SamplingParams
from tml_core.engine.seat import Degrade
from tml_core.engine.session_file import read_session
from tml_core.engine.stats import EngineStats
from tml_core.errors import InvalidArgument, InvalidType
from tml_core.layout.select import layout_for
from tml_core.sequence.values import Retention
from tml_core.session.checks import require_park_after
from tml_core.session.session import Session

__all__ = ["Engine"]


class Engine:
    """Runs many sessions of one model: one thread, one ragged step for all that have work.

    ``max_sessions``: how many may be open at once, forks included; at most what the model was
    loaded for. While it is open the model's sequences belong to it: use the model through sessions.
    ``admission``: "capacity" refuses a session with Overloaded when, by the steps measured so far,
    a tick of all of them at once would take longer than 200 ms in one case of a hundred.
    ``park_after_s``: a session idle for so long is parked (see `Session.park`), and one idle for
    less if memory runs short; then ``max_sessions`` may be more than the model was loaded for.
    None: only `Session.park` parks. ``park_dir``: where the files go; the system's place for
    temporary files by default.
    Raises InvalidArgument for a bad count or a model that another engine runs.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_sessions: int | None = None,
        admission: Admission = "none",
        park_after_s: float | None = None,
        park_dir: str | Path | None = None,
    ) -> None:
        if not isinstance(model, Model):
            raise InvalidType(f"model: expected Model, got {type(model).__name__}")
        num_slots = model.store.kv.num_slots
        wanted = num_slots if max_sessions is None else max_sessions
        if isinstance(wanted, bool) or not isinstance(wanted, int):
            raise InvalidType(f"max_sessions: expected an int, got {type(wanted).__name__}")
        require_park_after(park_after_s)
        if wanted < 1 or (wanted > num_slots and park_after_s is None):
            raise InvalidArgument(
                f"max_sessions: expected 1 to {num_slots} (load_model(max_sequences=...)), "
                f"got {wanted}"
            )
        layout = layout_for(model.config, model.tokenizer)
        if admission not in get_args(Admission):
            raise InvalidArgument(f"admission: expected 'none' or 'capacity', got {admission!r}")
        loop = new_loop(
            model,
            layout,
            wanted,
            admission=admission,
            park_after_s=park_after_s,
            park_dir=park_dir,
        )
        self._host: Final = Host(loop, model, layout)
        self._finalizer = weakref.finalize(self, loop.shutdown, wait=False)

    @property
    def model(self) -> Model:
        """The model it runs."""
        return self._host.model

    def open(
        self,
        *,
        system: str | None = None,
        tools: SequenceOf[Tool] = (),
        seed: int = 0,
        sampling: SamplingParams | None = None,
        retention: Retention | None = None,
        effort: float | str | None = None,
        degrade: Degrade = "none",
    ) -> "Session":
        """A new session in this engine; arguments as for `Session`.

        Raises PoolExhausted when all are in use, Overloaded when admission finds no capacity,
        SessionClosed after `close`.
        """
        options = SessionOptions.checked(
            self._host.layout, system, tools, seed, sampling, retention, effort, degrade
        )
        seat = self._host.loop.add_seat(lambda: new_seat(self._host, options))
        session = Session._over(self._host, seat, self)
        session._put_prefix(options.prefix)
        return session

    def restore(self, path: str | Path) -> "Session":
        """The session that `Session.snapshot` wrote, in this engine; see `Session.restore`."""
        seat = self._host.loop.add_seat(lambda: read_session(self._host, Path(path)))
        return Session._over(self._host, seat, self)

    @property
    def num_sessions(self) -> int:
        """Sessions that are open."""
        return self._host.loop.num_sessions

    def stats(self) -> EngineStats:
        """Gauges and counters of this moment; cheap, and does not wait for the running step."""
        return self._host.loop.stats()

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more work."""
        return self._host.loop.is_shut

    def close(self) -> None:
        """Close all sessions and wait for the thread to end; a second time does nothing."""
        self._finalizer.detach()
        self._host.loop.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
