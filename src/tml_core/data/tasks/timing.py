"""Time that goes on: reminders until told to stop, counting between two words, two clocks."""

from typing import Final

from tml_core.data.script import REACTION_TICKS, Phrasings, ScriptWriter, tick_at
from tml_core.data.tasks.basic import TIMER_SECONDS
from tml_core.data.tasks.task import Task
from tml_core.data.words import CHATTER, CUES, ENOUGH, FILLERS, GO, HALT, NUMBERS, WORDS
from tml_core.media.audio_file import SAMPLE_RATE

__all__ = ["PERIOD_SECONDS", "TIMING"]

PERIOD_SECONDS: Final = {"train": (2, 3, 4, 6), "held_out": (5, 7)}

_PERIODIC: Final = Phrasings(
    train=(
        "say {word} every {number} seconds",
        "every {number} seconds say {word}",
        "please say {word} every {number} seconds",
        "please say {word} every {number} seconds until i say stop",
        "every {number} seconds please say {word}",
        "say {word} every {number} seconds until i stop you",
        "keep saying {word} every {number} seconds",
        "tell me {word} every {number} seconds",
        "i want to hear {word} every {number} seconds",
        "can you say {word} every {number} seconds",
    ),
    held_out=(
        "remind me of {word} every {number} seconds",
        "once every {number} seconds say {word}",
        "say {word} again and again every {number} seconds",
        "i want you to say {word} every {number} seconds",
    ),
)
_STOPWATCH: Final = Phrasings(
    train=(
        "start counting when i say {go} and stop when i say {halt}",
        "when i say {go} start counting and when i say {halt} stop",
        "count from {go} until {halt}",
        "count the seconds from {go} until i say {halt}",
        "please start counting when i say {go} and stop at {halt}",
        "begin to count when you hear {go} and stop when you hear {halt}",
        "count the seconds after i say {go} until i say {halt}",
        "i say {go} and you count until i say {halt}",
        "count seconds when i say {go} and stop when i say {halt}",
        "start to count at {go} and stop at {halt}",
    ),
    held_out=(
        "once i say {go} count the seconds until {halt}",
        "count up from the moment i say {go} and end when i say {halt}",
        "at {go} start counting and at {halt} stop",
        "keep counting between {go} and {halt}",
    ),
)
_TIMERS: Final = Phrasings(
    train=(
        "say {word} in {number} seconds and {other} in {later} seconds",
        "in {number} seconds say {word} and in {later} seconds say {other}",
        "please say {word} in {number} seconds and {other} in {later} seconds",
        "wait {number} seconds and say {word} and after {later} seconds say {other}",
        "tell me {word} in {number} seconds and {other} in {later} seconds",
        "timers please {word} in {number} seconds and {other} in {later} seconds",
        "{word} in {number} seconds and {other} in {later} seconds please",
        "set timers of {number} seconds for {word} and {later} seconds for {other}",
        "i want to hear {word} in {number} seconds and {other} in {later} seconds",
        "can you say {word} in {number} seconds and {other} in {later} seconds",
    ),
    held_out=(
        "after {number} seconds say {word} and after {later} seconds say {other}",
        "remind me of {word} in {number} seconds and of {other} in {later} seconds",
        "say {word} {number} seconds from now and {other} {later} seconds from now",
        "first {word} in {number} seconds then {other} in {later} seconds",
    ),
)
_ARMED: Final = Phrasings(
    train=(
        "say {word} in {number} seconds and say {other} when i say {cue}",
        "when i say {cue} say {other} and in {number} seconds say {word}",
        "in {number} seconds say {word} and if i say {cue} say {other}",
        "please say {other} when you hear {cue} and {word} in {number} seconds",
        "wait {number} seconds and say {word} but when i say {cue} say {other}",
        "{word} in {number} seconds and {other} when i say {cue}",
        "listen for {cue} and say {other} and say {word} in {number} seconds",
        "if i say {cue} you say {other} and in {number} seconds you say {word}",
        "say {other} when you hear {cue} and say {word} in {number} seconds",
        "set a timer for {number} seconds then say {word} and when i say {cue} say {other}",
    ),
    held_out=(
        "after {number} seconds say {word} and the moment i say {cue} say {other}",
        "answer {other} when i say {cue} and say {word} when {number} seconds are over",
        "say {other} as soon as you hear {cue} and {word} {number} seconds from now",
        "remind me of {word} in {number} seconds and say {other} at the word {cue}",
    ),
)


