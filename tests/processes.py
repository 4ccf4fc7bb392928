"""Child processes of the tests: the environment they get, and waiting for them, never for ever."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

REPOSITORY = Path(__file__).resolve().parents[1]

Result = TypeVar("Result")


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, changed, with the repository on Python's path."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **changes}


def descendants(process: int) -> list[int]:
    """The processes that this one has started, and those have, by their ids."""
    children = [
        int(word)
        for thread in Path(f"/proc/{process}/task").iterdir()
        for word in (thread / "children").read_text().split()
    ]
    return [*children, *(each for child in children for each in descendants(child))]


def wait_for(
    look: Callable[[], Result], what: str, *, process: subprocess.Popen | None = None, seconds: float = 60
) -> Result:
    """Look again and again until there is something, and return it.

    Fails after `seconds`, and at once where `process`, which should bring it about, has ended without.
    """
    deadline = time.monotonic() + seconds
    while True:
        ended = process.poll() if process else None
        found = look()
        if found:
            return found
        assert ended is None, f"the process ended with {ended} and without {what}"
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.01)
