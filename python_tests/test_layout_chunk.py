"""What a turn takes: every bad argument is refused by name; tool declarations from functions."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

from tml_core import errors
from tml_core.layout import Chunk, ToolResult, tool_schema, tool_schemas

PCM = np.zeros(1600, np.float32)
FRAME = np.zeros((4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({}, errors.InvalidArgument, "Chunk: expected audio, frames, text or items, got nothing"),
        ({"text": ""}, errors.InvalidArgument, "Chunk: expected audio, frames, text or items"),
        (
            {"text": "x", "is_idle": True},
            errors.InvalidArgument,
            "is_idle: expected an empty chunk",
        ),
        (
            {"audio": PCM, "sample_rate": 48000},
            errors.InvalidArgument,
            "Chunk.sample_rate: expected 16000, got 48000",
        ),
        (
            {"audio": PCM[:0]},
            errors.InvalidArgument,
            r"Chunk.audio: expected 1 to 3200 samples .* got 0",
        ),
        (
            {"audio": np.zeros(3201, np.float32)},
            errors.InvalidArgument,
            r"Chunk.audio: expected 1 to 3200 samples \(200 ms\), got 3201",
        ),
        (
            {"audio": np.full(8, np.nan, np.float32)},
            errors.InvalidArgument,
            "Chunk.audio: expected finite samples",
        ),
        (
            {"audio": PCM + 1.5},
            errors.InvalidArgument,
            r"Chunk.audio: expected samples in \[-1, 1\]",
        ),
        (
            {"audio": PCM.astype(np.int16)},
            errors.InvalidArgument,
            "Chunk.audio: expected a float32 array .* got dtype int16",
        ),
        ({"audio": [0.0]}, errors.InvalidType, "Chunk.audio: expected a float32 array .* got list"),
        (
            {"frames": [FRAME[:0]]},
            errors.InvalidArgument,
            r"Chunk.frames\[0\]: expected .* got shape \[0, 6, 3\]",
        ),
        (
            {"frames": [FRAME, FRAME[:2]]},
            errors.InvalidArgument,
            "Chunk.frames: expected one shape",
        ),
        (
            {"frames": [FRAME] * 3},
            errors.InvalidArgument,
            "Chunk.frames: expected at most 2 a tick, got 3",
        ),
        ({"frames": FRAME}, errors.InvalidType, "Chunk.frames: expected a list, got ndarray"),
        (
            {"frames": [FRAME.astype(np.float32)]},
            errors.InvalidArgument,
            r"Chunk.frames\[0\]: expected a uint8 array .* got dtype float32",
        ),
        ({"text": b"x"}, errors.InvalidType, "Chunk.text: expected str, got bytes"),
        (
            {"items": ["x"]},
            errors.InvalidType,
            r"Chunk.items\[0\]: expected ToolResult, got str",
        ),
        ({"items": "x"}, errors.InvalidType, "Chunk.items: expected a list, got str"),
    ],
)
def test_chunk_refusals(kwargs: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Chunk(**kwargs)


def test_tool_result_content_is_text_or_json() -> None:
    assert ToolResult("c", "plain").text() == "plain"
    assert ToolResult("c", {"b": 1, "a": ["é"]}).text() == '{"a":["é"],"b":1}'
    with pytest.raises(errors.InvalidArgument, match="content: expected a JSON value"):
        ToolResult("c", object())
    with pytest.raises(errors.InvalidArgument, match="content: expected a JSON value"):
        ToolResult("c", float("nan"))
    with pytest.raises(errors.InvalidType, match="call_id: expected str, got int"):
        ToolResult(3, "x")  # type: ignore[arg-type]


def test_a_function_declares_itself() -> None:
    def search(
        query: str,
        limit: int = 3,
        tags: list[str] | None = None,
        mode: Literal["fast", "deep"] = "fast",
        where: dict[str, float] | None = None,
        anything: list = [],  # type: ignore[type-arg]  # noqa: B006
        exact: bool | None = None,
    ) -> str:
        """Search the notes."""
        return f"{query} {limit} {tags} {mode} {where} {anything} {exact}"

    assert tool_schema(search) == {
        "type": "function",
        "name": "search",
        "description": "Search the notes.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string"},
                "limit": {"type": "integer"},
                "tags": {"type": ["array", "null"], "items": {"type": "string"}},
                "mode": {"type": "string", "enum": ["fast", "deep"]},
                "where": {
                    "type": ["object", "null"],
                    "additionalProperties": {"type": "number"},
                },
                "anything": {"type": "array"},
                "exact": {"type": ["boolean", "null"]},
            },
            "required": ["query"],
        },
    }


def bare(x):  # type: ignore[no-untyped-def]
    return x


def variadic(*args: int) -> None: ...


def positional(x: int, /) -> None: ...


def both(x: int | str) -> None: ...


def keyed(x: dict[int, str]) -> None: ...


def foreign(x: np.ndarray) -> None: ...


def mixed(x: Literal[1, "a"]) -> None: ...


def unknown(x: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (bare, "bare: parameter 'x': expected a type annotation"),
        (variadic, "variadic: parameter 'args': expected a named parameter"),
        (positional, "positional: parameter 'x': expected one that can be given by name"),
        (both, "both: parameter 'x': expected str, int"),
        (keyed, r"keyed: parameter 'x': expected dict\[str, ...\]"),
        (foreign, "foreign: parameter 'x': expected str, int"),
        (mixed, "mixed: parameter 'x': expected Literal of one plain type"),
        (unknown, "unknown: annotations cannot be resolved"),
        (lambda x: x, "tool: expected a named function"),
        (functools.partial(both, 1), "tool: expected a named function"),
    ],
)
def test_other_functions_are_refused(tool: Callable[..., Any], message: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=message):
        tool_schema(tool)


def test_ready_declarations() -> None:
    plain = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert tool_schema(plain) == {"type": "function", **plain}
    assert tool_schema({"type": "function", "function": plain}) == {"type": "function", **plain}
    with pytest.raises(errors.InvalidArgument, match="tool 'f': unknown key 'colour'"):
        tool_schema({**plain, "colour": 1})
    with pytest.raises(errors.InvalidArgument, match="expected a declaration with a name"):
        tool_schema({"description": "d"})
    with pytest.raises(errors.InvalidType, match="tool 'f': parameters: expected a JSON schema"):
        tool_schema({"name": "f", "parameters": 3})
    with pytest.raises(errors.InvalidType, match="tool: expected a function or a mapping"):
        tool_schema(3)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match="tools: expected distinct names, got 'f'"):
        tool_schemas([plain, plain])
    with pytest.raises(errors.InvalidType, match="tools: expected a list"):
        tool_schemas(plain)