def _periodic(script: ScriptWriter) -> None:
    word, seconds = script.choice(WORDS), script.choice(PERIOD_SECONDS[script.split])
    start = script.ask(_PERIODIC, word=word, number=NUMBERS[seconds])
    num_times = int(script.rng.integers(2, max(3, 16 // seconds)))
    ends_at = start + num_times * seconds * SAMPLE_RATE + script.seconds(0.25, 0.5)
    if seconds >= 4 and script.rng.random() < 0.4:
        script.pause(0.5, 1.0)
        script.say(script.choice(CHATTER))
    script.now = max(script.now, ends_at)
    # What is due while the user says stop still comes; what is due then does not.
    stop = script.say(script.choice(ENOUGH))
    due = start + seconds * SAMPLE_RATE
    while tick_at(due) <= tick_at(stop):
        script.expect(tick_at(due), word)
        due += seconds * SAMPLE_RATE
    script.pause(max(1.5, seconds + 0.5), seconds + 2.0)  # long enough to see that it has ended


def _stopwatch(script: ScriptWriter) -> None:
    go, halt = script.choice(GO), script.choice(HALT)
    script.ask(_STOPWATCH, go=go, halt=halt)
    script.pause(0.8, 2.0)
    if script.rng.random() < 0.3:
        script.say(script.choice(CHATTER))
        script.pause(0.5, 1.0)
    start = script.say(go)
    script.pause(0.6, 1.5)
    ends_at = start + script.seconds(2.3, 9.5)
    if script.rng.random() < 0.4:  # the user talks while the model counts
        script.say(script.choice(CHATTER))
        script.pause(0.4, 0.8)
    script.now = max(script.now, ends_at)
    stop = script.say(halt)
    number = 1
    while (tick := tick_at(start + number * SAMPLE_RATE)) <= tick_at(stop):
        script.expect(tick, str(number))
        number += 1
    script.pause(2.0, 3.0)


def _timers(script: ScriptWriter) -> None:
    word, other = (str(one) for one in script.rng.choice(WORDS, 2, replace=False))
    known = TIMER_SECONDS[script.split]
    number, later = sorted(int(one) for one in script.rng.choice(known, 2, replace=False))
    fields = {"number": NUMBERS[number], "later": NUMBERS[later]}
    end = script.ask(_TIMERS, word=word, other=other, **fields)
    script.expect(tick_at(end + number * SAMPLE_RATE), word)
    script.expect(tick_at(end + later * SAMPLE_RATE), other)
    if script.rng.random() < 0.4:
        script.pause(0.6, 1.2)
        script.say(script.choice(CHATTER))
    script.now = max(script.now, end + later * SAMPLE_RATE)
    script.pause(1.5, 3.0)


def _armed(script: ScriptWriter) -> None:
    word, other = (str(one) for one in script.rng.choice(WORDS, 2, replace=False))
    cue, number = script.choice(CUES), script.choice(TIMER_SECONDS[script.split])
    fields = {"number": NUMBERS[number], "cue": cue}
    end = script.ask(_ARMED, word=word, other=other, **fields)
    script.expect(tick_at(end + number * SAMPLE_RATE), word)
    script.pause(0.8, 2.0 + number)
    before, after = script.choice(FILLERS)
    heard = script.say_marked(f"{before} {cue}", after)
    script.expect(tick_at(heard) + REACTION_TICKS, other)
    script.now = max(script.now, end + number * SAMPLE_RATE)
    script.pause(1.5, 3.0)


TIMING: Final = (
    Task("periodic", _PERIODIC, _periodic),
    Task("stopwatch", _STOPWATCH, _stopwatch),
    Task("timers", _TIMERS, _timers, 0.7),
    Task("armed", _ARMED, _armed, 0.7),
)
