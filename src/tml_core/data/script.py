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
from tml_core.data.figure import Rep, Scene, draw_scene
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
_MAX_SAMPLES: Final = 240 * SAMPLE_RATE


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

    ``phrasing``: of the first request, as in its task's list, for counting and for holding out;
    ``requests``: (task, phrasing) of all, more than one in a session of several tasks.
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
    requests: tuple[tuple[str, str], ...] = ()

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
    ``task``: of the session; ``part``: the one that is being written. ``has_camera``: whether there
    are pictures even if nothing is done in them. ``typed``: the share of requests that are typed.
    """

    def __init__(
        self, task: str, split: Split, bank: SpeechBank, rng: Generator, typed: float = 0.0
    ) -> None:
        self.split = split
        self.typed = typed
        self.rng = rng
        self.now = 0
        self.part = task
        self.has_camera = False
        self.task = task
        self._bank = bank
        self._voices = bank.voices(split)
        self._requests: list[tuple[str, str]] = []
        self._num_calls = 0
        self._spoken: list[Spoken] = []
        self._expected: dict[int, Expected] = {}
        self._results: list[tuple[int, ToolResult]] = []
        self._typed: list[tuple[int, str]] = []
        self._reps: list[Rep] = []
        self._visits: list[tuple[float, float]] = []
        self.user = self.draw_voice()
        self._speed = round(float(rng.uniform(0.92, 1.08)), 2)
        self.pause(0.1, 1.2)

    def draw_voice(self, other_than: Voice | None = None) -> Voice:
        """Somebody of this split. Engines come by the root of how many voices they have, of which
        64 count: neither is one with a single voice heard all the time, nor hardly ever."""
        shares = np.sqrt([min(len(ours), 64) for ours in self._voices])
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
        """The user asks for the task, in one of the split's ways, or types it; the sample it ends
        at."""
        if self.typed and self.rng.random() < self.typed:
            self.type_text(self._request(phrasings).format(**fields))
            return self.now
        return self.ask_aloud(phrasings, **fields)

    def ask_aloud(self, phrasings: Phrasings, **fields: object) -> int:
        """The user says it, even where requests may be typed; the sample it ends at."""
        return self.say(self._request(phrasings).format(**fields))

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
        self.type_text(self._request(phrasings))

    def type_text(self, text: str) -> None:
        """The user types ``text`` now."""
        self._typed.append((tick_at(self.now), text))

    def dictate(
        self, text: str, answers: Mapping[str, str] | None = None, *, is_kept: bool = False
    ) -> None:
        """The user says ``text``, and the model writes each word in the tick after it was over, or
        what ``answers`` has for it.

        Where the engine tells no times, one to three words are an utterance, after which they are
        written; utterances follow each other end to end. ``is_kept``: it will be said again, and is
        one utterance.
        """
        words = text.split()
        written = answers or {}
        whole = Spoken(self.now, text, self.user, self._speed, is_once=not is_kept)
        speech = perform(whole, self._bank)
        if speech.words is not None:
            self._spoken.append(whole)
            ends = (*speech.words[1:], len(speech.pcm))
            for word, end in zip(words, ends, strict=True):
                self.expect(tick_at(whole.start + end) + REACTION_TICKS, written.get(word, word))
            self.now += len(speech.pcm)
            return
        while words:
            num_words = len(words) if is_kept else int(self.rng.integers(1, 4))
            said, words = words[:num_words], words[num_words:]
            tick = tick_at(self.say(" ".join(said))) + REACTION_TICKS
            self.expect(tick, " ".join(written.get(word, word) for word in said))

    def expect(
        self, tick: int, text: str = "", call: tuple[str, Mapping[str, Any]] | None = None
    ) -> None:
        """The model should begin this in ``tick``, after what it says there already."""
        before = self._expected.get(tick, Expected(tick))
        if before.call is not None:
            raise InvalidArgument(f"tick: expected one without a call, got {tick}")
        self._expected[tick] = Expected(tick, f"{before.text} {text}".strip(), call)

    def result(self, tick: int, content: str) -> None:
        """The result of the next call comes in ``tick``."""
        self._results.append((tick, ToolResult(f"call-{self._num_calls}", content)))
        self._num_calls += 1

    def move(self, rep: Rep) -> None:
        """Somebody in front of the camera, which is on from the first tick, does this."""
        self._reps.append(rep)

    def visit(self, start_s: float, end_s: float) -> None:
        """The figure is in front of the camera between these times only, and other such ones."""
        self._visits.append((start_s, end_s))

    def finish(self) -> Script:
        """The script up to now."""
        if self.now > _MAX_SAMPLES:
            raise InvalidArgument(f"now: expected at most {_MAX_SAMPLES} samples, got {self.now}")
        scene = None
        if self._reps or self._visits or self.has_camera:
            scene = draw_scene(self.rng, tuple(self._reps), tuple(self._visits))
        return Script(
            task=self.task,
            split=self.split,
            phrasing=self._requests[0][1] if self._requests else "",
            requests=tuple(self._requests),
            num_ticks=tick_at(self.now) + 1,
            spoken=tuple(self._spoken),
            expected=tuple(self._expected[tick] for tick in sorted(self._expected)),
            sound=draw_sound(self.rng),
            scene=scene,
            results=tuple(self._results),
            typed=tuple(self._typed),
        )

    def _request(self, phrasings: Phrasings) -> str:
        phrasing = self.choice(phrasings.of(self.split))
        self._requests.append((self.part, phrasing))
        return phrasing


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
