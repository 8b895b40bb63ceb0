"""A session in one file, and back: its sequence's, as `tml_core.sequence.snapshot` writes it.

The note in it is JSON: what the file is, the layout's state, sampling options, waiting tool results
and the transcript.
"""

import json
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
from tml_core.layout.output import MicroTurnState
from tml_core.sequence.sequence import Sequence
from tml_core.sequence.snapshot import read_note

__all__ = ["read_session", "write_session"]

_FORMAT: Final = "tml_core.session"
_VERSION: Final = 2


def write_session(host: Host, seat: Seat, target: Path) -> None:
    """The session into a file that replaces ``target`` once it is complete; the seat is idle."""
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
    note = json.dumps(header, sort_keys=True).encode()
    host.loop.call(lambda: host.loop.memory.awake(seat).snapshot(target, note=note))


def read_session(host: Host, path: Path) -> Seat:
    """A seat with the session of ``path``; call it in the engine thread.

    Raises SnapshotError naming what differs, PoolExhausted without room; nothing is held then.
    """
    what = f"restore: {path}"
    try:
        header = json.loads(read_note(path))
    except ValueError as error:
        raise SnapshotError(f"{what} is not a session: {error}") from error
    _require_fitting(what, header, host.layout.name)
    sequence = host.model.restore_sequence(path)
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
