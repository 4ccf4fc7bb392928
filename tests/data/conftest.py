"""Fixtures of the data tests."""

from pathlib import Path

import preprocess_command
import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a small in.fasta and an empty folder out."""
    (tmp_path / "out").mkdir()
    (tmp_path / "in.fasta").write_bytes(preprocess_command.TEXT)
    return tmp_path
