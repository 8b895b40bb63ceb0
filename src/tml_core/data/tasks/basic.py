"""One request each: timers, cues, echoes, sums, talk to others, delegation, counting.

Values are held out too: durations, sums and actions that training never has.
"""

from typing import Final

from tml_core.background.attachment import DELEGATE
from tml_core.data.figure import ACTIONS, HELD_OUT_ACTIONS, Rep
from tml_core.data.script import REACTION_TICKS, Phrasings, ScriptWriter, tick_at
from tml_core.data.tasks.task import Task
from tml_core.data.words import CHATTER, CUES, FILLERS, NAMES, NUMBERS, QUESTIONS, WORDS
from tml_core.media.audio_file import SAMPLE_RATE
from tml_core.media.micro_turns import TICK_SAMPLES

__all__ = ["BASIC", "TIMER_SECONDS", "is_held_out_sum"]

TIMER_SECONDS: Final = {"train": (2, 3, 4, 6, 7, 8, 10), "held_out": (5, 9, 11)}

_TIMER: Final = Phrasings(
    train=(
        "say {word} in {number} seconds",
        "please say {word} {number} seconds from now",
        "wait {number} seconds and then say {word}",
        "in {number} seconds say {word}",
        "in {number} seconds please say {word}",
        "can you say {word} in {number} seconds",
        "i want to hear {word} in {number} seconds",
        "set a timer for {number} seconds then say {word}",
        "give me {number} seconds and say {word}",
        "tell me {word} when {number} seconds have passed",
        "{number} seconds from now say {word}",
    ),
    held_out=(
        "after {number} seconds i want you to say {word}",
        "remind me of {word} in {number} seconds",
        "say {word} when {number} seconds are over",
        "would you say {word} {number} seconds from now",
    ),
)
_CUE: Final = Phrasings(
    train=(
        "say {word} when i say {cue}",
        "when you hear {cue} say {word}",
        "as soon as i say {cue} please say {word}",
        "if i say {cue} you say {word}",
        "when i say {cue} you say {word}",
        "please say {word} when you hear {cue}",
        "wait until i say {cue} and then say {word}",
        "listen for {cue} and say {word}",
        "the word is {cue} when you hear it say {word}",
        "once i say {cue} say {word}",
        "i will say {cue} and then you say {word}",
    ),
    held_out=(
        "the moment you hear {cue} say {word}",
        "say {word} the moment i say {cue}",
        "say {word} as soon as you hear {cue}",
        "answer {word} when i say {cue}",
    ),
)
_ECHO: Final = Phrasings(
    train=(
        "repeat after me {words}",
        "say {words}",
        "please repeat {words}",
        "repeat {words}",
        "can you say {words}",
        "please say {words}",
        "say it after me {words}",
        "say the words {words}",
        "i want you to say {words}",
        "now say {words}",
    ),
    held_out=(
        "echo {words}",
        "say after me {words}",
        "would you say {words}",
        "repeat this {words}",
    ),
)
_SUM: Final = Phrasings(
    train=(
        "what is {a} plus {b}",
        "{a} plus {b} is what",
        "add {a} and {b}",
        "please add {a} and {b}",
        "tell me {a} plus {b}",
        "what do you get for {a} plus {b}",
        "what are {a} and {b} together",
        "do you know {a} plus {b}",
        "what is the sum of {a} and {b}",
        "{a} and {b} is how much",
    ),
    held_out=(
        "how much is {a} plus {b}",
        "tell me the sum of {a} and {b}",
        "can you add {a} and {b}",
        "how much are {a} and {b}",
    ),
)
_ASIDE: Final = Phrasings(
    train=(
        "{name} {line}",
        "hey {name} {line}",
        "{name} i have to tell you {line}",
        "you know {name} {line}",
        "well {name} {line}",
        "oh {name} {line}",
        "hello {name} {line}",
        "{name} guess what {line}",
        "so {name} {line}",
        "{name} i heard {line}",
    ),
    held_out=(
        "listen {name} {line}",
        "{line} {name}",
        "{name} by the way {line}",
        "no {name} {line}",
    ),
)
_DELEGATE: Final = Phrasings(
    train=(
        "look up the {what}",
        "find out the {what}",
        "can you check the {what}",
        "please look up the {what}",
        "check the {what}",
        "what is the {what}",
        "tell me the {what}",
        "do you know the {what}",
        "find the {what} for me",
        "could you find out the {what}",
    ),
    held_out=(
        "please search for the {what}",
        "i need to know the {what}",
        "go and check the {what}",
        "can you tell me the {what}",
    ),
)
_COUNT: Final = Phrasings(
    train=(
        "count my {action}",
        "please count the {action}",
        "count out loud the {action}",
        "count the {action}",
        "count every one of the {action}",
        "i will do {action} please count",
        "can you count the {action}",
        "count {action}",
        "watch me and count the {action}",
        "please count {action} for me",
    ),
    held_out=(
        "please count out reps for {action}",
        "how many {action} do i do",
        "keep count of the {action}",
        "number my {action} as i do them",
    ),
)


def is_held_out_sum(a: int, b: int) -> bool:
    """Whether training never sees a + b; a fifth of all sums, in either order of the two."""
    return (3 * (a + b) + a * b) % 5 == 0


