"""Speeds of several sides, measured in turn: what the subjects that compare speeds share.

A machine whose speed drifts slows all sides of a round alike, so that ratios are taken round by round.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron_plm.benchmark.checks import Checks, check
from megatron_plm.benchmark.flags import Size, add_size, count, seconds
from megatron_plm.errors import UserError

Step = Callable[[], int]  # some work; returns its useful tokens
Wait = Callable[[], object]  # until the device has done what it was given


def no_wait() -> None:
    """A CPU has done its work when a call returns."""


def add_round_flags(parser: argparse.ArgumentParser) -> None:
    """--rounds and --seconds."""
    add_size(parser, "--rounds", count, Size(5, 2), "rounds; each measures every side once, in turn")
    add_size(parser, "--seconds", seconds, Size(10.0, 2.0), "time of each side in one round")


def fastest_size(
    label: str,
    sizes: Sequence[int],
    step_of: Callable[[int], Step],
    seconds: float,
    say: Callable[[str], None],
    wait: Wait = no_wait,
) -> tuple[int, Step]:
    """The batch size whose step is the fastest, each timed for so long, and that step; `say` is told of each.

    Each is alone in the memory while it is tried, and the fastest is made again: a larger one may need all of it.
    """
    speeds: dict[int, float] = {}
    for size in sizes:
        step: Step | None = None
        try:
            step = step_of(size)
            speeds[size] = tokens_per_second(step, seconds, wait)
        except torch.OutOfMemoryError:
            say(f"{label} of {size}: out of memory")
            continue
        say(f"{label} of {size}: {speeds[size]:,.0f} tokens/s")
    del step
    if not speeds:
        raise UserError(
            f"{label}: none of the batch sizes {', '.join(map(str, sizes))} fits the memory; try smaller ones"
        )
    fastest = max(speeds, key=speeds.__getitem__)
    return fastest, step_of(fastest)


def timed_in_turn(
    sides: Mapping[str, Step], num_rounds: int, seconds: float, say: Callable[[str], None], wait: Wait = no_wait
) -> dict[str, list[float]]:
    """Tokens a second of each side in each round, after one step to warm up; `say` is told of each round."""
    for step in sides.values():
        step()
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(1, num_rounds + 1):
        for side, step in sides.items():
            speeds[side].append(tokens_per_second(step, seconds, wait))
        shown = ", ".join(f"{side} {each[-1]:,.0f}" for side, each in speeds.items())
        say(f"round {number} of {num_rounds}, tokens/s: {shown}")
    return speeds


def tokens_per_second(step: Step, seconds: float, wait: Wait = no_wait) -> float:
    """Repeat `step` for so long, and until the device is done."""
    wait()
    start = time.perf_counter()
    tokens = 0
    while time.perf_counter() - start < seconds:
        tokens += step()
    wait()
    return tokens / (time.perf_counter() - start)


def ratios(speeds: Mapping[str, Sequence[float]], bars: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """How many times as fast as each other side `ours` is, round by round: median, extremes and the bar, if any."""
    found: dict[str, dict[str, float | None]] = {}
    for side in [name for name in speeds if name != "ours" and "ours" in speeds]:
        each = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds[side], strict=True)]
        found[side] = {"median": statistics.median(each), "min": min(each), "max": max(each), "bar": bars.get(side)}
    return found


def ratio_checks(found: Mapping[str, Mapping[str, float | None]], labels: Mapping[str, str], what: str) -> Checks:
    """A check for each ratio that has a bar; `what` was measured."""
    checks = {}
    for side, ratio in found.items():
        if ratio["bar"] is not None:
            checks[side] = check(f"{what}: against {labels[side]}", ratio["median"], ratio["bar"], unit="x")
    return checks


def speed_lines(
    speeds: Mapping[str, Sequence[float]],
    found: Mapping[str, Mapping[str, float | None]],
    labels: Mapping[str, str],
    more: Mapping[str, str] | None = None,
) -> list[str]:
    """Speeds and ratios for people, a line a side, with `more` at its end."""
    lines = [f"{'':<48}{'tokens/s (median)':>18}{'ours is':>10}{'bar':>8}"]
    for side, each in speeds.items():
        line = f"{labels[side]:<48}{statistics.median(each):>18,.0f}"
        if side in found:
            ratio = found[side]
            line += f"{ratio['median']:>8.2f} x" + ("" if ratio["bar"] is None else f"{ratio['bar']:>6.1f} x")
        lines.append(f"{line:<84}  {more[side]}" if more and more[side] else line)
    return lines


def machine_line(result: Mapping[str, Any]) -> str:
    """Where a result was measured, for people."""
    machine = result["machine"]
    where = f"{machine['gpu']}, " if machine.get("gpu") and result.get("device") == "cuda" else ""
    return f"{where}{machine['processor']}, {machine['threads']} threads, {machine['versions']}"
