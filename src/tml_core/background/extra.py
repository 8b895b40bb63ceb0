"""Optional packages, imported where they are used."""

from importlib import import_module
from typing import Any

from tml_core.errors import MissingExtra

__all__ = ["require"]


def require(module: str, what: str) -> Any:
    """The module; raises MissingExtra naming what needs it and the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{what}: needs {module}; install it with: pip install 'tml_core[background]'"
        ) from error
