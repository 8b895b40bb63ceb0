"""Audio files in and out: any rate and channel count to mono float32, whole or in blocks.

Legend: S samples, C channels. soundfile reads WAV, FLAC, Ogg and MP3; for containers it does not
know (MP4, WebM, ...) PyAV decodes the first audio stream. soxr resamples as a stream, whose bits
do not depend on the blocks, so the blocks joined equal the recording read whole.
"""

import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import soxr
import torch
from numpy.typing import NDArray

from tml_core.errors import MediaError
from tml_core.media._checks import Pcm, pcm_array, positive_int
from tml_core.media._container import checked_path, guarded_frames

__all__ = ["SAMPLE_RATE", "audio_blocks", "read_audio", "resample_blocks", "write_wav"]

SAMPLE_RATE = 16000

_BLOCK_LEN = 16384
# Writers that cannot seek back leave these in place of a WAV data size; such files are whole.
_UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)


def read_audio(path: str | os.PathLike[str], sample_rate: int = SAMPLE_RATE) -> Pcm:
    """A whole recording as mono float32 [S] in [-1, 1] at ``sample_rate``.

    Channels are averaged, then resampled; what a decoder or the resampler overshoots is clipped.
    Raises MediaError, naming path and reason, if the file is missing, unreadable, truncated (as
    far as its format tells: a cut MP3 or Ogg cannot be told from a short one), or holds no
    audio or values that are not finite.
    """
    blocks = list(audio_blocks(path, sample_rate))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def audio_blocks(
    path: str | os.PathLike[str], sample_rate: int = SAMPLE_RATE
) -> Generator[Pcm, None, None]:
    """The blocks of a recording, of any length each; joined they equal ``read_audio(path)``.

    The file is opened at once and closed when the iterator ends or is closed.
    Raises MediaError as read_audio does: at once for a file that does not open, else when the
    damage is reached.
    """
    target_rate = positive_int("sample_rate", sample_rate)
    name, what = checked_path(path, "audio")
    try:
        file = soundfile.SoundFile(name)
    except soundfile.LibsndfileError as error:
        source_rate, blocks = _open_container(name, what, reason=error.error_string)
        return resample_blocks(blocks, source_rate, target_rate)
    try:
        _refuse_truncated_wav(file, what)
    except MediaError:
        file.close()
        raise
    return resample_blocks(_soundfile_blocks(file, what), int(file.samplerate), target_rate)


def resample_blocks(
    blocks: Iterable[Pcm], source_rate: int, target_rate: int
) -> Generator[Pcm, None, None]:
    """The signal cut into ``blocks`` (float32 [S] each) at another rate, clipped to [-1, 1].

    Equal rates pass through unchanged. The resampler holds back a few ms until the signal ends.
    """
    if source_rate == target_rate:
        yield from blocks
        return
    resampler = soxr.ResampleStream(source_rate, target_rate, num_channels=1, dtype="float32")
    for block_S in blocks:
        yield _clipped(resampler.resample_chunk(np.ascontiguousarray(block_S)))
    yield _clipped(resampler.resample_chunk(np.zeros(0, np.float32), last=True))


def write_wav(
    path: str | os.PathLike[str], pcm: Pcm | torch.Tensor, sample_rate: int = SAMPLE_RATE
) -> None:
    """Write mono ``pcm`` (float32 [S] in [-1, 1]) as 16-bit WAV.

    Raises InvalidArgument or InvalidType for other samples, MediaError if it cannot be written.
    """
    pcm_S = pcm_array("pcm", pcm)
    rate = positive_int("sample_rate", sample_rate)
    name = os.fspath(path)
    try:
        soundfile.write(name, pcm_S, rate, subtype="PCM_16", format="WAV")
    except soundfile.LibsndfileError as error:
        is_homeless = not Path(name).parent.is_dir()
        reason = "no such directory" if is_homeless else error.error_string
        raise MediaError(f"audio: cannot write {name!r}: {reason}") from error


def _soundfile_blocks(file: Any, what: str) -> Iterator[Pcm]:
    with file:
        num_read = 0
        while True:
            try:
                block_SC = file.read(_BLOCK_LEN, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise MediaError(f"{what}: {error.error_string}") from error
            if not len(block_SC):
                break
            num_read += len(block_SC)
            yield _mono(block_SC, what)
        if num_read < file.frames:
            raise MediaError(f"{what}: truncated, {num_read} of {file.frames} samples")


def _refuse_truncated_wav(file: Any, what: str) -> None:
    # libsndfile shortens a WAV whose data ends early and only logs "data : 640 (should be 320)".
    for line in file.extra_info.splitlines():
        chunk, _, sizes = line.partition(":")
        if chunk.strip() == "data" and "(should be" in sizes:
            promised, actual = (int(size.strip(" )")) for size in sizes.split("(should be"))
            if promised > actual and promised not in _UNKNOWN_SIZES:
                raise MediaError(f"{what}: truncated, {actual} of {promised} bytes")


def _open_container(name: str, what: str, reason: str) -> tuple[int, Iterator[Pcm]]:
    try:
        container = av.open(name)
    except av.FFmpegError as error:
        raise MediaError(f"{what}: {reason}") from error
    if not container.streams.audio:
        container.close()
        raise MediaError(f"{what}: it has no audio stream")
    stream = container.streams.audio[0]
    return int(stream.rate), _container_blocks(container, stream, what)


def _container_blocks(container: Any, stream: Any, what: str) -> Iterator[Pcm]:
    to_float = av.AudioResampler(format="fltp")
    with container:
        for frame in guarded_frames(container, stream, what):
            for piece in to_float.resample(frame):
                channels_CS: NDArray[Any] = piece.to_ndarray()
                yield _mono(channels_CS.T, what)


def _mono(block_SC: NDArray[np.float32], what: str) -> Pcm:
    mono_S = block_SC[:, 0] if block_SC.shape[1] == 1 else block_SC.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono_S).all():
        raise MediaError(f"{what}: it holds NaN or infinity")
    return _clipped(mono_S)


def _clipped(pcm_S: Pcm) -> Pcm:
    return np.clip(pcm_S, -1.0, 1.0)
