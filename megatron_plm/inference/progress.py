"""How far long work over proteins has come: residues done, of those there are, and a second."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_LOG_SECONDS = 10.0  # between two lines of progress where there is no terminal


@contextlib.contextmanager
def shown_residues(total: int | None, what: str) -> Iterator[Callable[[int], None]]:
    """Give a function to be told of so many more residues: a bar on a terminal, a line every ten seconds elsewhere.

    `total` is None where it is unknown.
    """
    if not sys.stderr.isatty():
        yield _logged(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TextColumn("{task.completed:,} residues"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _logged(total: int | None) -> Callable[[int], None]:
    """Lines on standard error; work of less than ten seconds has none."""
    done = done_before = 0
    last = time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, done_before, last
        done += count
        now = time.monotonic()
        if now - last >= _LOG_SECONDS:
            share = f" ({done / total:.0%})" if total else ""
            speed = (done - done_before) / (now - last)
            shown = f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"
            print(f"{done:,} residues{share}, {shown} a second", file=sys.stderr, flush=True)
            done_before, last = done, now

    return advance
