"""The folder that a dataset is written into: made, held against a second run, cleared of what a killed one left."""

import contextlib
import glob
import secrets
import shlex
from collections.abc import Iterator
from pathlib import Path

from megatron_plm.data.indexed import DatasetPaths
from megatron_plm.errors import UserError
from megatron_plm.files import Busy, exclusive
from megatron_plm.files import remove as remove_any

_TOKEN_BYTES = 4  # random part of a temporary name


def in_order(paths: DatasetPaths) -> tuple[Path, Path, Path]:
    """The files in the order in which they are published."""
    return paths.bin, paths.idx, paths.json


def remove(paths: DatasetPaths) -> None:
    """Remove the files that are there."""
    for path in in_order(paths):
        path.unlink(missing_ok=True)


def temporary_paths(paths: DatasetPaths) -> DatasetPaths:
    """Names for files that are being written, which no other run uses."""
    token = secrets.token_hex(_TOKEN_BYTES)
    return DatasetPaths(*(path.with_name(f"{path.name}.{token}.tmp") for path in in_order(paths)))


def work_folder_path(paths: DatasetPaths) -> Path:
    """A name for a folder of temporary files beside the dataset."""
    return paths.bin.with_name(f"{paths.bin.stem}.work.{secrets.token_hex(_TOKEN_BYTES)}.tmp")


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make the folder, if only its last part is missing: more is likely a slip. Empty at the end, it goes again."""
    if folder.is_dir():
        yield
        return
    if folder.exists():
        raise UserError(f"output folder '{folder}' is not a folder: choose another --output-prefix")
    if not folder.parent.is_dir():
        raise UserError(f"output folder '{folder}' does not exist: create it (`mkdir -p {shlex.quote(str(folder))}`)")
    folder.mkdir(exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def held_prefix(paths: DatasetPaths) -> Iterator[None]:
    """Hold PREFIX.lock, and remove temporary files that a killed run of the same prefix left behind.

    On a file system without locks there is no exclusion; random temporary names still keep two runs apart.
    """
    lock = paths.bin.with_suffix(".lock")
    try:
        with exclusive(lock) as locked:
            if locked:
                _remove_leftovers(paths)
            yield
    except Busy:
        raise UserError(
            f"another run is writing '{lock.with_suffix('')}' at this moment and holds '{lock}': wait for it or "
            "choose another --output-prefix"
        ) from None


def _remove_leftovers(paths: DatasetPaths) -> None:
    for name in (*(path.name for path in in_order(paths)), f"{paths.bin.stem}.work"):
        for leftover in paths.bin.parent.glob(glob.escape(name) + "." + "[0-9a-f]" * (2 * _TOKEN_BYTES) + ".tmp"):
            remove_any(leftover)
