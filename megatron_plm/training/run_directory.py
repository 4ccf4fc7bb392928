"""The run directory: config.toml, metrics.jsonl, tensorboard/, status, checkpoints/; held by one run at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_plm.checkpoint_format import CHECKPOINTS, LATEST, find_checkpoint
from megatron_plm.config.options import Config
from megatron_plm.errors import UserError
from megatron_plm.files import Busy, atomic_file, exclusive, write_errors_told
from megatron_plm.parallel.mesh import World

METRICS_FILE, STATUS_FILE = "metrics.jsonl", "status"
LOCK_FILE = "lock"  # there while a run writes


def run_directory(config: Config) -> Path | None:
    """Where this run writes, if it writes."""
    return Path(config.training.save) if config.training.save else None


def check_run_directory(config: Config) -> None:
    """Refuse a run directory that cannot be written or holds checkpoints that this run does not go on from; before
    any process group exists. Where an earlier run saved none, this one begins anew."""
    directory, load = run_directory(config), config.training.load
    if directory is None:
        return
    latest = directory / CHECKPOINTS / LATEST
    way_out = f"go on with it by --load {directory}, or give another folder"
    if latest.exists() and load is None:
        raise UserError(f"--save {directory}: holds a run already; {way_out}")
    # Going on from elsewhere would mix two runs, and from an older checkpoint overwrite the newer ones one by one.
    if latest.exists() and load and find_checkpoint(Path(load)) != latest.resolve():
        raise UserError(
            f"--save {directory}: holds a run already, and --load {load} is not its latest checkpoint; {way_out}"
        )
    nearest = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--save {directory}: {nearest} cannot be written to; choose a folder with write permission")


@contextlib.contextmanager
def own_run_directory(config: Config, world: World) -> Iterator[None]:
    """Make the run directory and hold it against a second run; raises UserError where one is writing there."""
    directory, busy = run_directory(config), False
    with contextlib.ExitStack() as stack:
        if directory and world.is_main:
            with write_errors_told(directory):
                directory.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(exclusive(directory / LOCK_FILE))
                except Busy:
                    busy = True
        if world.any(busy):
            raise UserError(
                f"--save {directory}: another run is writing there at this moment; wait for it or give another folder"
            )
        yield


def begins_anew(config: Config) -> bool:
    """Whether --load names the run's own folder and no checkpoint is there yet: one command then serves the first
    start and every later one."""
    load, directory = config.training.load, run_directory(config)
    if load is None or directory is None or Path(load).resolve() != directory.resolve():
        return False
    return not (directory / CHECKPOINTS / LATEST).exists()


def write_status(directory: Path, status: str) -> None:
    with atomic_file(directory / STATUS_FILE) as aside:
        aside.write_text(status + "\n", encoding="utf-8")
