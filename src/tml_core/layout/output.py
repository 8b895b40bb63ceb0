"""The output half of a tick: what may be sampled next, and how tokens and sound become events.

What it looks like is drawn in `tml_core.layout.micro_turn`.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, Self

import numpy as np
import torch

from tml_core.errors import CheckpointError, InvalidArgument
from tml_core.layout.events import (
    AudioChunk,
    Event,
    Silence,
    Tags,
    TextToken,
    TurnDone,
    TurnEnd,
)
from tml_core.layout.sound import (
    BLOCKS_PER_TICK,
    SOUND,
    Heard,
    Unheard,
    Voice,
    spelled,
)
from tml_core.layout.state import LayoutState, Stream, TokenRun
from tml_core.layout.text import TextCodec, bitmask
from tml_core.layout.tool_call import call_event
from tml_core.media.dmel import DmelState
from tml_core.media.mel import Mel, mel_array
from tml_core.media.micro_turns import TICK_MS
from tml_core.media.segments import OwnAudio, Segment
from tml_core.media.vocoder import Vocoder, VocoderState
from tml_core.model.audio_out_config import AudioOutConfig
from tml_core.model.config import ModelConfig
from tml_core.model.token_loop import TokenTable

__all__ = ["MAX_CALL_TOKENS", "MicroTurnState", "OutputGrammar", "TickOutput"]

MAX_CALL_TOKENS: Final = 4096


@dataclass(frozen=True, kw_only=True)
class MicroTurnState(LayoutState):
    """``waiting``: runs of ids that still have to be put in, oldest first, of which the first
    ``num_used`` ids of the first run are already in. ``call_ids``: what an open call holds.
    ``voice``: sound that goes on, None after silence."""

    waiting: tuple[tuple[int, ...], ...] = ()
    num_used: int = 0
    call_ids: tuple[int, ...] | None = None
    voice: Voice | None = None

    @property
    def is_in_call(self) -> bool:
        """Whether a tool call goes on in the next tick."""
        return self.call_ids is not None

    @property
    def num_waiting(self) -> int:
        """Ids of text and tool results that still have to be put in."""
        return sum(len(ids) for ids in self.waiting) - self.num_used

    def to_dict(self) -> dict[str, Any]:
        """See `LayoutState.to_dict`."""
        voice = None if self.voice is None else self.voice.to_dict()
        return {**super().to_dict(), "voice": voice}

    @classmethod
    def from_dict(cls, values: dict[str, Any], dmel: DmelState | None) -> Self:
        """The inverse of `to_dict`; raises `SnapshotError` for anything else."""
        voice = values.get("voice")
        state = super().from_dict({**values, "voice": None}, dmel)
        return state if voice is None else replace(state, voice=Voice.from_dict(voice))


class _Phase(Enum):
    """Where an output half stands."""

    START = "start"
    START_IN_CALL = "start in call"
    TEXT = "text"
    SAY = "say"
    SAID = "said"
    CALL = "call"
    DONE = "done"

    # Looked up with every token; members are the same only if they are one.
    __hash__ = object.__hash__


class OutputGrammar:
    """The token kinds of one vocabulary, and the bit masks of what may follow; made once a model.

    ``<|say|>`` is in a mask only where the model has an audio-out head and ``speaks``.
    """

    def __init__(self, config: ModelConfig, codec: TextCodec, *, speaks: bool = True) -> None:
        if config.interaction is None:
            raise CheckpointError("config: expected an interaction block, got a plain checkpoint")
        self.tokens = config.interaction.tokens
        self.max_text = config.interaction.max_text_per_tick
        self.codec = codec
        is_text = codec.is_text.copy()
        ids = self.tokens
        is_text[[ids.tick, ids.out, ids.end_out, ids.silence, ids.say, ids.call, ids.end_call]] = (
            False
        )
        is_text.flags.writeable = False
        self.is_text = is_text
        extra: dict[_Phase, tuple[int, ...]] = {
            _Phase.START: (ids.silence, ids.call),
            _Phase.START_IN_CALL: (ids.silence, ids.end_call),
            _Phase.TEXT: (ids.call, ids.end_out),
            _Phase.CALL: (ids.end_call, ids.end_out),
        }
        #: The head it speaks with, None where it only writes.
        self.head: AudioOutConfig | None = config.interaction.audio_out if speaks else None
        controls: tuple[int, ...] = (ids.silence, ids.end_out, ids.end_call, ids.call)
        if self.head is not None:
            extra[_Phase.START] += (ids.say,)
            extra[_Phase.TEXT] += (ids.say,)
            extra[_Phase.SAID] = (ids.call, ids.end_out)
            controls += (ids.say,)
        self._extra = extra
        masks_PW = torch.stack([self._mask(phase) for phase in extra])
        self._masks: dict[_Phase, torch.Tensor] = dict(zip(extra, masks_PW, strict=True))
        self._numbers = {phase: number for number, phase in enumerate(extra)}
        after_text = {
            _Phase.START: _Phase.TEXT,
            _Phase.START_IN_CALL: _Phase.CALL,
            _Phase.TEXT: _Phase.TEXT,
            _Phase.CALL: _Phase.CALL,
        }
        call_phase = self._numbers[_Phase.CALL]
        after_control = tuple(call_phase if one == ids.call else -1 for one in controls)
        # Beside text only <|call|> leaves the half open and needs nobody to look.
        self._table = TokenTable(
            masks_PW,
            controls,
            tuple(
                (*after_control, self._numbers[after_text[phase]] if phase in after_text else -1)
                for phase in extra
            ),
            len(is_text),
        )

    def mask(self, phase: _Phase) -> torch.Tensor:
        """Ids allowed in ``phase``: int32 [ceil(V / 32)], shared, not to be written."""
        return self._masks[phase]

    def run_ahead(self, phase: _Phase, num_text: int) -> TokenRun:
        """`TokenRun` from ``phase``."""
        return TokenRun(self._table, self._numbers[phase], num_text)

    def is_allowed(self, phase: _Phase, token_id: int) -> bool:
        """Whether ``token_id`` may come in ``phase``."""
        if not 0 <= token_id < len(self.is_text):
            return False
        if phase not in self._extra:
            return False
        takes_text = phase != _Phase.SAID
        return (takes_text and bool(self.is_text[token_id])) or token_id in self._extra[phase]

    def _mask(self, phase: _Phase) -> torch.Tensor:
        is_allowed = np.zeros_like(self.is_text) if phase == _Phase.SAID else self.is_text.copy()
        is_allowed[list(self._extra[phase])] = True
        return bitmask(is_allowed)


class TickOutput:
    """The output half of one tick, token by token; the same code labels training targets.

    ``token_ids`` and ``streams``: the half so far, in which `SOUND` stands for a block of sound.
    ``state``: the session after it, final once ``is_done``. ``vocoder``: turns sound into the PCM
    of `AudioChunk`, and is left as it is. Without one sound causes no events.
    """

    def __init__(
        self,
        grammar: OutputGrammar,
        state: MicroTurnState,
        epoch: int = 0,
        vocoder: Vocoder | None = None,
    ) -> None:
        self._grammar = grammar
        self._before = state
        self._epoch = epoch
        self._vocoder = vocoder
        self._reset()

    def _reset(self) -> None:
        self.state = self._before
        self.token_ids: list[int] = []
        self.streams: list[Stream] = []
        self.is_done = False
        self._num_text = 0
        self._num_fed = 0
        self._sound: list[OwnAudio] = []
        self._num_sound_fed = 0
        self._heard: VocoderState | None = None  # after the sound of this half
        # Of an open call; they become part of the state when the half is closed.
        before = self._before.call_ids
        self._call_ids: list[int] | None = None if before is None else list(before)
        is_in_call = before is not None
        self._phase = _Phase.START_IN_CALL if is_in_call else _Phase.START

    def allowed(self) -> torch.Tensor:
        """Bit mask of the ids that may come next: int32 [ceil(V / 32)], not to be written."""
        if self.is_done:
            raise InvalidArgument("allowed: expected an open output half, got a closed one")
        if self.wants_sound:
            raise InvalidArgument("allowed: expected to be asked for a token, a block comes next")
        return self._grammar.mask(self._phase)

    @property
    def wants_sound(self) -> bool:
        """Whether a block comes next, for `accept_sound`, and not a token."""
        return self._phase == _Phase.SAY

    @property
    def has_unfed_sound(self) -> bool:
        """Whether what the model has not been given yet is more than tokens."""
        return self._num_sound_fed < len(self._sound)

    @property
    def has_spoken(self) -> bool:
        """Whether the tick's sound is whole and the half still open."""
        return self._phase == _Phase.SAID

    @property
    def before_M(self) -> torch.Tensor:
        """The frame said before the block that comes next: float32 [M], silence if nothing was."""
        last_M = self._last_frame()
        head = self._grammar.head
        if head is None:
            raise InvalidArgument("before_M: this model has no audio-out head")
        if last_M is None:
            return torch.full((head.num_mel_bins,), head.mel.min_log10)
        return last_M

    def _last_frame(self) -> torch.Tensor | None:
        if self._sound:
            return self._sound[-1].mel[0, -1]
        voice = self._before.voice
        return None if voice is None else voice.last

    def run_ahead(self) -> TokenRun | None:
        """How far to go without it: to what closes it, or a budget."""
        if self.is_done or self.wants_sound:
            return None
        num_text = self._grammar.max_text - self._num_text
        if self._call_ids is not None:
            num_text = min(num_text, MAX_CALL_TOKENS - len(self._call_ids))
        num_text = min(max(1, num_text), MAX_CALL_TOKENS)
        return self._grammar.run_ahead(self._phase, num_text)

    def accept(self, token_id: int, logprob: float) -> list[Event]:
        """Take the next token; the events it causes, `TurnDone` last when the tick is over.

        Raises `InvalidArgument`, changing nothing, for a token the mask does not allow.
        """
        grammar, ids = self._grammar, self._grammar.tokens
        if self.is_done or not grammar.is_allowed(self._phase, token_id):
            where = "a closed output half" if self.is_done else f"phase {self._phase.value!r}"
            raise InvalidArgument(f"token_id: expected an allowed token, got {token_id} in {where}")
        if token_id == ids.silence:
            self._append(token_id, Stream.SILENCE)
            return [Silence(**self._tags(), logprob=logprob), *self._close("silence")]
        if token_id == ids.end_out:
            self._append(token_id, Stream.CONTROL)
            return self._close("end")
        if token_id == ids.call:
            self._append(token_id, Stream.CONTROL)
            self._phase = _Phase.CALL
            self._call_ids = []
            return []
        if token_id == ids.end_call:
            self._append(token_id, Stream.CONTROL)
            return self._end_call()
        if token_id == ids.say:
            self._append(token_id, Stream.CONTROL)
            self._phase = _Phase.SAY
            return []
        self._num_text += 1
        if self._call_ids is not None:
            return self._accept_call_text(token_id)
        return self._accept_text(token_id, logprob)

    def completed_by(self, mel_FM: Mel | torch.Tensor) -> Unheard | None:
        """See `OutputHalf.completed_by`. Raises as `accept_sound` does."""
        frames_FM = self._checked_block(mel_FM)
        if self._vocoder is None or len(self._sound) + 1 < BLOCKS_PER_TICK:
            return None
        voice = self._before.voice
        before = [one.mel[0].numpy() for one in self._sound]
        return Unheard(
            self._vocoder,
            None if voice is None else voice.vocoder,
            np.concatenate([*before, frames_FM]),
        )

    def accept_sound(self, mel_FM: Mel | torch.Tensor, heard: Heard | None = None) -> list[Event]:
        """Take the next block, log10 frames float32 [F, M]; the tick's sound once it is whole.
        ``heard``: see `OutputHalf.accept_sound`.

        Raises `InvalidArgument`, changing nothing, where none is wanted or for another shape.
        """
        unheard = self.completed_by(mel_FM)
        if unheard is not None and heard is None:
            pcm_1S, (state,) = unheard.vocoder.push_together([unheard.state], unheard.mel_FM[None])
            heard = Heard(pcm_1S[0], state)
        mel_1FM = torch.from_numpy(self._checked_block(mel_FM).copy())[None]
        self._sound.append(OwnAudio(mel_1FM, self._last_frame()))
        self._append(SOUND, Stream.AUDIO)
        if len(self._sound) == BLOCKS_PER_TICK:
            self._phase = _Phase.SAID
        if unheard is None or heard is None:
            return []
        self._heard = heard.state
        sample_rate = unheard.vocoder.config.sample_rate
        return [AudioChunk(**self._tags(), pcm=heard.pcm, sample_rate=sample_rate)]

    def _checked_block(self, mel_FM: Mel | torch.Tensor) -> Mel:
        head = self._grammar.head
        if head is None or not self.wants_sound:
            raise InvalidArgument(
                f"mel: expected a token in phase {self._phase.value!r}, got sound"
            )
        frames_FM = mel_array("mel", mel_FM, head.mel)
        if len(frames_FM) != head.num_frames:
            raise InvalidArgument(f"mel: expected {head.num_frames} frames, got {len(frames_FM)}")
        return frames_FM

    def take_unfed(self) -> list[int]:
        """The accepted tokens the model has not been given yet; now they count as given."""
        unfed = self.token_ids[self._num_fed :]
        self._num_fed = len(self.token_ids)
        self._num_sound_fed = len(self._sound)
        return unfed

    def take_unfed_segments(self) -> list[Segment]:
        """The same with its sound, as segments."""
        sound = self._sound[self._num_sound_fed :]
        return spelled(self.take_unfed(), sound)

    def segments(self) -> list[Segment]:
        """The half so far."""
        return spelled(self.token_ids, self._sound)

    def cut(self, num_kept: int = 0) -> list[Event]:
        """Keep the first ``num_kept`` tokens and close the half after them with ``<|/out|>``."""
        kept, sound = self.token_ids[:num_kept], iter(self._sound)
        self._reset()
        for token_id in kept:
            if token_id == SOUND:
                self.accept_sound(next(sound).mel[0])
                continue
            events = self.accept(token_id, 0.0)
            if self.is_done:
                return events[-1:]
        self._append(self._grammar.tokens.end_out, Stream.FORCED)
        # What was still to be heard of the ticks before is not.
        return self._close("cancelled")[-1:]

    def close_now(self, reason: TurnEnd) -> list[Event]:
        """Close the half with what it holds: ``<|/out|>``, or ``<|silence|>`` without a token."""
        ids = self._grammar.tokens
        self._append(ids.end_out if self.token_ids else ids.silence, Stream.FORCED)
        return self._close(reason)

    def _accept_text(self, token_id: int, logprob: float) -> list[Event]:
        self._append(token_id, Stream.TEXT)
        self._phase = _Phase.TEXT
        text, utf8 = self._grammar.codec.feed(self.state.utf8, token_id)
        if utf8 != self.state.utf8:
            self.state = replace(self.state, utf8=utf8)
        event = TextToken(**self._tags(), text=text, token_id=token_id, logprob=logprob)
        return [event, *self._close_at_budget()]

    def _accept_call_text(self, token_id: int) -> list[Event]:
        self._append(token_id, Stream.CALL)
        self._phase = _Phase.CALL
        assert self._call_ids is not None  # a call is open
        self._call_ids.append(token_id)
        if len(self._call_ids) < MAX_CALL_TOKENS:
            return self._close_at_budget()
        self._append(self._grammar.tokens.end_call, Stream.FORCED)
        return self._end_call()

    def _end_call(self) -> list[Event]:
        call_ids, self._call_ids = tuple(self._call_ids or ()), None
        raw = self._grammar.codec.decode(call_ids)
        event, self.state = call_event(self.state, raw, call_ids, self._tags())
        self._append(self._grammar.tokens.end_out, Stream.FORCED)
        return [event, *self._close("call")]

    def _close_at_budget(self) -> list[Event]:
        if self._num_text < self._grammar.max_text:
            return []
        self._append(self._grammar.tokens.end_out, Stream.FORCED)
        return self._close("budget")

    def _append(self, token_id: int, stream: Stream) -> None:
        self.token_ids.append(token_id)
        self.streams.append(stream)

    def _close(self, reason: TurnEnd) -> list[Event]:
        done = TurnDone(**self._tags(), reason=reason, token_ids=tuple(self.token_ids))
        unsent = tuple(self.token_ids[self._num_fed :])
        call_ids = None if self._call_ids is None else tuple(self._call_ids)
        voice, events = self._voice_after()
        self.state = replace(
            self.state, tick=self.state.tick + 1, unsent=unsent, call_ids=call_ids, voice=voice
        )
        self._phase = _Phase.DONE
        self.is_done = True
        return [*events, done]

    def _voice_after(self) -> tuple[Voice | None, list[Event]]:
        """What the next tick goes on from; the rest of a sound that ended with the tick before."""
        unsent = tuple(self._sound[self._num_sound_fed :])
        if len(self._sound) == BLOCKS_PER_TICK:
            return Voice(self._last_frame(), self._heard, unsent), []
        events: list[Event] = []
        before = self._before.voice
        if self._vocoder is not None and before is not None and before.vocoder is not None:
            vocoder = self._vocoder.copy()
            vocoder.restore(before.vocoder)
            sample_rate = vocoder.config.sample_rate
            rest_S = vocoder.flush()
            events.append(AudioChunk(**self._tags(), pcm=rest_S, sample_rate=sample_rate))
        return (Voice(unsent=unsent) if unsent else None), events

    def _tags(self) -> Tags:
        tick = self._before.tick
        return {"tick": tick, "t_ms": tick * TICK_MS, "epoch": self._epoch}
