"""Fixtures shared by every test: kernel levels and thread counts are restored after each."""

from collections.abc import Iterator

import pytest
import torch

from tml_core import _ext


@pytest.fixture
def each_isa() -> Iterator[list[str]]:
    """The instruction-set levels this machine can run; the active one is restored afterwards."""
    before = _ext.isa()
    yield list(_ext.supported_isas())
    _ext.set_isa(before)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
