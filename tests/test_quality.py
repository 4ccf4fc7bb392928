"""Style, formatting and types, as `make lint` checks them."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_the_sources_pass(command):
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], capture_output=True, text=True, timeout=600, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_makefile_checks_the_same():
    recipe = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert all(f"-m {command}\n" in recipe for command in ["ruff check .", "ruff format --check .", "mypy"])
