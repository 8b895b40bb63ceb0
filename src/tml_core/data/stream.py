"""Scripts made into what a model lives through, and the endless stream of them.

Everything random of interaction ``index`` comes from a generator keyed by (seed, index) and the
split: any one can be made alone, anywhere, in any order.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Final

import numpy as np
from numpy.random import Generator, Philox

from tml_core.data.augment import apply_sound
from tml_core.data.bank import SPLITS, SpeechBank, Split, as_split, cache_folder
from tml_core.data.figure import render
from tml_core.data.script import Expected, Script, ScriptWriter, perform
from tml_core.data.tasks import TASKS
from tml_core.errors import InvalidArgument
from tml_core.layout.chunk import Chunk, ToolResult
from tml_core.layout.micro_turn import MicroTurnLayout, MicroTurnState
from tml_core.media.micro_turns import TICK_MS, TICK_SAMPLES
from tml_core.train.packing import Transcript

__all__ = ["DATA_VERSION", "Interaction", "interaction", "interactions", "render_script"]

# Raise it when an interaction of the same seed is no longer the same.
DATA_VERSION: Final = 4
_FRAMES_PER_TICK: Final = 2
_MAX_LATE_TICKS: Final = 10  # that text may be spelled without a break while more is due


@dataclass(frozen=True, eq=False)
class Interaction:
    """A rendered script: ``chunks``, what comes in at each tick."""

    script: Script
    chunks: tuple[Chunk, ...]

    @property
    def expected(self) -> Mapping[int, Expected]:
        """What the model should begin, by tick; a tick that is not here begins nothing."""
        return {one.tick: one for one in self.script.expected}

    def runs(self, layout: MicroTurnLayout) -> list[list[int]]:
        """What should be sampled in each tick, as `MicroTurnLayout.encode_session` takes it.

        What is too long for a tick goes on in the next ones, and what is due then comes after it.
        Every word begins with a space. Raises InvalidArgument where a call is due while something
        goes on, something while a call goes on, or text comes too late.
        """
        tokens = layout.grammar.tokens
        runs: list[list[int]] = []
        going_on: deque[int] = deque()
        is_calling, since = False, 0
        state = layout.initial_state()
        expected = self.expected
        for tick in range(len(self.chunks)):
            if (due := expected.get(tick)) is not None:
                if going_on and (is_calling or due.call or tick > since + _MAX_LATE_TICKS):
                    raise InvalidArgument(
                        f"script: {self.script.task}: tick {tick} has output, but what came "
                        f"before needs {len(going_on)} more tokens"
                    )
                if not going_on:
                    since = tick
                # A space before every word, so that each has one spelling.
                text = f" {due.text}" if due.text else ""
                is_calling = due.call is not None
                call = None if due.call is None else (due.call[0], dict(due.call[1]))
                going_on.extend(layout.encode_output(state, text, call))
            if not going_on:
                runs.append([tokens.silence])
                continue
            # What comes in does not change how the output is spelled.
            output = layout.begin_output(state)
            run: list[int] = []
            while not output.is_done:
                closing = tokens.end_out if run else tokens.silence
                run.append(going_on.popleft() if going_on else closing)
                output.accept(run[-1], 0.0)
            state = _advanced(output.state)
            runs.append(run)
        if going_on:
            raise InvalidArgument(
                f"script: {self.script.task}: ends {len(going_on)} tokens before its output does"
            )
        return runs

    def transcript(self, layout: MicroTurnLayout) -> Transcript:
        """What a trainer learns from, laid out by the code that lays out live sessions."""
        ticks = zip(self.chunks, self.runs(layout), strict=True)
        segments, streams = layout.encode_session(ticks)
        return Transcript.next_tokens(segments, streams)


def interactions(
    seed: int,
    split: Split = "train",
    *,
    bank: SpeechBank | None = None,
    tasks: Sequence[str] | None = None,
    start: int = 0,
    num: int | None = None,
    typed: float = 0.0,
) -> Iterator[Interaction]:
    """Interactions ``start``, ``start`` + 1, ... of a seed; ``num`` of them, or without end.

    ``bank``: who speaks; by default every engine of this machine, and the user's cache folder.
    ``tasks``: names from `TASKS`, by default all. ``typed``: the share of requests that are typed
    where they would be said; what to do is learned from those before it can be heard.
    """
    if bank is None:
        with SpeechBank(cache=cache_folder()) as own:
            yield from interactions(
                seed, split, bank=own, tasks=tasks, start=start, num=num, typed=typed
            )
        return
    for index in islice(count(start), num):
        yield interaction(seed, index, split, bank=bank, tasks=tasks, typed=typed)


def interaction(
    seed: int,
    index: int,
    split: Split = "train",
    *,
    bank: SpeechBank,
    tasks: Sequence[str] | None = None,
    typed: float = 0.0,
) -> Interaction:
    """Interaction ``index`` of a seed, the same as in the stream.

    Raises InvalidArgument for a negative number, an unknown split or task, and for a share that is
    none.
    """
    if not 0.0 <= typed <= 1.0:
        raise InvalidArgument(f"typed: expected a share of requests, 0 to 1, got {typed}")
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 1 << 64:
            raise InvalidArgument(f"{name}: expected 0 to 2**64 - 1, got {value}")
    as_split(split)
    names = tuple(TASKS) if tasks is None else tuple(tasks)
    for name in names:
        if name not in TASKS:
            raise InvalidArgument(f"tasks: expected some of {list(TASKS)}, got {name!r}")
    if not names:
        raise InvalidArgument("tasks: expected at least one, got none")
    # The low counter words are the generator's own; the top one keeps the splits apart.
    rng = Generator(Philox(key=[seed, index], counter=[0, 0, 0, SPLITS.index(split)]))
    weights = np.array([TASKS[name].weight for name in names])
    task = TASKS[names[int(rng.choice(len(names), p=weights / weights.sum()))]]
    writer = ScriptWriter(task.name, split, bank, rng, typed)
    task.write(writer)
    return render_script(writer.finish(), bank)


def render_script(script: Script, bank: SpeechBank) -> Interaction:
    """The script's sound and pictures, cut into ticks."""
    pcm_S = np.zeros(script.num_ticks * TICK_SAMPLES, np.float32)
    for spoken in script.spoken:
        said_S = perform(spoken, bank).pcm[: len(pcm_S) - spoken.start]
        pcm_S[spoken.start : spoken.start + len(said_S)] += said_S
    pcm_S = apply_sound(pcm_S, script.sound)
    results = dict[int, list[ToolResult]]()
    for tick, result in script.results:
        results.setdefault(tick, []).append(result)
    typed = dict(script.typed)
    chunks = []
    for tick in range(script.num_ticks):
        start_s = tick * TICK_MS / 1000
        step_s = TICK_MS / 1000 / _FRAMES_PER_TICK
        frames = [
            render(script.scene, start_s + frame * step_s)
            for frame in range(_FRAMES_PER_TICK)
            if script.scene is not None
        ]
        chunks.append(
            Chunk(
                audio=pcm_S[tick * TICK_SAMPLES : (tick + 1) * TICK_SAMPLES],
                frames=frames,
                text=typed.get(tick),
                items=tuple(results.get(tick, ())),
            )
        )
    return Interaction(script, tuple(chunks))


def _advanced(state: object) -> MicroTurnState:
    assert isinstance(state, MicroTurnState)
    return state
