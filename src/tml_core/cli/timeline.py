"""What a live session looks like: one row a tick, a footer with the totals, or plain lines.

A row reads from left to right: clock, sound (one bar for each 50 ms), picture (the first frame,
8 x 2 pixels), what the model wrote, said (bars again) or did, and how much of the 200 ms it took.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tml_core.engine.turn import TurnResult
from tml_core.layout.chunk import Chunk
from tml_core.layout.events import AudioChunk, Notice, Silence, TextToken, ToolCall
from tml_core.media.audio_file import SAMPLE_RATE
from tml_core.media.micro_turns import TICK_MS

__all__ = ["TickView", "Totals", "footer", "header", "job_line", "plain_line", "row"]

_BARS: Final = " ▁▂▃▄▅▆▇█"
_THUMB_WIDTH: Final = 8
_BAR_WIDTH: Final = 20  # cells of 10 ms
_HOP: Final = SAMPLE_RATE // 20
_QUIET_DB: Final = -60.0

_SPOKEN, _CALLED, _QUIET, _WARNED = "bold spring_green3", "bold orchid1", "grey50", "gold3"
_HEARD: Final = "spring_green3"
_JOB: Final = "sky_blue2"
_PREFILL, _DECODE, _FREE, _LATE = "dodger_blue1", "turquoise2", "grey23", "bold red1"


@dataclass(frozen=True)
class TickView:
    """One finished tick: what came in, what came out."""

    index: int
    chunk: Chunk
    result: TurnResult

    @property
    def total_ms(self) -> float:
        """Arrival to end."""
        return self.result.stats.total_ms or 0.0


@dataclass
class Totals:
    """Counts over the ticks so far. ``media_ms``: expected length, None if not known."""

    media_ms: int | None = None
    tick_ms: list[float] = field(default_factory=list)
    num_silent: int = 0
    num_calls: int = 0
    num_tokens: int = 0
    spoken_s: float = 0.0
    position: int = 0
    kv_bytes: int = 0
    wall_s: float = 0.0

    def add(self, tick: TickView, position: int, kv_bytes: int, wall_s: float) -> None:
        """Count one more tick."""
        events = tick.result.events
        self.tick_ms.append(tick.total_ms)
        self.num_silent += any(isinstance(one, Silence) for one in events)
        self.num_calls += len(tick.result.tool_calls)
        self.num_tokens += tick.result.stats.num_output_tokens
        chunks = [one for one in events if isinstance(one, AudioChunk)]
        self.spoken_s += sum(len(one.pcm) / one.sample_rate for one in chunks)
        self.position, self.kv_bytes, self.wall_s = position, kv_bytes, wall_s

    @property
    def num_late(self) -> int:
        """Ticks that took longer than 200 ms."""
        return sum(one > TICK_MS for one in self.tick_ms)

    def percentile_ms(self, percent: float) -> float:
        """A percentile of the ticks' times."""
        return float(np.percentile(self.tick_ms, percent)) if self.tick_ms else 0.0

    def to_dict(self) -> dict[str, float | int]:
        """The totals as JSON values."""
        return {
            "num_ticks": len(self.tick_ms),
            "media_ms": len(self.tick_ms) * TICK_MS,
            "wall_s": round(self.wall_s, 3),
            "tick_p50_ms": round(self.percentile_ms(50), 3),
            "tick_p95_ms": round(self.percentile_ms(95), 3),
            "tick_max_ms": round(self.percentile_ms(100), 3),
            "num_late": self.num_late,
            "num_silent": self.num_silent,
            "num_calls": self.num_calls,
            "num_tokens": self.num_tokens,
            "spoken_s": round(self.spoken_s, 3),
            "position": self.position,
            "kv_bytes": self.kv_bytes,
        }


