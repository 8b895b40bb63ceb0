"""A task: how it is asked for, and what writes its part of a script."""

from collections.abc import Callable
from dataclasses import dataclass

from tml_core.data.script import Phrasings, ScriptWriter

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """``write`` fills a script; ``weight``: how often it comes, against the others."""

    name: str
    phrasings: Phrasings
    write: Callable[[ScriptWriter], None]
    weight: float = 1.0
