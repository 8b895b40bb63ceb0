"""Writing what the user says while it is said, or its translation, word for word: word error rate,
by the engine of the voice.

Errors are the fewest words to put in, take out or change, over the words that were said, as usual;
words written late count as right. How late they come is beside it.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from tml_core.evals.item import Item
from tml_core.evals.metrics import equal_words, word_errors
from tml_core.evals.played import Played, normal_words
from tml_core.evals.suite import Mark, Suite
from tml_core.media.micro_turns import TICK_MS

__all__ = ["TRANSCRIBE", "TRANSLATE"]

_EARLY_TICKS, _LATE_TICKS = 1, 5


def _mark(item: Item, played: Played) -> Mark:
    due = [(word, one.tick) for one in item.expected for word in normal_words(one.text)]
    said = [word.text for word in played.words]
    wanted = [word for word, _ in due]
    pairs = equal_words(said, wanted)
    late = [played.words[a].start - due[b][1] for a, b in pairs]
    facts = {"late": late, "words": len(wanted), "said": said, "wanted": wanted}
    errors = word_errors(said, wanted)
    return Mark(float(errors), item.script.spoken[0].voice.engine, max(1, len(wanted)), facts)


def _extras(marks: Sequence[Mark]) -> dict[str, float]:
    late = [ticks for one in marks for ticks in one.facts["late"]]
    num_words = sum(one.facts["words"] for one in marks)
    in_time = sum(-_EARLY_TICKS <= ticks <= _LATE_TICKS for ticks in late)
    found = {"words within 1 s": in_time / max(1, num_words)}
    if late:
        found["median late s"] = float(np.median(late)) * TICK_MS / 1000
    return found


TRANSCRIBE: Final = Suite(
    "transcribe",
    "word errors of live writing",
    ("transcribe",),
    _mark,
    "ratio",
    is_lower_better=True,
    extras=_extras,
)
TRANSLATE: Final = Suite(
    "translate",
    "word errors of live translation",
    ("translate",),
    _mark,
    "ratio",
    is_lower_better=True,
    extras=_extras,
)
