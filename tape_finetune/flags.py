"""Command lines with TAPE's flags: underscores as TAPE writes them, hyphens as everyone else does."""

import argparse
import math
from collections.abc import Callable
from typing import Any


def add_flag(parser: argparse._ActionsContainer, name: str, **options: Any) -> argparse.Action:
    """Add the flag `--name`; an underscore in `name` may be typed as a hyphen."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    return parser.add_argument(*spellings, **options)


def whole_number(minimum: int) -> Callable[[str], int]:
    """A converter of flag values to whole numbers of at least `minimum`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, not {text!r}")
        return value

    return convert


def number(minimum: float, *, above: bool = False) -> Callable[[str], float]:
    """A converter of flag values to finite numbers of at least (or, with `above`, above) `minimum`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < minimum or (above and value == minimum):
            limit = f"above {minimum:g}" if above else f"of at least {minimum:g}"
            raise argparse.ArgumentTypeError(f"expected a number {limit}, not {text!r}")
        return value

    return convert
