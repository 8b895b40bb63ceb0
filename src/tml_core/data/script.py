"""A scripted interaction: who says what when, what is seen, and what the model should do about it.

One clock, in samples of 16 kHz. The output half of tick k comes when its input has been heard, at
sample 3200 (k + 1). So what is due at a time belongs to `tick_at` that time, and a reaction to
something, which has to be heard first, to the tick after that.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import soxr
from numpy.random import Generator

from tml_core.data.augment import Sound, draw_sound
from tml_core.data.bank import SpeechBank, Split
from tml_core.data.engines import Speech, Voice
from tml_core.data.figure import Scene
from tml_core.errors import InvalidArgument
from tml_core.layout.chunk import ToolResult
from tml_core.media.audio_file import SAMPLE_RATE
from tml_core.media.micro_turns import TICK_SAMPLES

__all__ = [
    "REACTION_TICKS",
    "Expected",
    "Phrasings",
    "Script",
    "ScriptWriter",
    "Spoken",
    "perform",
    "tick_at",
]

T = TypeVar("T")

REACTION_TICKS: Final = 1
_LOUDNESS: Final = 0.1  # root mean square of everybody near
_MAX_SAMPLES: Final = 120 * SAMPLE_RATE


def tick_at(sample: int) -> int:
    """The first tick whose output comes at ``sample`` or later."""
    return max(0, -(-sample // TICK_SAMPLES) - 1)


@dataclass(frozen=True)
class Spoken:
    """Something said. ``start``: its first sample. ``speed``: tempo and pitch together, as of a
    tape. ``level``: a factor on the amplitude; other people are far away. ``is_once``: hardly to be
    said again, and so not kept on disk."""

    start: int
    text: str
    voice: Voice
    speed: float = 1.0
    level: float = 1.0
    is_once: bool = False


@dataclass(frozen=True)
class Expected:
    """What the model begins in ``tick``: saying ``text``, a ``call`` (name, args), or both. Text
    that is due while other text is still being spelled comes right after it."""

    tick: int
    text: str = ""
    call: tuple[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Script:
    """Everything that makes one interaction; equal scripts render to equal bits.

    ``phrasing``: of the request, as in the task's list, for counting and for holding out.
    ``results``: (tick, result) of tools. ``typed``: (tick, text) of the user's keyboard.
    ``expected``: in order of ticks; every other is silent.
    """

    task: str
    split: Split
    phrasing: str
    num_ticks: int
    spoken: tuple[Spoken, ...]
    expected: tuple[Expected, ...]
    sound: Sound
    scene: Scene | None = None
    results: tuple[tuple[int, ToolResult], ...] = ()
    typed: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        ticks = [one.tick for one in self.expected]
        if ticks != sorted(set(ticks)):
            raise InvalidArgument(f"Script.expected: expected rising ticks, got {ticks}")
        for name, used in (
            ("expected", ticks),
            ("results", [tick for tick, _ in self.results]),
            ("typed", [tick for tick, _ in self.typed]),
        ):
            if any(not 0 <= tick < self.num_ticks for tick in used):
                raise InvalidArgument(
                    f"Script.{name}: expected ticks in [0, {self.num_ticks}), got {used}"
                )


@dataclass(frozen=True)
class Phrasings:
    """Ways to ask for a task, with {fields}; no held-out one is ever seen in training."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def __post_init__(self) -> None:
        if both := set(self.train) & set(self.held_out):
            raise InvalidArgument(f"Phrasings: expected disjoint sets, got {sorted(both)} in both")

    def of(self, split: Split) -> tuple[str, ...]:
        """Those of a split."""
        return self.train if split == "train" else self.held_out


