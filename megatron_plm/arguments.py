"""argparse as every command uses it: no abbreviated flags, and its errors as UserErrors."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_plm.errors import UserError, suggestion


class ArgumentParser(argparse.ArgumentParser):
    """argparse.ArgumentParser that raises UserError, and names the flag nearest to an unknown one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`; raises UserError for an unknown, missing or ill-typed flag."""
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            kind = "flag" if unknown[0].startswith("-") else "argument"
            self.error(f"unknown {kind} {unknown[0]}{suggestion(unknown[0].split('=')[0], flags)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; --help lists the flags")
