"""What a background job reports, in order; the last update of every job is one of three.

A backend yields `Progress`, `Partial` and one `Final`; the runner adds the rest. No exception of a
backend or a tool gets past these: it becomes `Failed`, or a `ToolOutput` with ``is_error``.
"""

from dataclasses import dataclass
from typing import Any

__all__ = [
    "Cancelled",
    "Failed",
    "Final",
    "Outcome",
    "Partial",
    "Progress",
    "ToolCall",
    "ToolOutput",
    "Update",
]


@dataclass(frozen=True)
class Progress:
    """Something worth showing while the job goes on; for people, never part of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """The background model calls a tool. ``arguments``: JSON as the model wrote it."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolOutput:
    """What a tool gave back, cut to the runner's cap; ``num_bytes`` is its size before that.

    ``is_error``: the tool raised, hung, does not exist or was called with wrong arguments; then
    ``content`` says so in words for the model.
    """

    call_id: str
    name: str
    content: str
    is_error: bool = False
    num_bytes: int = 0


@dataclass(frozen=True)
class Partial:
    """A further piece of the answer, as it is written."""

    text: str


@dataclass(frozen=True)
class Final:
    """The answer. ``media``: pictures or sound that belong to it, as the backend made them."""

    text: str
    media: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The job ended without an answer; ``reason`` says why in one line."""

    reason: str


@dataclass(frozen=True)
class Cancelled:
    """The job was stopped; ``reason`` says by what."""

    reason: str


Outcome = Final | Failed | Cancelled
Update = Progress | ToolCall | ToolOutput | Partial | Outcome
