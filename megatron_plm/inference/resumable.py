"""Work that a killed run goes on with: columns of numbers that grow in a folder beside the output.

`journal.json` says how much of them is certain, and of which work they are; what lies behind that is cut off when a
run goes on. The output itself is written when all is there, and renamed to its place. An output that is a folder of
files grows in `files`; one that the journal does not count is written again.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_plm.errors import JSON_ERRORS, UserError, json_fault
from megatron_plm.files import Busy, exclusive, publish_directory, sync, write_errors_told

RESUMES = "; a run that was stopped leaves PATH.partial, and the same command goes on with it"  # in --help
COMMIT_SECONDS = 20.0  # of work that a kill loses, at most
_JOURNAL, _LOCK, _ASIDE, _FILES = "journal.json", "lock", "output", "files"
# What sorting the names and putting the output together leave behind where they are stopped: of no use to anyone.
_SCRATCH = re.compile(rf"{_JOURNAL}\.tmp|{_ASIDE}|(hashes|repeated)-[0-9-]+")
_WORK = re.compile(rf"{_JOURNAL}|{_FILES}|\w+\.bin|{_SCRATCH.pattern}")  # all that a run makes, but its lock
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Column:
    """Values of one dtype: numbers, or rows of them. `size` counts values."""

    path: Path
    dtype: np.dtype[Any]
    size: int

    def blocks(self, at_a_time: int | None = None) -> Iterator[npt.NDArray[Any]]:
        """Yield the values in order, `at_a_time`, or some megabytes of them."""
        count = at_a_time or max(1, _BLOCK_BYTES // self.dtype.itemsize)
        with self.reader() as reader:
            for begin in range(0, self.size, count):
                yield reader.take(min(count, self.size - begin))

    @contextlib.contextmanager
    def reader(self) -> Iterator["ColumnReader"]:
        """Reads the values from the first on."""
        with self.path.open("rb") as file:
            yield ColumnReader(file, self.dtype)


class ColumnReader:
    """Takes the values of a column in order."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._file = file
        self._dtype = dtype

    def take(self, count: int) -> npt.NDArray[Any]:
        """The next `count` values."""
        content = self._file.read(count * self._dtype.itemsize)
        assert len(content) == count * self._dtype.itemsize, "the journal counts only what is on the disk"
        return np.frombuffer(content, dtype=self._dtype)


class ResumableWork:
    """The folder of one output, held against a second run; use `resumable_work`.

    Attributes:
        folder: where it is.
        files: see `files_of`.
        records: how many records of the input are done.
        digest: of those records, as it was given to `commit`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], dtypes: Mapping[str, np.dtype[Any]]) -> None:
        self.folder = folder
        self.files = folder / _FILES
        self._identity = dict(identity)
        self._dtypes = dict(dtypes)
        self._paths = {name: folder / f"{name}.bin" for name in dtypes}
        self._files: dict[str, BinaryIO] = {}
        self._committed = time.monotonic()
        self.records = 0
        self.digest = ""

    def open(self, *, force: bool) -> None:
        """Go on behind what is certain, or begin. Raises UserError where the folder holds other work, unless
        `force`."""
        found = self._read_journal()
        if found is not None and found["identity"] != self._identity:
            if not force:
                raise UserError(_other_work(self.folder, found["identity"], self._identity))
            found = None
        if found is not None and found.get("has_files") and not self.files.is_dir():
            found = None  # a kill came between their publishing and the journal's removal
        if found is None:
            self.begin_anew()
            return
        _clear(self.folder, _SCRATCH)
        self.records, self.digest = found["records"], found["digest"]
        self._open_columns(found["bytes"])

    def begin_anew(self) -> None:
        """Forget what the folder holds."""
        self.close()
        _clear(self.folder, _WORK)
        self.records, self.digest = 0, ""
        self._open_columns(dict.fromkeys(self._paths, 0))

    def _open_columns(self, sizes: Mapping[str, int]) -> None:
        """Open them behind so many bytes of each."""
        for name, path in self._paths.items():
            file = self._files[name] = path.open("ab")
            if file.tell() < sizes[name]:
                raise self._damaged(f"{path.name} is shorter than it was")
            file.truncate(sizes[name])
            file.seek(sizes[name])

    def append(self, name: str, values: npt.NDArray[Any]) -> None:
        """Add values to a column."""
        assert values.dtype == self._dtypes[name].base, name
        self._files[name].write(np.ascontiguousarray(values).data)

    def commit_now_and_then(self, records: int, digest: str) -> None:
        """Commit if the last time is some seconds ago."""
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit(records, digest)

    def commit(self, records: int, digest: str) -> None:
        """Make what was appended certain: it is of the first `records` records."""
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
        aside = self.folder / f"{_JOURNAL}.tmp"
        document = {
            "identity": self._identity, "records": records, "digest": digest, "bytes": sizes,
            "has_files": self.files.is_dir(),
        }  # fmt: skip
        aside.write_text(json.dumps(document), encoding="utf-8")
        sync(aside)
        os.replace(aside, self.folder / _JOURNAL)
        sync(self.folder)
        self.records, self.digest = records, digest
        self._committed = time.monotonic()

    def columns(self) -> dict[str, Column]:
        """What has been committed, to be read."""
        sizes = {name: file.tell() for name, file in self._files.items()}
        return {
            name: Column(path, self._dtypes[name], sizes[name] // self._dtypes[name].itemsize)
            for name, path in self._paths.items()
        }

    def close(self) -> None:
        """Close the files; what a full disk still says about them is of no interest then."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()

    def _read_journal(self) -> Any:
        path = self.folder / _JOURNAL
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except JSON_ERRORS as error:
            raise self._damaged(f"{path.name}: {json_fault(error)}") from None
        if not isinstance(found, dict) or not {"identity", "records", "digest", "bytes"} <= found.keys():
            raise self._damaged(f"{path.name} is none of ours")
        return found

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.folder}, the work of a run that was stopped, is damaged ({what}); remove it with "
            f"`rm -r {shlex.quote(str(self.folder))}`"
        )


