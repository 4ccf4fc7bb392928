"""Bars: what a measurement has to reach, and whether it did."""

from collections.abc import Mapping
from typing import Any

Checks = dict[str, dict[str, Any]]  # of `check`, by name; a result has them under "checks"


def check(what: str, value: float | None, bar: float, *, at_least: bool = True, unit: str = "") -> dict[str, Any]:
    """A measured value beside its bar, to reach or, without `at_least`, not to exceed; what is unknown is missed."""
    met = value is not None and (value >= bar if at_least else value <= bar)
    return {"what": what, "value": value, "bar": bar, "at_least": at_least, "unit": unit, "met": met}


def missed_checks(result: Mapping[str, Any]) -> list[str]:
    """The names of the bars that were not reached."""
    return [name for name, each in result["checks"].items() if not each["met"]]


def check_lines(checks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Values and bars for people."""
    width = max([52, *(len(each["what"]) + 2 for each in checks.values())])
    lines = [f"{'':<{width}}{'value':>10}{'bar':>18}"]
    for each in checks.values():
        value = "unknown" if each["value"] is None else f"{each['value']:.4g}"
        bar = f"{'at least' if each['at_least'] else 'at most'} {each['bar']:g}"
        unit = f" {each['unit']}" if each["unit"] else ""
        lines.append(f"{each['what']:<{width}}{value:>10}{bar:>18}{unit}" + ("" if each["met"] else "  MISSED"))
    return lines
