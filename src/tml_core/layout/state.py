"""What a layout remembers from one turn to the next, and what it hands to the engine.

States are frozen: a mark, a fork or a rewind keeps a reference, and a turn that fails has changed
nothing. ``to_dict`` and ``from_dict`` are the form a snapshot stores.
"""

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, Final, NamedTuple, Protocol, Self

import torch

from tml_core.errors import InvalidArgument, SnapshotError
from tml_core.layout.chunk import Chunk
from tml_core.layout.events import Event, TurnEnd
from tml_core.layout.sound import Heard, Unheard
from tml_core.media.dmel import DmelConfig, DmelState, DmelStream
from tml_core.media.segments import Block, Segment
from tml_core.model.config import AudioConfig
from tml_core.model.token_loop import TokenTable

__all__ = [
    "AudioCarry",
    "EncodedInput",
    "Layout",
    "LayoutState",
    "OutputHalf",
    "Stream",
    "TokenRun",
]

# A result may still come for this many calls; older ones are forgotten, so that the state of an
# endless session stays small.
_NUM_OPEN_CALLS: Final = 64


class Stream(IntEnum):
    """Who is responsible for a position; trainers weigh the loss of predicting it by this.

    INPUT came from outside, FORCED was put there by the layout without sampling: neither is a
    choice of the model. AUDIO is sound the model made.
    """

    INPUT = 0
    TEXT = 1
    SILENCE = 2
    CONTROL = 3
    CALL = 4
    FORCED = 5
    AUDIO = 6


@dataclass(frozen=True, kw_only=True)
class LayoutState:
    """State common to all layouts.

    ``tick``: the tick that comes next. ``unsent``: tokens at the end of the last output half that
    stand in the sequence but have not been run through the model; they lead the next input.
    ``utf8``: bytes of a character the model has not finished. ``num_calls``: tool calls so far.
    ``open_calls``: (call_id, name) of those that may still be answered. ``dmel``: audio carry.
    """

    tick: int = 0
    unsent: tuple[int, ...] = ()
    utf8: bytes = b""
    num_calls: int = 0
    open_calls: tuple[tuple[str, str], ...] = ()
    dmel: DmelState | None = None

    @property
    def num_waiting(self) -> int:
        """Ids of text and tool results that still have to be put in."""
        return 0

    @property
    def is_in_call(self) -> bool:
        """Whether a tool call goes on in the next tick."""
        return False

    def name_of(self, call_id: str) -> str:
        """The tool that call ``call_id`` is for. Raises `InvalidArgument` for an unknown call."""
        for known, name in self.open_calls:
            if known == call_id:
                return name
        known_ids = [known for known, _ in self.open_calls[-3:]]
        raise InvalidArgument(
            f"call_id: expected the id of a tool call of this session (latest: {known_ids}), "
            f"got {call_id!r}"
        )

    def knows(self, call_id: str) -> bool:
        """Whether a result for this call can still come."""
        return any(known == call_id for known, _ in self.open_calls)

    def with_call(self, name: str) -> tuple[str, Self]:
        """A new call's id, and the state that knows it."""
        call_id = f"call-{self.num_calls}"
        open_calls = (*self.open_calls, (call_id, name))[-_NUM_OPEN_CALLS:]
        return call_id, replace(self, num_calls=self.num_calls + 1, open_calls=open_calls)

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON values, but for the audio carry, which the sequence keeps too."""
        names = [one.name for one in fields(self) if one.name != "dmel"]
        return {name: getattr(self, name) for name in names} | {"utf8": self.utf8.hex()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], dmel: DmelState | None) -> Self:
        """The inverse of `to_dict`; raises `SnapshotError` for anything else."""
        known = {one.name for one in fields(cls)} - {"dmel"}
        if set(values) != known:
            raise SnapshotError(
                f"layout: expected the fields {sorted(known)}, got {sorted(values)}"
            )
        try:
            plain = {name: _as_tuples(value) for name, value in values.items()}
            return cls(**plain | {"utf8": bytes.fromhex(values["utf8"]), "dmel": dmel})
        except (TypeError, ValueError) as error:
            raise SnapshotError(f"layout: damaged state: {error}") from error


@dataclass(frozen=True)
class EncodedInput:
    """One turn's input half. ``state``: after it. ``num_tokens``: positions it will take."""

    segments: tuple[Segment | Block, ...]
    state: LayoutState
    num_tokens: int
    num_waiting: int = 0


