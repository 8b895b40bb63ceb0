"""Findings that are no line of the table: printed after it, and written beside its JSON.

    note(request.config, "growth", lambda: ("64k turn over 1k turn: 1.02", {"ratio": 1.02}))

They are worked out when the run is over, with the machine's limits as the table has them.
"""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

__all__ = ["note"]

_NAME = "tml-bench-notes"

Finding = Callable[[], tuple[str, dict[str, Any]]]


class _Note(NamedTuple):
    case: str
    finding: Finding


class _Notes:
    """A pytest plugin that prints what was noted."""

    def __init__(self) -> None:
        self.notes: list[_Note] = []

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        terminalreporter.section("noted")
        entries = []
        for one in self.notes:
            text, values = one.finding()
            terminalreporter.write_line(f"{one.case}: {text}")
            entries.append({"case": one.case, "text": text, **values})
        if config.getoption("bench_json"):
            folder = Path(__file__).parent / "results"
            folder.mkdir(exist_ok=True)
            path = folder / f"{datetime.now():%Y-%m-%d-%H%M%S}-notes.json"
            path.write_text(json.dumps(entries, indent=2) + "\n")
            terminalreporter.write_line(f"written: {path}")


def note(config: pytest.Config, case: str, finding: Finding) -> None:
    """Keep a finding for the end of the run: its line, and its values for the JSON."""
    plugin = config.pluginmanager.get_plugin(_NAME)
    if plugin is None:
        plugin = _Notes()
        config.pluginmanager.register(plugin, _NAME)
    plugin.notes.append(_Note(case, finding))
