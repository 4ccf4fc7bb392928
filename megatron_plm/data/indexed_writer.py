"""Writing MMIDIDX datasets (see indexed.py) so that an interrupted run leaves none, and two runs never mix.

Everything is written under temporary names in the output folder and synced to disk; only then do the files get their
names: .bin, .idx and last .json. Without its .idx a .bin opens nowhere, so a run killed between the renames leaves
no dataset; killed after the .idx, it leaves a complete one that lacks its description. Replacing an old dataset
removes its .json and .idx first, so no mixture of old and new files ever opens. A locked file PREFIX.lock keeps a
second run away from the same prefix; the lock goes with the process, however it ends.
"""

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shlex
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_plm.data.indexed import DTYPE_CODES, HEADER, MAGIC, VERSION, DatasetPaths, dataset_paths
from megatron_plm.errors import UserError
from megatron_plm.files import Busy, exclusive, sync, write_errors_told

_DTYPE_CODE = next(code for code, dtype in DTYPE_CODES.items() if dtype is np.uint8)
_CHUNK = 1 << 18  # sequences handled at a time while the index is completed
_TOKEN_BYTES = 4  # random part of a temporary name


class IndexedDatasetWriter:
    """Writes one dataset of uint8 tokens, one document for each sequence, in constant memory.

    A context manager: `append` as often as needed, then `commit`; leaving it without `commit` removes what was
    written. A folder whose parent exists is made for the dataset. Raises UserError where the folder cannot be made or
    written to, where a file of the dataset exists already (unless `force`), where another run writes the same prefix,
    and where the disk is full.

    With more than one of `workers` the checksum of the tokens is computed in a thread of its own.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, force: bool = False, workers: int = 1) -> None:
        self.paths = dataset_paths(prefix)
        self._force = force
        self._num_sequences = 0
        self._checksum = _Checksum(threaded=workers > 1)
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> "IndexedDatasetWriter":
        with contextlib.ExitStack() as stack, write_errors_told(self.paths.bin):
            stack.enter_context(_folder(self.paths.bin.parent))
            self._check_free()
            stack.enter_context(_exclusive(self.paths))
            stack.callback(self._checksum.close)
            self._temporary = _temporary_paths(self.paths, secrets.token_hex(_TOKEN_BYTES))
            stack.callback(_remove, self._temporary)
            self._bin = stack.enter_context(self._temporary.bin.open("wb", buffering=0))
            self._idx = stack.enter_context(self._temporary.idx.open("w+b"))
            # The header, which holds the number of sequences, is filled in at the end.
            self._idx.write(bytes(HEADER.size))
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After `commit` nothing is left to flush; without it, a flush that fails is of no interest.
        with contextlib.suppress(OSError):
            self._cleanup.close()

    def append(self, tokens: npt.NDArray[np.uint8], lengths: npt.NDArray[np.int32]) -> None:
        """Append tokens, and the lengths of the sequences that are complete with them (see FastaTokenizer.read).

        The arrays must not be changed afterwards.
        """
        with write_errors_told(self.paths.bin):
            unwritten = tokens.data
            while unwritten:
                unwritten = unwritten[self._bin.write(unwritten) :]
            self._idx.write(lengths.astype("<i4", copy=False).data)
        self._checksum.update(tokens)
        self._num_sequences += len(lengths)

    def commit(self, metadata: dict[str, Any]) -> None:
        """Complete the index, write `metadata` with the files' checksums added, and give the files their names."""
        with write_errors_told(self.paths.bin):
            self._complete_index()
            with self._temporary.idx.open("rb") as idx:
                idx_sha256 = hashlib.file_digest(idx, "sha256").hexdigest()
            sha256 = {"idx": idx_sha256, "bin": self._checksum.hexdigest()}
            with self._temporary.json.open("w", encoding="utf-8") as file:
                json.dump({**metadata, "sha256": sha256}, file, indent=1, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.fsync(self._bin.fileno())
            os.fsync(self._idx.fileno())
            self._publish()

    def _publish(self) -> None:
        self._check_free()
        for path in (self.paths.json, self.paths.idx):
            path.unlink(missing_ok=True)
        sync(self.paths.bin.parent)
        for temporary, path in zip(_all(self._temporary), _all(self.paths), strict=True):
            os.replace(temporary, path)
        sync(self.paths.bin.parent)

    def _check_free(self) -> None:
        existing = [f"'{path}'" for path in _all(self.paths) if path.exists()]
        if existing and not self._force:
            raise UserError(
                f"output {', '.join(existing)} exists already: choose another --output-prefix, or give --force to "
                "replace it"
            )

    def _complete_index(self) -> None:
        """Append pointers and document entries to the lengths that are there, and fill in the header."""
        file, count, begin = self._idx, self._num_sequences, 0
        for first in range(0, count, _CHUNK):
            file.seek(HEADER.size + 4 * first)
            lengths = np.frombuffer(file.read(4 * min(_CHUNK, count - first)), dtype="<i4")
            ends = begin + np.cumsum(lengths, dtype="<i8")
            file.seek(HEADER.size + 4 * count + 8 * first)
            file.write((ends - lengths).data)
            begin = int(ends[-1])
        for first in range(0, count + 1, _CHUNK):
            file.write(np.arange(first, min(first + _CHUNK, count + 1), dtype="<i8").data)
        file.seek(0)
        file.write(HEADER.pack(MAGIC, VERSION, _DTYPE_CODE, count, count + 1))
        file.flush()


class _Checksum:
    """SHA-256 of arrays in a row, computed here or in a thread that is a few arrays behind."""

    def __init__(self, *, threaded: bool) -> None:
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checksum") if threaded else None
        self._pending: deque[Future[None]] = deque()

    def update(self, array: npt.NDArray[np.uint8]) -> None:
        if self._pool is None:
            self._sha256.update(array.data)
            return
        self._pending.append(self._pool.submit(self._sha256.update, array.data))
        if len(self._pending) > 4:
            self._pending.popleft().result()

    def hexdigest(self) -> str:
        while self._pending:
            self._pending.popleft().result()
        return self._sha256.hexdigest()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _all(paths: DatasetPaths) -> tuple[Path, Path, Path]:
    """In the order in which they are published."""
    return paths.bin, paths.idx, paths.json


def _remove(paths: DatasetPaths) -> None:
    for path in _all(paths):
        path.unlink(missing_ok=True)


def _temporary_paths(paths: DatasetPaths, token: str) -> DatasetPaths:
    return DatasetPaths(*(path.with_name(f"{path.name}.{token}.tmp") for path in _all(paths)))


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
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
def _exclusive(paths: DatasetPaths) -> Iterator[None]:
    """Hold PREFIX.lock, and remove temporary files that a killed run of the same prefix left behind.

    On a file system without locks there is no exclusion; random temporary names still keep two runs apart.
    """
    lock = paths.bin.with_suffix(".lock")
    try:
        with exclusive(lock) as locked:
            for path in _all(paths) if locked else ():
                leftover = glob.escape(path.name) + "." + "[0-9a-f]" * (2 * _TOKEN_BYTES) + ".tmp"
                for temporary in path.parent.glob(leftover):
                    temporary.unlink(missing_ok=True)
            yield
    except Busy:
        raise UserError(
            f"another run is writing '{lock.with_suffix('')}' at this moment and holds '{lock}': wait for it or "
            "choose another --output-prefix"
        ) from None
