"""What is seen: tell when something begins, mark its start and stop, see somebody come in."""

from typing import Final

from tml_core.data.figure import ACTIONS, HELD_OUT_ACTIONS, WALK_S, Rep
from tml_core.data.script import REACTION_TICKS, Phrasings, ScriptWriter, tick_at
from tml_core.data.tasks.task import Task
from tml_core.data.words import CHATTER, WORDS
from tml_core.media.audio_file import SAMPLE_RATE

__all__ = ["SEEING"]

# A movement is known this long after it began, and known to be over this long after it ended.
_BEGUN_S: Final = 0.4
_OVER_S: Final = 0.6
_INSIDE_S: Final = 0.6 * WALK_S  # most of a person who walks in can be seen

_WHEN: Final = Phrasings(
    train=(
        "tell me when the {action} begin",
        "say now when you see {action}",
        "say now when the {action} start",
        "tell me when you see {action}",
        "tell me when i start the {action}",
        "watch me and tell me when the {action} begin",
        "say now as soon as you see {action}",
        "please tell me when the {action} start",
        "wait for the {action} and say now",
        "let me know when you see {action}",
    ),
    held_out=(
        "say now the moment the {action} begin",
        "tell me as soon as there are {action}",
        "watch and say now when somebody does {action}",
        "i want to know when the {action} begin",
    ),
)
_SPAN: Final = Phrasings(
    train=(
        "say start when the {action} begin and stop when they end",
        "say start when i start the {action} and stop when i stop",
        "tell me start and stop of the {action}",
        "when the {action} start say start and when they are over say stop",
        "please say start when you see {action} and stop when they are over",
        "watch the {action} say start and then stop",
        "mark the start and the stop of the {action}",
        "say start at the first of the {action} and stop after the last",
        "say start when the {action} start and stop when the {action} stop",
        "for the {action} say start and stop",
    ),
    held_out=(
        "say start when the person starts doing {action} then say stop when they stop",
        "tell me when the {action} start and when they stop",
        "call start and stop of the {action}",
        "say start once the {action} begin and stop once they have ended",
    ),
)
_APPEAR: Final = Phrasings(
    train=(
        "say {word} when somebody comes in",
        "say {word} when you see somebody",
        "when somebody comes in say {word}",
        "when you see a person say {word}",
        "please say {word} when a person comes in",
        "watch the room and say {word} when somebody comes in",
        "say {word} as soon as you see somebody",
        "tell me {word} when somebody is there",
        "wait for a person and say {word}",
        "if somebody comes in say {word}",
    ),
    held_out=(
        "say {word} the moment somebody walks in",
        "when a person walks in say {word}",
        "say {word} once there is somebody",
        "as soon as somebody walks in say {word}",
    ),
)


def _known(script: ScriptWriter) -> tuple[str, str]:
    """The action that is asked for, and another one."""
    among = ACTIONS if script.split == "train" else HELD_OUT_ACTIONS
    first, second = (str(one) for one in script.rng.choice(among, 2, replace=False))
    return first, second


def _do(script: ScriptWriter, action: str, num_reps: int, *, is_other: bool = False) -> None:
    """So many of ``action`` without a rest between them."""
    for _ in range(num_reps):
        start_s = round(script.now / SAMPLE_RATE, 3)
        end_s = round(start_s + float(script.rng.uniform(0.9, 1.8)), 3)
        warp = round(float(script.rng.uniform(-0.5, 0.5)), 2)
        script.move(Rep(action, start_s, end_s, warp, is_other))
        script.now = round(end_s * SAMPLE_RATE) + script.seconds(0.0, 0.15)


def _distract(script: ScriptWriter, other: str) -> None:
    """Perhaps somebody does something else first: the figure, or a bystander."""
    kind = script.rng.random()
    if kind < 0.6:
        _do(script, other, int(script.rng.integers(1, 3)), is_other=kind < 0.2)
        script.pause(0.8, 2.0)


def _after(seconds: float, sample: int) -> int:
    """The tick of a reaction to what is known ``seconds`` after ``sample``."""
    return tick_at(sample + round(seconds * SAMPLE_RATE)) + REACTION_TICKS


def _when(script: ScriptWriter) -> None:
    action, other = _known(script)
    script.ask(_WHEN, action=action)
    script.pause(0.8, 4.0)
    _distract(script, other)
    script.expect(_after(_BEGUN_S, script.now), "now")
    _do(script, action, int(script.rng.integers(2, 5)))
    script.pause(1.5, 2.5)


def _span(script: ScriptWriter) -> None:
    action, other = _known(script)
    script.ask(_SPAN, action=action)
    script.pause(0.8, 3.0)
    _distract(script, other)
    script.expect(_after(_BEGUN_S, script.now), "start")
    _do(script, action, int(script.rng.integers(2, 7)))
    script.expect(_after(_OVER_S, script.now), "stop")
    script.pause(1.5, 3.0)
    if script.rng.random() < 0.3:
        _do(script, other, 1)
        script.pause(0.8, 1.5)


def _appear(script: ScriptWriter) -> None:
    word = script.choice(WORDS)
    script.ask(_APPEAR, word=word)
    script.pause(1.0, 5.0)
    if script.rng.random() < 0.3:
        script.say(script.choice(CHATTER))
        script.pause(0.5, 1.0)
    start_s = round(script.now / SAMPLE_RATE, 3)
    stays_s = float(script.rng.uniform(3.0, 6.0))
    script.visit(start_s, round(start_s + stays_s, 3))
    script.expect(_after(_INSIDE_S, script.now), word)
    script.now += round(stays_s * SAMPLE_RATE)
    script.pause(1.0, 2.0)


SEEING: Final = (
    Task("when", _WHEN, _when, 0.8),
    Task("span", _SPAN, _span, 0.8),
    Task("appear", _APPEAR, _appear, 0.5),
)
