"""One turn on its way through the engine: what it appends, what it samples, how it can end."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor

from tml_core.engine.sampler import SampleRequest
from tml_core.engine.seat import Seat, TickRecord
from tml_core.engine.turn import Turn
from tml_core.errors import TmlError
from tml_core.layout.chunk import Chunk, ToolResult
from tml_core.layout.events import Event, Notice, Silence, Tags, TextToken, ToolCall, TurnDone
from tml_core.layout.state import EncodedInput, LayoutState, OutputHalf
from tml_core.media.audio_file import SAMPLE_RATE
from tml_core.media.micro_turns import TICK_MS
from tml_core.media.segments import Block, Segment, Tokens
from tml_core.sequence.sequence import Mark

__all__ = ["BeginOutput", "Job"]

BeginOutput = Callable[[LayoutState, int], OutputHalf | None]


class _Phase(Enum):
    QUEUED = "queued"  # nothing appended yet
    SAMPLING = "sampling"  # the input half is in; one token after the other
    DONE = "done"


class Job:
    """The engine's side of a turn; used by the engine thread alone once it is submitted.

    ``encoded``: the input half. ``begin_output`` makes the output half. ``items``: tool results
    that go back to the session if the turn is undone. ``chunk``: what came in, None for a prefix
    or a commit. ``clock_ms``: media time after the turn, None if it does not pass.
    """

    def __init__(
        self,
        seat: Seat,
        turn: Turn,
        encoded: EncodedInput,
        begin_output: BeginOutput,
        *,
        chunk: Chunk | None = None,
        items: tuple[ToolResult, ...] = (),
        num_dropped_items: int = 0,
        clock_ms: int | None = None,
    ) -> None:
        self.seat = seat
        self.turn = turn
        self._encoded = encoded
        self._begin_output = begin_output
        self._chunk = chunk
        self._items = items
        self._num_dropped_items = num_dropped_items
        self._clock_ms = clock_ms
        self._tick = seat.state.tick
        self._phase = _Phase.QUEUED
        self._segments: tuple[Segment | Block, ...] = ()
        self._output: OutputHalf | None = None
        self._before: Mark | None = None
        self._after_input: Mark | None = None
        self._notices: list[Event] = []
        self._events: list[Event] = []
        self._h_D: Tensor | None = None
        self._stats = turn.stats
        self._decode_start_s = 0.0

    @property
    def is_done(self) -> bool:
        """Whether the turn has ended."""
        return self._phase == _Phase.DONE

    @property
    def is_resting(self) -> bool:
        """Whether it waits for its readers."""
        return self.turn.is_full and self.turn.cancelled is None

    @property
    def segments(self) -> tuple[Segment | Block, ...]:
        """What the next step appends."""
        return self._segments

    @property
    def carry_changes(self) -> dict[str, Any]:
        """What the sequence carries beside KV once the next step is in."""
        if self._phase != _Phase.QUEUED:
            return {}
        changes = {"audio": self._encoded.state.dmel, "clock_ms": self._clock_ms}
        return {name: value for name, value in changes.items() if value is not None}

    def begin_step(self) -> bool:
        """Decide what the next step appends; False if the turn has ended instead."""
        if self.turn.cancelled is not None and self._end_cancelled():
            return False
        if self._phase == _Phase.QUEUED:
            self._start()
            self._segments = self._encoded.segments
        else:
            self._segments = (Tokens(self._open_output().take_unfed()),)
        return True

    def end_step(self, h_TD: Tensor) -> bool:
        """The step is done; ``h_TD`` [T, D] are its hidden states. True if a token is wanted."""
        if self._phase == _Phase.QUEUED:
            self._end_input()
        if self.turn.cancelled is not None:
            self._end_cancelled()
        if self._output is None or self._phase == _Phase.DONE:
            return False
        self._h_D = h_TD[-1]
        return True

    @property
    def hidden(self) -> Tensor:
        """The last hidden state [D], from which the wanted token is sampled."""
        assert self._h_D is not None  # end_step has set it
        return self._h_D

    @property
    def request(self) -> SampleRequest:
        """How the wanted token is drawn."""
        seat = self.seat
        allowed = self._open_output().allowed()
        return SampleRequest(seat.sampling, seat.sequence.seed, seat.sequence.tip, allowed)

    def accept(self, token_id: int, logprob: float) -> None:
        """Take a sampled token; the turn may end with it."""
        output = self._open_output()
        events = output.accept(token_id, logprob)
        self._events += events
        stats = self._stats
        if stats.first_token_ms is None:
            stats = replace(stats, first_token_ms=self._since_arrival_ms())
        self._stats = replace(stats, num_output_tokens=stats.num_output_tokens + 1)
        if output.is_done:
            self._end(events, output.state)
        elif events:
            # A cancel in between is seen before the next step.
            self.turn.deliver(events, self._stats)

    def fail(self, error: BaseException) -> None:
        """End the turn with ``error``; the sequence goes back to where it stood before."""
        if self._phase == _Phase.DONE:
            return
        sequence = self.seat.sequence
        if not sequence.is_closed and self._before is not None:
            try:
                sequence.rewind(self._before)
            except Exception:
                # Nowhere to go back to: rather no session than one in an unknown state.
                self.seat.is_closed = True
                sequence.close()
        self._close(lambda: self.seat.settle(None, self._items), [], error)

    def _start(self) -> None:
        sequence = self.seat.sequence
        self._stats = replace(self._stats, queued_ms=self._since_arrival_ms())
        # Before the mark: what eviction drops at the start of a tick stays dropped.
        evicted = sequence.note_boundary()
        self._before = sequence.mark()
        if evicted is not None:
            self._notice(
                "evicted",
                f"positions {evicted.start} to {evicted.end - 1} left the context",
                start=evicted.start,
                end=evicted.end,
            )
        if self._chunk is not None and self._chunk.num_padded:
            missing_ms = self._chunk.num_padded * 1000 // SAMPLE_RATE
            self._notice(
                "padded",
                f"the last {missing_ms} ms of sound are zeros",
                num_samples=self._chunk.num_padded,
            )
        if self._encoded.num_waiting:
            self._notice(
                "waiting",
                f"{self._encoded.num_waiting} tokens of text wait for the next ticks",
                num_tokens=self._encoded.num_waiting,
            )
        if self._num_dropped_items:
            self._notice(
                "dropped",
                f"{self._num_dropped_items} tool results answer calls that were undone",
                num_items=self._num_dropped_items,
            )

    def _end_input(self) -> None:
        self._phase = _Phase.SAMPLING
        self._decode_start_s = time.perf_counter()
        self._stats = replace(
            self._stats,
            prefill_ms=self._since_arrival_ms() - (self._stats.queued_ms or 0.0),
            num_input_tokens=self._encoded.num_tokens,
        )
        state = self._encoded.state
        self._output = self._begin_output(state, self.seat.epoch)
        if self._output is None:
            if self.turn.cancelled is None:
                self._end([*self._notices, TurnDone(**self._tags(), reason="input")], state)
            return
        self.seat.output = self._output
        self._after_input = self.seat.sequence.mark()
        if self._notices:
            self.turn.deliver(self._notices, self._stats)

    def _end_cancelled(self) -> bool:
        """End a cancelled turn, if it can end here; True if it did."""
        sequence = self.seat.sequence
        done = TurnDone(**self._tags(), reason="cancelled")
        if self.turn.cancelled == "none":
            if self._before is not None:
                sequence.rewind(self._before)
            self._close(lambda: self.seat.settle(None, self._items), [done])
            return True
        if self._phase == _Phase.QUEUED:
            return False
        self._events = []
        if self._output is None or self._after_input is None:
            self._end([done], self._encoded.state)
            return True
        sequence.rewind(self._after_input)
        self._output.cut()
        self._end([replace(done, token_ids=tuple(self._output.token_ids))], self._output.state)
        return True

    def _end(self, events: list[Event], state: LayoutState) -> None:
        record = self._record()
        self._close(lambda: self.seat.settle(state, record=record), events)

    def _close(
        self,
        settle: Callable[[], None],
        events: list[Event],
        error: BaseException | None = None,
    ) -> None:
        if self._decode_start_s:
            decode_ms = 1000 * (time.perf_counter() - self._decode_start_s)
            self._stats = replace(self._stats, decode_ms=decode_ms)
        sequence = self.seat.sequence
        if not sequence.is_closed:
            self._stats = replace(self._stats, position=sequence.tip, num_pages=sequence.num_pages)
        stats = replace(self._stats, total_ms=self._since_arrival_ms())
        if not self.turn.end(events, stats, settle, error):
            return  # a cancel came first; the next step begins with it
        self._phase = _Phase.DONE
        for mark in (self._before, self._after_input):
            if mark is not None:
                mark.release()

    def _record(self) -> TickRecord | None:
        chunk = self._chunk
        if chunk is None and self._output is None:
            return None
        audio_S = None if chunk is None else chunk.audio
        rms = None if audio_S is None else math.sqrt(float(np.square(audio_S, dtype=float).mean()))
        said = [one for one in self._events if isinstance(one, TextToken)]
        calls = [one for one in self._events if isinstance(one, ToolCall)]
        done = [one for one in self._events if isinstance(one, TurnDone)]
        reason = done[-1].reason if done else "input" if self._output is None else "cancelled"
        return TickRecord(
            tick=self._tick,
            t_ms=self._tick * TICK_MS,
            audio_ms=0 if audio_S is None else len(audio_S) * 1000 // SAMPLE_RATE,
            audio_rms=rms,
            num_frames=0 if chunk is None else len(chunk.frames),
            text_in="" if chunk is None or chunk.text is None else chunk.text,
            num_items=0 if chunk is None else len(chunk.items),
            text_out="".join(one.text for one in said if one.channel == "text"),
            is_silent=any(isinstance(one, Silence) for one in self._events),
            calls=tuple((one.name, one.call_id, one.raw) for one in calls),
            reason=reason,
        )

    def _open_output(self) -> OutputHalf:
        if self._output is None:
            raise TmlError("turn: it asks nothing of the model")
        return self._output

    def _notice(self, kind: str, message: str, **data: int) -> None:
        self._notices.append(Notice(**self._tags(), kind=kind, message=message, data=data))

    def _tags(self) -> Tags:
        return {"tick": self._tick, "t_ms": self._tick * TICK_MS, "epoch": self.seat.epoch}

    def _since_arrival_ms(self) -> float:
        return 1000 * (time.perf_counter() - self._stats.arrived_s)
