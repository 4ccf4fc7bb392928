"""What the tests of `preprocess_data` share: a small file and ways to run the command on it."""

import sys
from pathlib import Path

from processes import REPOSITORY as ROOT
from processes import environment

from megatron_plm.data.preprocess import main
from megatron_plm.errors import run_command

__all__ = ["ROOT", "SEQUENCES", "TEXT", "command", "environment", "outputs", "run"]

TEXT = b">sp|P1|A first\nMKTAYIAKQR\nQISFVKSHFS\n\n>P2\nmkvJ*lag\n>P3 x y\nACDEFGHIKLMNPQRSTVWY"
SEQUENCES = ["MKTAYIAKQRQISFVKSHFS", "MKVJ*LAG", "ACDEFGHIKLMNPQRSTVWY"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)]


def run(folder: Path, *arguments: object) -> int:
    """Run the command in this process on FOLDER/in.fasta unless other input is named; returns its exit code."""
    given = list(map(str, arguments))
    if "--input" not in given:
        given += ["--input", str(folder / "in.fasta")]
    if "--output-prefix" not in given:
        given += ["--output-prefix", str(folder / "out" / "p")]
    return run_command(main, given)


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())
