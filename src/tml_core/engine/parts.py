"""The parts of one job: ticks that go in together, what is said of each, how their turns end."""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from tml_core.engine.seat import Part, Seat, TickRecord
from tml_core.engine.stats import EngineCounters
from tml_core.engine.turn import Ending, end_together
from tml_core.errors import TmlError
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
from tml_core.layout.sound import BLOCKS_PER_TICK, SOUND
from tml_core.layout.state import EncodedInput, LayoutState
from tml_core.media.audio_file import SAMPLE_RATE
from tml_core.media.micro_turns import TICK_MS
from tml_core.media.segments import Block, Segment
from tml_core.sequence.sequence import Mark
from tml_core.sequence.values import Carry

__all__ = ["Parts", "state_after_input"]


class Parts:
    """``items``, oldest first: encoded one behind the other, of which the last may be answered.

    Used by the engine thread alone once submitted; ``counters`` are the engine's from then on.
    """

    def __init__(self, seat: Seat, items: SequenceOf[Part]) -> None:
        self._seat = seat
        self.items = list(items)
        self.counters = EngineCounters()

    def encode(self) -> tuple[Segment | Block, ...]:
        """What is to be appended: both halves of all parts but the last one's output.

        A part that the layout does not take ends with the layout's error; the others go on without
        it, and none may be left.
        """
        seat = self._seat
        state = seat.state
        segments: list[Segment | Block] = []
        for part in list(self.items):
            encoded = part.encoded
            if encoded is None:
                try:
                    with seat.lock:
                        encoded = seat.encode(part, state)
                except Exception as error:
                    self.items.remove(part)
                    self.end([part], [Ending(part.turn, (), error)])
                    continue
            else:
                part.tick = state.tick
            segments += encoded.segments
            state = encoded.state
            part.turn.clock.num_input_tokens = encoded.num_tokens
            part.notices = self._input_notices(part, encoded)
            if part is not self.items[-1]:
                state = self.silence(part, state)
        return tuple(segments)

    def silence(self, part: Part, state: LayoutState) -> LayoutState:
        """Close a part's output half without the model; returns the state after it."""
        half = part.begin_output(state, self._seat.epoch)
        if half is None:
            return state
        if part.answer:
            part.notices += self.degraded(
                "coalesce_input",
                "more input was waiting: this tick was taken in without an answer",
                part,
                num_ticks=len(self.items),
            )
        part.tail = half.close_now("degraded" if part.answer else "input")[:-1]
        part.silent = half
        return half.state

    def carry_after(self, carry: Carry) -> Carry:
        """What the sequence carries beside KV once the input halves are in; ``carry`` before."""
        last = self.items[-1]
        audio = state_after_input(last).dmel
        return Carry(
            audio=carry.audio if audio is None else audio,
            frame=carry.frame,
            num_sampled=carry.num_sampled,
            num_noise=carry.num_noise,
            clock_ms=carry.clock_ms if last.chunk is None else (last.tick + 1) * TICK_MS,
        )

    # What is said of them.

    def tags(self, tick: int) -> Tags:
        """What every event of a tick carries."""
        return {"tick": tick, "t_ms": tick * TICK_MS, "epoch": self._seat.epoch}

    def degraded(
        self, policy: str, message: str, part: Part | None = None, **data: int
    ) -> list[Notice]:
        """That a part, by default the last, was not answered in full, and why."""
        tags = self.tags((self.items[-1] if part is None else part).tick)
        return [Notice(**tags, kind="degraded", message=message, data={"policy": policy, **data})]

    def cancelled_done(self, part: Part) -> TurnDone:
        """The end of a part that was cancelled."""
        is_encoded = part.encoded is not None
        tick = part.tick if is_encoded else self._seat.state.tick + self.items.index(part)
        return TurnDone(**self.tags(tick), reason="cancelled")

    def silent_events(self, part: Part) -> list[Event]:
        """How a turn ends that the model was not asked to answer."""
        reason: TurnEnd = "degraded" if part.answer and part.silent is not None else "input"
        token_ids = () if part.silent is None else tuple(part.silent.token_ids)
        if part.turn.cancelled is not None:
            return [replace(self.cancelled_done(part), token_ids=token_ids)]
        done = TurnDone(**self.tags(part.tick), reason=reason, token_ids=token_ids)
        # Of a sound that ended before; who answers the last one tells its notices.
        events: list[Event] = [*part.tail, done]
        return events if part is self.items[-1] else [*part.notices, *events]

    def records(
        self, endings: SequenceOf[Ending], output: SequenceOf[Event] | None
    ) -> list[TickRecord]:
        """All parts in words; ``output``: the events of the last one's, None if it had none."""
        found = []
        for part, ending in zip(self.items, endings, strict=True):
            events = output if part is self.items[-1] else None
            if part.chunk is not None or events is not None:
                found.append(_record(part, events or (), ending.events))
        return found

    def _input_notices(self, part: Part, encoded: EncodedInput) -> list[Notice]:
        found: list[Notice] = []

        def notice(kind: str, message: str, **data: int) -> None:
            found.append(Notice(**self.tags(part.tick), kind=kind, message=message, data=data))

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

    # How they end.

    def end(
        self,
        parts: SequenceOf[Part],
        endings: SequenceOf[Ending],
        state: LayoutState | None = None,
        records: SequenceOf[TickRecord] = (),
        after_input: Mark | None = None,
    ) -> bool:
        """End the turns of ``parts``, and settle them on the seat: see `Seat.settle`. False, with
        nothing done, if a cancel came first."""

        def settle() -> None:
            self._seat.settle(parts, state, records, after_input)
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
                policy = self._seat.degrade
                counters.degraded[policy] += 1


def state_after_input(part: Part) -> LayoutState:
    """The state after a part's input half."""
    if part.encoded is None:
        raise TmlError("turn: its input was not encoded")
    return part.encoded.state


def _record(part: Part, events: SequenceOf[Event], last_events: SequenceOf[Event]) -> TickRecord:
    """A turn in words; ``events`` of its output, ``last_events`` those it ended with."""
    chunk = part.chunk
    audio_S = None if chunk is None else chunk.audio
    said = [one for one in events if isinstance(one, TextToken)]
    calls = [one for one in events if isinstance(one, ToolCall)]
    done = last_events[-1] if last_events else None
    num_items = 0 if chunk is None else len(chunk.items) + len(part.known)
    return TickRecord(
        tick=part.tick,
        t_ms=part.tick * TICK_MS,
        audio_ms=0 if audio_S is None else len(audio_S) * 1000 // SAMPLE_RATE,
        audio_rms=part.audio_rms,
        num_frames=0 if chunk is None else len(chunk.frames),
        text_in="" if chunk is None or chunk.text is None else chunk.text,
        num_items=num_items,
        text_out="".join(one.text for one in said if one.channel == "text"),
        sound_ms=_sound_ms(done),
        is_silent=any(isinstance(one, Silence) for one in events),
        calls=tuple((one.name, one.call_id, one.raw) for one in calls),
        reason=done.reason if isinstance(done, TurnDone) else "input",
    )


def _sound_ms(done: Event | None) -> int:
    """How much of a tick its own sound fills: all or nothing."""
    is_whole = isinstance(done, TurnDone) and done.token_ids.count(SOUND) == BLOCKS_PER_TICK
    return TICK_MS if is_whole else 0
