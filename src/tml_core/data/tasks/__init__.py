"""What can happen: each task writes one script, asked for in words of its split."""

from string import Formatter
from typing import Final

from tml_core.data.bank import SPLITS
from tml_core.data.sentences import Sentences
from tml_core.data.tasks.basic import BASIC, TIMER_SECONDS, is_held_out_sum
from tml_core.data.tasks.chain import chain_task
from tml_core.data.tasks.pieces import pieces_task
from tml_core.data.tasks.seeing import SEEING
from tml_core.data.tasks.talking import REFUSAL, TALKING
from tml_core.data.tasks.task import Task
from tml_core.data.tasks.timing import PERIOD_SECONDS, TIMING
from tml_core.data.tasks.transcribe import transcribe_task
from tml_core.data.words import GERMAN, HARMLESS, QUESTIONS, SPANISH

__all__ = ["PERIOD_SECONDS", "TASKS", "TIMER_SECONDS", "Task", "is_held_out_sum", "vocabulary"]

_OTHERS: Final = (*BASIC, *TIMING, *SEEING, *TALKING)
# Somebody who comes in was not there to do anything before.
_CAMERAS: Final = (("appear",), ("count", "when", "span"), ("count", "when", "span"))
_TRANSCRIBE: Final = transcribe_task(_OTHERS)
# A chain is several times as long as another interaction.
_CHAIN: Final = chain_task((*_OTHERS, _TRANSCRIBE), 2.0, _CAMERAS)
_PIECES: Final = pieces_task(_OTHERS, 1.0)
TASKS: Final = {task.name: task for task in (*_OTHERS, _TRANSCRIBE, _CHAIN, _PIECES)}


def vocabulary() -> tuple[str, ...]:
    """The words that are said, typed and answered in either split, sorted: what a tokenizer should
    know."""
    phrasings = [task.phrasings for task in TASKS.values()]
    asked = [text for one in phrasings for split in SPLITS for text in one.of(split)]
    answers = (*QUESTIONS.values(), *HARMLESS.values(), *SPANISH.values(), *GERMAN.values())
    literals = (literal for text in asked for literal, *_ in Formatter().parse(text))
    words = " ".join([*literals, *answers, "now start stop mm", REFUSAL]).split()
    return tuple(sorted({*Sentences(()).words, *words}))
