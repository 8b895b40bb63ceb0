"""The cascade, a baseline: voice activity, recognition, rules and a written reply.

It is what a turn-taking harness can do with its ears alone and the best of rules: timers it keeps
exactly, but it hears nothing before an utterance is over and half a second of silence has passed.
Recognising and replying are taken to take no time, which is more than fair.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from tml_core.data import tick_at
from tml_core.evals.item import Item
from tml_core.evals.played import Call, Played
from tml_core.evals.recogniser import Detector, Recogniser, Utterance
from tml_core.evals.rules import Action, Rules
from tml_core.media.micro_turns import TICK_SAMPLES

__all__ = ["CascadePlayer"]


class CascadePlayer:
    """Plays one item after another. Raises as `Detector` and `Recogniser`, when it is made."""

    name = "cascade"

    def __init__(
        self, detector: Detector | None = None, recogniser: Recogniser | None = None
    ) -> None:
        self._detector = detector or Detector()
        self._recogniser = recogniser or Recogniser()

    def play(self, items: Iterable[Item]) -> Iterator[tuple[Item, Played]]:
        """Each item, by what could be known at each time."""
        for item in items:
            yield item.without_media(), self._played(item)

    def _played(self, item: Item) -> Played:
        silence_S = np.zeros(TICK_SAMPLES, np.float32)
        pcm_S = np.concatenate(
            [silence_S if one.audio is None else one.audio for one in item.chunks]
        )
        utterances = self._detector.utterances(pcm_S)
        rules = Rules()
        for chunk in item.chunks:
            if chunk.text:
                rules.typed(chunk.text)
        for one in utterances:
            text = self._recogniser.text(pcm_S[one.start : one.end])
            rules.heard(text, one.end, one.known)
        return perform(item, rules.actions, utterances)


def perform(item: Item, actions: Iterable[Action], utterances: Iterable[Utterance]) -> Played:
    """Actions put into ticks, and results said once nobody speaks."""
    num_ticks = item.script.num_ticks
    texts, calls = [""] * num_ticks, []
    for action in sorted(actions, key=lambda one: one.at):
        tick = tick_at(action.at)
        if tick >= num_ticks:
            continue
        if action.text:
            texts[tick] += f" {action.text}"
        if action.call is not None:
            calls.append(Call(tick, *action.call))
    spans = [(one.start, one.known) for one in utterances]
    results: list[int | None] = []
    for at, result in item.script.results:
        made = [one.tick for one in calls]
        came = max(at, made[0] + 1) if made else at
        if (result.name is None and not made) or came >= num_ticks:
            results.append(None)
            continue
        results.append(came)
        free = (came + 1) * TICK_SAMPLES
        for start, known in spans:
            free = known if start < free < known else free
        if (tick := tick_at(free)) < num_ticks:
            texts[tick] += f" {result.text()}"
    return Played(tuple(texts), tuple(calls), tuple(results))
