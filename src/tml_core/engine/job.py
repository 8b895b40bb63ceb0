"""One turn on its way through the engine: a transaction on its sequence, step by step.

It ends by its end (input and output stand in the sequence), by a cancel (see `Turn.cancel`) or by
an error (the sequence stands where it stood before the append).

Where input is coalesced a job brings several ticks: each has its input half, all but the last a
silent output half that the model is not asked for.
"""

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from enum import Enum
from typing import Final, Protocol

from torch import Tensor

from tml_core.engine.parts import Parts, state_after_input
from tml_core.engine.runner import StepInput
from tml_core.engine.sampler import SampleRequest, SoundRequest
from tml_core.engine.seat import Part, Seat
from tml_core.engine.token_feed import FedToken, TokenFeed
from tml_core.engine.turn import Ending, Turn
from tml_core.errors import InvalidArgument, TmlError
from tml_core.layout.events import Event, Notice, TextToken
from tml_core.layout.sound import SOUND, Heard, Unheard
from tml_core.layout.state import LayoutState, OutputHalf, TokenRun
from tml_core.media.micro_turns import TICK_MS
from tml_core.media.segments import Block, Segment
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
        self.parts = Parts(seat, parts)
        self.feed = TokenFeed(seat)
        self.turn: Turn = parts[-1].turn  # the one that is answered
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
        self._is_fed = False
        self._is_behind = False  # the sequence lacks tokens that the model had been given
        self._rested_since_s: float | None = None

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
        is_single = len(self.parts.items) == 1
        if self._phase is _Phase.SAMPLING and is_single and not self.turn.cancelled:
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
        return (
            self._phase == _Phase.SAMPLING
            and not self._segments
            and not self._is_behind
            and not self._open_output().has_unfed_sound
        )

    def feed_one(self) -> FedToken:
        """The token drawn last, and where it goes; it counts as given to the model. The feed
        must have room for it."""
        (token_id,) = self._open_output().take_unfed()
        self._is_fed = True
        return self.feed.feed(token_id)

    def run_ahead(self) -> TokenRun | None:
        """How far its tokens may be drawn at one go; None if every one must be seen first."""
        if self.turn.cancelled is not None or self.seat.degrade == "shrink_output":
            return None
        return self._open_output().run_ahead()

    def catch_up(self) -> None:
        """A step has failed and may have left anything behind: take the output so far as one more
        input, from where it begins."""
        assert self._after_input is not None  # it is decoding
        self._is_fed = False
        self.feed.drop()
        self.seat.sequence.rewind(self._after_input)
        self._is_behind = True

    def bring_drawn(self) -> None:
        """Bring what was drawn and is not in the sequence as `segments`."""
        if self._phase != _Phase.SAMPLING or self._segments:
            return
        self.feed.flush()
        output = self._open_output()
        unfed = output.take_unfed_segments()
        self._segments = tuple(output.segments() if self._is_behind else unfed)
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
        if self._phase is _Phase.QUEUED:
            carry = self.parts.carry_after(self.seat.sequence.carry)
            step_input = StepInput(
                step_input.sequence,
                step_input.x_TD,
                step_input.token_ids,
                step_input.blocks,
                carry,
            )
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
        """The token of `feed_one` is in. True if more is to be drawn."""
        self._is_fed = False
        clock = self.turn.clock
        if batch_size > clock.max_batch:
            clock.max_batch = batch_size
        if self.turn.cancelled is None:
            return True
        return self._obey_cancels() and self._phase == _Phase.SAMPLING

    def end_step(self, h_TD: Tensor, costs: Costs, batch_size: int) -> bool:
        """The step is done; ``h_TD`` [T, D] are its hidden states. True if more is to be drawn."""
        clock = self.turn.clock
        clock.max_batch = max(clock.max_batch, batch_size)
        self._num_fed += h_TD.shape[0]
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
        """The last hidden state [D], from which the wanted token or block is drawn."""
        assert self._h_D is not None  # end_step has set it
        return self._h_D

    @property
    def request(self) -> SampleRequest:
        """How the wanted token is drawn."""
        seat, allowed = self.seat, self._open_output().allowed()
        return SampleRequest(seat.sampling, seat.sequence.seed, self.feed.next_position, allowed)

    @property
    def wants_sound(self) -> bool:
        """Whether a block of sound is to be drawn, and not a token."""
        return self._open_output().wants_sound

    @property
    def sound_request(self) -> SoundRequest:
        """How the wanted block is drawn."""
        before_M, seed = self._open_output().before_M, self.seat.sequence.seed
        return SoundRequest(before_M, seed, self.feed.next_position)

    def accept(self, token_id: int, logprob: float, costs: Costs, batch_size: int) -> None:
        """Take a sampled token; the turn may end with it."""
        output = self._open_output()
        self._go_on(output, output.accept(token_id, logprob), costs, batch_size)

    def completed_by(self, mel_FM: Tensor) -> Unheard | None:
        """What has to be made heard with this block; see `OutputHalf.completed_by`."""
        return self._open_output().completed_by(mel_FM)

    def accept_sound(
        self, mel_FM: Tensor, heard: Heard | None, costs: Costs, batch_size: int
    ) -> None:
        """Take a block that was drawn, log10 frames float32 [F, M]; ``heard``: the sound that is
        whole with it, if it was made already."""
        output = self._open_output()
        self._go_on(output, output.accept_sound(mel_FM, heard), costs, batch_size)

    def _go_on(
        self, output: OutputHalf, events: list[Event], costs: Costs, batch_size: int
    ) -> None:
        """Tell of the token or block that was accepted last, unless there is no time for more."""
        clock = self.turn.clock
        self._count_tokens(1)
        is_shrinking = self.seat.degrade == "shrink_output" and not output.is_done
        if is_shrinking and self._would_miss("shrink_output", costs, batch_size):
            events += self.parts.degraded(
                "shrink_output",
                f"the output was closed after {clock.num_output_tokens} tokens to keep the clock",
                num_tokens=clock.num_output_tokens,
            )
            events += output.close_now("degraded")
        self._tell(output, events)

    def accept_run(self, token_ids: list[int], logprobs: list[float], batch_size: int) -> None:
        """Take tokens that were drawn at one go, after the one of `feed_one`: all but the last are
        in the model already. What a cancel asks for is done in the next step."""
        self._is_fed = False
        clock = self.turn.clock
        clock.max_batch = max(clock.max_batch, batch_size)
        output = self._open_output()
        events: list[Event] = []
        last = len(token_ids) - 1
        for index, token_id in enumerate(token_ids):
            if output.is_done:
                raise TmlError("turn: its output was closed before the last of the tokens drawn")
            events += output.accept(token_id, logprobs[index])
            if index < last:
                output.take_unfed()
                self.feed.feed(token_id)
        self._count_tokens(len(token_ids))
        self._tell(output, events)

    def _count_tokens(self, count: int) -> None:
        clock = self.turn.clock
        clock.num_output_tokens += count
        if not clock.first_s:
            clock.first_s = time.perf_counter()

    def _tell(self, output: OutputHalf, events: list[Event]) -> None:
        """Tell the readers what came of the output's last tokens; end if it is closed."""
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
        endings = [Ending(part.turn, (), error) for part in self.parts.items]
        self._end(endings, None)

    def _start(self) -> bool:
        """Mark where to come back to, and encode; False if nothing is left to do."""
        seat = self.seat
        now_s = time.perf_counter()
        for part in self.parts.items:
            part.turn.clock.started_s = part.turn.clock.started_s or now_s
        if self._before is None:
            # Before the mark: what eviction drops at the start of a tick stays dropped.
            evicted = seat.sequence.note_boundary()
            self._before = seat.sequence.mark()
            if evicted is not None:
                self._evicted = Notice(
                    **self.parts.tags(seat.state.tick),
                    kind="evicted",
                    message=f"positions {evicted.start} to {evicted.end - 1} left the context",
                    data={"start": evicted.start, "end": evicted.end},
                )
        self._segments = self.parts.encode()
        if not self.parts.items:
            self._phase = _Phase.DONE
            self._before.release()
            return False
        self.turn = self.parts.items[-1].turn
        if self._evicted is not None:
            self.parts.items[0].notices.insert(0, self._evicted)
        return True

    def _end_input(self, costs: Costs, batch_size: int) -> None:
        now_s = time.perf_counter()
        for one in self.parts.items:
            one.turn.clock.input_done_s = now_s
        part = self.parts.items[-1]
        state = state_after_input(part)
        self._phase = _Phase.CLOSING
        if not part.answer or self._is_last_silent:
            self.parts.silence(part, state)
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
                part.notices += self.parts.degraded(
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
        undone = [part for part in self.parts.items if part.turn.cancelled == "none"]
        if undone:
            if self._before is not None:
                self._rewind(self._before)
            endings = [Ending(part.turn, [self.parts.cancelled_done(part)]) for part in undone]
            if len(undone) == len(self.parts.items):
                self._end(endings, None)
                return False
            self._begin_again([part for part in self.parts.items if part not in undone])
            self.parts.end(undone, endings)
        if self.turn.heard_ms is not None and self._live_again(self.turn.heard_ms):
            return False
        is_cancelled = self.turn.cancelled is not None and self._phase != _Phase.QUEUED
        return not is_cancelled or not self._end_cancelled()

    def _live_again(self, heard_ms: float) -> bool:
        """Go back to the first output the user has not heard, and put in again what came after it,
        without answers. True if that is left to other jobs; False if all was heard before the
        last turn, or retention is in the way."""
        seat, parts = self.seat, self.parts.items
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
                        **self.parts.tags(parts[-1].tick),
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
        self.parts.items, self.turn = parts, parts[-1].turn
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
        part = self.parts.items[-1]
        num_tokens, num_events = self._delivered if self._is_begun_heard() else (0, 0)
        self._events = self._events[:num_events]
        self._fresh = [self.parts.cancelled_done(part)]
        if self._output is not None and self._after_input is not None:
            self._rewind(self._after_input)
            self._output.cut(num_tokens)
        half = part.silent if self._output is None else self._output
        if half is not None:
            token_ids = tuple(half.token_ids)
            self._fresh = [replace(self.parts.cancelled_done(part), token_ids=token_ids)]
        part.notices = [one for one in part.notices if one.kind == "unheard"]
        self._finish()
        return self.is_done

    def _is_begun_heard(self) -> bool:
        """Whether what was delivered of the last turn was played before it was cancelled."""
        heard_ms = self.turn.heard_ms
        return heard_ms is not None and self.parts.items[-1].tick * TICK_MS < heard_ms

    def _finish(self) -> None:
        """End all turns with what they have; a cancel that comes first is seen in the next step."""
        self._phase = _Phase.CLOSING
        parts = self.parts.items
        endings = [Ending(part.turn, self.parts.silent_events(part)) for part in parts[:-1]]
        last = parts[-1]
        state = state_after_input(last)
        if self._output is not None:
            state = self._output.state
        elif last.silent is not None:
            state = last.silent.state
        events = self._fresh
        if self._output is None and last.turn.cancelled is None:
            events = self.parts.silent_events(last)
        endings.append(Ending(last.turn, [*last.notices, *events]))
        self._end(endings, state)

    def _end(self, endings: list[Ending], state: LayoutState | None) -> None:
        """End the turns of all parts; without a ``state`` they are undone."""
        sequence, parts = self.seat.sequence, self.parts.items
        if not sequence.is_closed:
            self.feed.flush()
            tip, num_pages = sequence.tip, sequence.num_pages
            for part in parts:
                part.turn.clock.position, part.turn.clock.num_pages = tip, num_pages
        output = None if self._output is None else self._events
        records = [] if state is None else self.parts.records(endings, output)
        kept: Mark | None = None
        if state is not None and self._has_said_something():
            kept = self._after_input
        if not self.parts.end(parts, endings, state, records, kept):
            return  # a cancel came first; the next step begins with it
        if kept is not None:
            self._after_input = None  # the seat has it now
        self._phase = _Phase.DONE
        self._release()

    def _release(self) -> None:
        for mark in (self._before, self._after_input):
            if mark is not None:
                mark.release()

    # Small parts.

    def _has_said_something(self) -> bool:
        """Whether there is output the user may not have heard."""
        if any(isinstance(one, TextToken) for one in self._events):
            return True
        return self._output is not None and SOUND in self._output.token_ids

    def _rewind(self, mark: Mark) -> None:
        self.feed.flush()
        self.seat.sequence.rewind(mark)

    def _open_output(self) -> OutputHalf:
        if self._output is None:
            raise TmlError("turn: it asks nothing of the model")
        return self._output