def files_of(output: Path) -> Path:
    """The folder in which the files of an output that is one are collected; who writes them makes it."""
    return _folder_of(output) / _FILES


def _folder_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


@contextlib.contextmanager
def resumable_work(
    output: Path, identity: Mapping[str, Any], dtypes: Mapping[str, np.dtype[Any]], *, force: bool
) -> Iterator[ResumableWork]:
    """The work for `output`, in the folder OUTPUT.partial; it stays there after a failure if some of it is certain.

    `identity` is JSON, and says all that the values depend on but the input; `dtypes` are those of the columns. Raises
    UserError where another run holds the folder, where it cannot be written to, and see `ResumableWork.open`.
    """
    folder = _folder_of(output)
    with write_errors_told(output):
        _make(folder, output)
        try:
            with exclusive(folder / _LOCK):
                work = ResumableWork(folder, identity, dtypes)
                try:
                    work.open(force=force)
                    yield work
                except KeyboardInterrupt:
                    if work.records:
                        print(f"the work is kept in {folder}; the same command goes on with it", file=sys.stderr)
                    raise
                finally:
                    work.close()
                    _clear(folder, _SCRATCH if (folder / _JOURNAL).exists() else _WORK)
        except Busy:
            raise UserError(
                f"another run is writing {output} at this moment; wait for it, or choose another --output"
            ) from None
        finally:
            with contextlib.suppress(OSError):  # it holds certain work, another run's lock, or a file of the user's
                folder.rmdir()


def publish(work: ResumableWork, output: Path, write: Callable[[Path], None], *, force: bool) -> None:
    """Have `write` make the output file in the work's folder, or see to it that `work.files` are all there; then rename
    that to its place and remove what the work was.

    Raises UserError, and keeps the work, where the output exists by now, unless `force`.
    """
    aside = work.folder / _ASIDE
    write(aside)
    made = aside if aside.exists() else work.files
    if output.exists() and not force:
        raise UserError(
            f"{output} was made by another run in the meantime; the work of this one is kept in {work.folder}: move "
            "that output away and type the same command, or type it with --force to replace it"
        )
    if made.is_dir():
        publish_directory(made, output)
    else:
        sync(made)
        os.replace(made, output)
        sync(output.parent)
    work.close()
    _clear(work.folder, _WORK)


def _make(folder: Path, output: Path) -> None:
    """Make the folder of the work; raises UserError where something else has its name."""
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        raise UserError(
            f"{folder} is in the way: it is no folder, and the work for {output} is to be kept in one of that name; "
            "move it away, or choose another --output"
        ) from None
    names = set(os.listdir(folder))
    # A run that was killed leaves its lock, one that failed its journal.
    others = sorted(name for name in names if not (_is_ours(name) and names & {_LOCK, _JOURNAL}))
    if others and _JOURNAL not in names:
        raise UserError(
            f"{folder} is in the way: it holds {others[0]}, and is to hold nothing but the work for {output}; move it "
            "away, or choose another --output"
        )


def _is_ours(name: str) -> bool:
    return name == _LOCK or _WORK.fullmatch(name) is not None


def _clear(folder: Path, which: re.Pattern[str]) -> None:
    """Remove what has such names, the journal first, and nothing that is the user's; the lock goes when it is given
    back."""
    for name in sorted(os.listdir(folder), key=lambda name: name != _JOURNAL):
        if which.fullmatch(name) and name == _FILES:
            shutil.rmtree(folder / name, ignore_errors=True)
        elif which.fullmatch(name):
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def _other_work(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    name = next(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
    there, here = (json.dumps(identity.get(name)) for identity in (theirs, ours))
    return (
        f"{folder} holds the work of a run that was stopped, with {name} {there} in place of {here}; type the same "
        "command to go on with it, or --force to begin anew"
    )
