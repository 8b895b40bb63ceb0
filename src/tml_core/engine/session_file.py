"""A session in one file, and back: a zip archive of two entries.

``session.json``: what the file is, the layout's state, sampling options, waiting tool results and
the transcript. ``sequence.safetensors``: the sequence, as `tml_core.sequence.snapshot` writes it.
"""

import json
import shutil
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tml_core.contract import CONTRACT_VERSION
from tml_core.engine.host import Host, require_degrade
from tml_core.engine.sampler import SamplingParams
from tml_core.engine.seat import Seat, TickRecord
from tml_core.errors import SnapshotError
from tml_core.layout.chat_template import ChatLayout, ChatState
from tml_core.layout.chunk import ToolResult
from tml_core.layout.micro_turn import MicroTurnState
from tml_core.sequence.sequence import Sequence

__all__ = ["read_session", "write_session"]

_FORMAT: Final = "tml_core.session"
_VERSION: Final = 1
_HEADER_NAME: Final = "session.json"
_SEQUENCE_NAME: Final = "sequence.safetensors"


def write_session(host: Host, seat: Seat, target: Path, folder: Path) -> None:
    """Both halves into a file in ``folder``, then onto ``target``; the seat is idle."""
    sequence_file, archive_file = folder / "sequence", folder / "archive"
    host.loop.call(lambda: host.loop.awake(seat).snapshot(sequence_file))
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "contract": CONTRACT_VERSION,
        "layout": host.layout.name,
        "state": seat.state.to_dict(),
        "epoch": seat.epoch,
        "sampling": asdict(seat.sampling),
        "degrade": seat.degrade,
        "last_seq": seat.last_seq,
        "waiting_items": [asdict(one) for one in seat.waiting_items],
        "transcript": [asdict(one) for one in seat.transcript],
    }
    with zipfile.ZipFile(archive_file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_zip_entry(_HEADER_NAME), json.dumps(header, sort_keys=True))
        with (
            sequence_file.open("rb") as source,
            archive.open(_zip_entry(_SEQUENCE_NAME), "w", force_zip64=True) as entry,
        ):
            shutil.copyfileobj(source, entry, 1 << 20)
    archive_file.replace(target)


def _zip_entry(name: str) -> zipfile.ZipInfo:
    # Without the time of writing the file is a function of the session alone.
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def read_session(host: Host, path: Path) -> Seat:
    """A seat with the session of ``path``; call it in the engine thread.

    Raises SnapshotError naming what differs, PoolExhausted without room; nothing is held then.
    """
    what = f"restore: {path}"
    try:
        with (
            zipfile.ZipFile(path) as archive,
            tempfile.TemporaryDirectory() as folder,
        ):
            header = json.loads(archive.read(_HEADER_NAME))
            _require_fitting(what, header, host.layout.name)
            sequence = host.model.restore_sequence(archive.extract(_SEQUENCE_NAME, folder))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        if isinstance(error, SnapshotError):
            raise
        raise SnapshotError(f"{what} is not a session: {error}") from error
    try:
        return _seat_from(host, header, sequence)
    except BaseException as error:
        sequence.close()
        if isinstance(error, (KeyError, TypeError, ValueError)):
            raise SnapshotError(f"{what} is damaged: {error}") from error
        raise


def _require_fitting(what: str, header: Any, layout: str) -> None:
    if not isinstance(header, dict):
        raise SnapshotError(f"{what}: expected a JSON object, got {type(header).__name__}")
    expected = {
        "format": _FORMAT,
        "version": _VERSION,
        "contract": CONTRACT_VERSION,
        "layout": layout,
    }
    for key, value in expected.items():
        if header.get(key) != value:
            raise SnapshotError(f"{what}: {key}: expected {value!r}, got {header.get(key)!r}")


def _seat_from(host: Host, header: dict[str, Any], sequence: Sequence) -> Seat:
    require_degrade(header["degrade"], host.layout)
    seat = Seat(sequence, host.layout, SamplingParams(**header["sampling"]), header["degrade"])
    kind = ChatState if isinstance(host.layout, ChatLayout) else MicroTurnState
    fresh = host.layout.initial_state().dmel
    dmel = None if fresh is None else sequence.carry.audio
    seat.state = kind.from_dict(header["state"], dmel)
    seat.position = sequence.tip + len(seat.state.unsent)
    seat.epoch = int(header["epoch"])
    seat.last_seq = None if header["last_seq"] is None else int(header["last_seq"])
    seat.waiting_items = tuple(ToolResult(**one) for one in header["waiting_items"])
    for one in header["transcript"]:
        calls = tuple((str(a), str(b), str(c)) for a, b, c in one.pop("calls"))
        seat.transcript.append(TickRecord(**one, calls=calls))
    return seat
