"""The cascade's head: rules over what was recognised, with timers and cues.

They read any order of the words that matter, so they are not tied to the phrasings of a split. It
knows of nothing until an utterance is over, and has no eyes.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Final

from tml_core.background.attachment import DELEGATE
from tml_core.evals.played import as_number, normal_words
from tml_core.media.audio_file import SAMPLE_RATE

__all__ = ["Action", "Rules"]

_STOPS: Final = r"(?= in | after | when | as soon| the moment| every| at | \d+ seconds?|$)"
_SAY: Final = re.compile(rf"(?<!i )\bsay (?!when)(?:the word )?(.+?){_STOPS}")
_REMIND: Final = re.compile(rf"\b(?:remind me|reminder) (?:of |about |to |for )?(.+?){_STOPS}")
_SECONDS: Final = re.compile(r"\b(\d+) seconds?\b")
_AFTER: Final = re.compile(r"\b(?:after|in) (\d+) seconds? (?:please )?(?:say )(\w+)")
_IN: Final = re.compile(r"\b(\w+) (?:in )?(\d+) seconds?\b")
_ENOUGH: Final = re.compile(r"\b(?:stop|enough|quiet|cancel)\b")
_PERIOD: Final = re.compile(r"\bevery (\d+) seconds?\b")
_CUE: Final = re.compile(
    r"\b(?:when|moment|as|time|whenever|if)\b.*?\b(?:i say|you hear|i mention|the word)\s+"
    r"(?:the word )?(\w+)"
)
_ECHO: Final = re.compile(r"\b(?:repeat after me|say after me|echo|repeat|say)\s+(.+)$")
_SUM: Final = re.compile(r"\b(?:plus|sum|add|added)\b|\+")
_LOOK_UP: Final = re.compile(
    r"\b(?:look up|search for|search|find out|check|need to know|google)\s+(?:the )?(.+)$"
)
_DICTATE: Final = re.compile(r"\b(?:write|type|transcribe|transcript|dictation)\b")
_MAX_REPEATS: Final = 60


@dataclass(frozen=True)
class Action:
    """At sample ``at`` say ``text``, or make ``call`` (name, args). ``is_repeat``: it is one of
    many, until the user has had enough."""

    at: int
    text: str = ""
    call: tuple[str, dict[str, Any]] | None = None
    is_repeat: bool = False


@dataclass
class Rules:
    """What one conversation has asked for so far: ``actions``, also those still to come, cues by
    word, and whether to write all down."""

    actions: list[Action] = field(default_factory=list)
    cues: dict[str, str] = field(default_factory=dict)
    is_dictating: bool = False

    def typed(self, text: str) -> None:
        """The user typed a request."""
        self.is_dictating = self.is_dictating or bool(_DICTATE.search(text.casefold()))

    def heard(self, text: str, end: int, known: int) -> None:
        """An utterance that ended at sample ``end``, which is known at ``known``."""
        plain = " ".join(_digits(word) for word in normal_words(text.replace("-", " ")))
        is_repeating = any(one.is_repeat and one.at > known for one in self.actions)
        if is_repeating and _ENOUGH.search(plain):
            self.actions = [one for one in self.actions if not one.is_repeat or one.at <= known]
        else:
            self.actions += self._answers(plain, text, end, known)

    def _answers(self, plain: str, text: str, end: int, known: int) -> list[Action]:
        if self.is_dictating:
            return [Action(known, plain)] if plain else []
        said = [reply for word, reply in self.cues.items() if word in plain.split()]
        if said:
            return [Action(known, reply) for reply in said]
        wanted = _SAY.search(plain) or _REMIND.search(plain)
        words = wanted[1].strip() if wanted else ""
        if words and (every := _PERIOD.search(plain)):
            step = max(1, int(every[1])) * SAMPLE_RATE
            times = [end + step * (k + 1) for k in range(_MAX_REPEATS)]
            return [Action(at, words, is_repeat=True) for at in times if at > known]
        if len(_SECONDS.findall(plain)) > 1:
            pairs = _AFTER.findall(plain) or [pair[::-1] for pair in _IN.findall(plain)]
            return [Action(max(known, end + int(n) * SAMPLE_RATE), word) for n, word in pairs]
        if words and (seconds := _SECONDS.search(plain)):
            return [Action(max(known, end + int(seconds[1]) * SAMPLE_RATE), words)]
        if words and (cue := _CUE.search(plain)):
            self.cues[cue[1]] = words
            return []
        numbers = [int(word) for word in plain.split() if word.isdigit()]
        if len(numbers) >= 2 and _SUM.search(plain + text):
            return [Action(known, str(numbers[0] + numbers[1]))]
        if what := _LOOK_UP.search(plain):
            return [Action(known, call=(DELEGATE, {"request": what[1]}))]
        if echo := _ECHO.search(plain):
            return [Action(known, echo[1])]
        return []


def _digits(word: str) -> str:
    number = as_number(word)
    return word if number is None else str(number)
