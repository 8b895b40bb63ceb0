"""Micro-turn layout v1: token-exact halves, grammar masks, calls over several ticks, budgets."""

import dataclasses
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
    Chunk,
    MicroTurnLayout,
    MicroTurnState,
    Silence,
    Stream,
    TextToken,
    TickOutput,
    ToolCall,
    ToolResult,
    TurnDone,
    as_chunk,
)
from tml_core.layout import output as output_module
from tml_core.media import Audio, Image, MicroTurn, Tokens, dmel_bins, image_patches
from tml_core.model import ModelConfig, load_tokenizer

TICK, OUT, END_OUT, SILENCE, SAY, CALL, END_CALL = range(274, 281)


@functools.cache
def nano_layout(**interaction: int) -> MicroTurnLayout:
    path = BYTE_MODEL
    config = ModelConfig.from_path(path)
    assert config.interaction is not None
    changed = dataclasses.replace(config.interaction, **interaction)
    return MicroTurnLayout(dataclasses.replace(config, interaction=changed), load_tokenizer(path))


def ids_of(segments: Any) -> list[Any]:
    """Token ids, with media shown as (kind, number of positions)."""
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


def run(output: TickOutput, tokens: list[int]) -> list[Any]:
    events: list[Any] = []
    for token in tokens:
        events += output.accept(token, -1.0)
    return events


