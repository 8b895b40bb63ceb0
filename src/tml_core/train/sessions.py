"""Recorded sessions as text: a line of JSON each, made into transcripts by the micro-turn layout.

    {"audio": "talk.wav", "system": "...", "ticks": {"3": {"text": "hi", "say": "hello"}}}

``audio`` and ``video`` (both may be missing) are cut into 200 ms ticks; paths are relative to the
file. ``ticks``: by number, what was typed (``text``), and what the model should then ``say`` or
``call`` ({"name", "args"}), which goes on in the ticks after it where the budget of one is too
small. All other ticks are silent. ``num_ticks``: how many there are at least.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from tml_core.errors import InvalidArgument, TmlError
from tml_core.layout.chunk import Chunk
from tml_core.layout.micro_turn import MicroTurnLayout, MicroTurnState
from tml_core.layout.state import Stream
from tml_core.media.micro_turns import micro_turns
from tml_core.model.config import ModelConfig
from tml_core.train.packing import Transcript

__all__ = ["encode_session", "read_sessions"]

_KEYS: Final = frozenset({"audio", "video", "system", "ticks", "num_ticks"})
_TICK_KEYS: Final = frozenset({"text", "say", "call"})


def read_sessions(
    path: str | Path, config: ModelConfig, tokenizer: Tokenizer | None
) -> list[Transcript]:
    """The transcripts of a ``.jsonl`` file, in order.

    Raises InvalidArgument naming the line that is not such a session, CheckpointError for a model
    without micro-turns or tokenizer.
    """
    file = Path(path)
    layout = MicroTurnLayout(config, tokenizer)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"data: {file} cannot be read: {error}") from error
    transcripts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            transcripts.append(encode_session(json.loads(line), layout, file.parent))
        except (TmlError, ValueError, TypeError, OSError) as error:
            raise InvalidArgument(f"data: {file} line {number}: {error}") from error
    return transcripts


def encode_session(session: dict[str, Any], layout: MicroTurnLayout, base: Path) -> Transcript:
    """One session, as the module describes it; files are looked for in ``base``."""
    _only("session", session, _KEYS)
    told = {int(key): value for key, value in session.get("ticks", {}).items()}
    for tick, value in told.items():
        _only(f"ticks[{tick}]", value, _TICK_KEYS)
    runs: list[list[int]] = []  # of ticks still to come
    ticks: list[tuple[Chunk, list[int]]] = []
    state = layout.initial_state()
    last = max([int(session.get("num_ticks", 1)) - 1, *told])
    for tick, (audio, frames) in enumerate(_media(session, base)):
        if tick > last and audio is None and not frames and not runs:
            break
        now = told.get(tick, {})
        text = now.get("text")
        is_idle = audio is None and not frames and text is None
        chunk = Chunk(audio=audio, frames=frames, text=text, is_idle=is_idle)
        if "say" in now or "call" in now:
            if runs:
                raise InvalidArgument(
                    f"ticks[{tick}]: expected a tick without output, for the last one needs "
                    f"{len(runs)} more"
                )
            runs = _runs(layout, state, now)
        run = runs.pop(0) if runs else [layout.grammar.tokens.silence]
        output = layout.begin_output(layout.encode_input(chunk, state).state)
        for token_id in run:
            output.accept(token_id, 0.0)
        state = output.state
        ticks.append((chunk, run))
    segments, streams = layout.encode_session(ticks, layout.encode_prefix(session.get("system")))
    return Transcript.next_tokens(segments, streams)


def _runs(layout: MicroTurnLayout, state: MicroTurnState, now: dict[str, Any]) -> list[list[int]]:
    """What is sampled in this tick and the following ones."""
    call = now.get("call")
    ids = layout.encode_output(
        state, now.get("say", ""), None if call is None else (call["name"], call["args"])
    )
    parts = layout.split_output(state, ids)
    return [
        [
            token_id
            for token_id, stream in zip(part.token_ids, part.streams, strict=True)
            if stream != Stream.FORCED
        ]
        for part in parts
    ]


def _media(session: dict[str, Any], base: Path) -> Iterator[tuple[Any, Any]]:
    """(audio, frames) of each tick, then nothing for ever."""
    paths = {
        kind: base / session[kind] for kind in ("audio", "video") if session.get(kind) is not None
    }
    if paths:
        for one in micro_turns(audio=paths.get("audio"), video=paths.get("video")):
            yield one.audio, one.frames
    while True:
        yield None, ()


def _only(where: str, value: object, known: frozenset[str]) -> None:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where}: expected an object, got {type(value).__name__}")
    for key in value:
        if key not in known:
            raise InvalidArgument(f"{where}: unknown key {key!r}; expected {sorted(known)}")
