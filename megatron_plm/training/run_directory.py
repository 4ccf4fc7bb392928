"""The run directory: config.toml, metrics.jsonl, tensorboard/, status, checkpoints/; held by one run at a time."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_plm.checkpoint_format import CHECKPOINTS, LATEST, find_checkpoint, newest_step
from megatron_plm.config.options import Config
from megatron_plm.errors import UserError
from megatron_plm.files import Busy, atomic_file, exclusive, write_errors_told
from megatron_plm.parallel.mesh import World

METRICS_FILE, STATUS_FILE, TENSORBOARD = "metrics.jsonl", "status", "tensorboard"
LOCK_FILE = "lock"  # there while a run writes
_LAST_WORD = "the last word about the run"
_SECONDS_TO_WRITE = 5.0


def run_directory(config: Config) -> Path | None:
    """Where this run writes, if it writes."""
    return Path(config.training.save) if config.training.save else None


def check_run_directory(config: Config) -> None:
    """Refuse a run directory that cannot be written or holds checkpoints that this run does not go on from.

    Where an earlier run saved none, this one begins anew.
    """
    directory, load = run_directory(config), config.training.load
    if directory is None:
        return
    nearest = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--save {directory}: {nearest} cannot be written to; choose a folder with write permission")
    if not _holds_checkpoints(directory):
        return
    way_out = f"go on with it by --load {directory}, or give another folder"
    if not load:
        raise UserError(f"--save {directory}: holds a run already; {way_out}")
    # Going on from elsewhere would mix two runs, and from an older checkpoint overwrite the newer ones one by one.
    if find_checkpoint(Path(load)) != find_checkpoint(directory):
        raise UserError(
            f"--save {directory}: holds a run already, and --load {load} is not its latest checkpoint; {way_out}"
        )
    latest = directory / CHECKPOINTS / LATEST
    if latest.exists() and not latest.is_symlink():
        raise UserError(
            f"{latest}: is a folder and should be a link, as after a copy that followed links; delete it, and the run "
            "goes on from its newest step"
        )


@contextlib.contextmanager
def own_run_directory(config: Config, world: World) -> Iterator[None]:
    """Make the run directory and hold it against a second run; raises UserError where one is writing there.

    A folder made here that is still empty at the end goes again.
    """
    refusal = None
    with contextlib.ExitStack() as stack:
        directory = run_directory(config)
        if directory and world.is_main:
            stack.enter_context(_made_folder(directory))
            try:
                with write_errors_told(directory):
                    stack.enter_context(exclusive(directory / LOCK_FILE))
                check_run_directory(config)  # again: another run may have saved and left since
            except Busy:
                refusal = UserError(
                    f"--save {directory}: another run is writing there at this moment; wait for it or give another "
                    "folder"
                )
            except UserError as error:
                refusal = error
        if world.any(refusal is not None):
            if refusal is None:
                refusal = UserError(f"--save {directory}: cannot be used")
                refusal.told = True  # by the main process, which knows why
            raise refusal
        yield


def begins_anew(config: Config) -> bool:
    """Whether --load names the run's own folder and no checkpoint is there yet: one command then serves the first
    start and every later one."""
    load, directory = config.training.load, run_directory(config)
    if not load or directory is None or Path(load).resolve() != directory.resolve():
        return False
    return not _holds_checkpoints(directory)


class RunStatus:
    """The file `status`, while the body runs and afterwards: "running", then what `end` was told, else "failed".

    One process writes it, and its last word stays. That is the main one, unless it has gone or hangs as others find
    out: then one of those. Where it ends well after all, as it was only slow, its word is the last.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._directory, self._world, self._word = run_directory(config), world, "failed"

    def __enter__(self) -> Self:
        if self._directory:
            if self._world.is_main:
                write_status(self._directory, "running")
            self._world.at_failure(self._note_failure)
        return self

    def end(self, word: str) -> None:
        """Say how the run has ended: finished or interrupted."""
        self._word = word

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not (self._directory and self._world.is_main):
            return
        is_first = self._world.is_first(_LAST_WORD)
        if error is None:
            if not is_first:
                self._wait_for_the_first()
            write_status(self._directory, self._word)
        elif is_first:
            with contextlib.suppress(UserError):  # a disk that is full is told by the error on its way
                write_status(self._directory, "failed")

    def _wait_for_the_first(self) -> None:
        """Wait for the process that was first, and is about to write, to have written."""
        assert self._directory is not None
        deadline = time.monotonic() + _SECONDS_TO_WRITE
        with contextlib.suppress(OSError):
            while read_status(self._directory) == "running" and time.monotonic() < deadline:
                time.sleep(0.05)

    def _note_failure(self) -> None:
        """Write for the main process; where the store has gone, several may, but never over a last word."""
        assert self._directory is not None
        with contextlib.suppress(OSError, UserError):
            if read_status(self._directory) == "running" and self._world.is_first(_LAST_WORD):
                write_status(self._directory, "failed")


def write_status(directory: Path, status: str) -> None:
    """Write the file `status`: running, finished, interrupted or failed."""
    with atomic_file(directory / STATUS_FILE) as aside:
        aside.write_text(status + "\n", encoding="utf-8")


def read_status(directory: Path) -> str:
    """What the file `status` says."""
    return (directory / STATUS_FILE).read_text(encoding="utf-8").strip()


def _holds_checkpoints(directory: Path) -> bool:
    return (directory / CHECKPOINTS / LATEST).exists() or newest_step(directory / CHECKPOINTS) is not None


@contextlib.contextmanager
def _made_folder(directory: Path) -> Iterator[None]:
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    with write_errors_told(directory):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for place in missing:
                place.rmdir()
