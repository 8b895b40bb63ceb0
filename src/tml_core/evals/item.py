"""One thing to play: an interaction, and when everybody in it speaks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from tml_core.data import Expected, Interaction, Script, SpeechBank, interactions
from tml_core.data.bank import Split
from tml_core.data.script import perform
from tml_core.layout.chunk import Chunk
from tml_core.media.micro_turns import TICK_SAMPLES

__all__ = ["Item", "make_items"]


@dataclass(frozen=True, eq=False)
class Item:
    """Interaction ``index`` of ``task``. ``spans``: for each of ``script.spoken`` its first sample
    and the one after its last. ``chunks``: what is heard and seen; () once it has been played."""

    task: str
    index: int
    script: Script
    spans: tuple[tuple[int, int], ...]
    chunks: tuple[Chunk, ...]

    @property
    def key(self) -> str:
        """What it is called in records."""
        return f"{self.task}/{self.index}"

    @property
    def expected(self) -> tuple[Expected, ...]:
        """What is due, in order of ticks."""
        return self.script.expected

    @property
    def asked(self) -> int:
        """The sample at which the first request was over, said or typed."""
        typed = self.script.typed
        return typed[0][0] * TICK_SAMPLES if typed else self.spans[0][1]

    @property
    def later_spans(self) -> tuple[tuple[int, int], ...]:
        """Those after the first request."""
        return self.spans if self.script.typed else self.spans[1:]

    def without_media(self) -> Self:
        """The same without its sound and pictures, which are most of its memory."""
        return replace(self, chunks=())

    @classmethod
    def of(cls, task: str, index: int, made: Interaction, bank: SpeechBank) -> Self:
        """An interaction with its spans; what was cut off at the end does not count."""
        limit = made.script.num_ticks * TICK_SAMPLES
        spans = []
        for one in made.script.spoken:
            end = one.start + len(perform(one, bank).pcm)
            spans.append((one.start, min(end, limit)))
        return cls(task, index, made.script, tuple(spans), made.chunks)


def make_items(
    seed: int,
    split: Split,
    tasks: Sequence[str],
    num_items: int,
    bank: SpeechBank,
    typed: float = 0.0,
) -> Iterator[Item]:
    """The first ``num_items`` interactions of each task, made as they are asked for."""
    for task in tasks:
        stream = interactions(seed, split, bank=bank, tasks=[task], num=num_items, typed=typed)
        for index, made in enumerate(stream):
            yield Item.of(task, index, made, bank)
