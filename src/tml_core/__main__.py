"""``python -m tml_core``: the command line."""

from tml_core.cli import main

main()
