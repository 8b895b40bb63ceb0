"""The chat template: token ids against hand-written sequences, streaming, answers into events."""

import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_model import BYTE_MODEL
from tml_core import errors
from tml_core.layout import (
    ChatLayout,
    ChatOutput,
    ChatState,
    Chunk,
    Stream,
    TextToken,
    ToolCall,
    ToolResult,
    tool_schema,
)
from tml_core.media import Audio, Image, Tokens, dmel_bins
from tml_core.model import ModelConfig, load_tokenizer

USER, MODEL, SYSTEM, TOOL = 257, 258, 259, 260
TEXT, IMAGE, AUDIO, AUDIO_END, THINKING, XML, CALL = range(261, 268)
TOOL_ERROR, END, STOP = 269, 270, 271


@functools.cache
def chat() -> ChatLayout:
    path = BYTE_MODEL
    return ChatLayout(ModelConfig.from_path(path), load_tokenizer(path))


def ids_of(segments: Any) -> list[Any]:
    out: list[Any] = []
    for segment in segments:
        if isinstance(segment, Tokens):
            out.extend(int(one) for one in segment.ids)
        elif isinstance(segment, Audio):
            out.append(("audio", len(segment.bins)))
        elif isinstance(segment, Image):
            out.append(("image", len(segment.patches)))
    return out


def text(value: str) -> list[int]:
    return list(value.encode())


def stream(chunks: list[Chunk], state: ChatState | None = None) -> tuple[list[Any], ChatState]:
    layout = chat()
    state = layout.initial_state() if state is None else state
    out: list[Any] = []
    for chunk in chunks:
        encoded = layout.encode_input(chunk, state)
        out += ids_of(encoded.segments)
        assert layout.begin_output(encoded.state) is None
        state = encoded.state
    encoded = layout.encode_commit(state)
    return out + ids_of(encoded.segments), encoded.state


def answer(tokens: list[int], max_tokens: int = 512) -> tuple[ChatOutput, list[Any]]:
    _, state = stream([Chunk(text="q")])
    output = chat().begin_output(state, max_tokens=max_tokens)
    assert output is not None
    events: list[Any] = []
    for token in tokens:
        events += output.accept(token, -1.0)
    return output, events


def test_prefix_is_tools_instructions_effort() -> None:
    def f(city: str) -> None:
        """Get weather."""

    body = (
        '[{"description":"Get weather.","name":"f","parameters":{"properties":'
        '{"city":{"type":"string"}},"required":["city"],"type":"object"},"type":"function"}]'
    )
    assert list(chat().encode_prefix("sys", (tool_schema(f),))) == [
        SYSTEM, *text("tool_declare"), XML, *text(body), END,
        SYSTEM, TEXT, *text("sys"), END,
        SYSTEM, TEXT, *text("Thinking effort level: 0.9"), END,
    ]  # fmt: skip
    assert list(chat().encode_prefix(effort=0.0)) == [
        SYSTEM, TEXT, *text("Thinking effort level: 0"), END,
    ]  # fmt: skip
    with pytest.raises(errors.InvalidArgument, match=r"effort: expected 0 to 0\.99, got 1"):
        chat().encode_prefix(effort=1.0)


def test_text_streams_into_one_message() -> None:
    ids, state = stream([Chunk(text="Hel"), Chunk(text="lo")])
    assert ids == [USER, TEXT, *text("Hello"), END, MODEL]
    assert state.is_committed


def test_sound_streams_into_one_message_and_pictures_stand_alone() -> None:
    pcm = np.linspace(-1, 1, 2000, dtype=np.float32)
    frame = np.zeros((40, 40, 3), np.uint8)
    ids, _ = stream(
        [Chunk(audio=pcm[:1000]), Chunk(audio=pcm[1000:]), Chunk(frames=[frame]), Chunk(text="?")]
    )
    # 2000 samples are 2.5 hops: the last one is filled up when the message is closed.
    assert ids == [
        USER, AUDIO, ("audio", 1), ("audio", 1), ("audio", 1), AUDIO_END, END,
        USER, IMAGE, ("image", 2), END,
        USER, TEXT, *text("?"), END,
        MODEL,
    ]  # fmt: skip


def test_each_recording_stands_alone() -> None:
    layout, state = chat(), chat().initial_state()
    pcm = np.random.default_rng(1).uniform(-1, 1, 1300).astype(np.float32)
    bins = []
    for chunk in (Chunk(audio=pcm), Chunk(text="x"), Chunk(audio=pcm), Chunk(text="y")):
        encoded = layout.encode_input(chunk, state)
        bins += [one.bins for one in encoded.segments if isinstance(one, Audio)]
        state = encoded.state
    assert torch.equal(torch.cat(bins[:2]), dmel_bins(pcm))
    assert torch.equal(torch.cat(bins[2:]), dmel_bins(pcm))


