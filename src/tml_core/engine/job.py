"""One turn on its way through the engine: what it appends, what it samples, how it can end.

Where input is coalesced a job brings several ticks: each has its input half, all but the last a
silent output half that the model is not asked for.
"""

import math
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from enum import Enum
from typing import Any, Final, Protocol

import numpy as np
from torch import Tensor

from tml_core.engine.runner import StepInput
from tml_core.engine.sampler import SampleRequest
from tml_core.engine.seat import Part, Seat, TickRecord
from tml_core.engine.stats import EngineCounters
from tml_core.engine.token_feed import FedToken, TokenFeed
from tml_core.engine.turn import Ending, Turn, end_together
from tml_core.errors import InvalidArgument, TmlError
from tml_core.layout.events import (
    Event,
    Notice,
    Silence,
    Tags,
    TextToken,
    ToolCall,
    TurnDone,
    TurnEnd,
)
from tml_core.layout.state import EncodedInput, LayoutState, OutputHalf
from tml_core.media.audio_file import SAMPLE_RATE
from tml_core.media.micro_turns import TICK_MS
from tml_core.media.segments import Block, Segment, Tokens
from tml_core.sequence.sequence import Mark

__all__ = ["Costs", "Job"]

# After so long a turn without a deadline is as urgent as one whose deadline is now.
_PATIENCE_S: Final = 2.0


class Costs(Protocol):
    """What a model step is expected to take."""

    def step_s(self, num_tokens: int, num_rows: int) -> float:
        """Seconds of a step of that many positions in that many sequences, sampling included."""


class _Phase(Enum):
    QUEUED = "queued"  # the input half is not in, or only a part of it
    SAMPLING = "sampling"  # the input half is in; one token after the other
    CLOSING = "closing"  # nothing more is asked of the model
    DONE = "done"


