"""The Inkling chat template, streamed: for checkpoints that know no ticks.

    [tools] [instructions] <effort>                                  before the first turn
    <|message_user|><|content_audio_input|> audio ... <|audio_end|><|end_message|>
    <|message_user|><|content_image|> patches <|end_message|>
    <|message_user|><|content_text|> text <|end_message|>
    <|message_tool|> name <|content_text|> result <|end_message|>
    <|message_model|>                                                 commit()
        <|content_thinking|> text <|end_message|><|message_model|>
        <|content_text|> text <|end_message|><|message_model|>
        name <|content_invoke_tool_json|> {"name": ..., "args": ...} <|end_message|>
    <|content_model_end_sampling|>

Chunks go into the sequence as they come: sound and text keep their message open, so that the next
chunk of the same kind continues it. The spelling is that of the published template: tools first,
JSON with sorted keys and no spaces, one effort line after the instructions.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from tml_core.errors import CheckpointError, InvalidArgument, Unsupported
from tml_core.layout.chunk import Chunk, ToolResult, compact_json
from tml_core.layout.events import Event, Tags, TextToken, TurnDone, TurnEnd
from tml_core.layout.sound import WrittenHalf
from tml_core.layout.state import AudioCarry, EncodedInput, LayoutState, Stream, TokenRun
from tml_core.layout.text import TextCodec, bitmask
from tml_core.layout.tool_call import call_event
from tml_core.media.micro_turns import TICK_MS
from tml_core.media.patches import image_patches
from tml_core.media.segments import Audio, Block, Image, Segment, Tokens
from tml_core.model.config import ModelConfig
from tml_core.model.tokenizer import special_ids

__all__ = ["DEFAULT_EFFORT", "EFFORTS", "ChatLayout", "ChatOutput", "ChatState"]

DEFAULT_EFFORT: Final = 0.9
# The words other interfaces use for the same numbers.
EFFORTS: Final = {
    "none": 0.0,
    "minimal": 0.1,
    "low": 0.2,
    "medium": 0.7,
    "high": 0.9,
    "max": 0.99,
}

_NAMES: Final = (
    "message_user",
    "message_model",
    "message_system",
    "message_tool",
    "content_text",
    "content_image",
    "content_audio_input",
    "content_thinking",
    "content_xml",
    "content_invoke_tool_json",
    "content_tool_error",
    "content_model_end_sampling",
    "audio_end",
    "end_message",
)


@dataclass(frozen=True, kw_only=True)
class ChatState(LayoutState):
    """``open_part``: the kind of user message that is still open, or "". ``has_input``: something
    came since the last answer. ``is_committed``: the generation prompt stands at the end."""

    open_part: Literal["", "audio", "text"] = ""
    has_input: bool = False
    is_committed: bool = False


class _Phase(Enum):
    HEADER = "header"  # after <|message_model|>
    TEXT = "text"
    THINKING = "thinking"
    CALL = "call"
    BETWEEN = "between"  # after <|end_message|>
    DONE = "done"


class ChatOutput(WrittenHalf):
    """One answer, token by token. ``max_tokens`` bounds it: then it is closed without sampling."""

    def __init__(self, layout: "ChatLayout", state: ChatState, epoch: int, max_tokens: int) -> None:
        self._layout = layout
        self._before = state
        self._epoch = epoch
        self._max_tokens = max_tokens
        self._reset()

    def _reset(self) -> None:
        self.state = self._before
        self.token_ids: list[int] = []
        self.streams: list[Stream] = []
        self.is_done = False
        self._num_fed = 0
        self._header: list[int] = []
        self._body: list[int] = []
        self._phase = _Phase.HEADER

    def allowed(self) -> torch.Tensor:
        """Bit mask of the ids that may come next: int32 [ceil(V / 32)], not to be written."""
        if self.is_done:
            raise InvalidArgument("allowed: expected an open answer, got a closed one")
        return self._layout.masks[self._phase]

    def run_ahead(self) -> TokenRun | None:
        """None: what may follow depends on more than a table holds."""
        return None

    def accept(self, token_id: int, logprob: float) -> list[Event]:
        """Take the next token; the events it causes, `TurnDone` last when the answer is over.

        Raises `InvalidArgument`, changing nothing, for a token the mask does not allow.
        """
        if self.is_done or not self._layout.is_allowed(self._phase, token_id):
            where = "a closed answer" if self.is_done else f"phase {self._phase.value!r}"
            raise InvalidArgument(f"token_id: expected an allowed token, got {token_id} in {where}")
        ids = self._layout.ids
        if token_id == ids["content_model_end_sampling"]:
            events = self._end_part()
            self._append(token_id, Stream.CONTROL)
            return [*events, self._close("end")]
        events = self._accept_open(token_id, logprob)
        if len(self.token_ids) < self._max_tokens:
            return events
        return [*events, *self.close_now("budget")]

    def take_unfed(self) -> list[int]:
        """The accepted tokens the model has not been given yet; now they count as given."""
        unfed = self.token_ids[self._num_fed :]
        self._num_fed = len(self.token_ids)
        return unfed

    def cut(self, num_kept: int = 0) -> list[Event]:
        """Keep the first ``num_kept`` tokens and close the answer; without any an empty text
        message stands in its place."""
        kept = self.token_ids[:num_kept]
        self._reset()
        for token_id in kept:
            events = self.accept(token_id, 0.0)
            if self.is_done:
                return events[-1:]
        if not kept:
            for name in ("content_text", "end_message"):
                self._append(self._layout.ids[name], Stream.FORCED)
        return self.close_now("cancelled")[-1:]

    def close_now(self, reason: TurnEnd) -> list[Event]:
        """Close the answer with what it holds."""
        events: list[Event] = []
        if self._phase in (_Phase.TEXT, _Phase.THINKING, _Phase.CALL):
            events += self._end_part()
            self._append(self._layout.ids["end_message"], Stream.FORCED)
        self._append(self._layout.ids["content_model_end_sampling"], Stream.FORCED)
        return [*events, self._close(reason)]

    def _accept_open(self, token_id: int, logprob: float) -> list[Event]:
        ids = self._layout.ids
        if token_id == ids["end_message"]:
            events = self._end_part()
            self._append(token_id, Stream.CONTROL)
            self._phase = _Phase.BETWEEN
            return events
        if token_id == ids["message_model"]:
            self._append(token_id, Stream.CONTROL)
            self._phase, self._header, self._body = _Phase.HEADER, [], []
            return []
        opened = self._layout.opened_by.get(token_id)
        if opened is not None:
            self._append(token_id, Stream.CONTROL)
            self._phase = opened
            return []
        if self._phase == _Phase.HEADER:
            self._append(token_id, Stream.CALL)
            self._header.append(token_id)
            return []
        if self._phase == _Phase.CALL:
            self._append(token_id, Stream.CALL)
            self._body.append(token_id)
            return []
        self._append(token_id, Stream.TEXT)
        text, utf8 = self._layout.codec.feed(self.state.utf8, token_id)
        self.state = replace(self.state, utf8=utf8)
        channel: Literal["text", "thinking"] = (
            "thinking" if self._phase == _Phase.THINKING else "text"
        )
        return [
            TextToken(
                **self._tags(), text=text, token_id=token_id, logprob=logprob, channel=channel
            )
        ]

    def _end_part(self) -> list[Event]:
        # A character that was never finished ends with its message.
        self.state = replace(self.state, utf8=b"")
        if self._phase != _Phase.CALL:
            return []
        raw = self._layout.codec.decode(self._body)
        event, self.state = call_event(self.state, raw, tuple(self._body), self._tags())
        return [event]

    def _append(self, token_id: int, stream: Stream) -> None:
        self.token_ids.append(token_id)
        self.streams.append(stream)

    def _close(self, reason: TurnEnd) -> TurnDone:
        done = TurnDone(**self._tags(), reason=reason, token_ids=tuple(self.token_ids))
        self.state = replace(
            self.state,
            tick=self.state.tick + 1,
            unsent=tuple(self.token_ids[self._num_fed :]),
            has_input=False,
            is_committed=False,
        )
        self._phase = _Phase.DONE
        self.is_done = True
        return done

    def _tags(self) -> Tags:
        tick = self._before.tick
        return {"tick": tick, "t_ms": tick * TICK_MS, "epoch": self._epoch}


class ChatLayout:
    """The chat template for one model; holds no session.

    Raises `CheckpointError` if the tokenizer is missing or lacks a special token of the template.
    """

    name: Final = "inkling chat"
    knows_ticks: Final = False

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        if tokenizer is None:
            raise CheckpointError("tokenizer: expected tokenizer.json in the checkpoint, got none")
        self.config = config
        self.codec = TextCodec(tokenizer, config.text.unpadded_vocab_size)
        found = special_ids(tokenizer, [f"<|{name}|>" for name in _NAMES])
        self.ids = {name: found[f"<|{name}|>"] for name in _NAMES}
        self._audio = None if config.audio is None else AudioCarry(config.audio)
        ids = self.ids
        self.opened_by = {
            ids["content_text"]: _Phase.TEXT,
            ids["content_thinking"]: _Phase.THINKING,
            ids["content_invoke_tool_json"]: _Phase.CALL,
        }
        stop = ids["content_model_end_sampling"]
        body = (True, (ids["end_message"], stop))
        self._allowed: dict[_Phase, tuple[bool, tuple[int, ...]]] = {
            # Text in a header is the name of the tool that is called.
            _Phase.HEADER: (True, (*self.opened_by, stop)),
            _Phase.TEXT: body,
            _Phase.THINKING: body,
            _Phase.CALL: body,
            _Phase.BETWEEN: (False, (ids["message_model"], stop)),
        }
        self.masks = {phase: self._mask(phase) for phase in self._allowed}

    def is_allowed(self, phase: _Phase, token_id: int) -> bool:
        """Whether ``token_id`` may come in ``phase``."""
        if not 0 <= token_id < self.codec.num_ids:
            return False
        has_text, extra = self._allowed[phase]
        return token_id in extra or (has_text and bool(self.codec.is_text[token_id]))

    def initial_state(self) -> ChatState:
        """The state of an empty session."""
        return ChatState(dmel=None if self._audio is None else self._audio.fresh)

    def encode_prefix(
        self,
        system: str | None = None,
        tools: tuple[dict[str, Any], ...] = (),
        effort: float | None = None,
    ) -> tuple[int, ...]:
        """Tools, instructions and the effort line (0 to 0.99, default 0.9)."""
        value = DEFAULT_EFFORT if effort is None else effort
        if not 0.0 <= value <= 0.99:
            raise InvalidArgument(f"effort: expected 0 to 0.99, got {effort}")
        ids: tuple[int, ...] = ()
        encode, special = self.codec.encode, self.ids
        if tools:
            declared = compact_json("tools", list(tools))
            ids += (special["message_system"], *encode("tool_declare"), special["content_xml"])
            ids += (*encode(declared), special["end_message"])
        lines = [] if system is None else [system]
        for line in (*lines, f"Thinking effort level: {value:g}"):
            ids += self._message("message_system", line)
        return ids

    def encode_input(self, chunk: Chunk, state: LayoutState) -> EncodedInput:
        """The chunk as messages, led by what the last answer left unsent: tool results, sound,
        picture, text. Raises as `MicroTurnLayout.encode_input` does; ``state`` stays valid."""
        writer = _Writer(self, _checked(state))
        for item in chunk.items:
            writer.tool_result(item, item.name or writer.state.name_of(item.call_id))
        if chunk.audio is not None:
            writer.audio(chunk.audio)
        if chunk.frames:
            writer.image(chunk.frames)
        if chunk.text:
            writer.text(chunk.text)
        # Without output the tick is over once its input is in.
        has_input = writer.state.has_input or not chunk.is_idle
        return writer.encoded(tick=writer.state.tick + 1, has_input=has_input)

    def encode_commit(self, state: LayoutState) -> EncodedInput:
        """What closes the user's message and asks the model to answer.

        Raises `InvalidArgument` if nothing came since the last answer.
        """
        checked = _checked(state)
        if not checked.has_input:
            raise InvalidArgument("commit: expected input since the last answer, got none")
        writer = _Writer(self, checked)
        writer.close_part()
        writer.tokens(self.ids["message_model"])
        return writer.encoded(is_committed=True)

    def begin_output(
        self, state: LayoutState, epoch: int = 0, max_tokens: int = 512
    ) -> ChatOutput | None:
        """The answer after a commit; None after a chunk, which asks nothing."""
        checked = _checked(state)
        return ChatOutput(self, checked, epoch, max_tokens) if checked.is_committed else None

    def encode_result(self, item: ToolResult, name: str) -> tuple[int, ...]:
        """The message that holds a result of the tool ``name``."""
        ids, encode = self.ids, self.codec.encode
        kind = "content_tool_error" if item.is_error else "content_text"
        head = (ids["message_tool"], *encode(name), ids[kind])
        return (*head, *encode(item.text()), ids["end_message"])

    @property
    def audio_carry(self) -> AudioCarry:
        """The dMel front end; raises `Unsupported` for a text-only model."""
        if self._audio is None:
            raise Unsupported("Chunk.audio: this model has no audio encoder")
        return self._audio

    def _message(self, role: str, text: str) -> tuple[int, ...]:
        ids = self.ids
        return (ids[role], ids["content_text"], *self.codec.encode(text), ids["end_message"])

    def _mask(self, phase: _Phase) -> torch.Tensor:
        has_text, extra = self._allowed[phase]
        is_allowed = self.codec.is_text.copy() if has_text else np.zeros(self.codec.num_ids, bool)
        is_allowed[list(extra)] = True
        return bitmask(is_allowed)


class _Writer:
    """Segments of one turn, with runs of ids joined; knows which message is open."""

    def __init__(self, layout: ChatLayout, state: ChatState) -> None:
        self._layout = layout
        self.state = state
        self._segments: list[Segment | Block] = []
        self._run: list[int] = list(state.unsent)
        self._num_tokens = 0

    def tokens(self, *ids: int) -> None:
        self._run.extend(ids)

    def text(self, text: str) -> None:
        ids = self._layout.ids
        if self.state.open_part != "text":
            self.close_part()
            self.tokens(ids["message_user"], ids["content_text"])
        self.tokens(*self._layout.codec.encode(text))
        self.state = replace(self.state, open_part="text")

    def audio(self, pcm_S: Any) -> None:
        carry, ids = self._layout.audio_carry, self._layout.ids
        if self.state.open_part != "audio":
            self.close_part()
            self.tokens(ids["message_user"], ids["content_audio_input"])
        bins_FM, dmel = carry.push(self.state.dmel, pcm_S)
        self._audio_frames(bins_FM)
        self.state = replace(self.state, open_part="audio", dmel=dmel)

    def image(self, frames: Any) -> None:
        if self._layout.config.vision is None:
            raise Unsupported("Chunk.frames: this model has no picture encoder")
        ids = self._layout.ids
        self.close_part()
        self.tokens(ids["message_user"], ids["content_image"])
        second = frames[1] if len(frames) == 2 else None
        size = self._layout.config.vision.patch_size
        patches = image_patches(frames[0], second, patch_size=size)
        self._segment(Image(patches=patches), len(patches))
        self.tokens(ids["end_message"])

    def tool_result(self, item: ToolResult, name: str) -> None:
        self.close_part()
        self.tokens(*self._layout.encode_result(item, name))

    def close_part(self) -> None:
        ids = self._layout.ids
        if self.state.open_part == "audio":
            # Each recording stands alone: its last hop is filled up and no context is carried on.
            self._audio_frames(self._layout.audio_carry.flush(self.state.dmel))
            self.state = replace(self.state, dmel=self._layout.audio_carry.fresh)
            self.tokens(ids["audio_end"], ids["end_message"])
        elif self.state.open_part == "text":
            self.tokens(ids["end_message"])
        self.state = replace(self.state, open_part="")

    def encoded(self, **changes: Any) -> EncodedInput:
        self._flush()
        after = replace(self.state, unsent=(), **changes)
        return EncodedInput(tuple(self._segments), after, self._num_tokens)

    def _audio_frames(self, bins_FM: torch.Tensor) -> None:
        if len(bins_FM):
            self._segment(Audio(bins=bins_FM), len(bins_FM))

    def _segment(self, segment: Segment, num_tokens: int) -> None:
        self._flush()
        self._segments.append(segment)
        self._num_tokens += num_tokens

    def _flush(self) -> None:
        if self._run:
            self._segments.append(Tokens(tuple(self._run)))
            self._num_tokens += len(self._run)
            self._run = []


def _checked(state: LayoutState) -> ChatState:
    if not isinstance(state, ChatState):
        raise InvalidArgument(f"state: expected ChatState, got {type(state).__name__}")
    return state
