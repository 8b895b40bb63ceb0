"""Who speaks: the voices to train on and those that are kept for measuring, and a bank of both.

A voice is held out by what makes it: espeak accents and variants, a Pico accent, speakers of
flite, and the one neural voice.
"""

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tml_core.data.engines import ENGINES, Engine, Speech, Voice
from tml_core.errors import InvalidArgument, MissingExtra

__all__ = ["SPLITS", "SpeechBank", "Split", "as_split", "cache_folder", "voices"]

Split = Literal["train", "held_out"]
SPLITS: Final[tuple[Split, ...]] = ("train", "held_out")

_ESPEAK: Final[dict[Split, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "train": (
        ("en-us", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-gb-x-gbclan", "en-us-nyc"),
        (
            *("", "+f1", "+f2", "+f3", "+f5", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m8"),
            *("+Andy", "+Annie", "+Gene", "+Lee", "+Mario", "+Michael", "+adam"),
            *("+anika", "+belinda", "+benjamin", "+boris", "+caleb", "+david", "+edward"),
            *("+linda", "+klatt4", "+steph", "+shelby", "+quincy", "+norbert", "+grandma"),
            *("+grandpa", "+Alicia", "+Reed", "+aunty", "+max", "+rob", "+paul"),
        ),
    ),
    "held_out": (("en-gb-scotland", "en-029"), ("+f4", "+m7")),
}
_OTHERS: Final[dict[Split, tuple[tuple[str, str], ...]]] = {
    "train": (("pico", "en-US"), ("flite", "rms"), ("flite", "slt")),
    "held_out": (("pico", "en-GB"), ("flite", "awb"), ("flite", "kal16"), ("piper", "joe")),
}
_FORMAT: Final = 2  # of a cached utterance: raise it when what an engine hands over changes
_NUM_RECENT: Final = 64  # utterances at hand: a script is written first and rendered then


def as_split(name: str) -> Split:
    """``name`` as a split. Raises InvalidArgument for any other word."""
    for split in SPLITS:
        if name == split:
            return split
    raise InvalidArgument(f"split: expected one of {list(SPLITS)}, got {name!r}")


def voices(split: Split, engine: str | None = None) -> tuple[Voice, ...]:
    """All voices of a split, of one engine or of all, in a fixed order."""
    accents, variants = _ESPEAK[as_split(split)]
    every = [Voice("espeak", accent + variant) for accent in accents for variant in variants]
    every += [Voice(name, voice) for name, voice in _OTHERS[split]]
    return tuple(one for one in every if engine is None or one.engine == engine)


def cache_folder() -> Path:
    """Where utterances are kept by default: ``$TML_CACHE/speech`` or below ``~/.cache``."""
    root = os.environ.get("TML_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "tml_core") / "speech"


class SpeechBank:
    """The engines of this machine, and everything they have said, filed by what was asked for.

    ``engines``: names that must be there; by default all that are. What the data of a seed sounds
    like depends on them, so name them where it must be the same on another machine. ``cache``: a
    folder several processes may share; None keeps nothing. Each process needs a bank of its own:
    one that was forked would read its parent's answers.

    ``left_out``: why the others are not there, with the command that installs each.

    Raises MissingExtra for a named engine that is not installed, or when there is none at all.
    """

    def __init__(
        self, engines: Collection[str] | None = None, cache: str | Path | None = None
    ) -> None:
        for name in engines or ():
            if name not in ENGINES:
                raise InvalidArgument(f"engines: expected some of {list(ENGINES)}, got {name!r}")
        self._cache = None if cache is None else Path(cache)
        self._engines: dict[str, Engine] = {}
        self._recent: OrderedDict[tuple[str, Voice], Speech] = OrderedDict()
        reasons = []
        for name, make in ENGINES.items():
            if engines is not None and name not in engines:
                continue
            try:
                self._engines[name] = make()
            except MissingExtra as error:
                reasons.append(str(error))
                if engines is not None:
                    self.close()
                    raise
        self.left_out = tuple(reasons)
        if not self._engines:
            raise MissingExtra(f"engines: expected at least one; {'; '.join(reasons)}")

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of what is there."""
        return tuple(self._engines)

    def versions(self, split: Split) -> tuple[str, ...]:
        """Names and versions of who speaks in a split: with the same ones, words sound the same."""
        ours = (self._engines[group[0].engine] for group in self.voices(split))
        return tuple(f"{one.name} {one.version}" for one in ours)

    def voices(self, split: Split) -> tuple[tuple[Voice, ...], ...]:
        """The voices of a split, engine by engine; raises MissingExtra when there is none."""
        found = tuple(ours for name in self._engines if (ours := voices(split, name)))
        if not found:
            raise MissingExtra(
                f"engines: expected one with {split} voices, got {list(self._engines)}; "
                "install others with: pip install 'tml_core[train]'"
            )
        return found

    def speak(self, text: str, voice: Voice, *, keep: bool = True) -> Speech:
        """``text`` in that voice, at 16 bits; from the cache if it was said before.

        ``keep=False``: what nobody says twice is not filed.
        """
        recent = self._recent.get((text, voice))
        if recent is None:
            recent = self._recent[text, voice] = self._speak(text, voice, keep)
            if len(self._recent) > _NUM_RECENT:
                self._recent.popitem(last=False)
        return recent

    def _speak(self, text: str, voice: Voice, keep: bool) -> Speech:
        engine = self._engines.get(voice.engine)
        if engine is None:
            raise InvalidArgument(
                f"voice.engine: expected one of {list(self._engines)}, got {voice.engine!r}"
            )
        asked = [_FORMAT, engine.name, engine.version, voice.name, voice.rate, voice.pitch, text]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        folder = self._cache if keep else None
        file = None if folder is None else folder / key[:2] / f"{key}.safetensors"
        if file is not None and (kept := _read(file)) is not None:
            return kept
        said = engine.speak(text, voice)
        levels = np.rint(said.pcm * 32767.0).astype(np.int16)
        if file is not None:
            _write(file, levels, said.words)
        return Speech(_floats(levels), said.words)

    def close(self) -> None:
        """End the engines' programs."""
        for engine in self._engines.values():
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _floats(levels: np.ndarray) -> np.ndarray:
    return levels.astype(np.float32) / np.float32(32767.0)


def _read(file: Path) -> Speech | None:
    """What ``file`` holds; None if it is not there or not whole."""
    try:
        with safe_open(file, "numpy") as opened:
            words = json.loads(opened.metadata()["words"])
            return Speech(
                _floats(opened.get_tensor("pcm")), None if words is None else tuple(words)
            )
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _write(file: Path, levels: np.ndarray, words: tuple[int, ...] | None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all, also for another process that reads or writes the same utterance.
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
        part.write(save({"pcm": levels}, metadata={"words": json.dumps(words)}))
    Path(part.name).replace(file)
