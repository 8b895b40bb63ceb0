"""Writing what is said, word by word: the user types the request, then speaks."""

from collections.abc import Sequence
from typing import Final

from tml_core.data.script import Phrasings, ScriptWriter
from tml_core.data.sentences import Sentences
from tml_core.data.tasks.task import Task

__all__ = ["transcribe_task"]

_TRANSCRIBE: Final = Phrasings(
    train=(
        "write what i say",
        "write down what i say",
        "please write what i say",
        "write every word i say",
        "transcribe",
        "transcribe me",
        "transcribe what i say",
        "please transcribe",
        "type what i say",
        "type what you hear",
        "take dictation",
        "dictation please",
        "live transcript",
    ),
    held_out=(
        "write what you hear",
        "please type what i say",
        "transcribe every word",
        "write down every word i say",
        "start a live transcript",
    ),
)


def transcribe_task(others: Sequence[Task]) -> Task:
    """The task, dictating among other things what ``others`` are asked for with; they have 70 %."""
    sentences = Sentences([text for task in others for text in task.phrasings.train])

    def write(script: ScriptWriter) -> None:
        script.type(_TRANSCRIBE)
        script.pause(0.4, 1.2)
        for _ in range(int(script.rng.integers(1, 5))):
            script.dictate(sentences.draw(script.rng))
            script.pause(0.3, 1.8)
        script.pause(0.8, 1.5)

    weight = sum(task.weight for task in others) * 3 / 7
    return Task("transcribe", _TRANSCRIBE, write, weight)
