"""What a session says, in a sound file on the clock of what it hears."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from tml_core.errors import InvalidArgument
from tml_core.layout.events import AudioChunk, Event
from tml_core.media.micro_turns import TICK_MS
from tml_core.model.config import ModelConfig

__all__ = ["ReplyFile"]


class ReplyFile:
    """``path``, mono, in the format its name ends with. What a tick says begins there when its
    input has been heard: 200 ms after the tick began.

    Raises InvalidArgument for a file that cannot be written, and for a model that cannot speak.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        head = None if config.interaction is None else config.interaction.audio_out
        if head is None:
            raise InvalidArgument("out: this model has no audio-out head, it does not speak")
        rate = head.mel.sample_rate
        self._tick_len = rate * TICK_MS // 1000
        self._num_written = 0
        try:
            self._file = soundfile.SoundFile(path, "w", samplerate=rate, channels=1)
        except (TypeError, ValueError, soundfile.LibsndfileError) as error:
            raise InvalidArgument(f"out: cannot write {path}: {error}") from error

    def add(self, tick: int, events: Sequence[Event]) -> None:
        """What was said in ``tick``; nothing of an earlier one may follow."""
        start = (tick + 1) * self._tick_len
        said = [one.pcm for one in events if isinstance(one, AudioChunk)]
        silence_S = np.zeros(max(0, start - self._num_written), np.float32)
        pcm_S = np.concatenate([silence_S, *said])
        self._file.write(pcm_S)
        self._num_written += len(pcm_S)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()
