"""What the audio and video readers share: opening files and decoding with PyAV, errors in words."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from tml_core.errors import MediaError


def checked_path(path: str | os.PathLike[str], kind: str) -> tuple[str, str]:
    """``path`` as a string, and how its errors begin; MediaError if it is not a file."""
    name = os.fspath(path)
    what = f"{kind}: cannot read {name!r}"
    if not Path(name).is_file():
        reason = "it is not a file" if Path(name).exists() else "no such file"
        raise MediaError(f"{what}: {reason}")
    return name, what


def reason_of(error: av.FFmpegError) -> str:
    """The reason alone, without FFmpeg's number and file name."""
    return str(error.strerror or error)


def guarded_frames(container: Any, stream: Any, what: str) -> Iterator[Any]:
    """Decoded frames of ``stream``; damage and early ends become MediaError("{what}: reason")."""
    num_packets = 0
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise MediaError(f"{what}: truncated or damaged")
            num_packets += packet.size > 0
            # The demuxer ends with an empty packet, which drains the decoder.
            yield from packet.decode()
    except av.FFmpegError as error:
        raise MediaError(f"{what}: {reason_of(error)}") from error
    # Only the MP4 family lists every packet up front.
    if "mp4" in container.format.name and num_packets < len(stream.index_entries):
        raise MediaError(f"{what}: truncated, {num_packets} of {len(stream.index_entries)} packets")
