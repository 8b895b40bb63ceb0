"""What can happen: each task writes one script, asked for in words of its split."""

from typing import Final

from tml_core.data.tasks.basic import BASIC, TIMER_SECONDS, is_held_out_sum
from tml_core.data.tasks.task import Task
from tml_core.data.tasks.transcribe import transcribe_task

__all__ = ["TASKS", "TIMER_SECONDS", "Task", "is_held_out_sum"]

_OTHERS: Final = BASIC
TASKS: Final = {task.name: task for task in (*_OTHERS, transcribe_task(_OTHERS))}
