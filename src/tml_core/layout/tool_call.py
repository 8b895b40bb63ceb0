"""Tool calls as the model writes them, and tools as it is told about them."""

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Union

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.layout.chunk import compact_json
from tml_core.layout.events import Tags, ToolCall
from tml_core.layout.state import LayoutState

__all__ = ["call_event", "parse_call", "tool_schema", "tool_schemas"]

StateT = TypeVar("StateT", bound=LayoutState)

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def parse_call(raw: str) -> tuple[str, dict[str, Any], str | None]:
    """(name, args, error) of ``{"name": ..., "args": {...}}``; never raises.

    ``error`` is None for a call, else it says what is wrong and the others are empty.
    """
    try:
        value = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return "", {}, f"not JSON: {error}"
    if not isinstance(value, dict):
        return "", {}, f"expected a JSON object, got {type(value).__name__}"
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return "", {}, "the call has no name"
    if not name.isprintable():
        return "", {}, f"name: expected printable characters, got {name!r}"
    args = value.get("args", {})
    if not isinstance(args, dict):
        return "", {}, f"args: expected a JSON object, got {type(args).__name__}"
    return name, args, None


def call_event(
    state: StateT, raw: str, token_ids: tuple[int, ...], tags: Tags
) -> tuple[ToolCall, StateT]:
    """The event of a call that was closed, and the state that knows its id."""
    name, args, error = parse_call(raw)
    call_id, state = state.with_call(name)
    event = ToolCall(
        **tags,
        name=name,
        args=args,
        call_id=call_id,
        raw=raw,
        error=error,
        token_ids=token_ids,
    )
    return event, state


def tool_schemas(tools: object) -> tuple[dict[str, Any], ...]:
    """The declarations of ``tools``, in order. Raises for what is no tool or declared twice."""
    if not isinstance(tools, (list, tuple)):
        raise InvalidType(f"tools: expected a list, got {type(tools).__name__}")
    schemas = tuple(tool_schema(tool) for tool in tools)
    names = [schema["name"] for schema in schemas]
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgument(f"tools: expected distinct names, got {name!r} twice")
    return schemas


def tool_schema(tool: Callable[..., object] | Mapping[str, Any]) -> dict[str, Any]:
    """How the model is told about a tool: name, description, JSON schema of its parameters.

    ``tool``: a function whose parameters are annotated with str, int, float, bool, list[...],
    dict[str, ...], Literal[...], or one of these or None; or a ready declaration, a mapping with
    ``name``, ``description`` and ``parameters`` (an OpenAI-style ``{"type", "function"}`` wrapper
    is opened). A plain ``list`` or ``dict`` may hold anything.

    Raises InvalidType or InvalidArgument naming the parameter for anything else.
    """
    if isinstance(tool, Mapping):
        return _from_mapping(tool)
    if not callable(tool):
        raise InvalidType(f"tool: expected a function or a mapping, got {type(tool).__name__}")
    name = getattr(tool, "__name__", "")
    if not name.isidentifier():
        raise InvalidArgument(f"tool: expected a named function, got {tool!r}")
    try:
        hints = typing.get_type_hints(tool)
    except (NameError, TypeError) as error:
        raise InvalidArgument(f"{name}: annotations cannot be resolved: {error}") from error
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in inspect.signature(tool).parameters.values():
        where = f"{name}: parameter {parameter.name!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InvalidArgument(f"{where}: expected a named parameter, got *args or **kwargs")
        if parameter.kind == parameter.POSITIONAL_ONLY:
            raise InvalidArgument(f"{where}: expected one that can be given by name")
        if parameter.name not in hints:
            raise InvalidArgument(f"{where}: expected a type annotation, got none")
        properties[parameter.name] = _schema(hints[parameter.name], where)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "name": name,
        "description": inspect.getdoc(tool) or "",
        "parameters": parameters,
    }


def _no_constant(name: str) -> float:
    # Python's reader takes NaN and Infinity, JSON has none.
    raise ValueError(f"{name} is no JSON value")


def _from_mapping(tool: Mapping[str, Any]) -> dict[str, Any]:
    inner = tool.get("function", tool)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise InvalidArgument(f"tool: expected a declaration with a name, got keys {sorted(tool)}")
    unknown = set(inner) - {"type", "name", "description", "parameters", "strict"}
    if unknown:
        raise InvalidArgument(f"tool {inner['name']!r}: unknown key {sorted(unknown)[0]!r}")
    parameters = inner.get("parameters", {"type": "object", "properties": {}})
    if not isinstance(parameters, Mapping):
        raise InvalidType(
            f"tool {inner['name']!r}: parameters: expected a JSON schema, "
            f"got {type(parameters).__name__}"
        )
    schema = {
        "type": "function",
        "name": inner["name"],
        "description": str(inner.get("description", "")),
        "parameters": dict(parameters),
    }
    compact_json(f"tool {inner['name']!r}", schema)
    return schema


def _schema(hint: Any, where: str) -> dict[str, Any]:
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is list or origin is list:
        return {"type": "array", **({"items": _schema(args[0], where)} if args else {})}
    if hint is dict or origin is dict:
        if args and args[0] is not str:
            raise InvalidArgument(f"{where}: expected dict[str, ...], got {hint}")
        extra = {"additionalProperties": _schema(args[1], where)} if args else {}
        return {"type": "object", **extra}
    if origin is Literal:
        kinds = {type(value) for value in args}
        if len(kinds) != 1 or next(iter(kinds)) not in _PLAIN:
            raise InvalidArgument(f"{where}: expected Literal of one plain type, got {hint}")
        return {"type": _PLAIN[next(iter(kinds))], "enum": list(args)}
    if origin in (Union, types.UnionType):
        inner = [arg for arg in args if arg is not types.NoneType]
        if len(inner) == 1 and len(args) == 2:
            schema = _schema(inner[0], where)
            null = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
            return {**schema, "type": [schema["type"], "null"], **null}
    raise InvalidArgument(
        f"{where}: expected str, int, float, bool, list, dict, Literal or one of these or None, "
        f"got {hint}"
    )
