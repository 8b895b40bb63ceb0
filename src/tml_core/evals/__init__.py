"""How well a model does what it should in time: suites of held-out interactions, played live.

    from tml_core.evals import evaluate, evaluate_all
    report = evaluate("path/to/model", "timespeak", num_items=200)
    report.scores["timespeak"]                 # value, interval, groups

What is played (item), who plays (player), what was done (played), how it is marked (match, metrics,
one file a suite in suites/) and what comes of it (suite, report). Needs the extra ``train``, which
makes the interactions.
"""

from tml_core.evals.cascade import CascadePlayer
from tml_core.evals.evaluate import evaluate, evaluate_all
from tml_core.evals.item import Item, make_items
from tml_core.evals.played import Call, Played, Word
from tml_core.evals.player import ModelPlayer, Player, SilentPlayer
from tml_core.evals.report import Record, Report
from tml_core.evals.suite import Mark, Score, Suite
from tml_core.evals.suites import SUITES

__all__ = [
    "SUITES",
    "Call",
    "CascadePlayer",
    "Item",
    "Mark",
    "ModelPlayer",
    "Played",
    "Player",
    "Record",
    "Report",
    "Score",
    "SilentPlayer",
    "Suite",
    "Word",
    "evaluate",
    "evaluate_all",
    "make_items",
]
