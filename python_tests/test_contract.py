"""contract.py, contract.h and the compiled module state the same constants."""

import re
from pathlib import Path

from tml_core import _ext, contract

HEADER = Path(__file__).parent.parent / "csrc" / "core" / "contract.h"


def header_constants() -> dict[str, int]:
    """``kPageLen = 128`` of the header as ``{"PAGE_LEN": 128}``; kVersion is CONTRACT_VERSION."""
    found = re.findall(r"inline constexpr int k(\w+) = (\d+);", HEADER.read_text())
    snake = {re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper(): int(value) for name, value in found}
    snake["CONTRACT_VERSION"] = snake.pop("VERSION")
    return snake


def python_constants() -> dict[str, int]:
    return {name: getattr(contract, name) for name in contract.__all__}


def test_python_mirrors_the_header() -> None:
    assert python_constants() == header_constants()


def test_header_has_nothing_but_integers() -> None:
    assert HEADER.read_text().count("inline constexpr") == len(header_constants())


def test_compiled_module_was_built_from_this_header() -> None:
    assert {name: getattr(_ext, name) for name in contract.__all__} == python_constants()


def test_constants_fit_each_other() -> None:
    assert contract.SEGMENT_LEN % contract.PAGE_LEN == 0
    assert contract.PANEL % contract.LANES == 0
