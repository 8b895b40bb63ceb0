"""A live session as a picture: what came in and went out over time, and what each tick took.

Needs matplotlib: ``pip install tml_core[plot]``.
"""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tml_core.cli.timeline import TickView
from tml_core.errors import InvalidArgument, MissingExtra
from tml_core.layout.events import AudioChunk, Notice, TextToken, ToolCall
from tml_core.media.audio_file import SAMPLE_RATE
from tml_core.media.micro_turns import TICK_MS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RunPicture"]

_TICK_S: Final = TICK_MS / 1000
_ROW_TICKS: Final = 100  # of 20 s, or more of them where there would be too many rows
_MOST_ROWS: Final = 12
_POINTS: Final = 20  # of a waveform, in each tick
_INK, _FAINT, _HEARD, _SPOKEN = "#22313f", "#9aa5ad", "#5b7c99", "#2a9d8f"
_CALLED, _TYPED, _WARNED = "#6a4c93", "#b5651d", "#c1121f"
_INPUT, _OUTPUT = "#5b7c99", "#2a9d8f"
# From the top: pictures, what is typed or comes back, sound in, words, sound out, milliseconds.
_FRAMES_AT, _TYPED_AT, _HEARD_AT, _WORDS_AT, _SAID_AT = 4.3, 3.05, 2.2, 1.1, -0.35
_BARS_AT, _BARS_HIGH = -2.1, 0.9
_NUM_LANES: Final = 3
_SECONDS_PER_LETTER: Final = 0.115  # of 20 s in a row
_SECONDS_PER_FRAME: Final = 0.8


