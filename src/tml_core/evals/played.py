"""What a player did with an item: what it wrote in each tick, in words, and what it called."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from tml_core.media.micro_turns import TICK_MS

__all__ = [
    "PAUSE_TICKS",
    "Call",
    "Played",
    "Word",
    "as_number",
    "heard_s",
    "normal_words",
    "utterances",
]

PAUSE_TICKS: Final = 3  # words with more silent ticks between them are two utterances
_NUMBERS: Final = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)


def heard_s(tick: int) -> float:
    """When the output of ``tick`` comes, in seconds of the media clock: its input has been heard
    then. Computing is taken to take no time; `tml-core load` measures how much it does."""
    return (tick + 1) * TICK_MS / 1000


def normal_words(text: str) -> list[str]:
    """Words as they are compared: no case, no punctuation but ``%`` and apostrophes."""
    words = (re.sub(r"[^\w%']", "", one) for one in text.casefold().split())
    return [one for one in words if one]


def as_number(word: str) -> int | None:
    """The number a word says, in digits or letters up to twenty; None if it says none."""
    if word.isascii() and word.isdigit():
        return int(word)
    return _NUMBERS.index(word) if word in _NUMBERS else None


@dataclass(frozen=True)
class Call:
    """A tool call that was closed in ``tick``; malformed ones are none."""

    tick: int
    name: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class Word:
    """A normal word, and the ticks its first and last characters were written in."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Played:
    """``texts``: what was written in each tick, "" where it was silent. ``calls`` in order.
    ``result_ticks``: when each of the script's tool results was handed over, None if it never was:
    one that answers a call goes in when its time has come and the call has been made."""

    texts: tuple[str, ...]
    calls: tuple[Call, ...] = ()
    result_ticks: tuple[int | None, ...] = field(default=())

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """All that was written; a silent tick ends a word, as a space does."""
        words: list[Word] = []
        letters, start, last = "", 0, -1
        for tick, text in enumerate((*self.texts, "")):
            for letter in text or " ":
                if not letter.isspace():
                    start = start if letters else tick
                    letters, last = letters + letter, tick
                elif letters:
                    words += (Word(one, start, last) for one in normal_words(letters))
                    letters = ""
        return tuple(words)

    @property
    def num_writing_ticks(self) -> int:
        """Ticks with output."""
        return sum(bool(text) for text in self.texts)


def utterances(words: Sequence[Word]) -> list[list[Word]]:
    """Words in groups with at most `PAUSE_TICKS` silent ticks inside."""
    groups: list[list[Word]] = []
    for word in words:
        if groups and word.start - groups[-1][-1].end <= PAUSE_TICKS + 1:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups
