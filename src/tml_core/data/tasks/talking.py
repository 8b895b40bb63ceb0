"""Talking and listening at once: translation, signs of attention, being interrupted, refusals."""

from typing import Final

from tml_core.data.script import REACTION_TICKS, Phrasings, ScriptWriter, tick_at
from tml_core.data.tasks.task import Task
from tml_core.data.words import (
    CHATTER,
    GERMAN,
    HARMFUL,
    HARMLESS,
    INTERRUPTIONS,
    LISTS,
    SPANISH,
    THE_END,
)
from tml_core.media.audio_file import SAMPLE_RATE
from tml_core.media.micro_turns import TICK_SAMPLES

__all__ = ["TALKING"]

_PAUSE_S: Final = 0.4  # a pause is known for one after so long
_WORD_TICKS: Final = 2  # the pace of an answer that takes time
REFUSAL: Final = "i cannot help with that"

_TRANSLATE: Final = Phrasings(
    train=(
        "translate into {language}",
        "translate every word into {language}",
        "please translate into {language}",
        "say it in {language}",
        "translate what i say into {language}",
        "say every word in {language}",
        "i speak and you translate into {language}",
        "word for word in {language} please",
        "can you translate into {language}",
        "tell me every word in {language}",
    ),
    held_out=(
        "translate my words into {language}",
        "give me every word in {language}",
        "please say what i say in {language}",
        "translate live into {language}",
    ),
)
_STORY: Final = Phrasings(
    train=(
        "i will tell you a story just say mm when i pause",
        "listen to my story and say mm when i pause",
        "say mm at every pause of my story",
        "while i talk say mm when i pause",
        "please say mm when i pause",
        "let me tell you something say mm at the pauses",
        "i have a long story say mm now and then when i pause",
        "say mm when i take a break so i know that you listen",
        "say mm at each pause so that i know you are there",
        "listen and say mm when i stop for a moment",
    ),
    held_out=(
        "show me that you listen say mm at my pauses",
        "when i pause in my story say mm",
        "here is a story say mm whenever i pause",
        "say mm each time i pause",
    ),
)
_RECITE: Final = Phrasings(
    train=(
        "tell me {what}",
        "please tell me {what}",
        "say {what}",
        "can you say {what}",
        "please say {what}",
        "i want to hear {what}",
        "let me hear {what}",
        "do you know {what}",
        "tell me {what} please",
        "go through {what}",
    ),
    held_out=(
        "recite {what}",
        "name {what}",
        "could you tell me {what}",
        "would you say {what}",
    ),
)
_REFUSE: Final = Phrasings(
    train=(
        "how do i {what}",
        "tell me how to {what}",
        "how can i {what}",
        "i want to {what} how do i do it",
        "please tell me how to {what}",
        "can you tell me how to {what}",
        "what do i need to {what}",
        "help me {what}",
        "what is the best way to {what}",
        "i need to {what} please help",
    ),
    held_out=(
        "explain how to {what}",
        "show me how to {what}",
        "what should i do to {what}",
        "teach me to {what}",
    ),
)


def _translate(script: ScriptWriter) -> None:
    language, words = script.choice((("spanish", SPANISH), ("german", GERMAN)))
    script.ask(_TRANSLATE, language=language)
    script.pause(0.8, 1.8)
    for _ in range(int(script.rng.integers(1, 4))):
        num_words = int(script.rng.integers(1, 6))
        said = script.rng.choice(tuple(words), num_words, replace=False)
        script.dictate(" ".join(str(one) for one in said), words)
        script.pause(0.5, 1.5)
    _end(script)


def _story(script: ScriptWriter) -> None:
    script.ask(_STORY)
    script.pause(0.5, 0.9)
    for _ in range(int(script.rng.integers(2, 5))):
        end = script.say(script.choice(CHATTER))
        if script.rng.random() < 0.3:  # only a breath
            script.pause(0.08, 0.2)
            end = script.say(script.choice(CHATTER))
        script.expect(tick_at(end + round(_PAUSE_S * SAMPLE_RATE)) + REACTION_TICKS, "mm")
        script.pause(1.0, 2.2)
    _end(script)


def _end(script: ScriptWriter) -> None:
    """The user says that it is over: always where something else follows."""
    if script.part != script.task or script.rng.random() < 0.5:
        script.say(script.choice(THE_END))
    script.pause(1.0, 2.0)


def _recite(script: ScriptWriter) -> None:
    what, words = script.choice(tuple(LISTS.items()))
    end = script.ask(_RECITE, what=what)
    tick = tick_at(end) + REACTION_TICKS
    due = [(tick + _WORD_TICKS * index, word) for index, word in enumerate(words)]
    last = due[-1][0]
    if script.rng.random() < 0.6:
        start = end + script.seconds(1.5, max(2.0, 0.4 * len(words)))
        script.now = max(script.now, start)
        # The user can be heard in the tick after the one in which the first sound falls.
        last = tick_at(script.now) + REACTION_TICKS
        script.say(script.choice(INTERRUPTIONS))
    for at, word in due:
        if at <= last:
            script.expect(at, word)
    script.now = max(script.now, (min(last, due[-1][0]) + 1) * TICK_SAMPLES)
    script.pause(1.5, 3.0)


def _refuse(script: ScriptWriter) -> None:
    is_harmful = script.rng.random() < 0.5
    what, answer = (
        (script.choice(HARMFUL), REFUSAL) if is_harmful else script.choice(tuple(HARMLESS.items()))
    )
    end = script.ask(_REFUSE, what=what)
    script.expect(tick_at(end) + REACTION_TICKS, answer)
    script.pause(2.0, 3.5)


TALKING: Final = (
    Task("translate", _TRANSLATE, _translate),
    Task("story", _STORY, _story, 0.7),
    Task("recite", _RECITE, _recite, 0.7),
    Task("refuse", _REFUSE, _refuse, 0.7),
)
