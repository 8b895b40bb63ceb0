"""The picture of reports: whole for every mix of suites, refused where it cannot be."""

import sys
from pathlib import Path

import pytest

from evals_kit import a_scene, an_item, written
from tml_core import errors
from tml_core.data import Expected
from tml_core.evals import SUITES, Record, Report
from tml_core.evals.plot import plot_reports

PNG = b"\x89PNG"


def a_report(player: str, names: list[str], late: int | None) -> Report:
    """One item a suite, answered ``late`` ticks late or not at all."""
    records, scores = [], {}
    for name in names:
        suite = SUITES[name]
        due = [Expected(20, "3"), Expected(30, "4")]
        if name == "delegate":
            due = [Expected(20, call=("background", {}))]
        scene = a_scene(("waves", 3.0, 6.0, False))
        item = an_item(suite.tasks[0], 60, due, [(0, 60 * 3200)], scene=scene)
        said = () if late is None else ((20 + late, "3"), (30 + late, "4"))
        mark = suite.mark(item, written(60, *said))
        records.append(Record(item.key, "", "", (), (), {name: mark}))
        scores[name] = suite.score([mark])
    return Report(player, "held_out", 0.0, 0, 1, ("espeak",), scores, tuple(records), 1.0, 12.0)


@pytest.mark.parametrize(
    "names", [list(SUITES), ["timespeak"], ["turntaking"], ["others", "sum"]], ids=len
)
def test_a_picture_of_any_suites(tmp_path: Path, names: list[str]) -> None:
    pytest.importorskip("matplotlib")
    reports = [a_report("model", names, 1), a_report("silent", names, None)]
    plot_reports(reports, tmp_path / "eval.png")
    assert (tmp_path / "eval.png").read_bytes().startswith(PNG)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = a_report("model", ["sum"], 0)
    with pytest.raises(errors.InvalidArgument, match=r"path: cannot write .*no such folder"):
        plot_reports([report], tmp_path / "no" / "eval.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(errors.MissingExtra, match=r"pip install 'tml_core\[plot\]'"):
        plot_reports([report], tmp_path / "eval.png")