class RunPicture:
    """``path``: a PNG, written by `close`, with a row for every 20 s of a session.

    Raises MissingExtra without matplotlib, and InvalidArgument where the file cannot be written.
    """

    def __init__(self, path: Path, title: str) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtra(
                "plot: matplotlib is not installed; pip install 'tml_core[plot]'"
            ) from error
        if not path.parent.is_dir():
            raise InvalidArgument(f"plot: cannot write {path}: no such folder")
        self._make: type[Figure] = Figure
        self._path = path
        self._title = title
        self._ticks: list[TickView] = []

    def add(self, tick: TickView) -> None:
        """One more tick, the next."""
        self._ticks.append(tick)

    def close(self) -> None:
        """Draw it and write it; nothing where no tick was added."""
        if not self._ticks:
            return
        length = max(min(_ROW_TICKS, len(self._ticks)), -(-len(self._ticks) // _MOST_ROWS))
        rows = [self._ticks[i : i + length] for i in range(0, len(self._ticks), length)]
        figure = self._make(figsize=(20, 0.7 + 3.4 * len(rows)), dpi=90, layout="constrained")
        figure.suptitle(self._title, ha="left", x=0.01, color=_INK)
        grid: Any = figure.subplots(len(rows), 1, squeeze=False)
        for axes, ticks in zip(grid[:, 0], rows, strict=True):
            _draw_row(axes, ticks, length)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing")  # a box says so too
                figure.savefig(self._path, format="png")
        except OSError as error:
            raise InvalidArgument(f"plot: cannot write {self._path}: {error.strerror}") from error


def _draw_row(axes: "Axes", ticks: list[TickView], length: int) -> None:
    start_s = ticks[0].index * _TICK_S
    end_s = start_s + length * _TICK_S
    _draw_frames(axes, ticks, length)
    heard = [_envelope(tick.chunk.audio) for tick in ticks]
    _draw_wave(axes, start_s, heard, _HEARD_AT, _HEARD)
    names = {_HEARD_AT: "heard", _WORDS_AT: "written", _BARS_AT + 0.45: "ms"}
    if any(_said(tick) is not None for tick in ticks):
        names[_SAID_AT] = "said"
        # What a tick says is heard when its input has been heard.
        said = [_envelope(_said(tick)) for tick in ticks]
        _draw_wave(axes, start_s + _TICK_S, said, _SAID_AT, _SPOKEN)
    _draw_words(axes, ticks, length)
    _draw_bars(axes, ticks)
    axes.set(xlim=(start_s, end_s), ylim=(_BARS_AT - 0.15, _FRAMES_AT + 1.0))
    axes.set_xticks(np.arange(start_s, end_s + 0.01, max(1.0, length // _ROW_TICKS)))
    axes.set_yticks(list(names), list(names.values()), color=_FAINT)
    axes.tick_params(axis="both", length=0, labelsize=9)
    axes.grid(axis="x", color="#eef1f3", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)


def _draw_frames(axes: "Axes", ticks: list[TickView], length: int) -> None:
    step = max(1, round(length / _ROW_TICKS * _SECONDS_PER_FRAME / _TICK_S))
    for tick in ticks:
        at_s = tick.index * _TICK_S
        if tick.chunk.frames and not tick.index % step:
            box = (at_s, at_s + 0.94 * step * _TICK_S, _FRAMES_AT - 0.85, _FRAMES_AT + 0.95)
            axes.imshow(tick.chunk.frames[0], extent=box, aspect="auto", zorder=1)
        told = [tick.chunk.text] if tick.chunk.text else []
        told += [f"result: {item.text()}" for item in tick.chunk.items]
        if told:
            axes.text(at_s, _TYPED_AT, " ".join(told), color=_TYPED, fontsize=10, va="center")


def _draw_wave(
    axes: "Axes", start_s: float, ticks: list[NDArray[np.float32]], at: float, color: str
) -> None:
    loud = np.concatenate(ticks)
    at_s = start_s + (np.arange(len(loud)) + 0.5) * _TICK_S / _POINTS
    height = 0.65 * loud / max(float(loud.max()), 0.05)
    axes.fill_between(at_s, at - height, at + height, color=color, linewidth=0)


def _draw_words(axes: "Axes", ticks: list[TickView], length: int) -> None:
    """Each at the end of its tick, when it is there; in lanes, so that none covers another."""
    free_s = [-1.0] * _NUM_LANES
    per_letter = _SECONDS_PER_LETTER * length / _ROW_TICKS
    for tick in ticks:
        for text, color in _words(tick):
            at_s = (tick.index + 1) * _TICK_S
            lane = min(range(_NUM_LANES), key=lambda one: max(free_s[one], at_s))
            free_s[lane] = at_s + per_letter * (len(text) + 1)
            height = _WORDS_AT + 0.3 - 0.33 * lane
            axes.plot([at_s, at_s], [height, _HEARD_AT], color=color, linewidth=0.7, alpha=0.6)
            axes.text(at_s, height, f" {text}", color=color, fontsize=10, va="center", clip_on=True)


def _words(tick: TickView) -> list[tuple[str, str]]:
    """What a tick wrote, called and warned of, with the colour of each."""
    written = "".join(one.text for one in tick.result.events if isinstance(one, TextToken)).strip()
    found = [(written, _INK)] if written else []
    for one in tick.result.events:
        if isinstance(one, ToolCall):
            found.append((f"{one.name}({json.dumps(one.args, ensure_ascii=False)})", _CALLED))
        elif isinstance(one, Notice):
            found.append((one.message, _WARNED))
    return found


def _draw_bars(axes: "Axes", ticks: list[TickView]) -> None:
    """Input and output half of each tick; the line is 200 ms."""
    at_s = [tick.index * _TICK_S for tick in ticks]
    total = np.array([tick.total_ms for tick in ticks])
    decode = np.array([tick.result.stats.decode_ms or 0.0 for tick in ticks])
    scale = _BARS_HIGH / TICK_MS
    is_late = total > TICK_MS
    before = np.minimum(total - decode, TICK_MS) * scale
    after = np.minimum(total, TICK_MS) * scale - before
    colors = np.where(is_late, _WARNED, _OUTPUT).tolist()
    width = 0.8 * _TICK_S
    axes.bar(at_s, before, width, _BARS_AT, align="edge", color=_INPUT)
    axes.bar(at_s, after, width, _BARS_AT + before, align="edge", color=colors)
    line = _BARS_AT + _BARS_HIGH
    axes.axhline(line, color=_FAINT, linewidth=0.8, linestyle=":")
    slowest = f" 200 ms; median {np.median(total):.0f}, slowest {total.max():.0f}"
    axes.text(at_s[0], line + 0.06, slowest, color=_FAINT, fontsize=8, va="bottom")


def _said(tick: TickView) -> NDArray[np.float32] | None:
    said = [one.pcm for one in tick.result.events if isinstance(one, AudioChunk)]
    return np.concatenate(said) if said else None


def _envelope(pcm_S: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The largest magnitudes in equal parts of a tick."""
    if pcm_S is None:
        return np.zeros(_POINTS, np.float32)
    length = SAMPLE_RATE * TICK_MS // 1000
    whole_S = np.zeros(max(length, len(pcm_S)), np.float32)
    whole_S[: len(pcm_S)] = np.abs(pcm_S)
    return np.array([part.max() for part in np.array_split(whole_S, _POINTS)], np.float32)
