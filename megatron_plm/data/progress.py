"""How far long work over files has come."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_LOG_SECONDS = 10.0  # between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Progress:
    """Where to tell it: `read`, how many bytes of the input have been read so far; `then`, what comes after that."""

    read: Callable[[int], None]
    then: Callable[[str], None]


@contextlib.contextmanager
def shown_progress(total: int, what: str) -> Iterator[Progress]:
    """A bar on a terminal, a line every ten seconds elsewhere; `total` is the size of the input, 0 where unknown."""
    if not sys.stderr.isatty():
        yield _logged(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total or None)
        yield Progress(
            read=lambda num_bytes: bar.update(task, completed=num_bytes),
            then=lambda text: bar.update(task, description=text),
        )


def _logged(total: int) -> Progress:
    """Lines on standard error; work of less than ten seconds has none."""
    started = last = time.monotonic()

    def read(num_bytes: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LOG_SECONDS:
            last = time.monotonic()
            share = f" ({num_bytes / total:.0%})" if total else ""
            print(f"read {num_bytes / 1e6:,.0f} MB{share}", file=sys.stderr, flush=True)

    def then(text: str) -> None:
        if time.monotonic() - started >= _LOG_SECONDS:
            print(text, file=sys.stderr, flush=True)

    return Progress(read, then)
