"""The suites, one file each (or two of a kind); a suite is here if the data have a task of its."""

from typing import Final

from tml_core.data import TASKS
from tml_core.errors import InvalidArgument
from tml_core.evals.suite import Suite
from tml_core.evals.suites import (
    answers,
    backchannel,
    cuespeak,
    delegate,
    events,
    falsealarms,
    interruption,
    localisation,
    others,
    refusals,
    repcount,
    sessions,
    timespeak,
    transcribe,
    turntaking,
)

__all__ = ["SUITES", "chosen_suites", "tasks_of"]

SUITES: Final = {
    suite.name: suite
    for suite in (
        timespeak.SUITE,
        cuespeak.SUITE,
        repcount.SUITE,
        events.SUITE,
        localisation.SUITE,
        turntaking.SUITE,
        interruption.SUITE,
        backchannel.SUITE,
        others.SUITE,
        falsealarms.SUITE,
        transcribe.TRANSCRIBE,
        transcribe.TRANSLATE,
        answers.ECHO,
        answers.SUM,
        delegate.SUITE,
        refusals.SUITE,
        sessions.SUITE,
    )
    if any(task in TASKS for task in suite.tasks)
}


def chosen_suites(names: str | list[str] | tuple[str, ...]) -> list[Suite]:
    """Suites by name, or "all"; in the registry's order. Raises InvalidArgument for others."""
    wanted = [names] if isinstance(names, str) else list(names)
    if "all" in wanted:
        return list(SUITES.values())
    for name in wanted:
        if name not in SUITES:
            raise InvalidArgument(f"suites: expected 'all' or some of {list(SUITES)}, got {name!r}")
    return [suite for name, suite in SUITES.items() if name in wanted]


def tasks_of(suite: Suite) -> list[str]:
    """Those of the suite's tasks that the data have."""
    return [task for task in suite.tasks if task in TASKS]