class TokenRun(NamedTuple):
    """How tokens may be drawn before an output half has to see them: from ``phase`` of a table, at
    most ``num_text`` of them text. The half then accepts them in order; it is closed by none but
    the last."""

    table: TokenTable
    phase: int
    num_text: int


class OutputHalf(Protocol):
    """One turn's output: says what may be sampled next, and turns tokens into events."""

    @property
    def token_ids(self) -> list[int]:
        """The half so far."""

    @property
    def streams(self) -> list[Stream]:
        """Who is responsible for each of its tokens."""

    @property
    def state(self) -> LayoutState:
        """The session's state after it; final once ``is_done``."""

    @property
    def is_done(self) -> bool:
        """Whether the half is closed."""

    def allowed(self) -> torch.Tensor:
        """Bit mask of the ids that may come next: int32 [ceil(V / 32)]."""

    def run_ahead(self) -> TokenRun | None:
        """How far to go without it; None if it has to see every token."""

    def accept(self, token_id: int, logprob: float) -> list[Event]:
        """Take the next sampled token; events end with `TurnDone` when the turn is over."""

    @property
    def wants_sound(self) -> bool:
        """Whether a block of sound comes next, for `accept_sound`, and not a token."""

    @property
    def before_M(self) -> torch.Tensor:
        """The frame said before that block, log10 float32 [M]."""

    def completed_by(self, mel_FM: torch.Tensor) -> Unheard | None:
        """What `accept_sound` of this block will have to make heard; None where the tick's sound is
        not whole with it, or nobody listens."""

    def accept_sound(self, mel_FM: torch.Tensor, heard: Heard | None = None) -> list[Event]:
        """Take the next block, log10 frames float32 [F, M]; events as `accept` gives them.
        ``heard``: what `completed_by` asks for, if that was done already."""

    @property
    def has_unfed_sound(self) -> bool:
        """Whether what the model has not been given yet is more than tokens."""

    def take_unfed(self) -> list[int]:
        """The accepted tokens the model has not been given yet; now they count as given."""

    def take_unfed_segments(self) -> list[Segment]:
        """The same with its sound, as segments."""

    def segments(self) -> list[Segment]:
        """The half so far."""

    def cut(self, num_kept: int = 0) -> list[Event]:
        """Keep the first ``num_kept`` tokens, drop the rest, close the half the shortest valid way;
        all of it counts as not given to the model. Returns what closed it."""

    def close_now(self, reason: TurnEnd) -> list[Event]:
        """Close the half with what it holds; without a token it is spelled as silence."""


class Layout(Protocol):
    """How chunks become segments and sampled tokens become events; one per model, stateless."""

    @property
    def name(self) -> str:
        """What the layout is called in snapshots."""

    @property
    def knows_ticks(self) -> bool:
        """Whether every turn is a tick that the model answers."""

    def initial_state(self) -> LayoutState:
        """The state of an empty session."""

    def encode_prefix(
        self, system: str | None, tools: tuple[dict[str, Any], ...], effort: float | None
    ) -> tuple[int, ...]:
        """Token ids that stand before the first turn."""

    def encode_input(self, chunk: Chunk, state: LayoutState) -> EncodedInput:
        """One turn's input half; raises for a chunk it cannot take."""

    def begin_output(self, state: LayoutState, epoch: int) -> OutputHalf | None:
        """The output half that follows ``state``; None if the model is not asked."""


class AudioCarry:
    """PCM to dMel levels with the left context and the unfinished hop kept in a `LayoutState`."""

    def __init__(self, config: AudioConfig) -> None:
        self._config = DmelConfig(
            num_mel_bins=config.num_mel_bins,
            num_levels=config.num_levels,
            min_log10=config.min_log10,
            max_log10=config.max_log10,
        )

        self.fresh = DmelStream(self._config).state()

    def push(self, state: DmelState | None, pcm_S: Any) -> tuple[torch.Tensor, DmelState]:
        """Levels int32 [F, M] of the hops that became complete, and what is carried on."""
        stream = self._stream(state)
        return stream.push(pcm_S), stream.state()

    def flush(self, state: DmelState | None) -> torch.Tensor:
        """Levels int32 [0 or 1, M] of the unfinished hop, filled up with zeros."""
        return self._stream(state).flush()

    def _stream(self, state: DmelState | None) -> DmelStream:
        stream = DmelStream(self._config)
        if state is not None:
            stream.restore(state)
        return stream


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(one) for one in value) if isinstance(value, list) else value
