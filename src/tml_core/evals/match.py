"""Which of what was said answers which of what was due."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tml_core.data import Expected
from tml_core.evals.played import PAUSE_TICKS, Word, normal_words

__all__ = ["Match", "Matching", "match"]


@dataclass(frozen=True)
class Match:
    """``off``: ticks from when ``expected`` was due to when it was said, None if it never was.
    ``is_right``: said, and in the window."""

    expected: Expected
    off: int | None
    is_right: bool


@dataclass(frozen=True)
class Matching:
    """``matches`` of all that was due, and the words that answer nothing."""

    matches: tuple[Match, ...]
    extra: tuple[Word, ...]

    @property
    def is_right(self) -> bool:
        """Whether all came in time, and nothing else."""
        return not self.extra and all(one.is_right for one in self.matches)


def match(words: Sequence[Word], due: Sequence[Expected], early: int, late: int) -> Matching:
    """Each text that is due takes the nearest words that say exactly it, one after the other
    without a long pause; each word answers one thing. In the window it is if its first word was
    begun at most ``early`` ticks before and ``late`` after its tick."""
    left = list(range(len(words)))
    matches = []
    for one in due:
        wanted = normal_words(one.text)
        if not wanted:
            continue
        found = [
            run
            for at in range(len(left) - len(wanted) + 1)
            if _says(words, run := left[at : at + len(wanted)], wanted)
        ]
        best = min(found, key=lambda run: abs(words[run[0]].start - one.tick), default=None)
        off = None if best is None else words[best[0]].start - one.tick
        matches.append(Match(one, off, off is not None and -early <= off <= late))
        left = [index for index in left if best is None or index not in best]
    return Matching(tuple(matches), tuple(words[index] for index in left))


def _says(words: Sequence[Word], run: Sequence[int], wanted: Sequence[str]) -> bool:
    if run[-1] - run[0] != len(run) - 1 or [words[i].text for i in run] != wanted:
        return False
    return all(words[b].start - words[a].end <= PAUSE_TICKS + 1 for a, b in pairwise(run))
