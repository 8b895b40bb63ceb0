"""Dictation put together from pieces that were said before, in another order each time.

Speaking costs several times what all else costs; here it is paid once a piece. And as no order
comes again, every word has to be heard, however often the data are gone through.
"""

import zlib
from collections.abc import Sequence
from typing import Final

from numpy.random import Generator, Philox

from tml_core.data.engines import Voice
from tml_core.data.script import ScriptWriter
from tml_core.data.sentences import Sentences
from tml_core.data.tasks.task import Task
from tml_core.data.tasks.transcribe import TRANSCRIBE

__all__ = ["pieces_task"]

_NUM_WAYS: Final = 2  # in which a voice speaks
_NUM_PIECES: Final = 256  # that are said in one way
_RATES: Final = (0.85, 1.0, 1.15)


def pieces_task(others: Sequence[Task], weight: float) -> Task:
    """The task, with the words of `transcribe_task` of the same ``others``."""
    sentences = Sentences([text for task in others for text in task.phrasings.train])

    def write(script: ScriptWriter) -> None:
        script.user = _narrator(script)
        script.type(TRANSCRIBE)
        script.pause(0.4, 1.2)
        for _ in range(int(script.rng.integers(1, 5))):
            for _ in range(int(script.rng.integers(2, 8))):
                number = int(script.rng.integers(_NUM_PIECES))
                script.dictate(_piece(sentences, script.user, number), is_kept=True)
                script.pause(0.0, 0.12)
            script.pause(0.3, 1.5)
        script.pause(0.8, 1.2)

    return Task("pieces", TRANSCRIBE, write, weight)


def _narrator(script: ScriptWriter) -> Voice:
    """The user's voice, in one of its few ways."""
    name = script.user.name
    way = zlib.crc32(name.encode()) + int(script.rng.integers(_NUM_WAYS))
    rate, pitch = _RATES[way % 3], _RATES[way // 3 % 3]
    return Voice(script.user.engine, name, rate, pitch)


def _piece(sentences: Sentences, voice: Voice, number: int) -> str:
    """One to three words in a row of some sentence: a function of voice and number."""
    rng = Generator(Philox(key=[zlib.crc32(repr(voice).encode()), number]))
    words = sentences.draw(rng).split()
    start = int(rng.integers(len(words)))
    return " ".join(words[start : start + int(rng.integers(1, 4))])
