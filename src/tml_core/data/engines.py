"""Speech engines behind one interface: text and voice in, samples and (if known) word times out.

All run as programs of their own (espeak-ng is GPL), none is imported by the runtime. A missing
engine raises MissingExtra with the command that installs it.
"""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import numpy as np
import soundfile as sf
import soxr

from tml_core.errors import InvalidArgument, MediaError, MissingExtra
from tml_core.media._checks import Pcm
from tml_core.media.audio_file import SAMPLE_RATE

__all__ = [
    "ENGINES",
    "Engine",
    "EspeakEngine",
    "FliteEngine",
    "PicoEngine",
    "PiperEngine",
    "Speech",
    "Voice",
]

# Quieter than this at either end of an utterance is the engine's padding, not speech.
_SILENCE: Final = 0.004
_FLITE_TIMEOUT_S: Final = 600.0  # it needs milliseconds: only what hangs takes so long


@dataclass(frozen=True, order=True)
class Voice:
    """Who speaks. ``name``: as the engine spells it. ``rate`` and ``pitch``: factors around 1;
    flite and Piper take no pitch."""

    engine: str
    name: str
    rate: float = 1.0
    pitch: float = 1.0


@dataclass(frozen=True, eq=False)
class Speech:
    """``pcm``: float32 [S] at 16 kHz, from the first sound to the last. ``words``: the sample at
    which each word of the text begins, None where the engine does not say. Of words that are run
    together ("of the"), all but the first begin where the group ends."""

    pcm: Pcm
    words: tuple[int, ...] | None = None


class Engine(Protocol):
    """What synthesises. ``version``: of the program, part of what a cached utterance is filed by.

    Whoever makes one closes it.
    """

    name: str
    version: str

    def speak(self, text: str, voice: Voice) -> Speech:
        """``text`` in that voice; the same bits for the same arguments, whatever came before."""

    def close(self) -> None:
        """End the programs it started."""


class _Closing:
    """Engines as context managers."""

    def close(self) -> None:
        """Nothing to end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _ChildEngine(_Closing):
    """An engine that lives in a child process."""

    name = ""
    extra = "train"

    def __init__(self) -> None:
        program = Path(__file__).with_name("speech_child.py")
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(program), self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us; it ends when its stdin does
        )
        hello = self._answer()
        if "error" in hello:
            self.close()
            raise MissingExtra(
                f"{self.name}: {hello['error']}; install it with: pip install "
                f"'tml_core[{self.extra}]'"
            )
        self.version = str(hello["version"])

    def speak(self, text: str, voice: Voice) -> Speech:
        """See `Engine`. Raises MediaError for a voice the engine has not."""
        assert self._child.stdin is not None and self._child.stdout is not None
        request = {"text": text, "voice": voice.name, "rate": voice.rate, "pitch": voice.pitch}
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise MediaError(f"{self.name}: its process has ended") from None
        head = self._answer()
        if "error" in head:
            raise MediaError(f"{self.name}: {head['error']}")
        pcm = np.frombuffer(self._child.stdout.read(head["num_bytes"]), "<i2")
        return _speech(pcm, head["sample_rate"], head["words"])

    def close(self) -> None:
        """End the child; harmless when done twice."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # of a child that is gone, with a request unread
                    pipe.close()
        self._child.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise MediaError(f"{self.name}: its process has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


class EspeakEngine(_ChildEngine):
    """espeak-ng, with exact word times."""

    name = "espeak"


class PicoEngine(_ChildEngine):
    """SVOX Pico; no word times."""

    name = "pico"


class PiperEngine(_ChildEngine):
    """Piper's voice joe, a neural network without its noise; no word times."""

    name = "piper"
    extra = "natural"


class FliteEngine(_Closing):
    """flite's compiled-in voices; no word times."""

    name = "flite"

    def __init__(self) -> None:
        program = shutil.which("flite")
        if program is None:
            raise MissingExtra(
                "flite: the program is not installed; install it with: apt-get install flite"
            )
        self._program = program
        told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        versions = [line for line in told.stdout.splitlines() if "version:" in line]
        self.version = versions[0].split()[1] if versions else "unknown"
        listed = subprocess.run([program, "-lv"], capture_output=True, text=True, check=False)
        self._voices = set(listed.stdout.partition(":")[2].split())

    def speak(self, text: str, voice: Voice) -> Speech:
        """See `Engine`. Raises MediaError where flite says no."""
        if voice.name not in self._voices:  # flite would take another without a word
            raise MediaError(f"flite: no voice {voice.name!r}; it has {sorted(self._voices)}")
        command = [self._program, "-voice", voice.name, "-t", text, "-o", "/dev/stdout"]
        command += ["--setf", f"duration_stretch={1 / voice.rate:.4f}"]
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=_FLITE_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise MediaError(f"flite: no speech after {_FLITE_TIMEOUT_S:.0f} s") from None
        if done.returncode != 0 or not done.stdout.startswith(b"RIFF"):
            raise MediaError(f"flite: {done.stderr.decode(errors='replace').strip()[:200]}")
        pcm, sample_rate = sf.read(io.BytesIO(done.stdout), dtype="int16")
        return _speech(pcm, sample_rate, None)


ENGINES: Final[Mapping[str, Callable[[], Engine]]] = {
    "espeak": EspeakEngine,
    "pico": PicoEngine,
    "flite": FliteEngine,
    "piper": PiperEngine,
}


def _speech(pcm: Any, sample_rate: int, starts_ms: list[int] | None) -> Speech:
    """16 kHz, full scale, without the silence at both ends; word starts moved along."""
    samples = pcm.astype(np.float32) / 32768.0
    if sample_rate != SAMPLE_RATE and len(samples):
        samples = soxr.resample(samples, sample_rate, SAMPLE_RATE, quality="HQ")
    loud = np.flatnonzero(np.abs(samples) > _SILENCE)
    if not len(loud):
        raise InvalidArgument("text: expected something to be heard, got silence")
    first, end = int(loud[0]), int(loud[-1]) + 1
    samples = np.ascontiguousarray(np.clip(samples[first:end], -1.0, 1.0))
    if starts_ms is None:
        return Speech(samples)
    return Speech(
        samples,
        tuple(min(max(at * SAMPLE_RATE // 1000 - first, 0), len(samples)) for at in starts_ms),
    )