def test_answer_thinking_text_and_call() -> None:
    body = '{"name":"look","args":{"n":1}}'
    tokens = [
        THINKING, *text("hm"), END, MODEL,
        TEXT, *text("Ä!"), END, MODEL,
        *text("look"), CALL, *text(body), END, STOP,
    ]  # fmt: skip
    output, events = answer(tokens)
    shown = [(one.text, one.channel) for one in events if isinstance(one, TextToken)]
    assert shown == [
        ("h", "thinking"), ("m", "thinking"), ("", "text"), ("Ä", "text"), ("!", "text"),
    ]  # fmt: skip
    (call,) = [one for one in events if isinstance(one, ToolCall)]
    assert (call.name, call.args, call.call_id, call.error) == ("look", {"n": 1}, "call-0", None)
    assert events[-1].reason == "end"
    assert output.token_ids == tokens
    assert output.state.unsent == tuple(tokens)
    assert output.streams[0] == Stream.CONTROL
    assert output.streams[tokens.index(CALL) - 1] == Stream.CALL
    result, _ = stream([Chunk(items=[ToolResult("call-0", "ok")])], output.state)
    assert result == [*tokens, TOOL, *text("look"), TEXT, *text("ok"), END, MODEL]
    failed, _ = stream([Chunk(items=[ToolResult("call-0", "no", is_error=True)])], output.state)
    assert failed[len(tokens) :] == [TOOL, *text("look"), TOOL_ERROR, *text("no"), END, MODEL]


def test_a_part_may_end_with_the_answer() -> None:
    output, events = answer([*text("f"), CALL, *text("{"), STOP])
    assert events[0].error is not None
    assert output.is_done
    output, events = answer([STOP])
    assert [one.reason for one in events] == ["end"]


def test_a_long_answer_is_closed_without_sampling() -> None:
    output, events = answer([TEXT, 65, 66], max_tokens=3)
    assert output.token_ids == [TEXT, 65, 66, END, STOP]
    assert output.streams[-2:] == [Stream.FORCED, Stream.FORCED]
    assert events[-1].reason == "budget"
    output, _ = answer([TEXT, 65, END], max_tokens=3)
    assert output.token_ids == [TEXT, 65, END, STOP]


def test_masks_follow_the_template() -> None:
    output, _ = answer([])

    def allowed() -> set[int]:
        words = output.allowed().numpy().view(np.uint32)
        return {i for i in range(281) if words[i // 32] >> (i % 32) & 1}

    assert allowed() == {*range(256), TEXT, THINKING, CALL, STOP}
    output.accept(TEXT, 0.0)
    assert allowed() == {*range(256), END, STOP}
    output.accept(END, 0.0)
    assert allowed() == {MODEL, STOP}
    with pytest.raises(errors.InvalidArgument, match="got 65 in phase 'between'"):
        output.accept(65, 0.0)


def test_cut_leaves_an_empty_answer() -> None:
    output, _ = answer([TEXT, 65])
    (event,) = output.cut()
    assert (event.reason, event.token_ids) == ("cancelled", (TEXT, END, STOP))
    assert not output.state.is_committed


def test_commit_needs_input() -> None:
    with pytest.raises(errors.InvalidArgument, match="commit: expected input since the last"):
        chat().encode_commit(chat().initial_state())


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_the_masks_allow_ends_and_comes_back(data: st.DataObject) -> None:
    _, state = stream([Chunk(text="q")])
    output = chat().begin_output(state, max_tokens=data.draw(st.integers(1, 12)))
    assert output is not None
    while not output.is_done:
        words = output.allowed().numpy().view(np.uint32)
        allowed = [i for i in range(281) if words[i // 32] >> (i % 32) & 1]
        pick = st.sampled_from(allowed[-3:]) | st.sampled_from(allowed)
        output.accept(data.draw(pick), -0.5)
    assert output.token_ids[-1] == STOP
    stored = json.loads(json.dumps(output.state.to_dict()))
    assert ChatState.from_dict(stored, output.state.dmel) == output.state
    again = chat().begin_output(state, max_tokens=10**6)
    assert again is not None
    for token in output.token_ids:
        again.accept(token, -0.5)
    assert again.token_ids == output.token_ids
