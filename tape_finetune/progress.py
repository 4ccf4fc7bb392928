"""What a person sees of long work: a progress bar where one watches, nothing of it in a log; and lines of output.

Of several processes the first one speaks."""

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from megatron_plm.errors import drop_output
from megatron_plm.parallel.mesh import process_rank

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str) -> Iterable[Item]:
    """Iterate over `items`, with a bar on standard error if that is a terminal."""
    if process_rank() or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, description, console=Console(stderr=True), transient=True)


def say(text: str) -> None:
    """Print at once; where nobody reads any more (`| head`), the work goes on and this and later text is dropped."""
    if process_rank():
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_output()
