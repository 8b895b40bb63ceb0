"""What suites of moments record beside right and wrong: how far off, and what windows would do."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from tml_core.evals.match import Matching
from tml_core.evals.suite import Mark
from tml_core.media.micro_turns import TICK_MS

__all__ = ["timing", "timing_facts"]

_WINDOWS: Final = (1, 2, 3, 5, 10)  # ticks


def timing_facts(found: Matching) -> dict[str, Any]:
    """``off``: ticks from due to said, of all that was due; ``extra``: what else was said."""
    return {
        "off": [one.off for one in found.matches],
        "extra": [word.text for word in found.extra],
        "is_said": all(one.off is not None for one in found.matches),
        "is_alone": not found.extra,
    }


def timing(marks: Sequence[Mark]) -> dict[str, float]:
    """Shares of items whose words were said at all, of those without anything else, and of those
    that would be right in other windows; the median of how late words were, in seconds."""
    num = len(marks)
    offs = [off for one in marks for off in one.facts["off"] if off is not None]
    found = {
        "said": sum(one.facts["is_said"] for one in marks) / num,
        "nothing else": sum(one.facts["is_alone"] for one in marks) / num,
    }
    for window in _WINDOWS:
        right = [
            one.facts["is_alone"]
            and all(off is not None and abs(off) <= window for off in one.facts["off"])
            for one in marks
        ]
        found[f"within {window * TICK_MS / 1000:g} s"] = sum(right) / num
    if offs:
        found["median late s"] = float(np.median(offs)) * TICK_MS / 1000
    return found
