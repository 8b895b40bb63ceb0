"""The public names: all there, typed where they are declared, and imported only when used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tml_core


def test_every_public_name_is_there() -> None:
    for name in tml_core.__all__:
        assert getattr(tml_core, name) is not None
    assert sorted(set(tml_core.__all__)) == sorted(tml_core.__all__)
    assert set(tml_core.__all__) <= set(dir(tml_core))
    with pytest.raises(AttributeError, match="module 'tml_core' has no attribute 'Sesion'"):
        tml_core.Sesion  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(tml_core.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == set(tml_core.__all__)


def test_import_does_no_work() -> None:
    code = (
        "import sys, threading, tml_core; "
        "print(sorted(m for m in sys.modules if m.startswith('tml_core') or m in "
        "('av', 'soundfile', 'soxr', 'tokenizers', 'rich', 'typer')), threading.active_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "['tml_core'] 1\n"
