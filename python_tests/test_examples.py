"""The examples run as they are, each in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHOWS = {
    "asyncio_service.py": "sessions still open: 0",
    "fork_two_futures.py": "kept ",
    "grpo_letters.py": "first ratio exactly 1 in 12 of 12 rounds",
    "microphone.py": " 2.8 s  ",
    "train_tiny.py": "5 of 5 sessions are known by heart",
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHOWS)


@pytest.mark.parametrize("name", sorted(SHOWS))
def test_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        # One thread each: a test machine has other work.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert SHOWS[name] in done.stdout
