"""Processes that a benchmark starts itself, in place of torchrun, and where those of one measurement meet."""

import os
import socket
import time
from pathlib import Path


def become_process(rank: int, processes: int, *, threads: int = 1) -> None:
    """Let this new process be the `rank`-th of so many on this machine."""
    import torch

    torch.set_num_threads(threads)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    os.environ["MASTER_ADDR"] = "localhost"


def meet(rank: int, place: Path) -> None:
    """Let the processes of one case agree on a free port of this machine, by a file at `place`.

    A port for each case, as a quick process would find the last case's store. (The tests hold a store for each group in
    the process that starts the others, as torchrun does; here it is the first process's, as where nothing else starts.)
    """
    if rank == 0:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            aside = place.with_suffix(".tmp")
            aside.write_text(str(free.getsockname()[1]))
        aside.rename(place)
    while not place.exists():
        time.sleep(0.01)
    os.environ["MASTER_PORT"] = place.read_text()