def header(model: str, is_trained: bool, machine: str, feed: str) -> RenderableType:
    """What runs, on what, fed with what, and the heads of the columns."""
    first = Text.assemble(("tml_core", "bold"), ("  live session of ", "grey62"), (model, "bold"))
    second = Text(f"{machine}\n{feed}", style="grey62")
    lines: list[RenderableType] = [first, second]
    if not is_trained:
        lines.append(
            Text(
                "This model is untrained (random weights): what it writes is noise.", style="gold3"
            )
        )
    heads = _grid()
    bar = Text.assemble(("input ", _PREFILL), ("output", _DECODE), (" 200 ms", _QUIET))
    clock, sound, picture, out, ms = (
        Text(one, style=_QUIET) for one in ("clock", "sound", "picture", "out", "ms")
    )
    heads.add_row(clock, sound, picture, out, bar, ms)
    return Group(*lines, Text(), heads)


def row(tick: TickView) -> RenderableType:
    """One tick as a row."""
    grid = _grid()
    grid.add_row(
        Text(_clock(tick.index), style="grey62"),
        _sound(tick.chunk.audio),
        _picture(tick.chunk),
        _said(tick),
        _time_bar(tick),
        Text(f"{tick.total_ms:6.1f}", style=_LATE if tick.total_ms > TICK_MS else "grey78"),
    )
    return grid


def footer(totals: Totals) -> RenderableType:
    """Progress and totals."""
    done_ms = len(totals.tick_ms) * TICK_MS
    speed = done_ms / 1000 / totals.wall_s if totals.wall_s else 0.0
    whole_ms = totals.media_ms or done_ms or 1
    progress = Table.grid(padding=(0, 1))
    progress.add_row(
        Text(f"{done_ms / 1000:5.1f} of {whole_ms / 1000:.1f} s", style="bold"),
        ProgressBar(whole_ms, min(done_ms, whole_ms), width=40, complete_style="spring_green3"),
        Text(f"{speed:.1f}x real time", style="grey62"),
    )
    late = Text(f"{totals.num_late} late", style=_LATE if totals.num_late else "spring_green3")
    times = Text.assemble(
        ("tick  ", "grey50"),
        f"median {totals.percentile_ms(50):.1f} ms, 95% {totals.percentile_ms(95):.1f}, "
        f"slowest {totals.percentile_ms(100):.1f} of {TICK_MS}, ",
        late,
    )
    counts = Text.assemble(
        ("sum   ", "grey50"),
        f"ticks {len(totals.tick_ms)}, silent {totals.num_silent}, tokens out {totals.num_tokens}, "
        f"calls {totals.num_calls}, "
        + (f"spoken {totals.spoken_s:.1f} s, " if totals.spoken_s else "")
        + f"positions {totals.position}, "
        f"memory {totals.kv_bytes / 2**20:.1f} MiB",
    )
    load = Text.assemble(("load  ", "grey50"), (_spark(totals.tick_ms[-60:]), _DECODE))
    return Padding(Group(progress, times, counts, load), (1, 0, 0, 0))


def plain_line(tick: TickView) -> str:
    """One tick as a line of text, for files and pipes."""
    chunk = tick.chunk
    came = []
    if chunk.audio is not None:
        came.append(f"sound {_level_db(chunk.audio):.0f} dB")
    if chunk.frames:
        came.append(f"{len(chunk.frames)} frames")
    if chunk.text:
        came.append(f"text {chunk.text!r}")
    went = _said(tick).plain
    return f"{_clock(tick.index)}  in: {', '.join(came) or 'nothing'}  out: {went}  " + (
        f"{tick.total_ms:.1f} of {TICK_MS} ms"
    )


def job_line(line: str) -> Text:
    """What a background job did, under the tick in which it was seen."""
    return Text(f"         {_visible(line)}", style=_JOB)


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=7, justify="right")
    grid.add_column(width=5)
    grid.add_column(width=_THUMB_WIDTH)
    grid.add_column(width=30, no_wrap=True, overflow="ellipsis")
    grid.add_column(width=_BAR_WIDTH)
    grid.add_column(width=6, justify="right")
    return grid


def _clock(index: int) -> str:
    seconds = index * TICK_MS / 1000
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"


