"""Files and directories that are complete or absent: written aside, synced, renamed last."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_plm.errors import UserError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is synced and renamed to `path`, else removed.

    Raises UserError where the folder cannot be written to.
    """
    aside = _aside(path)
    try:
        yield aside
        _sync(aside)
        os.replace(aside, path)
        _sync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def atomic_directory(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty directory beside `path`; on success its files are synced and it is renamed to `path`, else removed.

    Raises UserError where `path` exists (with `force` it is replaced) or cannot be written to.
    """
    if path.exists() and not force:
        raise UserError(f"{path} exists already; give another output, or --force to replace it")
    aside = _aside(path)
    try:
        aside.mkdir(parents=True)
        yield aside
        publish_directory(aside, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish_directory(aside: Path, path: Path) -> None:
    """Sync every file below `aside` and rename it to `path`, putting away what stood there."""
    for folder, _, names in os.walk(aside):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))
    if path.exists():
        old = _aside(path).with_suffix(".old")
        os.rename(path, old)
        os.rename(aside, path)
        shutil.rmtree(old)
    else:
        os.rename(aside, path)
    _sync(path.parent)


def replace_symlink(link: Path, target: str) -> None:
    """Point `link` at `target` in one step: readers see the old target or the new one."""
    aside = _aside(link)
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)
    _sync(link.parent)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written: {error.strerror or error}; choose a folder with write permission")