class ScriptWriter:
    """A script under construction: time goes on with every pause and everything the user says.

    ``now``: the sample at which the next thing begins. ``user``: the voice of this interaction.
    """

    def __init__(self, task: str, split: Split, bank: SpeechBank, rng: Generator) -> None:
        self.split = split
        self.rng = rng
        self.now = 0
        self._task = task
        self._bank = bank
        self._voices = bank.voices(split)
        self._phrasing = ""
        self._spoken: list[Spoken] = []
        self._expected: dict[int, Expected] = {}
        self._results: list[tuple[int, ToolResult]] = []
        self._typed: list[tuple[int, str]] = []
        self._scene: Scene | None = None
        self.user = self.draw_voice()
        self._speed = round(float(rng.uniform(0.92, 1.08)), 2)
        self.pause(0.1, 1.2)

    def draw_voice(self, other_than: Voice | None = None) -> Voice:
        """Somebody of this split. Engines come by the root of how many voices they have: neither
        is one with a single voice heard all the time, nor hardly ever."""
        shares = np.sqrt([len(ours) for ours in self._voices])
        while True:
            ours = self._voices[int(self.rng.choice(len(shares), p=shares / shares.sum()))]
            voice = ours[int(self.rng.integers(len(ours)))]
            rate, pitch = (float(self.rng.choice([0.85, 1.0, 1.15])) for _ in range(2))
            if other_than is None or voice.name != other_than.name:
                return Voice(voice.engine, voice.name, rate, pitch)

    def choice(self, values: Iterable[T]) -> T:
        """One of ``values``."""
        among = tuple(values)
        return among[int(self.rng.integers(len(among)))]

    def seconds(self, low: float, high: float) -> int:
        """A duration between two times, in samples."""
        return round(float(self.rng.uniform(low, high)) * SAMPLE_RATE)

    def pause(self, low_s: float, high_s: float) -> None:
        """Nothing happens for a while."""
        self.now += self.seconds(low_s, high_s)

    def ask(self, phrasings: Phrasings, **fields: object) -> int:
        """The user asks for the task, in one of the split's ways; the sample it ends at."""
        self._phrasing = self.choice(phrasings.of(self.split))
        return self.say(self._phrasing.format(**fields))

    def say(
        self, text: str, *, voice: Voice | None = None, at: int | None = None, level: float = 1.0
    ) -> int:
        """Somebody, by default the user, says ``text``; the sample after its last.

        ``at``: when, by default now, and then time goes on to its end.
        """
        spoken = Spoken(
            self.now if at is None else at, text, voice or self.user, self._speed, level
        )
        self._spoken.append(spoken)
        end = spoken.start + len(perform(spoken, self._bank).pcm)
        if at is None:
            self.now = end
        return end

    def say_marked(self, before: str, after: str) -> int:
        """The user says ``before after`` without a pause; the sample at which ``after`` begins.

        Where the engine tells no times, they are two utterances end to end, so the mark is exact.
        """
        start, index = self.now, len(before.split())
        whole = Spoken(start, f"{before} {after}", self.user, self._speed)
        words = perform(whole, self._bank).words
        # Not where the mark is in the middle of words that are run together ("of the").
        if words is not None and words[index] < (*words, start)[index + 1]:
            self.say(whole.text)
            return start + words[index]
        mark = self.say(before)
        self.say(after)
        return mark

    def type(self, phrasings: Phrasings) -> None:
        """The user types the request for the task now, in one of the split's ways."""
        self._phrasing = self.choice(phrasings.of(self.split))
        self._typed.append((tick_at(self.now), self._phrasing))

    def dictate(self, text: str) -> None:
        """The user says ``text``, and the model writes each word in the tick after it was over.

        Where the engine tells no times, one to three words are an utterance, after which they are
        written; utterances follow each other end to end.
        """
        words = text.split()
        whole = Spoken(self.now, text, self.user, self._speed, is_once=True)
        speech = perform(whole, self._bank)
        if speech.words is not None:
            self._spoken.append(whole)
            ends = (*speech.words[1:], len(speech.pcm))
            for word, end in zip(words, ends, strict=True):
                self.write(tick_at(whole.start + end) + REACTION_TICKS, word)
            self.now += len(speech.pcm)
            return
        while words:
            num_words = int(self.rng.integers(1, 4))
            said, words = words[:num_words], words[num_words:]
            tick = tick_at(self.say(" ".join(said))) + REACTION_TICKS
            self.write(tick, " ".join(said))

    def write(self, tick: int, text: str) -> None:
        """The model should say ``text`` in ``tick``, after what it says there already."""
        before = self._expected.pop(tick, Expected(tick))
        self.expect(tick, f"{before.text} {text}".strip(), before.call)

    def expect(
        self, tick: int, text: str = "", call: tuple[str, Mapping[str, Any]] | None = None
    ) -> None:
        """The model should begin this in ``tick``, which has nothing to do yet."""
        if tick in self._expected:
            raise InvalidArgument(f"tick: expected one without output, got {tick}")
        self._expected[tick] = Expected(tick, text, call)

    def result(self, tick: int, result: ToolResult) -> None:
        """A tool's result comes in ``tick``."""
        self._results.append((tick, result))

    def show(self, scene: Scene) -> None:
        """What the camera sees, from the first tick on."""
        self._scene = scene

    def finish(self) -> Script:
        """The script up to now."""
        if self.now > _MAX_SAMPLES:
            raise InvalidArgument(f"now: expected at most {_MAX_SAMPLES} samples, got {self.now}")
        return Script(
            task=self._task,
            split=self.split,
            phrasing=self._phrasing,
            num_ticks=tick_at(self.now) + 1,
            spoken=tuple(self._spoken),
            expected=tuple(self._expected[tick] for tick in sorted(self._expected)),
            sound=draw_sound(self.rng),
            scene=self._scene,
            results=tuple(self._results),
            typed=tuple(self._typed),
        )


def perform(spoken: Spoken, bank: SpeechBank) -> Speech:
    """What is heard of it, at its speed and level; times of words moved along."""
    speech = bank.speak(spoken.text, spoken.voice, keep=not spoken.is_once)
    pcm_S, words = speech.pcm, speech.words
    if spoken.speed != 1.0:
        rate = round(SAMPLE_RATE * spoken.speed)
        pcm_S = soxr.resample(pcm_S, rate, SAMPLE_RATE, quality="HQ")
        if words is not None:
            words = tuple(min(at * SAMPLE_RATE // rate, len(pcm_S)) for at in words)
    # Engines differ by ten decibels: nobody shall be known by that.
    factor = spoken.level * _LOUDNESS / float(np.sqrt(np.mean(np.square(pcm_S))))
    return Speech(np.clip(pcm_S * np.float32(factor), -1.0, 1.0), words)