class Job:
    """The engine's side of the turns of ``parts``; used by the engine thread alone once submitted.

    With ``is_last_silent`` the last part is not answered either: more input waits behind it.
    """

    def __init__(
        self, seat: Seat, parts: SequenceOf[Part], *, is_last_silent: bool = False
    ) -> None:
        self.seat = seat
        self._parts = list(parts)
        self.turn: Turn = self._parts[-1].turn  # the one that is answered
        self._is_last_silent = is_last_silent
        self._phase = _Phase.QUEUED
        self._segments: tuple[Segment | Block, ...] = ()
        self._input: StepInput | None = None
        self._num_fed = 0
        self._output: OutputHalf | None = None
        self._before: Mark | None = None
        self._after_input: Mark | None = None
        self._evicted: Notice | None = None
        self._events: list[Event] = []
        self._fresh: list[Event] = []
        self._delivered = (0, 0)  # tokens and events of the output that readers could see
        self._h_D: Tensor | None = None
        self.feed = TokenFeed(seat)
        self._is_fed = False
        self._is_behind = False  # the sequence lacks tokens that the model had been given
        self._rested_since_s: float | None = None
        self.counters = EngineCounters()  # the engine puts its own in this place

    @property
    def is_done(self) -> bool:
        """Whether all its turns have ended."""
        return self._phase == _Phase.DONE

    @property
    def is_resting(self) -> bool:
        """Whether it waits for its readers."""
        return self.turn.is_full and self.turn.cancelled is None

    @property
    def deadline_s(self) -> float:
        """When its last turn should have ended, in `time.perf_counter`; inf without a deadline."""
        return self.turn.clock.deadline_s

    @property
    def due_s(self) -> float:
        """``deadline_s``; a turn without one may wait for others, but not for ever."""
        clock = self.turn.clock
        return min(clock.deadline_s, clock.arrived_s + _PATIENCE_S)

    def rested_since(self) -> float | None:
        """Since when it waits for its readers; None if it does not."""
        if not self.is_resting:
            self._rested_since_s = None
        elif self._rested_since_s is None:
            self._rested_since_s = time.perf_counter()
        return self._rested_since_s

    # What it brings to a step.

    def begin_step(self) -> bool:
        """Decide what the next step appends; False if the turns have ended instead."""
        self._rested_since_s = None
        if self._phase is _Phase.SAMPLING and len(self._parts) == 1 and not self.turn.cancelled:
            return True
        if not self._obey_cancels():
            return False
        if self._phase == _Phase.CLOSING:
            self._finish()
            return False
        return bool(self._phase != _Phase.QUEUED or self._segments or self._start())

    @property
    def is_decoding(self) -> bool:
        """Whether it brings just the one token that was drawn last."""
        return self._phase == _Phase.SAMPLING and not self._segments and not self._is_behind

    def feed_one(self) -> FedToken:
        """The token drawn last, and where it goes; it counts as given to the model. The feed
        must have room for it."""
        (token_id,) = self._open_output().take_unfed()
        self._is_fed = True
        return self.feed.feed(token_id)

    def catch_up(self) -> None:
        """A step has failed and may have left anything behind: take the output so far as one more
        input, from where it begins."""
        assert self._after_input is not None  # it is decoding
        self._is_fed = False
        self.feed.drop()
        self.seat.sequence.rewind(self._after_input)
        self._is_behind = True

    def bring_tokens(self) -> None:
        """Bring what was drawn and is not in the sequence as `segments`."""
        if self._phase != _Phase.SAMPLING or self._segments:
            return
        self.feed.flush()
        output = self._open_output()
        unfed = output.take_unfed()
        self._segments = (Tokens(output.token_ids if self._is_behind else unfed),)
        self._is_behind = False

    @property
    def segments(self) -> tuple[Segment | Block, ...]:
        """What is being appended."""
        return self._segments

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` was called for the segments."""
        return self._input is not None

    def prepare(self, step_input: StepInput | None) -> None:
        """Take the segments as embeddings; None if those it had were used up by a failed step."""
        if step_input is None:
            self._input = None
            return
        changes = self._carry_changes()
        if changes:
            carry = replace(self.seat.sequence.carry, **changes)
            step_input = step_input._replace(carry=carry)
        self._input = step_input

    @property
    def num_left(self) -> int:
        """Positions that still have to be appended before the model can be asked."""
        if self._input is None:
            return int(self._is_fed)
        return self._input.token_ids.shape[0] - self._num_fed

    @property
    def is_fed(self) -> bool:
        """Whether its token went into the step that is being made."""
        return self._is_fed

    def piece(self, num_tokens: int) -> StepInput:
        """The next ``num_tokens`` positions, or a few more or less where a block must stay whole;
        at least one."""
        whole = self._input
        if whole is None:
            raise TmlError("turn: it brings nothing to this step")
        start = self._num_fed
        return whole.piece(start, whole.cut(start, start + num_tokens))

    def end_token(self, batch_size: int) -> bool:
        """The token of `feed_one` is in. True if another is wanted."""
        self._is_fed = False
        clock = self.turn.clock
        if batch_size > clock.max_batch:
            clock.max_batch = batch_size
        if self.turn.cancelled is None:
            return True
        return self._obey_cancels() and self._phase == _Phase.SAMPLING

    def end_step(self, h_TD: Tensor, costs: Costs, batch_size: int) -> bool:
        """The step is done; ``h_TD`` [T, D] are its hidden states. True if a token is wanted."""
        clock = self.turn.clock
        clock.max_batch = max(clock.max_batch, batch_size)
        self._num_fed += len(h_TD)
        if self.num_left:
            return False
        self._segments, self._input, self._num_fed = (), None, 0
        if self._phase == _Phase.QUEUED:
            self._end_input(costs, batch_size)
        if self._phase == _Phase.SAMPLING and not self._obey_cancels():
            return False
        if self._phase != _Phase.SAMPLING:
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
        seat, allowed = self.seat, self._open_output().allowed()
        return SampleRequest(seat.sampling, seat.sequence.seed, self.feed.next_position, allowed)

    def accept(self, token_id: int, logprob: float, costs: Costs, batch_size: int) -> None:
        """Take a sampled token; the turn may end with it."""
        output = self._open_output()
        events = output.accept(token_id, logprob)
        clock = self.turn.clock
        clock.num_output_tokens += 1
        if not clock.first_s:
            clock.first_s = time.perf_counter()
        is_shrinking = self.seat.degrade == "shrink_output" and not output.is_done
        if is_shrinking and self._would_miss("shrink_output", costs, batch_size):
            events += self._degraded(
                "shrink_output",
                f"the output was closed after {clock.num_output_tokens} tokens to keep the clock",
                num_tokens=clock.num_output_tokens,
            )
            events += output.close_now("degraded")
        self._events += events
        if output.is_done:
            self._fresh = events
            self._finish()
        elif events and self.turn.deliver(events):
            self._delivered = len(output.token_ids), len(self._events)

    # How it ends.

    def fail(self, error: BaseException) -> None:
        """End the turns with ``error``; the sequence goes back to where it stood before."""
        if self._phase == _Phase.DONE:
            return
        sequence = self.seat.sequence
        if not sequence.is_closed and self._before is not None:
            try:
                self.feed.drop()
                sequence.rewind(self._before)
            except Exception:
                # Nowhere to go back to: rather no session than one in an unknown state.
                self.seat.is_closed = True
                sequence.close()
        endings = [Ending(part.turn, (), error) for part in self._parts]
        self._end(endings, None)

    def _start(self) -> bool:
        """Mark where to come back to, and encode; False if nothing is left to do."""
        seat = self.seat
        now_s = time.perf_counter()
        for part in self._parts:
            part.turn.clock.started_s = part.turn.clock.started_s or now_s
        if self._before is None:
            # Before the mark: what eviction drops at the start of a tick stays dropped.
            evicted = seat.sequence.note_boundary()
            self._before = seat.sequence.mark()
            if evicted is not None:
                self._evicted = Notice(
                    **self._tags(seat.state.tick),
                    kind="evicted",
                    message=f"positions {evicted.start} to {evicted.end - 1} left the context",
                    data={"start": evicted.start, "end": evicted.end},
                )
        self._encode()
        if not self._parts:
            self._phase = _Phase.DONE
            self._before.release()
            return False
        if self._evicted is not None:
            self._parts[0].notices.insert(0, self._evicted)
        return True

    def _encode(self) -> None:
        """Both halves of all parts but the last one's output. A part that the layout does not take
        ends with the layout's error; the others go on without it."""
        seat = self.seat
        state = seat.state
        segments: list[Segment | Block] = []
        for part in list(self._parts):
            encoded = part.encoded
            if encoded is None:
                try:
                    with seat.lock:
                        encoded = seat.encode(part, state)
                except Exception as error:
                    self._parts.remove(part)
                    if self._parts:
                        self.turn = self._parts[-1].turn
                    self._end_some([part], [Ending(part.turn, (), error)])
                    continue
            else:
                part.tick = state.tick
            segments += encoded.segments
            state = encoded.state
            part.turn.clock.num_input_tokens = encoded.num_tokens
            part.notices = self._input_notices(part, encoded)
            if part is not self._parts[-1]:
                state = self._silence(part, state)
        self._segments = tuple(segments)

    def _silence(self, part: Part, state: LayoutState) -> LayoutState:
        """Close a part's output half without the model; returns the state after it."""
        half = part.begin_output(state, self.seat.epoch)
        if half is None:
            return state
        if part.answer:
            part.notices += self._degraded(
                "coalesce_input",
                "more input was waiting: this tick was taken in without an answer",
                part,
                num_ticks=len(self._parts),
            )
        half.close_now("degraded" if part.answer else "input")
        part.silent = half
        return half.state

    def _end_input(self, costs: Costs, batch_size: int) -> None:
        now_s = time.perf_counter()
        for one in self._parts:
            one.turn.clock.input_done_s = now_s
        part = self._parts[-1]
        state = self._state_after(part)
        self._phase = _Phase.CLOSING
        if not part.answer or self._is_last_silent:
            self._silence(part, state)
        else:
            self._output = part.begin_output(state, self.seat.epoch)
        if self._output is None:
            if part.turn.cancelled is None:
                self._finish()
            return
        self._phase = _Phase.SAMPLING
        with self.seat.lock:
            self.seat.output = self._output
        self._after_input = self.seat.sequence.mark()
        if part.turn.cancelled is not None:
            return
        for policy in ("emit_silence", "shrink_output"):
            if self._would_miss(policy, costs, batch_size):
                part.notices += self._degraded(
                    policy, "the output was not begun: its first token would have been late"
                )
                self._fresh = self._output.close_now("degraded")
                self._events = self._fresh
                self._finish()
                return
        if part.notices and part.turn.deliver(part.notices):
            part.notices = []

    def _would_miss(self, policy: str, costs: Costs, batch_size: int) -> bool:
        """Whether the policy is the session's, and the next token would come too late."""
        if self.seat.degrade != policy:
            return False
        next_s = time.perf_counter() + costs.step_s(batch_size, batch_size)
        return next_s > self.deadline_s

    def _obey_cancels(self) -> bool:
        """Do what cancels ask for; False if that has ended the job."""
        undone = [part for part in self._parts if part.turn.cancelled == "none"]
        if undone:
            if self._before is not None:
                self._rewind(self._before)
            endings = [Ending(part.turn, [self._cancelled_done(part)]) for part in undone]
            if len(undone) == len(self._parts):
                self._end(endings, None)
                return False
            self._begin_again([part for part in self._parts if part not in undone])
            self._end_some(undone, endings)
        if self.turn.heard_ms is not None and self._live_again(self.turn.heard_ms):
            return False
        is_cancelled = self.turn.cancelled is not None and self._phase != _Phase.QUEUED
        return not is_cancelled or not self._end_cancelled()

    def _live_again(self, heard_ms: float) -> bool:
        """Go back to the first output the user has not heard, and put in again what came after it,
        without answers. True if that is left to other jobs; False if all was heard before the
        last turn, or retention is in the way."""
        seat, parts = self.seat, self._parts
        with seat.lock:
            first = seat.first_unheard(heard_ms)
            if first is None:
                return False
            self.feed.flush()
            try:
                replayed = seat.forget_output(first)
            except InvalidArgument:
                parts[-1].notices = [
                    Notice(
                        **self._tags(parts[-1].tick),
                        kind="unheard",
                        message=f"the output since tick {first.tick} stays in the context: "
                        "retention has dropped what was before it",
                        data={"tick": first.tick},
                    )
                ]
                return False
            for part in reversed(parts):
                seat.take_back(part)
                part.silent = None
                part.answer = False
            for part in replayed:
                seat.turns.insert(0, part.turn)
            seat.parts.extendleft(reversed([*replayed, *parts]))
            seat.output = None
        self._phase = _Phase.DONE
        self._release()
        return True

    def _begin_again(self, parts: list[Part]) -> None:
        """Go on with these parts alone, from their input on."""
        self._parts, self.turn = parts, parts[-1].turn
        self._phase = _Phase.QUEUED
        self._segments, self._input, self._num_fed = (), None, 0
        self._is_behind = False
        self._output = self._after_input = None
        self._events, self._fresh, self._delivered = [], [], (0, 0)
        with self.seat.lock:
            self.seat.output = None
            for part in reversed(parts):
                part.turn.withdraw()
                part.silent = None
                self.seat.take_back(part)

    def _end_cancelled(self) -> bool:
        """End with the last turn's output dropped; True if that has ended the job."""
        part = self._parts[-1]
        num_tokens, num_events = self._delivered if self._is_begun_heard() else (0, 0)
        self._events = self._events[:num_events]
        self._fresh = [self._cancelled_done(part)]
        if self._output is not None and self._after_input is not None:
            self._rewind(self._after_input)
            self._output.cut(num_tokens)
        half = part.silent if self._output is None else self._output
        if half is not None:
            token_ids = tuple(half.token_ids)
            self._fresh = [replace(self._cancelled_done(part), token_ids=token_ids)]
        part.notices = [one for one in part.notices if one.kind == "unheard"]
        self._finish()
        return self.is_done

    def _is_begun_heard(self) -> bool:
        """Whether what was delivered of the last turn was played before it was cancelled."""
        heard_ms = self.turn.heard_ms
        return heard_ms is not None and self._parts[-1].tick * TICK_MS < heard_ms

    def _finish(self) -> None:
        """End all turns with what they have; a cancel that comes first is seen in the next step."""
        self._phase = _Phase.CLOSING
        parts = self._parts
        endings = [Ending(part.turn, self._silent_events(part)) for part in parts[:-1]]
        last = parts[-1]
        state = self._state_after(last)
        if self._output is not None:
            state = self._output.state
        elif last.silent is not None:
            state = last.silent.state
        events = self._fresh
        if self._output is None and last.turn.cancelled is None:
            events = self._silent_events(last)
        endings.append(Ending(last.turn, [*last.notices, *events]))
        self._end(endings, state)

    def _silent_events(self, part: Part) -> list[Event]:
        """How a turn ends that the model was not asked to answer."""
        reason: TurnEnd = "degraded" if part.answer and part.silent is not None else "input"
        token_ids = () if part.silent is None else tuple(part.silent.token_ids)
        if part.turn.cancelled is not None:
            return [replace(self._cancelled_done(part), token_ids=token_ids)]
        done = TurnDone(**self._tags(part.tick), reason=reason, token_ids=token_ids)
        return [done] if part is self._parts[-1] else [*part.notices, done]

    def _end(self, endings: list[Ending], state: LayoutState | None) -> None:
        """End the turns of all parts; without a ``state`` they are undone."""
        sequence, parts = self.seat.sequence, self._parts
        if not sequence.is_closed:
            self.feed.flush()
            tip, num_pages = sequence.tip, sequence.num_pages
            for part in parts:
                part.turn.clock.position, part.turn.clock.num_pages = tip, num_pages
        records = [] if state is None else self._records(endings)
        kept: Mark | None = None
        if state is not None and any(isinstance(one, TextToken) for one in self._events):
            kept = self._after_input
        if not self._end_some(parts, endings, state, records, kept):
            return  # a cancel came first; the next step begins with it
        if kept is not None:
            self._after_input = None  # the seat has it now
        self._phase = _Phase.DONE
        self._release()

    def _release(self) -> None:
        for mark in (self._before, self._after_input):
            if mark is not None:
                mark.release()

    def _end_some(
        self,
        parts: SequenceOf[Part],
        endings: SequenceOf[Ending],
        state: LayoutState | None = None,
        records: SequenceOf[TickRecord] = (),
        after_input: Mark | None = None,
    ) -> bool:
        def settle() -> None:
            self.seat.settle(parts, state, records, after_input)
            counted = zip(parts, endings, strict=True)
            self._count([ending for part, ending in counted if not part.is_replay])

        return end_together(endings, settle)

    def _count(self, endings: SequenceOf[Ending]) -> None:
        counters = self.counters
        for turn, events, error in endings:
            last = events[-1] if events else None
            reason = last.reason if isinstance(last, TurnDone) else ""
            is_cancelled = reason == "cancelled"
            counters.turns["failed" if error else "cancelled" if is_cancelled else "done"] += 1
            clock = turn.clock
            counters.misses += clock.ended_s > clock.deadline_s
            if not error and not is_cancelled and clock.deadline_s < math.inf:
                counters.note_tick(clock.num_input_tokens, clock.num_output_tokens)
            if reason == "degraded":
                policy = self.seat.degrade
                counters.degraded[policy] += 1

    # Small parts.

    def _state_after(self, part: Part) -> LayoutState:
        """The state after a part's input half."""
        if part.encoded is None:
            raise TmlError("turn: its input was not encoded")
        return part.encoded.state

    def _rewind(self, mark: Mark) -> None:
        self.feed.flush()
        self.seat.sequence.rewind(mark)

    def _carry_changes(self) -> dict[str, Any]:
        """What the sequence carries beside KV once the segments are in."""
        if self._phase != _Phase.QUEUED:
            return {}
        last = self._parts[-1]
        changes: dict[str, Any] = {"audio": self._state_after(last).dmel}
        if last.chunk is not None:
            changes["clock_ms"] = (last.tick + 1) * TICK_MS
        return {name: value for name, value in changes.items() if value is not None}

    def _input_notices(self, part: Part, encoded: EncodedInput) -> list[Notice]:
        found: list[Notice] = []

        def notice(kind: str, message: str, **data: int) -> None:
            found.append(Notice(**self._tags(part.tick), kind=kind, message=message, data=data))

        if part.chunk is not None and part.chunk.num_padded:
            missing_ms = part.chunk.num_padded * 1000 // SAMPLE_RATE
            message = f"the last {missing_ms} ms of sound are zeros"
            notice("padded", message, num_samples=part.chunk.num_padded)
        if encoded.num_waiting:
            message = f"{encoded.num_waiting} tokens of text wait for the next ticks"
            notice("waiting", message, num_tokens=encoded.num_waiting)
        num_dropped = len(part.taken) - len(part.known)
        if num_dropped:
            message = f"{num_dropped} tool results answer calls that were undone"
            notice("dropped", message, num_items=num_dropped)
        return found

    def _degraded(
        self, policy: str, message: str, part: Part | None = None, **data: int
    ) -> list[Notice]:
        tags = self._tags((self._parts[-1] if part is None else part).tick)
        return [Notice(**tags, kind="degraded", message=message, data={"policy": policy, **data})]

    def _cancelled_done(self, part: Part) -> TurnDone:
        is_encoded = part.encoded is not None
        tick = part.tick if is_encoded else self.seat.state.tick + self._parts.index(part)
        return TurnDone(**self._tags(tick), reason="cancelled")

    def _records(self, endings: list[Ending]) -> list[TickRecord]:
        found = []
        for part, ending in zip(self._parts, endings, strict=True):
            is_answered = part is self._parts[-1] and self._output is not None
            if part.chunk is not None or is_answered:
                events = self._events if is_answered else []
                found.append(_record(part, events, ending.events))
        return found

    def _open_output(self) -> OutputHalf:
        if self._output is None:
            raise TmlError("turn: it asks nothing of the model")
        return self._output

    def _tags(self, tick: int) -> Tags:
        return {"tick": tick, "t_ms": tick * TICK_MS, "epoch": self.seat.epoch}


def _record(part: Part, events: SequenceOf[Event], last_events: SequenceOf[Event]) -> TickRecord:
    """A turn in words; ``events`` of its output, ``last_events`` those it ended with."""
    chunk = part.chunk
    audio_S = None if chunk is None else chunk.audio
    rms = None if audio_S is None else math.sqrt(float(np.dot(audio_S, audio_S)) / len(audio_S))
    said = [one for one in events if isinstance(one, TextToken)]
    calls = [one for one in events if isinstance(one, ToolCall)]
    done = last_events[-1] if last_events else None
    num_items = 0 if chunk is None else len(chunk.items) + len(part.known)
    return TickRecord(
        tick=part.tick,
        t_ms=part.tick * TICK_MS,
        audio_ms=0 if audio_S is None else len(audio_S) * 1000 // SAMPLE_RATE,
        audio_rms=rms,
        num_frames=0 if chunk is None else len(chunk.frames),
        text_in="" if chunk is None or chunk.text is None else chunk.text,
        num_items=num_items,
        text_out="".join(one.text for one in said if one.channel == "text"),
        is_silent=any(isinstance(one, Silence) for one in events),
        calls=tuple((one.name, one.call_id, one.raw) for one in calls),
        reason=done.reason if isinstance(done, TurnDone) else "input",
    )
