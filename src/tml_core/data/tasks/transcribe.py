"""Writing what is said, word by word: the user types the request, then speaks."""

from collections.abc import Sequence
from typing import Final

from tml_core.data.script import Phrasings, ScriptWriter
from tml_core.data.sentences import Sentences
from tml_core.data.tasks.task import Task
from tml_core.data.words import CHATTER

__all__ = ["TRANSCRIBE", "transcribe_task"]

TRANSCRIBE: Final = Phrasings(
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
_END: Final = Phrasings(
    train=(
        *("stop writing", "stop", "end of dictation", "that is all", "stop transcribing"),
        *("you can stop now", "no more writing", "done", "stop the transcript", "end"),
    ),
    held_out=("please stop writing", "dictation over", "stop typing", "enough"),
)


def transcribe_task(others: Sequence[Task]) -> Task:
    """The task, dictating among other things what ``others`` are asked for with; it comes three
    times where all of them come seven times."""
    sentences = Sentences([text for task in others for text in task.phrasings.train])

    def write(script: ScriptWriter) -> None:
        script.type(TRANSCRIBE)
        script.pause(0.4, 1.2)
        for _ in range(int(script.rng.integers(1, 5))):
            script.dictate(sentences.draw(script.rng))
            script.pause(0.3, 1.8)
        script.pause(0.8, 1.2)
        # Always where something else follows; else often enough to be known.
        if script.part != script.task or script.rng.random() < 0.4:
            script.type_text(script.choice(_END.of(script.split)))
            script.pause(0.4, 1.2)
            if script.rng.random() < 0.7:
                script.say(script.choice(CHATTER))  # is not written
                script.pause(0.5, 1.5)

    weight = sum(task.weight for task in others) * 3 / 7
    return Task("transcribe", TRANSCRIBE, write, weight)
