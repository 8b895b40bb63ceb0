"""What the tests of evals share: items made by hand, and players that follow the script."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tml_core.data import Expected, Script, Spoken, Voice
from tml_core.data.augment import Sound
from tml_core.evals import Call, Item, Played

TICK = 3200
CLEAN = Sound(gain_db=0.0, snr_db=300.0, slope=0.0, rt60_s=0.0, echo_db=0.0, seed=0)
VOICE = Voice("espeak", "en-029")


def an_item(
    task: str,
    num_ticks: int,
    expected: Sequence[Expected] = (),
    spans: Sequence[tuple[int, int]] = ((0, TICK),),
    index: int = 0,
    phrasing: str = "",
    scene: object = None,
) -> Item:
    """An item without media; ``spans`` in samples; ``scene``: anything with reps and visits."""
    spoken = tuple(Spoken(start, "words", VOICE) for start, _ in spans)
    seen: Any = scene
    script = Script(task, "held_out", phrasing, num_ticks, spoken, tuple(expected), CLEAN, seen)
    return Item(task, index, script, tuple(spans), ())


def a_scene(
    *reps: tuple[str, float, float, bool], visits: tuple[tuple[float, float], ...] = ()
) -> SimpleNamespace:
    """Repetitions as (action, start, end, whether a bystander does it)."""
    made = tuple(
        SimpleNamespace(action=name, start_s=start, end_s=end, is_other=is_other)
        for name, start, end, is_other in reps
    )
    return SimpleNamespace(reps=made, visits=visits)


def written(num_ticks: int, *said: tuple[int, str]) -> Played:
    """What was written in some ticks, and nothing in the others."""
    texts = [""] * num_ticks
    for tick, text in said:
        texts[tick] = text
    return Played(tuple(texts))


@dataclass(frozen=True)
class ScriptedPlayer:
    """Does what is due, ``off`` ticks late, as ``say`` puts it; a whole answer in one tick."""

    name: str = "perfect"
    off: int = 0
    say: Callable[[str], str] = str

    def play(self, items: Iterable[Item]) -> Iterator[tuple[Item, Played]]:
        for item in items:
            num_ticks = item.script.num_ticks
            texts, calls = [""] * num_ticks, []
            for one in item.expected:
                tick = min(max(0, one.tick + self.off), num_ticks - 1)
                if one.text:
                    texts[tick] += f" {self.say(one.text)}"
                if one.call is not None:
                    calls.append(Call(tick, one.call[0], one.call[1]))
            results = tuple(tick for tick, _ in item.script.results)
            yield item.without_media(), Played(tuple(texts), tuple(calls), results)


class ChattyPlayer:
    """Says "oh" in every fifth tick from the first on."""

    name = "chatty"

    def play(self, items: Iterable[Item]) -> Iterator[tuple[Item, Played]]:
        for item in items:
            num_ticks = item.script.num_ticks
            texts = tuple("" if tick % 5 else " oh" for tick in range(num_ticks))
            yield item.without_media(), Played(texts, (), (None,) * len(item.script.results))
