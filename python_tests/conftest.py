"""Fixtures shared by every test, and how the whole suite is shared by processes.

A run of whole folders takes two to four workers (pytest-xdist): most tests keep one core busy. Runs
of single files, with ``-s`` or with ``--pdb`` stay in this process; ``-n 0`` asks for that too.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Choose the number of workers where the command line has not."""
    option = config.option
    paths = option.file_or_dir or config.args
    if (
        getattr(option, "numprocesses", 0) is None  # -n is known and was not given
        and not hasattr(config, "workerinput")  # we are one of them
        and not (option.usepdb or option.collectonly or option.capture == "no")
        and any(Path(path).is_dir() for path in paths)
    ):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the workers share the cores
        option.numprocesses = max(2, min(4, os.cpu_count() or 1))
        # Neighbours in the suite share fixtures: each worker begins with one stretch of it.
        option.dist = "worksteal"


@pytest.fixture
def each_isa() -> Iterator[list[str]]:
    """The instruction-set levels this machine can run; the active one is restored afterwards."""
    from tml_core import _ext

    before = _ext.isa()
    yield list(_ext.supported_isas())
    _ext.set_isa(before)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """After the test no engine runs and no session of `session_kit`'s model holds anything."""
    from session_kit import assert_nothing_left, engine_threads

    yield
    assert engine_threads() == []
    assert_nothing_left()


@pytest.fixture
def nothing_leaks_of_faults() -> Iterator[None]:
    """The same of `faults_kit`'s model; engines get a while to end."""
    from faults_kit import assert_nothing_left

    yield
    assert_nothing_left()
