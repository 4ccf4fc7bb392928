"""Running one side of a benchmark as a process, and watching its memory."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_plm.errors import UserError

_POLL_SECONDS = 0.02


def run_side(module: str, arguments: Sequence[object], *, cores: int) -> dict[str, Any]:
    """Run `python -m module arguments` on at most so many cores; returns the JSON of its last line of output.

    Added is `peak_memory`: the most anonymous memory, in bytes, that it and its children had together, as seen every
    20 ms; None where the system doesn't tell. Raises UserError with the side's own message where it fails.
    """
    output, peak = run_watched(module, arguments, cores=cores, threads=1, name=str(arguments[0]))
    return {**json.loads(output.splitlines()[-1]), "peak_memory": peak}


def run_watched(
    module: str, arguments: Sequence[object], *, cores: int, threads: int, name: str
) -> tuple[str, int | None]:
    """Run a module as `run_side` does; returns its output and its peak memory. `name` is told where it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        try:
            _keep_to(process.pid, cores)
            peak: int | None = None
            while process.poll() is None:
                memory = anonymous_memory(process.pid)
                if memory is not None:
                    peak = max(peak or 0, memory)
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            told = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
            raise UserError(f"{name}: {told[-1].removeprefix('error: ')}")
        return output.read(), peak


def _keep_to(process: int, cores: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(process, mine[-cores:])


def anonymous_memory(process: int) -> int | None:
    """Bytes of a process and its children; None once it has ended, and where there is no /proc."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
        threads = list(Path(f"/proc/{process}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except (OSError, StopIteration):
        return None
    return 1024 * int(line.split()[1]) + sum(anonymous_memory(child) or 0 for child in children)