def _timer(script: ScriptWriter) -> None:
    word, seconds = script.choice(WORDS), script.choice(TIMER_SECONDS[script.split])
    end = script.ask(_TIMER, word=word, number=NUMBERS[seconds])
    due = end + seconds * SAMPLE_RATE
    script.expect(tick_at(due), word)
    if seconds >= 6 and script.rng.random() < 0.4:  # life goes on meanwhile
        script.pause(1.0, 1.5)
        script.say(script.choice(CHATTER))
    script.now = max(script.now, due)
    script.pause(1.5, 3.0)


def _cue(script: ScriptWriter) -> None:
    word = script.choice(WORDS)
    cue, other = (str(one) for one in script.rng.choice(CUES, 2, replace=False))
    script.ask(_CUE, word=word, cue=cue)
    for spoken in script.rng.permutation([cue, other]):
        script.pause(0.8, 1.6)
        before, after = script.choice(FILLERS)
        heard = script.say_marked(f"{before} {spoken}", after)
        if spoken == cue:
            script.expect(tick_at(heard) + REACTION_TICKS, word)
    script.pause(0.8, 2.0)


def _echo(script: ScriptWriter) -> None:
    words = " ".join(str(one) for one in script.rng.choice(WORDS, 2, replace=False))
    end = script.ask(_ECHO, words=words)
    script.expect(tick_at(end) + REACTION_TICKS, words)
    script.pause(1.5, 3.0)


def _sum(script: ScriptWriter) -> None:
    wanted = script.split == "held_out"
    pairs = [(a, b) for a in range(10) for b in range(10) if is_held_out_sum(a, b) == wanted]
    a, b = script.choice(pairs)
    end = script.ask(_SUM, a=NUMBERS[a], b=NUMBERS[b])
    script.expect(tick_at(end) + REACTION_TICKS, str(a + b))
    script.pause(1.5, 3.0)


def _aside(script: ScriptWriter) -> None:
    name, line = script.choice(NAMES), script.choice(CHATTER)
    script.ask_aloud(_ASIDE, name=name, line=line)
    script.pause(0.5, 1.2)
    level = round(float(script.rng.uniform(0.1, 0.5)), 2)
    for _ in range(int(script.rng.integers(1, 3))):
        other = script.draw_voice(script.user)
        script.say(script.choice(CHATTER), voice=other, level=level)
        script.pause(0.4, 1.5)
    script.pause(0.5, 2.0)


def _background_speech(script: ScriptWriter) -> None:
    """Nobody is near: a television, people in the next room."""
    for _ in range(int(script.rng.integers(2, 5))):
        level = round(float(script.rng.uniform(0.08, 0.4)), 2)
        if script.rng.random() < 0.5:
            line = script.choice(CHATTER)
        else:
            line = f" {script.choice(CUES)} ".join(script.choice(FILLERS))
        script.say(line, voice=script.draw_voice(), level=level)
        script.pause(0.2, 2.0)
    script.pause(0.5, 3.0)


def _delegate(script: ScriptWriter) -> None:
    what, answer = script.choice(tuple(QUESTIONS.items()))
    end = script.ask(_DELEGATE, what=what)
    call = tick_at(end) + REACTION_TICKS
    script.expect(call, call=(DELEGATE, {"request": what}))
    # A call takes several ticks to spell: at least as many as a model of bytes needs.
    arrives = call + int(script.rng.integers(20, 35))
    script.result(arrives, answer)
    free = arrives
    if script.rng.random() < 0.5:  # it comes while the user talks, and has to wait
        start = arrives * TICK_SAMPLES - script.seconds(0.2, 1.0)
        free = max(free, tick_at(script.say(script.choice(CHATTER), at=start)))
    script.expect(free + REACTION_TICKS, answer)
    script.now = (free + 1) * TICK_SAMPLES
    script.pause(1.5, 3.0)


def _count(script: ScriptWriter) -> None:
    known = ACTIONS if script.split == "train" else HELD_OUT_ACTIONS
    action = script.choice(known)
    script.ask(_COUNT, action=action)
    script.pause(0.6, 1.5)
    period_s = float(script.rng.uniform(0.9, 2.0))
    counted = [action] * int(script.rng.integers(2, 9))
    others = [one for one in known if one != action]
    if script.rng.random() < 0.3:  # something else in between, not to be counted
        counted.insert(int(script.rng.integers(1, len(counted) + 1)), script.choice(others))
    number = 0
    for now in counted:
        start_s = round(script.now / SAMPLE_RATE, 3)
        end_s = round(start_s + period_s * float(script.rng.uniform(0.85, 1.15)), 3)
        warp = round(float(script.rng.uniform(-0.6, 0.6)), 2)
        script.move(Rep(now, start_s, end_s, warp))
        script.now = round(end_s * SAMPLE_RATE)
        if now == action:
            number += 1
            script.expect(tick_at(script.now) + REACTION_TICKS, str(number))
        script.pause(0.0, 0.5)
    script.pause(1.0, 2.5)


BASIC: Final = (
    Task("timer", _TIMER, _timer),
    Task("cue", _CUE, _cue),
    Task("echo", _ECHO, _echo),
    Task("sum", _SUM, _sum),
    Task("aside", _ASIDE, _aside),
    Task("background_speech", Phrasings((), ()), _background_speech),
    Task("delegate", _DELEGATE, _delegate),
    Task("count", _COUNT, _count),
)