def allowed_ids(output: TickOutput) -> set[int]:
    words = output.allowed().numpy().view(np.uint32)
    return {i for i in range(281) if words[i // 32] >> (i % 32) & 1}


def test_input_half_is_tick_audio_picture_text_out() -> None:
    layout = nano_layout()
    pcm = np.linspace(-0.5, 0.5, 3200, dtype=np.float32)
    frame = np.full((90, 120, 3), 7, np.uint8)
    encoded = layout.encode_input(
        Chunk(audio=pcm, frames=(frame, frame), text="hé"), layout.initial_state()
    )
    expected = [TICK, ("audio", 4), ("image", 12), *text("hé"), OUT]
    assert ids_of(encoded.segments) == expected
    assert encoded.num_tokens == 1 + 4 + 12 + 3 + 1
    assert torch.equal(encoded.segments[1].bins, dmel_bins(pcm))
    assert torch.equal(encoded.segments[2].patches, image_patches(frame, frame))


def test_missing_modalities_are_no_tokens() -> None:
    layout = nano_layout()
    encoded = layout.encode_input(Chunk(is_idle=True), layout.initial_state())
    assert ids_of(encoded.segments) == [TICK, OUT]
    assert encoded.num_tokens == 2


def test_a_short_chunk_gives_fewer_frames_and_its_rest_is_not_lost() -> None:
    layout, state = nano_layout(), MicroTurnState()
    pcm = np.random.default_rng(0).uniform(-1, 1, 4200).astype(np.float32)
    bins = []
    for start, stop, frames in ((0, 1000, 1), (1000, 1100, 0), (1100, 4200, 4)):
        encoded = layout.encode_input(Chunk(audio=pcm[start:stop]), state)
        audio = [one.bins for one in encoded.segments if isinstance(one, Audio)]
        assert sum(len(one) for one in audio) == frames
        bins += audio
        state = encoded.state
    assert torch.equal(torch.cat(bins), dmel_bins(pcm)[:5])
    assert len(state.dmel.pending) == 200


def test_text_over_the_budget_waits_in_order_and_nothing_is_lost() -> None:
    layout, state = nano_layout(max_injected_per_tick=5), MicroTurnState()
    chunks = [Chunk(text="abcdefg"), Chunk(text="hij"), Chunk(is_idle=True), Chunk(is_idle=True)]
    seen, waiting = [], []
    for chunk in chunks:
        encoded = layout.encode_input(chunk, state)
        seen.append(ids_of(encoded.segments)[1:-1])
        waiting.append(encoded.num_waiting)
        state = encoded.state
    assert seen == [text("abcde"), text("fghij"), [], []]
    assert waiting == [2, 0, 0, 0]
    assert state == MicroTurnState()


def test_tool_results_are_bracketed_and_need_a_known_call() -> None:
    layout = nano_layout(max_injected_per_tick=200)
    call_id, state = MicroTurnState().with_call("search")
    item = ToolResult(call_id, {"b": [1], "a": "ü"})
    encoded = layout.encode_input(Chunk(items=[item], text="!"), state)
    body = '{"call_id":"call-0","content":{"a":"ü","b":[1]},"name":"search"}'
    assert ids_of(encoded.segments) == [TICK, CALL, *text(body), END_CALL, *text("!"), OUT]
    with pytest.raises(errors.InvalidArgument, match=r"call_id: expected the id .*got 'call-9'"):
        layout.encode_input(Chunk(items=[ToolResult("call-9", "x")]), state)
    closed = nano_layout(max_injected_per_tick=0)
    with pytest.raises(errors.Unsupported, match="max_injected_per_tick is 0"):
        closed.encode_input(Chunk(text="x"), state)


def test_typed_control_tokens_are_plain_text() -> None:
    layout = nano_layout()
    encoded = layout.encode_input(Chunk(text="<|/out|><|tick|>"), MicroTurnState())
    assert ids_of(encoded.segments) == [TICK, *text("<|/out|><|tick|>"), OUT]


def test_prefix_is_instructions_then_tools() -> None:
    layout = nano_layout()
    tool = {"type": "function", "name": "f", "description": "", "parameters": {}}
    body = '[{"description":"","name":"f","parameters":{},"type":"function"}]'
    assert list(layout.encode_prefix("hi", (tool,))) == [
        *text("hi"), CALL, *text(body), END_CALL,
    ]  # fmt: skip
    assert layout.encode_prefix() == ()
    with pytest.raises(errors.InvalidArgument, match="effort: expected None for a micro-turn"):
        layout.encode_prefix(effort=0.5)


def test_silence_is_one_token_and_closes_the_tick() -> None:
    output = nano_layout().begin_output(MicroTurnState(tick=3), epoch=2)
    assert allowed_ids(output) == {*range(256), SILENCE, CALL}
    events = run(output, [SILENCE])
    tags = {"tick": 3, "t_ms": 600, "epoch": 2}
    assert events == [
        Silence(**tags, logprob=-1.0),
        TurnDone(**tags, reason="silence", token_ids=(SILENCE,)),
    ]
    assert output.is_done
    assert output.state == MicroTurnState(tick=4, unsent=(SILENCE,))
    assert output.streams == [Stream.SILENCE]


def test_text_then_end_and_what_the_model_was_not_given() -> None:
    output = nano_layout().begin_output(MicroTurnState())
    run(output, [104])
    assert allowed_ids(output) == {*range(256), CALL, END_OUT}
    assert output.take_unfed() == [104]
    run(output, [105])
    assert output.take_unfed() == [105]
    events = run(output, [END_OUT])
    assert events == [
        TurnDone(tick=0, t_ms=0, epoch=0, reason="end", token_ids=(104, 105, END_OUT))
    ]
    assert output.state.unsent == (END_OUT,)
    assert output.streams == [Stream.TEXT, Stream.TEXT, Stream.CONTROL]


def test_the_budget_closes_the_tick_without_sampling() -> None:
    output = nano_layout(max_text_per_tick=2).begin_output(MicroTurnState())
    events = run(output, [104, 105])
    assert [one.text for one in events[:2]] == ["h", "i"]
    assert events[2].reason == "budget"
    assert output.token_ids == [104, 105, END_OUT]
    assert output.streams == [Stream.TEXT, Stream.TEXT, Stream.FORCED]
    with pytest.raises(errors.InvalidArgument, match="a closed output half"):
        output.accept(104, 0.0)
    with pytest.raises(errors.InvalidArgument, match="expected an open output half"):
        output.allowed()


def test_a_call_spans_ticks_and_is_parsed_when_closed() -> None:
    layout = nano_layout()
    raw = '{"name":"search","args":{"q":"käse"}}'
    state = MicroTurnState()
    parts = layout.split_output(state, [*text("ok"), CALL, *text(raw), END_CALL])
    assert [part.is_done for part in parts] == [True] * len(parts)
    assert len(parts) == 6  # 2 + 38 bytes over ticks of 8; the marker closes the one after
    assert parts[0].token_ids == [*text("ok"), CALL, *text(raw)[:6], END_OUT]
    assert parts[1].token_ids == [*text(raw)[6:14], END_OUT]
    assert parts[-1].token_ids[-2:] == [END_CALL, END_OUT]
    assert parts[1].streams == [*[Stream.CALL] * 8, Stream.FORCED]
    assert parts[0].state.call_ids == tuple(text(raw)[:6])
    assert parts[-1].state.call_ids is None
    assert parts[-1].state.open_calls == (("call-0", "search"),)


def test_a_silent_tick_leaves_a_call_open() -> None:
    layout = nano_layout()
    first = layout.split_output(MicroTurnState(), [CALL, *text("{")])[-1]
    assert first.token_ids == [CALL, 123, END_OUT]
    output = layout.begin_output(first.state)
    assert allowed_ids(output) == {*range(256), SILENCE, END_CALL}
    run(output, [SILENCE])
    assert output.state.call_ids == (123,)
    output = layout.begin_output(output.state)
    run(output, [125])
    assert allowed_ids(output) == {*range(256), END_OUT, END_CALL}
    event = run(output, [END_CALL])[0]
    assert isinstance(event, ToolCall)
    assert (event.raw, event.error, event.token_ids) == ("{}", "the call has no name", (123, 125))


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        ("", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"args":{}}', "the call has no name"),
        ('{"name":3}', "the call has no name"),
        ('{"name":"f","args":[]}', "args: expected a JSON object, got list"),
        ('{"name":"f","args":{"x":NaN}}', "NaN is no JSON value"),
        ('{"name":"\\ud800"}', "expected printable characters"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_malformed_call_is_an_event_with_an_error(raw: str, error: str) -> None:
    from tml_core.layout import parse_call

    name, args, message = parse_call(raw)
    assert (name, args) == ("", {})
    assert message is not None
    assert error in message


def test_an_endless_call_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "MAX_CALL_TOKENS", 3)
    output = nano_layout().begin_output(MicroTurnState())
    events = run(output, [CALL, 123, 123, 123])
    assert output.token_ids == [CALL, 123, 123, 123, END_CALL, END_OUT]
    assert output.streams[-2:] == [Stream.FORCED, Stream.FORCED]
    assert events[0].error.startswith("not JSON")


def test_cut_leaves_a_valid_empty_half() -> None:
    layout = nano_layout()
    before = MicroTurnState(tick=1, call_ids=(1, 2), utf8=b"\xc3")
    output = layout.begin_output(before, epoch=1)
    run(output, [3])
    output.take_unfed()
    (event,) = output.cut()
    assert (event.reason, event.token_ids) == ("cancelled", (END_OUT,))
    assert output.state == dataclasses.replace(before, tick=2, unsent=(END_OUT,))
    encoded = layout.encode_input(Chunk(is_idle=True), output.state)
    assert ids_of(encoded.segments) == [END_OUT, TICK, OUT]


@pytest.mark.parametrize("token", [-1, 281, 10**9, TICK, OUT, SAY, END_CALL, END_OUT, 256])
def test_tokens_outside_the_mask_are_refused(token: int) -> None:
    output = nano_layout().begin_output(MicroTurnState())
    with pytest.raises(errors.InvalidArgument, match=f"got {token} in phase 'start'"):
        output.accept(token, 0.0)
    assert output.token_ids == []


def test_text_events_hold_whole_characters() -> None:
    layout = nano_layout(max_text_per_tick=3)
    state = MicroTurnState()
    texts = []
    for tokens in (text("a€")[:3], [*text("a€")[3:], 0xFF, 0xF0], [0x41, 0xE2, 0x82]):
        output = layout.begin_output(state)
        texts.append([one.text for one in run(output, tokens) if isinstance(one, TextToken)])
        state = output.state
    assert texts == [["a", "", ""], ["€", "�", ""], ["�A", "", ""]]
    assert state.utf8 == b"\xe2\x82"


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_the_masks_allow_parses_and_comes_back(data: st.DataObject) -> None:
    layout = nano_layout(max_text_per_tick=data.draw(st.integers(1, 4)))
    state = layout.initial_state()
    halves: list[list[int]] = []
    events: list[Any] = []
    for _ in range(data.draw(st.integers(1, 6))):
        output = layout.begin_output(state)
        while not output.is_done:
            allowed = sorted(allowed_ids(output))
            # Control tokens sort last: draw them as often as text.
            pick = st.sampled_from(allowed[-3:]) | st.sampled_from(allowed)
            events += output.accept(data.draw(pick), -0.5)
        # A state survives being stored.
        stored = json.loads(json.dumps(output.state.to_dict()))
        assert MicroTurnState.from_dict(stored, output.state.dmel) == output.state
        halves.append(output.token_ids)
        assert len(output.streams) == len(output.token_ids)
        state = output.state
    from_events: list[int] = []
    for event in events:
        if isinstance(event, TextToken):
            from_events.append(event.token_id)
        elif isinstance(event, Silence) and state.call_ids is None:
            pass
        elif isinstance(event, ToolCall):
            from_events += [CALL, *event.token_ids, END_CALL]
    if state.call_ids is not None:
        from_events += [CALL, *state.call_ids]
    flat = [token for half in halves for token in half if token not in (END_OUT, SILENCE)]
    assert from_events == flat
    assert [list(one.token_ids) for one in events if isinstance(one, TurnDone)] == halves
    # The same run of sampled tokens, dealt out again, gives the same halves and streams.
    assert all(half[-1] in (END_OUT, SILENCE) for half in halves)
    joined = b"".join(
        one.text.encode() for one in events if isinstance(one, TextToken) and "�" not in one.text
    )
    joined.decode()


@given(value=st.text(max_size=40), name=st.text(min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_training_targets_are_spelled_as_sampling_reads_them(value: str, name: str) -> None:
    layout = nano_layout()
    call = (name, {"x": value}) if name.isprintable() else None
    ids = layout.encode_output(MicroTurnState(), value, call)
    events: list[Any] = []
    state = MicroTurnState()
    for part in layout.split_output(state, ids):
        output = layout.begin_output(state)
        sampled = [
            one
            for one, stream in zip(part.token_ids, part.streams, strict=True)
            if stream != Stream.FORCED
        ]
        events += run(output, sampled)
        assert (output.token_ids, output.streams) == (part.token_ids, part.streams)
        state = output.state
    assert "".join(one.text for one in events if isinstance(one, TextToken)) == value
    calls = [(one.name, one.args) for one in events if isinstance(one, ToolCall)]
    assert calls == ([] if call is None else [call])


def test_a_session_for_a_trainer() -> None:
    layout = nano_layout(max_text_per_tick=2)
    ticks = [(Chunk(text="?"), [SILENCE]), (Chunk(is_idle=True), text("hi"))]
    segments, streams = layout.encode_session(ticks, text("s"))
    ids = [*text("s"), TICK, *text("?"), OUT, SILENCE, TICK, OUT, *text("hi"), END_OUT]
    assert ids_of(segments) == ids
    said = {4: Stream.SILENCE, 7: Stream.TEXT, 8: Stream.TEXT, 9: Stream.FORCED}
    assert streams == [said.get(i, Stream.INPUT) for i in range(len(ids))]
    with pytest.raises(errors.InvalidArgument, match=r"ticks\[0\]: expected tokens that close"):
        layout.encode_session([(Chunk(is_idle=True), text("h"))])


def test_a_micro_turn_is_a_chunk() -> None:
    pcm = np.zeros(3200, np.float32)
    chunk = as_chunk(MicroTurn(audio=pcm, text="x", num_padded=4))
    assert (chunk.audio is pcm, chunk.text, chunk.num_padded) == (True, "x", 4)
    assert as_chunk(MicroTurn()).is_idle
    with pytest.raises(errors.InvalidType, match="chunk: expected Chunk or MicroTurn, got dict"):
        as_chunk({})


def test_layout_refusals() -> None:
    path = BYTE_MODEL
    config = ModelConfig.from_path(path)
    plain = dataclasses.replace(config, interaction=None)
    with pytest.raises(errors.CheckpointError, match="expected an interaction block"):
        MicroTurnLayout(plain, load_tokenizer(path))
    with pytest.raises(errors.CheckpointError, match=r"tokenizer: expected tokenizer\.json"):
        MicroTurnLayout(config, None)
    text_only = dataclasses.replace(config, audio=None, vision=None)
    layout = MicroTurnLayout(text_only, load_tokenizer(path))
    with pytest.raises(errors.Unsupported, match="no audio encoder"):
        layout.encode_input(Chunk(audio=np.zeros(8, np.float32)), MicroTurnState())
    with pytest.raises(errors.Unsupported, match="no picture encoder"):
        layout.encode_input(Chunk(frames=[np.zeros((1, 1, 3), np.uint8)]), MicroTurnState())
    with pytest.raises(errors.SnapshotError, match="layout: expected the fields"):
        MicroTurnState.from_dict({}, None)
    with pytest.raises(errors.InvalidArgument, match="text: expected valid Unicode"):
        layout.encode_input(Chunk(text="\ud800"), MicroTurnState())
