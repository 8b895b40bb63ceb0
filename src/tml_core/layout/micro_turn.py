"""Micro-turn layout v1: one tick is 200 ms, an input half and an output half.

    <|tick|>  audio x <=4  [pictures]  [text waiting to be put in, budgeted]  <|out|>
              <|silence|>
            | text x <=N  [<|say|> sound x4]  [<|call|> json <|/call|>]  <|/out|>

Choices the figure leaves open, made here and nowhere else:

- A tick with no output is spelled ``<|silence|>``; ``<|/out|>`` directly after ``<|out|>`` is never
  sampled, it marks an output half that was cancelled.
- The budget N counts text tokens inside and outside a call. When it is used up, ``<|/out|>`` is put
  there without sampling, as it is after ``<|/call|>``: a tick of n tokens costs n model steps.
- Sound fills its tick or is not begun: four blocks of 50 ms, each one position, follow ``<|say|>``.
  Of a half that was cut short within them the blocks stay in the sequence and nobody hears them.
  A model says nothing while a call is open.
- A call that is open at the end of a tick goes on in the next tick that is not silent. One that
  reaches `output.MAX_CALL_TOKENS` is closed by the layout.
- In the input half, ``<|call|> json <|/call|>`` holds a tool result; bare text was typed. What does
  not fit the budget waits for the next tick, in order.
- A session with instructions or tools begins with the bare text and with
  ``<|call|> [tool, ...] <|/call|>``, before the first tick.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer

from tml_core.errors import CheckpointError, InvalidArgument, Unsupported
from tml_core.layout.chunk import Chunk, ToolResult, compact_json
from tml_core.layout.output import MicroTurnState, OutputGrammar, TickOutput
from tml_core.layout.sound import BLOCKS_PER_TICK, RunItem, spelled
from tml_core.layout.state import AudioCarry, EncodedInput, LayoutState, Stream
from tml_core.layout.text import TextCodec
from tml_core.media.mel import Mel, mel_array
from tml_core.media.patches import image_patches
from tml_core.media.segments import Audio, Block, Image, Segment, Tokens
from tml_core.media.vocoder import Vocoder
from tml_core.model.config import ModelConfig

__all__ = ["MicroTurnLayout", "MicroTurnState"]


class MicroTurnLayout:
    """Layout v1 for one model; holds no session.

    ``speaks=False`` takes no notice of an audio-out head. ``vocoder``: what its output halves turn
    sound into PCM with; without one sound causes no events. Raises `CheckpointError` if the
    checkpoint has no ``interaction`` block or no usable tokenizer.
    """

    name: Final = "micro-turn v1"
    knows_ticks: Final = True

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        *,
        speaks: bool = True,
        vocoder: Vocoder | None = None,
    ) -> None:
        if tokenizer is None:
            raise CheckpointError("tokenizer: expected tokenizer.json in the checkpoint, got none")
        if config.interaction is None:
            raise CheckpointError("config: expected an interaction block, got a plain checkpoint")
        self.config = config
        self.codec = TextCodec(tokenizer, config.text.unpadded_vocab_size)
        self.grammar = OutputGrammar(config, self.codec, speaks=speaks)
        self._vocoder = vocoder
        self._budget = config.interaction.max_injected_per_tick
        self._audio = None if config.audio is None else AudioCarry(config.audio)

    def initial_state(self) -> MicroTurnState:
        """The state of an empty session."""
        return MicroTurnState(dmel=None if self._audio is None else self._audio.fresh)

    def encode_prefix(
        self,
        system: str | None = None,
        tools: tuple[dict[str, Any], ...] = (),
        effort: float | None = None,
    ) -> tuple[int, ...]:
        """Ids before the first tick: instructions, then the tools. There is no effort line."""
        if effort is not None:
            raise InvalidArgument(f"effort: expected None for a micro-turn model, got {effort}")
        ids = () if system is None else self.codec.encode(system)
        return ids + (self._bracketed(list(tools)) if tools else ())

    def encode_input(self, chunk: Chunk, state: LayoutState) -> EncodedInput:
        """The input half of tick ``state.tick``, led by what the last tick left unsent.

        Text and tool results queue behind what waits already; as many ids as the budget allows go
        in. Raises `InvalidArgument` for an unknown call id or text that cannot be spelled, and
        `Unsupported` for sound or pictures a text-only model cannot take; ``state`` stays valid.
        """
        before = _checked(state)
        ids = self.grammar.tokens
        segments: list[Segment | Block] = [*_unsent(before, ids.tick)]
        num_tokens = len(before.unsent) + 2
        dmel = before.dmel
        if chunk.audio is not None:
            if self._audio is None:
                raise Unsupported("Chunk.audio: this model has no audio encoder")
            bins_FM, dmel = self._audio.push(dmel, chunk.audio)
            if len(bins_FM):
                segments.append(Audio(bins=bins_FM))
                num_tokens += len(bins_FM)
        if chunk.frames:
            image = self.encode_frames(chunk.frames)
            segments.append(image)
            num_tokens += 0 if image.patches is None else len(image.patches)
        waiting = before.waiting + self._queue(chunk, before)
        injected, waiting, num_used = _take(waiting, before.num_used, self._budget)
        segments.append(Tokens((*injected, ids.out)))
        voice = None if before.voice is None else before.voice.sent()
        after = replace(
            before, unsent=(), dmel=dmel, waiting=waiting, num_used=num_used, voice=voice
        )
        return EncodedInput(
            segments=tuple(segments),
            state=after,
            num_tokens=num_tokens + len(injected),
            num_waiting=after.num_waiting,
        )

    def begin_output(
        self, state: LayoutState, epoch: int = 0, vocoder: Vocoder | None = None
    ) -> TickOutput:
        """The output half that follows the input half that ended in ``state``. ``vocoder``: used
        instead of the layout's."""
        used = self._vocoder if vocoder is None else vocoder
        return TickOutput(self.grammar, _checked(state), epoch, used)

    def encode_sound(self, mel_FM: Mel) -> list[RunItem]:
        """What a model that says log10 frames float32 [F, M] would put out, as one run;
        `split_output` deals it out to ticks. The last tick is filled up with silence."""
        head = self.grammar.head
        if head is None:
            raise Unsupported("mel: this model has no audio-out head")
        frames_FM = mel_array("mel", mel_FM, head.mel)
        per_tick = BLOCKS_PER_TICK * head.num_frames
        rest = ((0, -len(frames_FM) % per_tick), (0, 0))
        frames_FM = np.pad(frames_FM, rest, constant_values=head.mel.min_log10)
        run: list[RunItem] = []
        for start in range(0, len(frames_FM), head.num_frames):
            if start % per_tick == 0:
                run.append(self.grammar.tokens.say)
            run.append(frames_FM[start : start + head.num_frames])
        return run

    def encode_output(
        self, state: LayoutState, text: str = "", call: tuple[str, dict[str, Any]] | None = None
    ) -> tuple[int, ...]:
        """What a model that writes ``text`` and then makes ``call`` (name, args) would sample, as
        one run without the closing tokens; `split_output` deals it out to ticks."""
        is_in_call = _checked(state).call_ids is not None
        if is_in_call and text:
            raise InvalidArgument("text: expected none while a call is open, got some")
        ids = self.codec.encode(text)
        if call is None:
            return ids
        name, args = call
        body = self._bracketed({"name": name, "args": args})
        return ids + (body[1:] if is_in_call else body)

    def split_output(self, state: LayoutState, run: Sequence[RunItem]) -> list[TickOutput]:
        """A run of sampled tokens and blocks of sound dealt out to as many ticks as the budget
        needs, in order.

        A run that ends before its tick is closed, or goes on to write or to speak after the tick's
        sound, ends it with ``<|/out|>``; an empty run is one silent tick. Each part has its tokens
        and their streams. Raises `InvalidArgument` for a run the grammar does not allow.
        """
        parts = [TickOutput(self.grammar, _checked(state))]
        ids = self.grammar.tokens
        for item in run:
            last = parts[-1]
            if last.has_spoken and not (isinstance(item, int) and item in (ids.call, ids.end_out)):
                last.accept(ids.end_out, 0.0)
            if last.is_done:
                parts.append(TickOutput(self.grammar, last.state))
            _accept(parts[-1], item)
        last = parts[-1]
        if not last.is_done:
            last.accept(ids.end_out if last.token_ids else ids.silence, 0.0)
        return parts

    def encode_session(
        self, ticks: Iterable[tuple[Chunk, Sequence[RunItem]]], prefix: Sequence[int] = ()
    ) -> tuple[list[Segment | Block], list[Stream]]:
        """A whole session as a trainer sees it: segments, and the stream of every position.

        ``ticks``: for each tick what came in and what was sampled, blocks of sound as their mel
        frames, FORCED tokens left out, the tick closed by it (`split_output` makes such runs).
        ``prefix``: ids of `encode_prefix`. The same positions as a live session has. Raises
        `InvalidArgument` for a run that does not close its tick or that the grammar does not allow.
        """
        segments: list[Segment | Block] = [Tokens(tuple(prefix))] if prefix else []
        streams = [Stream.INPUT] * len(prefix)
        state: LayoutState = self.initial_state()
        for chunk, run in ticks:
            encoded = self.encode_input(chunk, state)
            segments += encoded.segments
            # What the last tick left unsent leads this input, and is labelled already.
            streams += [Stream.INPUT] * (encoded.num_tokens - len(state.unsent))
            output = TickOutput(self.grammar, _checked(encoded.state))
            for item in run:
                _accept(output, item)
            if not output.is_done:
                raise InvalidArgument(
                    f"ticks[{output.state.tick}]: expected tokens that close the tick, "
                    f"got {output.token_ids}"
                )
            streams += output.streams
            state = output.state
        return segments + _unsent(_checked(state)), streams

    def encode_frames(self, frames: Sequence[Any]) -> Image:
        """One image-token set: a picture, or a pair with the later one in the second slot."""
        if self.config.vision is None:
            raise Unsupported("Chunk.frames: this model has no picture encoder")
        second = frames[1] if len(frames) == 2 else None
        size = self.config.vision.patch_size
        return Image(patches=image_patches(frames[0], second, patch_size=size))

    def encode_result(self, item: ToolResult, name: str) -> tuple[int, ...]:
        """The ids of a result of the tool ``name``; they may take several ticks to go in."""
        kind = "error" if item.is_error else "content"
        return self._bracketed({"call_id": item.call_id, "name": name, kind: item.content})

    def _queue(self, chunk: Chunk, state: MicroTurnState) -> tuple[tuple[int, ...], ...]:
        """The runs of ids that ``chunk`` adds to what waits: tool results first, then text."""
        runs = []
        for item in chunk.items:
            runs.append(self.encode_result(item, item.name or state.name_of(item.call_id)))
        if chunk.text:
            runs.append(self.codec.encode(chunk.text))
        if runs and not self._budget:
            raise Unsupported("Chunk.text: this model takes no text (max_injected_per_tick is 0)")
        return tuple(runs)

    def _bracketed(self, value: Any) -> tuple[int, ...]:
        ids = self.grammar.tokens
        return (ids.call, *self.codec.encode(compact_json("tools", value)), ids.end_call)


def _take(
    waiting: tuple[tuple[int, ...], ...], num_used: int, budget: int
) -> tuple[list[int], tuple[tuple[int, ...], ...], int]:
    """Up to ``budget`` ids from the front of ``waiting``; what is left of it."""
    taken: list[int] = []
    while waiting and len(taken) < budget:
        run = waiting[0][num_used : num_used + budget - len(taken)]
        taken.extend(run)
        num_used += len(run)
        if num_used == len(waiting[0]):
            waiting, num_used = waiting[1:], 0
    return taken, waiting, num_used


def _accept(output: TickOutput, item: RunItem) -> None:
    if isinstance(item, int):
        output.accept(item, 0.0)
    else:
        output.accept_sound(item)


def _unsent(state: MicroTurnState, *then: int) -> list[Segment]:
    """What the last tick left unsent, and more tokens after it."""
    sound = () if state.voice is None else state.voice.unsent
    return spelled((*state.unsent, *then), sound)


def _checked(state: LayoutState) -> MicroTurnState:
    if not isinstance(state, MicroTurnState):
        raise InvalidArgument(f"state: expected MicroTurnState, got {type(state).__name__}")
    return state
