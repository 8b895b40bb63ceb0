"""Play held-out interactions and score what was done."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

from tml_core.data import SpeechBank, cache_folder
from tml_core.data.bank import SPLITS, Split
from tml_core.engine.model import Model, load_model
from tml_core.errors import InvalidArgument
from tml_core.evals.item import Item, make_items
from tml_core.evals.played import Played
from tml_core.evals.player import ModelPlayer, Player
from tml_core.evals.report import Record, Report
from tml_core.evals.suite import Suite
from tml_core.evals.suites import chosen_suites, tasks_of
from tml_core.media.micro_turns import TICK_MS

__all__ = ["NUM_SESSIONS", "Watch", "evaluate", "evaluate_all"]

NUM_SESSIONS: Final = 16  # of a model that is loaded here
_GROUP: Final = 64

Watch = Callable[[str, int, int], None]


def evaluate(
    player: Player | Model | str | Path,
    suites: str | Sequence[str] = "all",
    num_items: int = 100,
    seed: int = 0,
    *,
    split: Split = "held_out",
    typed: float = 0.0,
    bank: SpeechBank | None = None,
    watch: Watch | None = None,
) -> Report:
    """Play the first ``num_items`` interactions of each task that the suites need, and score them.

    ``player``: a model, a checkpoint directory or "nano", which then runs in live sessions at
    temperature 0, or any `Player`. An item that several suites want is played once. ``seed``: of
    the interactions; choose models with ``split="train"`` and a seed that training does not use,
    never by "held_out". ``typed``: the share of requests that are typed, which tells what is
    misheard from what is misdone. ``bank``: who speaks; all engines of this machine by default.
    ``watch`` is told who plays, how many items are done, and how many there are.

    Raises InvalidArgument for an unknown suite or split or no items, and what `load_model` raises.
    """
    (report,) = evaluate_all(
        [player], suites, num_items, seed, split=split, typed=typed, bank=bank, watch=watch
    )
    return report


def evaluate_all(
    players: Sequence[Player | Model | str | Path],
    suites: str | Sequence[str] = "all",
    num_items: int = 100,
    seed: int = 0,
    *,
    split: Split = "held_out",
    typed: float = 0.0,
    bank: SpeechBank | None = None,
    watch: Watch | None = None,
) -> list[Report]:
    """`evaluate` for several players, who get the same items, each made once."""
    if num_items < 1:
        raise InvalidArgument(f"num_items: expected at least 1, got {num_items}")
    if split not in SPLITS:
        raise InvalidArgument(f"split: expected one of {list(SPLITS)}, got {split!r}")
    wanted = chosen_suites(suites if isinstance(suites, str) else tuple(suites))
    if bank is None:
        with SpeechBank(cache=cache_folder()) as own:
            return evaluate_all(
                players,
                suites,
                num_items,
                seed,
                split=split,
                typed=typed,
                bank=own,
                watch=watch,
            )
    playing = [_Playing(_player(one)) for one in players]
    tasks = list(dict.fromkeys(task for suite in wanted for task in tasks_of(suite)))
    stream = make_items(seed, split, tasks, num_items, bank, typed)
    num_all = len(tasks) * num_items
    # In groups: what is heard and seen in all items would be gigabytes.
    while group := list(islice(stream, _GROUP)):
        for one in playing:
            begun_s = time.perf_counter()
            for item, played in one.player.play(group):
                one.done.append((item, played))
                if watch is not None:
                    watch(one.player.name, len(one.done), num_all)
            one.wall_s += time.perf_counter() - begun_s
    reports = []
    for one in playing:
        one.done.sort(key=lambda pair: (tasks.index(pair[0].task), pair[0].index))
        records = tuple(_record(item, played, wanted) for item, played in one.done)
        scores = {
            suite.name: suite.score(
                [record.marks[suite.name] for record in records if suite.name in record.marks], seed
            )
            for suite in wanted
        }
        media_s = sum(item.script.num_ticks for item, _ in one.done) * TICK_MS / 1000
        reports.append(
            Report(
                player=one.player.name,
                split=split,
                typed=typed,
                seed=seed,
                num_items=num_items,
                engines=bank.engines,
                scores=scores,
                records=records,
                wall_s=one.wall_s,
                media_s=media_s,
            )
        )
    return reports


@dataclass
class _Playing:
    """A player, and what it has done."""

    player: Player
    done: list[tuple[Item, Played]] = field(default_factory=list)
    wall_s: float = 0.0


def _player(given: Player | Model | str | Path) -> Player:
    if isinstance(given, (str, Path)):
        loaded = load_model(given, max_sequences=NUM_SESSIONS)
        return ModelPlayer(loaded, name=Path(given).name)
    return ModelPlayer(given) if isinstance(given, Model) else given


def _record(item: Item, played: Played, suites: Sequence[Suite]) -> Record:
    marks = {suite.name: suite.mark(item, played) for suite in suites if item.task in suite.tasks}
    voice = item.script.spoken[0].voice if item.script.spoken else None
    return Record(
        key=item.key,
        phrasing=item.script.phrasing,
        voice="" if voice is None else f"{voice.engine}/{voice.name}",
        said=tuple((tick, text) for tick, text in enumerate(played.texts) if text),
        expected=tuple((one.tick, one.text) for one in item.expected),
        marks=marks,
    )
