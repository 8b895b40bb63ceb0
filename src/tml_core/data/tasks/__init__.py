"""What can happen: each task writes one script, asked for in words of its split."""

from typing import Final

from tml_core.data.tasks.basic import BASIC, TIMER_SECONDS, is_held_out_sum
from tml_core.data.tasks.chain import chain_task
from tml_core.data.tasks.pieces import pieces_task
from tml_core.data.tasks.seeing import SEEING
from tml_core.data.tasks.talking import TALKING
from tml_core.data.tasks.task import Task
from tml_core.data.tasks.timing import PERIOD_SECONDS, TIMING
from tml_core.data.tasks.transcribe import transcribe_task

__all__ = ["PERIOD_SECONDS", "TASKS", "TIMER_SECONDS", "Task", "is_held_out_sum"]

_OTHERS: Final = (*BASIC, *TIMING, *SEEING, *TALKING)
# Somebody who comes in was not there to do anything before.
_CAMERAS: Final = (("appear",), ("count", "when", "span"), ("count", "when", "span"))
_TRANSCRIBE: Final = transcribe_task(_OTHERS)
# A chain is several times as long as another interaction.
_CHAIN: Final = chain_task((*_OTHERS, _TRANSCRIBE), 2.0, _CAMERAS)
_PIECES: Final = pieces_task(_OTHERS, 1.0)
TASKS: Final = {task.name: task for task in (*_OTHERS, _TRANSCRIBE, _CHAIN, _PIECES)}
