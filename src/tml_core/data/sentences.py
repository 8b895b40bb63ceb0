"""Things to dictate: sentences of a small grammar, requests, numbers, words in no order.

Whatever words the training split's requests and their values have, these have too, and many more.
"""

from collections.abc import Sequence
from string import Formatter
from typing import Final, TypeVar

from numpy.random import Generator

from tml_core.data.figure import ACTIONS
from tml_core.data.words import (
    CHATTER,
    CUES,
    ENOUGH,
    FILLERS,
    GO,
    HALT,
    HARMFUL,
    HARMLESS,
    INTERRUPTIONS,
    LISTS,
    NAMES,
    NUMBERS,
    QUESTIONS,
    SPANISH,
    TENS,
    THE_END,
    WORDS,
    common_words,
)

__all__ = ["Sentences", "number_words"]

T = TypeVar("T")

_WHO: Final = (
    *("i", "you", "we", "they", "my brother", "my sister", "her mother", "his father", "the boy"),
    *("the old man", "a young woman", "our neighbour", "the doctor", "the teacher", "everybody"),
    *("somebody", "nobody", "the whole family", "a friend of mine", "the people in the village"),
)
_DID: Final = (
    *("saw", "found", "wanted", "bought", "lost", "carried", "painted", "remembered", "forgot"),
    *("opened", "closed", "brought", "kept", "heard about", "talked about", "looked at", "sold"),
    *("thought of", "asked for", "waited for", "wrote about", "dreamed of", "cleaned", "broke"),
)
_WILL: Final = (
    *("will see", "can have", "would like", "should take", "must not forget", "might need"),
    *("could use", "is going to buy", "does not want", "has never seen", "used to have"),
)
_WHEN: Final = (
    *("yesterday", "today", "tomorrow", "last night", "in the morning", "this afternoon"),
    *("on monday", "on friday evening", "next week", "every summer", "at noon", "in december"),
    *("a long time ago", "after dinner", "before breakfast", "all day long", "once again", "later"),
)
_WHERE: Final = (
    *("at home", "in the kitchen", "in the garden", "by the river", "at the station"),
    *("on the table", "under the bridge", "at school", "in the city", "near the market"),
    *("behind the house", "on the island", "at the office", "in front of the door", "outside"),
)
_HOW: Final = (
    *("quickly", "slowly", "again", "together", "for the first time", "by accident", "very well"),
    *("without a word", "with great care", "as usual", "because it was cold", "to be sure"),
)
_WHAT_IS: Final = (
    *("big", "small", "old", "new", "red", "blue", "green", "yellow", "heavy", "light", "quiet"),
    *("beautiful", "broken", "strange", "empty", "full", "warm", "cold", "important", "simple"),
)
_QUESTION: Final = (
    *("where is", "who has", "why do you need", "when can i get", "how much is", "do you know"),
    *("did you see", "have you got", "would you bring", "can you find", "what about"),
)
_LANGUAGES: Final = ("spanish", "german")


class Sentences:
    """Draws them. ``requests``: with {fields}, which get words and numbers."""

    def __init__(self, requests: Sequence[str]) -> None:
        self._requests = tuple(requests)
        fixed = " ".join(
            [
                *(_WHO + _DID + _WILL + _WHEN + _WHERE + _HOW + _WHAT_IS + _QUESTION),
                *(WORDS + CUES + NAMES + NUMBERS + TENS + CHATTER + ACTIONS + HARMFUL),
                *(ENOUGH + INTERRUPTIONS + THE_END + GO + HALT + _LANGUAGES),
                *(word for words in LISTS.values() for word in words),
                *(SPANISH.keys() | LISTS.keys() | HARMLESS.keys()),
                *common_words(),
                *(half for filler in FILLERS for half in filler),
                *QUESTIONS,
                *(literal for text in self._requests for literal, *_ in Formatter().parse(text)),
            ]
        )
        self.words = tuple(sorted(set(fixed.split())))

    def draw(self, rng: Generator) -> str:
        """One sentence, in lower case and without punctuation."""
        kind = rng.random()
        if kind < 0.35:
            return self._sentence(rng)
        if kind < 0.5:
            return self._request(rng)
        if kind < 0.85:  # no grammar to lean on: every word has to be heard
            return " ".join(_one(rng, self.words) for _ in range(int(rng.integers(2, 11))))
        if kind < 0.93:
            return " ".join(_one(rng, NUMBERS[:10]) for _ in range(int(rng.integers(2, 8))))
        return " and ".join(number_words(_number(rng)) for _ in range(int(rng.integers(1, 4))))

    def _sentence(self, rng: Generator) -> str:
        kind = int(rng.integers(7))
        if kind == 0:
            return _one(rng, CHATTER)
        if kind == 1:
            before, after = _one(rng, FILLERS)
            return f"{before} {self._noun(rng)} {after}"
        if kind == 2:
            return f"{_one(rng, _QUESTION)} {self._thing(rng)} {_one(rng, _WHERE)}"
        if kind == 3:
            return (
                f"{self._thing(rng)} {_one(rng, _WHERE)} is {_one(rng, _WHAT_IS)} "
                f"and {_one(rng, _WHAT_IS)}"
            )
        if kind == 4:
            who = f"{_one(rng, NAMES)} and {_one(rng, NAMES)}"
        else:
            who = _one(rng, (*_WHO, *NAMES))
        does = _one(rng, _DID if rng.random() < 0.6 else _WILL)
        rest = [_one(rng, part) for part in (_WHERE, _HOW, _WHEN) if rng.random() < 0.5]
        return " ".join([who, does, self._thing(rng), *rest])

    def _thing(self, rng: Generator) -> str:
        look = f"{_one(rng, _WHAT_IS)} " if rng.random() < 0.4 else ""
        return f"{_one(rng, ('the', 'a', 'my', 'that', 'his', 'her', 'your'))} {look}" + (
            self._noun(rng)
        )

    def _noun(self, rng: Generator) -> str:
        return _one(rng, self.words if rng.random() < 0.5 else CUES)

    def _request(self, rng: Generator) -> str:
        text = _one(rng, self._requests)
        fields = {name for _, name, *_ in Formatter().parse(text) if name}
        values = {
            "number": (*NUMBERS[1:], *TENS),
            "a": NUMBERS,
            "b": NUMBERS,
            "cue": CUES,
            "name": NAMES,
            "line": CHATTER,
            "what": (*QUESTIONS, *LISTS, *HARMFUL, *HARMLESS),
            "later": (*NUMBERS[1:], *TENS),
            "go": GO,
            "halt": HALT,
            "language": _LANGUAGES,
            "action": ACTIONS,
        }
        return text.format(**{name: _one(rng, values.get(name, WORDS)) for name in sorted(fields)})


def number_words(value: int) -> str:
    """0 to 9999 as it is said: "three hundred and five"."""
    if value >= 1000:
        rest = f" {number_words(value % 1000)}" if value % 1000 else ""
        return f"{NUMBERS[value // 1000]} thousand{rest}"
    if value >= 100:
        rest = f" and {number_words(value % 100)}" if value % 100 else ""
        return f"{NUMBERS[value // 100]} hundred{rest}"
    if value < 20:
        return NUMBERS[value]
    rest = f" {NUMBERS[value % 10]}" if value % 10 else ""
    return f"{TENS[value // 10 - 2]}{rest}"


def _number(rng: Generator) -> int:
    return int(rng.integers(10 ** int(rng.integers(1, 5))))


def _one(rng: Generator, values: Sequence[T]) -> T:
    return values[int(rng.integers(len(values)))]
