"""Starts pretraining runs for the tests, in this process or in two, and reads what they wrote."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from processes import REPOSITORY, environment
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_plm.benchmark.parity import relative_difference
from megatron_plm.distributed_checkpoint import without_single_process_warning
from megatron_plm.errors import run_command
from megatron_plm.training.pretrain import main

LAUNCHER = REPOSITORY / "launch" / "pretrain.sh"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def pretrain(*argv: object) -> int:
    """Run the command in this process; returns its exit code. The signal handlers are as before afterwards."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    try:
        return run_command(main, [str(word) for word in argv])
    finally:
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in the run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def column(run: Path, kind: str, name: str) -> list[float]:
    """One number of each record of a kind."""
    return [record[name] for record in records(run, kind)]


def checkpoint(run: Path, step: int | str = "latest") -> Path:
    """The directory of one checkpoint of a run."""
    return run / "checkpoints" / (step if isinstance(step, str) else f"step_{step:08d}")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names: "model.…" and "optimizer.state.…"."""
    reader = FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata.items()
    tensors = {
        n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries if isinstance(e, TensorStorageMetadata)
    }
    with without_single_process_warning():
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def largest_relative_difference(one: dict[str, Tensor], other: dict[str, Tensor], prefix: str) -> float:
    """The largest ‖a − b‖ / ‖b‖ over the tensors whose names begin with `prefix`."""
    assert one.keys() == other.keys()
    names = [name for name in one if name.startswith(prefix) and other[name].is_floating_point()]
    assert names
    return max(relative_difference(one[name], other[name]) for name in names)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether both hold the same tensors, of the same types and bit by bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def launcher_environment(num_processes: int) -> dict[str, str]:
    """The environment in which launch/pretrain.sh starts `num_processes` of this interpreter."""
    return environment(PYTHON=sys.executable, NPROC_PER_NODE=str(num_processes), OMP_NUM_THREADS="1")


def in_processes(count: int, work: Callable[[Path], None], folder: Path, *, groups: int, seconds: float = 240) -> None:
    """Call `work(folder)` in processes with torchrun's environment variables; their output goes to files there.

    They can form `groups` process groups one after another, each after `meet_anew`. Like torchrun's agent this process
    holds the stores where they meet: where the first process did, a quick one would find the last group's.
    """
    stores = [torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in range(groups)]
    ports = " ".join(str(store.port) for store in stores)
    context = torch.multiprocessing.spawn(_ranked, args=(count, work, folder, ports), nprocs=count, join=False)
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{count} processes ran for more than {seconds} seconds; see {folder}/output_*.txt")


def _ranked(rank: int, count: int, work: Callable[[Path], None], folder: Path, ports: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="localhost")
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", PORTS_TO_MEET=ports)
    output = folder / f"output_{rank}.txt"
    with output.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        work(folder)


def run_each(runs: dict[str, Sequence[object]], folder: Path) -> dict[str, int]:
    """Run the command once for each entry, saving into the folder of its name; returns the exit codes."""
    codes = {}
    for name, argv in runs.items():
        meet_anew()
        codes[name] = pretrain(*argv, f"--save={folder / name}")
    return codes


def meet_anew() -> None:
    """Let the next process group of `in_processes` meet in a store of its own."""
    if "PORTS_TO_MEET" in os.environ:
        os.environ["MASTER_PORT"], _, os.environ["PORTS_TO_MEET"] = os.environ["PORTS_TO_MEET"].partition(" ")
