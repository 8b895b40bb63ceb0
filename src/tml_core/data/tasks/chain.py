"""One thing after the other: several tasks in a session on one clock, with life in between."""

from collections.abc import Sequence
from typing import Final

from tml_core.data.script import Phrasings, ScriptWriter
from tml_core.data.tasks.task import Task
from tml_core.data.words import CHATTER
from tml_core.media.audio_file import SAMPLE_RATE

__all__ = ["chain_task"]

_LONGEST: Final = 75 * SAMPLE_RATE  # after which no further task begins


def chain_task(others: Sequence[Task], weight: float, cameras: Sequence[Sequence[str]]) -> Task:
    """Two to six of ``others``. ``cameras``: names of those that need one, in groups of which only
    one can be in a session; the camera is on one time in three, from the first tick on."""
    seeing = {name for group in cameras for name in group}

    def write(script: ScriptWriter) -> None:
        script.has_camera = bool(script.rng.random() < 1 / 3)
        seen = script.choice(cameras) if script.has_camera else ()
        among = [task for task in others if task.name not in seeing or task.name in seen]
        weights = [task.weight for task in among]
        shares = [one / sum(weights) for one in weights]
        for number in range(int(script.rng.integers(2, 7))):
            if script.now > _LONGEST:
                break
            if number:
                _meanwhile(script)
            task = among[int(script.rng.choice(len(among), p=shares))]
            script.part = task.name
            task.write(script)

    return Task("chain", Phrasings((), ()), write, weight)


def _meanwhile(script: ScriptWriter) -> None:
    """Silence, and sometimes talk that is nobody's request."""
    script.pause(1.0, 8.0 if script.rng.random() < 0.8 else 18.0)
    kind = script.rng.random()
    if kind < 0.2:
        script.say(script.choice(CHATTER))
    elif kind < 0.4:
        other = script.draw_voice(script.user)
        level = round(float(script.rng.uniform(0.1, 0.5)), 2)
        script.say(script.choice(CHATTER), voice=other, level=level)
    if kind < 0.4:
        script.pause(0.8, 3.0)