def _sound(audio_S: NDArray[np.float32] | None) -> Text:
    if audio_S is None:
        return Text("none", style=_QUIET)
    bars = Text()
    for bar, level in _levels(audio_S):
        color = "spring_green3" if level < 0.75 else "gold3" if level < 0.9 else "red1"
        bars.append(bar, style=color)
    return bars


def _levels(audio_S: NDArray[np.float32], hop: int = _HOP) -> Iterator[tuple[str, float]]:
    """A bar and a level from 0 to 1 for each ``hop`` samples."""
    for start in range(0, len(audio_S), hop):
        level = 1.0 - _level_db(audio_S[start : start + hop]) / _QUIET_DB
        yield _BARS[1 + round(level * (len(_BARS) - 2))], level


def _level_db(audio_S: NDArray[np.float32]) -> float:
    rms = float(np.sqrt(np.square(audio_S, dtype=np.float64).mean()))
    return max(_QUIET_DB, 20.0 * float(np.log10(rms))) if rms > 0.0 else _QUIET_DB


def _picture(chunk: Chunk) -> Text:
    if not chunk.frames:
        return Text("none", style=_QUIET)
    frame = chunk.frames[0]
    rows = np.array_split(frame, 2, axis=0)
    thumb = Text()
    for x in range(_THUMB_WIDTH):
        colors = []
        for part in rows:
            width = part.shape[1]
            start, stop = x * width // _THUMB_WIDTH, (x + 1) * width // _THUMB_WIDTH
            cell = part[:, start : max(stop, start + 1)] if part.size else frame
            red, green, blue = cell.reshape(-1, 3).mean(axis=0).astype(int)
            colors.append(f"rgb({red},{green},{blue})")
        thumb.append("▀", style=f"{colors[0]} on {colors[1]}")
    return thumb


def _said(tick: TickView) -> Text:
    said = Text()
    for event in tick.result.events:
        if isinstance(event, Silence):
            said.append("silence", style=_QUIET)
        elif isinstance(event, TextToken):
            style = _QUIET if event.channel == "thinking" else _SPOKEN
            said.append(_visible(event.text), style=style)
        elif isinstance(event, AudioChunk):
            bars = "".join(bar for bar, _ in _levels(event.pcm, event.sample_rate // 20))
            said.append(f"♪{bars} ", style=_HEARD)
        elif isinstance(event, ToolCall):
            args = ", ".join(f"{name}={value!r}" for name, value in event.args.items())
            call = event.error or f"{event.name}({args})"
            said.append(f"calls {_visible(call)}", style=_CALLED)
        elif isinstance(event, Notice):
            said.append(f"[{event.kind}] ", style=_WARNED)
    if not said.plain and not tick.result.done.token_ids:
        said.append("taken in", style=_QUIET)
    return said if said.plain else Text("writes a call", style=_CALLED)


def _visible(text: str) -> str:
    """``text`` with one visible cell for what has none, or would turn the line around."""
    return "".join(_visible_char(char) for char in text)


def _visible_char(char: str) -> str:
    code = ord(char)
    if code < 0x20 or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)
    is_plain = char.isprintable() and not unicodedata.combining(char)
    is_forward = unicodedata.bidirectional(char) not in {"R", "AL", "AN"}
    return char if is_plain and is_forward else "·"


def _time_bar(tick: TickView) -> Text:
    stats = tick.result.stats
    prefill_ms = (stats.queued_ms or 0.0) + (stats.prefill_ms or 0.0)
    total = min(_BAR_WIDTH, max(1, round(tick.total_ms * _BAR_WIDTH / TICK_MS)))
    prefill = min(total, round(prefill_ms * _BAR_WIDTH / TICK_MS))
    is_late = tick.total_ms > TICK_MS
    return Text.assemble(
        ("━" * prefill, _LATE if is_late else _PREFILL),
        ("━" * (total - prefill), _LATE if is_late else _DECODE),
        ("━" * (_BAR_WIDTH - total), _FREE),
    )


def _spark(tick_ms: list[float]) -> str:
    top = len(_BARS) - 1
    return "".join(_BARS[min(top, 1 + int(one * (top - 1) / TICK_MS))] for one in tick_ms)
