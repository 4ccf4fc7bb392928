"""Command lines with TAPE's flags: underscores as TAPE writes them, hyphens as everyone else does."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megatron_plm.errors import UserError, suggestion


class FlagParser(argparse.ArgumentParser):
    """argparse with both spellings of every flag, and with its errors as UserErrors."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; --help lists the flags")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`; raises UserError for an unknown flag, naming the nearest known one."""
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            nearest = suggestion(unknown[0].split("=")[0], flags)
            raise UserError(f"{self.prog}: unknown argument {unknown[0]}{nearest}; --help lists the flags")
        return arguments


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
