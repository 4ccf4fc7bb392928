"""Files and directories that are complete or absent: written aside, synced, renamed last; and locks on them."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from megatron_plm.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is synced and renamed to `path`, else removed.

    Raises UserError where the folder cannot be written to.
    """
    aside = _aside(path)
    try:
        with write_errors_told(path):
            yield aside
            sync(aside)
            os.replace(aside, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def atomic_directory(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty directory beside `path`; on success its files are synced and it is renamed to `path`, else removed.

    What a killed process left of the same is removed first. Raises UserError where `path` exists (with `force` it is
    replaced), cannot be written to, or is being written by another process.
    """
    _refuse_existing(path, force=force)
    aside = _aside(path)
    with write_errors_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(path):
            try:
                aside.mkdir()
                yield aside
                _refuse_existing(path, force=force)  # where files cannot be locked, another one may have been quicker
                publish_directory(aside, path)
            finally:
                shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold `.NAME.lock` beside `path`, and remove what killed writers of `path` left under temporary names.

    Raises UserError where another process holds it. On a file system without locks there is no exclusion, and nothing
    is removed.
    """
    try:
        with exclusive(path.with_name(f".{path.name}.lock")) as locked:
            if locked:
                _remove_leftovers(path)
            yield
    except Busy:
        raise UserError(
            f"{path}: another process is writing it at this moment; wait for it, or give another output"
        ) from None


def _remove_leftovers(path: Path) -> None:
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[0-9]+\.(tmp|old)")
    for child in path.parent.iterdir():
        # Without `path` an .old may be the only copy of what stood there: see publish_directory.
        if leftover.fullmatch(child.name) and (child.suffix == ".tmp" or path.exists()):
            remove(child)


def remove(path: Path) -> None:
    """Remove a file, or a directory with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refuse_existing(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise UserError(f"{path} exists already; give another output, or --force to replace it")


def publish_directory(aside: Path, path: Path) -> None:
    """Sync every file below `aside` and rename it to `path`, putting away what stood there.

    A kill between the two renames leaves the old directory under a hidden name, `.NAME.PID.old`.
    """
    for folder, _, names in os.walk(aside):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))
    if path.exists():
        old = _aside(path).with_suffix(".old")
        os.rename(path, old)
        os.rename(aside, path)
        shutil.rmtree(old)
    else:
        os.rename(aside, path)
    sync(path.parent)


def replace_symlink(link: Path, target: str) -> None:
    """Point `link` at `target` in one step: readers see the old target or the new one."""
    aside = _aside(link)
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)
    sync(link.parent)


class Busy(Exception):
    """The lock is held by another process."""


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[bool]:
    """Hold the file `lock`, which goes with this process, however that ends; raises Busy where another one holds it.

    Yields whether the file system could lock at all: where not, there is no exclusion.
    """
    descriptor, locked = _open_locked(lock)
    try:
        yield locked
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(lock: Path) -> tuple[int, bool]:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Busy(lock) from None
        except OSError:
            return descriptor, False
        # The last holder may have removed the file between the opening and the locking: then this is another one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor, True
        os.close(descriptor)


@contextlib.contextmanager
def write_errors_told(path: Path) -> Iterator[None]:
    """Turn an OSError while `path` is being written into a UserError; a broken pipe is no fault of the path."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        full = error.errno in _DISK_FULL
        advice = "free some space or choose another disk" if full else "choose a folder with write permission"
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; {advice}") from error


def sync(path: Path) -> None:
    """Make a file's content, or a folder's renames, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems cannot sync a folder; a file that cannot be synced is not safe on the disk.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def encodable(name: str | os.PathLike[str]) -> str:
    """A path, or a command that names some, as text for a file: bytes of it that are no UTF-8 as \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _aside(path: Path) -> Path:
    # A thread's number is a process's own number in its first thread, and no other's in any.
    return path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
