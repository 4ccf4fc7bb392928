"""Flags that the subjects share, and sizes that --quick makes smaller."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """The default of a flag: what a figure is measured with, and what --quick uses to see that all works."""

    full: Any
    quick: Any


def add_size(
    parser: argparse.ArgumentParser,
    flag: str,
    kind: Callable[[str], Any],
    size: Size,
    text: str,
    *,
    nargs: str | None = None,
    choices: list[str] | None = None,
) -> None:
    """Add a flag whose default depends on --quick; `choose_sizes` decides."""
    shown = [_told(value) for value in (size.full, size.quick)]
    metavar = None if choices is None else "NAME"
    text += f" (default: {shown[0]}; with --quick: {shown[1]})"
    parser.add_argument(flag, type=kind, default=size, nargs=nargs, choices=choices, metavar=metavar, help=text)


def _told(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value if isinstance(value, str) else f"{value:g}"


def choose_sizes(options: argparse.Namespace) -> None:
    """Give the flags that were not typed their sizes."""
    for name, value in vars(options).items():
        if isinstance(value, Size):
            setattr(options, name, value.quick if options.quick else value.full)


def count(text: str) -> int:
    """A flag's whole number, 1 or more."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def seconds(text: str) -> float:
    """A flag's time: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
