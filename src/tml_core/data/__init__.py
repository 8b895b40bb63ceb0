"""Scripted interactions with exact labels: speech, noise, pictures and what to do, tick by tick.

    from tml_core.data import interactions
    for one in interactions(seed=0):            # the same for ever; split="held_out" measures
        transcript = one.transcript(layout)

Who speaks (engines, bank), what is seen (figure), how it is heard (augment), what happens
(script, tasks), and all of them in order (stream). Needs the extra ``train``.
"""

from tml_core.data.augment import Sound
from tml_core.data.bank import SPLITS, SpeechBank, cache_folder, voices
from tml_core.data.build import BuildReport, build
from tml_core.data.engines import Speech, Voice
from tml_core.data.figure import Rep, Scene
from tml_core.data.script import Expected, Phrasings, Script, Spoken, tick_at
from tml_core.data.stream import Interaction, interaction, interactions, render_script
from tml_core.data.tasks import TASKS, vocabulary

__all__ = [
    "SPLITS",
    "TASKS",
    "BuildReport",
    "Expected",
    "Interaction",
    "Phrasings",
    "Rep",
    "Scene",
    "Script",
    "Sound",
    "Speech",
    "SpeechBank",
    "Spoken",
    "Voice",
    "build",
    "cache_folder",
    "interaction",
    "interactions",
    "render_script",
    "tick_at",
    "vocabulary",
    "voices",
]
