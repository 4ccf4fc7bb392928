"""Records and numbers about them kept on disk, in their order, until it is decided what becomes of them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_plm.data.records import RecordBatch
from megatron_plm.files import write_errors_told

_BATCH_TOKENS = 1 << 22
_BATCH_RECORDS = 1 << 16


class Column:
    """A file of values of one dtype: all are appended first, then taken from the beginning on.

    A dtype with a shape, such as (uint64, 2), makes a column of rows. With `default`, a column to which nothing was
    appended holds that, as often as asked for. A context manager: it is to be left before the file is removed, since
    network file systems keep a removed file under another name while it is open.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike, *, default: int | None = None) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._default = default
        self._num_written = 0
        with write_errors_told(path):
            self._file = path.open("w+b")

    def __enter__(self) -> "Column":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What is still to be written then is of no interest, and so is a full disk.
        with contextlib.suppress(OSError):
            self._file.close()

    def append(self, values: npt.NDArray) -> None:
        """Write more values; raises UserError where the disk is full."""
        with write_errors_told(self._path):
            self._file.write(np.ascontiguousarray(values, dtype=self._dtype.base).data)
        self._num_written += len(values)

    def rewind(self) -> None:
        """Let `take` begin at the first value (again)."""
        with write_errors_told(self._path):
            self._file.seek(0)

    def take(self, count: int) -> npt.NDArray:
        """Return the next values, fewer than `count` only at the end."""
        if not self._num_written and self._default is not None:
            return np.full(count, self._default, dtype=self._dtype)
        return np.frombuffer(self._file.read(count * self._dtype.itemsize), dtype=self._dtype)


class RecordStore:
    """Record batches on disk, in `folder`; read back in order, in other batches. `files` is to close its files."""

    def __init__(self, folder: Path, dtype: npt.DTypeLike, files: contextlib.ExitStack, *, names: bool) -> None:
        self._tokens = files.enter_context(Column(folder / "tokens", dtype))
        self._lengths = files.enter_context(Column(folder / "lengths", np.int32))
        self._names = files.enter_context(Column(folder / "names-read", (np.uint64, 2))) if names else None

    def append(self, batch: RecordBatch) -> None:
        """Write the records of a batch; raises UserError where the disk is full."""
        self._tokens.append(batch.tokens)
        self._lengths.append(batch.lengths)
        if self._names is not None and batch.names is not None:
            self._names.append(batch.names)

    def names(self) -> Iterator[npt.NDArray[np.uint64]]:
        """Yield the names' hashes of all records, in order, uint64 [k, 2]."""
        if self._names is not None:
            self._names.rewind()
            while len(names := self._names.take(_BATCH_RECORDS)):
                yield names

    def read(self) -> Iterator[RecordBatch]:
        """Yield all records in order, without names, in batches of a few megabytes."""
        self._tokens.rewind()
        self._lengths.rewind()
        while len(lengths := self._lengths.take(_BATCH_RECORDS)):
            number = (np.cumsum(lengths, dtype=np.int64) - 1) // _BATCH_TOKENS
            for part in np.split(lengths, np.flatnonzero(np.diff(number)) + 1):
                yield RecordBatch(self._tokens.take(int(part.sum(dtype=np.int64))), part)
