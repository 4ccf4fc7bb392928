"""Data too large for the repository, which some tests read where it is at hand."""

import os
from pathlib import Path

import pytest

VARIABLE = "MEGATRON_PLM_SHARED_DATA"  # its folder; default: ../shared/data beside the repository


def shared_data(name: str) -> Path:
    """The file or folder of that name; skips the test where it is not there."""
    folder = Path(os.environ.get(VARIABLE) or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (folder / name).exists():
        pytest.skip(f"no {folder / name}: {VARIABLE} names the folder that holds {name}")
    return folder / name
