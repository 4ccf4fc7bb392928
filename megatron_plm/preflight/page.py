"""The page: one line a check, green or red."""

from collections.abc import Sequence
from typing import Any, NamedTuple

_GREEN, _RED, _PLAIN = "\033[32m", "\033[31m", "\033[0m"


class Check(NamedTuple):
    """The outcome of one check: good, bad, or None for what was not checked or only measured."""

    name: str
    good: bool | None
    text: str
    values: dict[str, Any] | None = None


def is_green(checks: Sequence[Check]) -> bool:
    """Whether nothing is bad."""
    return all(check.good is not False for check in checks)


def page(title: str, checks: Sequence[Check], *, colour: bool) -> str:
    """The whole page as text."""
    marks = {True: "ok", False: "RED", None: "-"}
    width = max(len(check.name) for check in checks)
    lines = [title, ""]
    for check in checks:
        line = f"{marks[check.good]:>4}  {check.name:<{width}}  {check.text}"
        lines.append(_coloured(line, check.good) if colour else line)
    bad = [check.name for check in checks if check.good is False]
    verdict = f"RED: {', '.join(bad)}" if bad else "GREEN: nothing stands in the way of the run"
    return "\n".join([*lines, "", _coloured(verdict, not bad) if colour else verdict])


def _coloured(line: str, good: bool | None) -> str:
    return line if good is None else f"{_GREEN if good else _RED}{line}{_PLAIN}"
