"""An interaction as a picture: what is heard, seen and typed over time, and what is due when.

Needs matplotlib: ``pip install tml_core[plot]``.
"""

from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tml_core.data.stream import Interaction
from tml_core.errors import MissingExtra
from tml_core.media.audio_file import SAMPLE_RATE
from tml_core.media.micro_turns import TICK_MS, TICK_SAMPLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_sheet"]

_ROW_TICKS: Final = 100
_FRAME_EVERY: Final = 4  # ticks; a picture is as wide as three
_WAVE, _USER, _OTHER, _DUE, _CALL, _TYPED = (
    *("#5b7c99", "#22313f", "#9aa5ad", "#c1121f", "#6a4c93", "#2a9d8f"),
)
# Heights in the picture: frames, what is said by people, waveform, what is due.
_FRAMES_AT, _SAID_AT, _WAVE_AT, _DUE_AT = 3.4, 2.2, 1.0, -0.5


def draw_sheet(one: Interaction, path: str | Path) -> None:
    """Write a PNG of ``one``, a row for every 20 s. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra(
            "show: needs matplotlib; install it with: pip install 'tml_core[plot]'"
        ) from None
    num_rows = -(-len(one.chunks) // _ROW_TICKS)
    figure = Figure(figsize=(20, 0.8 + 3.0 * num_rows), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    script = one.script
    asked = ", ".join(dict.fromkeys(task for task, _ in script.requests))
    figure.suptitle(f"{script.task} ({script.split}): {asked}", ha="left", x=0.01)
    grid: Any = figure.subplots(num_rows, 1, squeeze=False)
    for row, axes in enumerate(grid[:, 0]):
        _draw_row(axes, one, row * _ROW_TICKS)
    figure.savefig(path)


def _draw_row(axes: "Axes", one: Interaction, first: int) -> None:
    seconds = TICK_MS / 1000
    start_s, end_s = first * seconds, (first + _ROW_TICKS) * seconds
    axes.set(xlim=(start_s, end_s), ylim=(-2.2, 4.4), yticks=[])
    axes.set_xticks(np.arange(start_s, end_s + 0.01))
    axes.set_xticks(np.arange(start_s, end_s, seconds), minor=True)
    axes.grid(which="minor", axis="x", color="#eeeeee", linewidth=0.5)
    axes.spines[["top", "left", "right"]].set_visible(False)
    chunks = one.chunks[first : first + _ROW_TICKS]
    _draw_wave(axes, one, first)
    for index, chunk in enumerate(chunks):
        at_s = start_s + index * seconds
        if chunk.frames and not index % _FRAME_EVERY:
            width = 3.4 * seconds
            extent = (at_s, at_s + width, _FRAMES_AT - 0.8, _FRAMES_AT + 1.0)
            axes.imshow(chunk.frames[0], extent=extent, aspect="auto", zorder=1)
        told = [chunk.text] if chunk.text else []
        told += [f"result: {item.text()}" for item in chunk.items]
        if told:
            axes.text(at_s, _SAID_AT - 0.4, " ".join(told), color=_TYPED, fontsize=8, va="center")
    axes.set(xlim=(start_s, end_s), ylim=(-2.2, 4.4))
    user = one.script.spoken[0].voice if one.script.spoken else None
    for spoken in one.script.spoken:
        at_s = spoken.start / SAMPLE_RATE
        if start_s <= at_s < end_s:
            color = _USER if spoken.voice == user else _OTHER
            text = shorten(spoken.text, 90, placeholder="...")
            axes.text(at_s, _SAID_AT, text, color=color, fontsize=9, va="center", clip_on=True)
    for number, due in enumerate(one.script.expected):
        if not first <= due.tick < first + _ROW_TICKS:
            continue
        # The output half of a tick comes when its input has been heard.
        at_s = (due.tick + 1) * seconds
        text = due.text + (f" {due.call[0]}({dict(due.call[1])})" if due.call else "")
        color = _CALL if due.call else _DUE
        axes.plot([at_s, at_s], [_DUE_AT + 0.1, _WAVE_AT + 0.8], color=color, linewidth=0.8)
        lane = _DUE_AT - 0.4 * (number % 4)
        axes.text(at_s, lane, text, color=color, fontsize=9, va="center", clip_on=True)


def _draw_wave(axes: "Axes", one: Interaction, first: int) -> None:
    pcm = [chunk.audio for chunk in one.chunks[first : first + _ROW_TICKS]]
    heard_S = np.concatenate([part for part in pcm if part is not None])
    step = TICK_SAMPLES // 20
    loud = np.abs(heard_S[: len(heard_S) // step * step]).reshape(-1, step).max(axis=1)
    at_s = first * TICK_MS / 1000 + (np.arange(len(loud)) + 0.5) * step / SAMPLE_RATE
    height = 0.8 * loud / max(float(loud.max(initial=0.0)), 1e-3)
    axes.fill_between(at_s, _WAVE_AT - height, _WAVE_AT + height, color=_WAVE, linewidth=0)
