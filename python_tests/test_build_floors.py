"""The floors: a file imports from its own floor or a lower one (CONTRIBUTING.md has the map)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "tml_core"

FLOORS = {
    **dict.fromkeys(["errors", "contract", "_ext"], 0),
    **dict.fromkeys(["ops", "media"], 1),
    "model": 2,
    **dict.fromkeys(["sequence", "layout"], 3),
    "engine": 4,
    "session": 5,
    "background": 6,
    **dict.fromkeys(["train", "data", "evals", "recipes", "safety", "serve", "load"], 7),
    "cli": 8,
    "__main__": 8,
}

# Folder of csrc -> folders whose headers it may include.
CSRC_MAY_INCLUDE = {
    "core": {"core"},
    "ops": {"core", "ops"},
    "cpu": {"core", "ops", "cpu"},
    "cuda": {"core", "ops", "cuda"},
    "step": {"core", "ops", "cpu", "cuda", "step"},
    "bindings": {"core", "ops", "cpu", "cuda", "step", "bindings"},
    "tests": {"core", "ops", "cpu", "cuda", "step", "tests"},
}


def sources() -> list[Path]:
    """Every module of the package but the root, which only re-exports."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    """``src/tml_core/ops/linear.py`` -> ``ops``; ``src/tml_core/errors.py`` -> ``errors``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> list[tuple[int, str]]:
    """(line, room) of every import from the package, at any depth of the file.

    ``from tml_core import x`` counts as room x, ``import tml_core`` as the room ``""``.
    """
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            names = [str(node.module)]
            if node.module == "tml_core":
                names = [f"tml_core.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "tml_core":
                found.append((node.lineno, rest.partition(".")[0]))
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_or_sideways(path: Path) -> None:
    room = room_of(path)
    assert room in FLOORS, f"give tml_core.{room} a floor"
    for line, target in imported_rooms(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        assert target in FLOORS, f"{where} imports tml_core.{target}, which has no floor"
        if target != "errors":
            assert FLOORS[target] <= FLOORS[room], (
                f"{where}: {room} (floor {FLOORS[room]}) imports {target} (floor {FLOORS[target]})"
            )


def csrc_files() -> list[Path]:
    folder = ROOT / "csrc"
    return sorted(p for p in folder.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


@pytest.mark.parametrize("path", csrc_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_includes_go_down_or_sideways(path: Path) -> None:
    folder = path.relative_to(ROOT / "csrc").parts[0]
    assert folder in CSRC_MAY_INCLUDE, f"say what csrc/{folder} may include"
    text = path.read_text()
    for target in re.findall(r'^#include "(\w+)/', text, re.MULTILINE):
        assert target in CSRC_MAY_INCLUDE[folder], f"csrc/{folder} includes csrc/{target}"
    system = set(re.findall(r"^#include <([\w./]+)>", text, re.MULTILINE))
    if folder not in {"bindings", "tests"}:
        assert not {h for h in system if re.match(r"Python|nanobind|pybind11|torch|ATen", h)}
    if folder not in {"cuda", "bindings"}:
        assert not {h for h in system if re.match(r"cuda|cutlass|cute", h)}
