"""Writing MMIDIDX datasets (see indexed.py) so that an interrupted run leaves none, and two runs never mix.

Everything is written under temporary names in the output folder and synced to disk; only then do the files get their
names: .bin, .idx and last .json. Without its .idx a .bin opens nowhere, so a run killed between the renames leaves
no dataset; killed after the .idx, it leaves a complete one that lacks its description. Replacing an old dataset
removes its .json and .idx first, so no mixture of old and new files ever opens. A locked file PREFIX.lock keeps a
second run away from the same prefix; the lock goes with the process, however it ends. What a killed run left, its
work folder included, the next run of the same prefix removes.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_plm.data.indexed import DTYPE_CODES, HEADER, MAGIC, VERSION, dataset_paths
from megatron_plm.data.output_folder import (
    held_prefix,
    in_order,
    made_folder,
    remove,
    temporary_paths,
    work_folder_path,
)
from megatron_plm.data.streamed_file import StreamedFile
from megatron_plm.errors import UserError
from megatron_plm.files import sync, write_errors_told

_CHUNK = 1 << 17  # sequences handled at a time while the index is completed
_BLOCKS_BEHIND = 16  # of about a megabyte: the checksum may fall behind for a moment without stopping whoever appends


class IndexedDatasetWriter:
    """Writes one dataset of tokens of one dtype (uint8, uint16 or int32), in constant memory.

    A context manager: `append` as often as needed, then `commit`; leaving it without `commit` removes what was
    written. A folder whose parent exists is made for the dataset. Raises UserError where the folder cannot be made or
    written to, where a file of the dataset exists already (unless `force`), where another run writes the same prefix,
    and where the disk is full.

    Each sequence is a document of its own; with `documents`, `append` is told which ones begin a document. With more
    than one of `workers` the checksum of the tokens is computed in a thread of its own.

    Attributes:
        paths: the files of the dataset.
        num_sequences, num_documents: appended so far.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        dtype: npt.DTypeLike = np.uint8,
        documents: bool = False,
        force: bool = False,
        workers: int = 1,
    ) -> None:
        self.paths = dataset_paths(prefix)
        self.num_sequences = 0
        self.num_documents = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._dtype_code = next(code for code, known in DTYPE_CODES.items() if np.dtype(known) == self._dtype)
        self._explicit = documents
        self._force = force
        self._checksum = _Checksum(threaded=workers > 1)
        self._cleanup = contextlib.ExitStack()
        self._work_folder: Path | None = None
        self._work_folder_lock = threading.Lock()

    def __enter__(self) -> "IndexedDatasetWriter":
        with contextlib.ExitStack() as stack, write_errors_told(self.paths.bin):
            stack.enter_context(made_folder(self.paths.bin.parent))
            self._check_free()
            stack.enter_context(held_prefix(self.paths))
            self._temporary = temporary_paths(self.paths)
            stack.callback(remove, self._temporary)
            self._bin = StreamedFile(self._temporary.bin)
            stack.callback(self._bin.close)
            self._idx = StreamedFile(self._temporary.idx)
            stack.callback(self._idx.close)
            stack.callback(self._checksum.close)
            # The index begins with the number of sequences, so it is written last, from files without a name, which
            # go with the process.
            self._lengths = stack.enter_context(tempfile.TemporaryFile(dir=self.paths.bin.parent))
            if self._explicit:
                self._starts = stack.enter_context(tempfile.TemporaryFile(dir=self.paths.bin.parent))
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After `commit` nothing is left to flush; without it, a flush that fails is of no interest.
        with contextlib.suppress(OSError):
            self._cleanup.close()

    def work_folder(self) -> Path:
        """The folder beside the dataset for the caller's temporary files, made when it is first asked for, by whichever
        thread; it goes when the writer is left."""
        with self._work_folder_lock:
            if self._work_folder is None:
                folder = work_folder_path(self.paths)
                with write_errors_told(folder):
                    folder.mkdir()
                self._cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
                self._work_folder = folder
            return self._work_folder

    def append(
        self,
        tokens: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.int32],
        starts: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Append tokens, and the lengths of the sequences that are complete with them or were before.

        `starts` tells of each of these sequences whether it begins a document; it is given where the writer has
        `documents`, and its very first is true. The arrays must not be changed afterwards.
        """
        if tokens.dtype != self._dtype or (starts is not None) != self._explicit:
            raise ValueError(f"append: tokens or starts are not what the writer was made for ({self._dtype})")
        with write_errors_told(self.paths.bin):
            content = np.ascontiguousarray(tokens).view(np.uint8).data
            self._bin.write(content)
            self._checksum.put(content)
            self._lengths.write(lengths.astype("<i4", copy=False).data)
            if starts is not None:
                firsts = self.num_sequences + np.flatnonzero(starts)
                self._starts.write(firsts.astype("<i8", copy=False).data)
        self.num_documents += len(lengths) if starts is None else len(firsts)
        self.num_sequences += len(lengths)

    def commit(self, metadata: dict[str, Any]) -> None:
        """Complete the index, write `metadata` with the files' checksums added, and give the files their names."""
        self.complete(metadata)
        publish([self])

    def complete(self, metadata: dict[str, Any]) -> None:
        """The part of `commit` that takes time: afterwards everything is on the disk, under temporary names."""
        with write_errors_told(self.paths.bin):
            self._bin.finish()
            sha256 = {"bin": self._checksum.hexdigest()}
            self._write_index()
            sha256["idx"] = self._checksum.hexdigest()
            with self._temporary.json.open("w", encoding="utf-8") as file:
                json.dump({**metadata, "sha256": sha256}, file, indent=1, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())

    def _check_free(self) -> None:
        for path in in_order(self.paths):
            if path.is_dir():
                raise UserError(f"output '{path}' is a folder: choose another --output-prefix, or move it away")
        existing = [f"'{path}'" for path in in_order(self.paths) if path.exists()]
        if existing and not self._force:
            raise UserError(
                f"output {', '.join(existing)} exists already: choose another --output-prefix, or give --force to "
                "replace it"
            )

    def _write_index(self) -> None:
        """The whole index, in one go; each piece goes to the disk and into the checksum side by side."""
        header = HEADER.pack(MAGIC, VERSION, self._dtype_code, self.num_sequences, self.num_documents + 1)
        parts = itertools.chain(_pieces(self._lengths, "<i4"), self._pointers(), self._documents())
        for content in itertools.chain([memoryview(header)], (values.view(np.uint8).data for values in parts)):
            self._idx.write(content)
            self._checksum.put(content)
        self._idx.finish()

    def _pointers(self) -> Iterator[npt.NDArray[np.int64]]:
        begin = 0
        for lengths in _pieces(self._lengths, "<i4"):
            ends = begin + np.cumsum(lengths, dtype="<i8")
            yield (ends - lengths) * self._dtype.itemsize
            begin = int(ends[-1])

    def _documents(self) -> Iterator[npt.NDArray[np.int64]]:
        end = self.num_sequences
        if self._explicit:
            yield from _pieces(self._starts, "<i8")
            yield np.array([end], dtype="<i8")
            return
        for first in range(0, end + 1, _CHUNK):
            yield np.arange(first, min(first + _CHUNK, end + 1), dtype="<i8")


def publish(writers: Sequence[IndexedDatasetWriter]) -> None:
    """Give the files of completed datasets their names, all or, where one of the names is taken, none.

    All old datasets lose .json and .idx before the first new file gets its name, and each kind of file is renamed for
    all before the next: killed on the way, no old dataset opens beside a new one. A failure removes all files, unless
    it comes before anything was changed.
    """
    for writer in writers:
        writer._check_free()
    changed = False
    try:
        for writer in writers:
            for path in (writer.paths.json, writer.paths.idx):
                with write_errors_told(path):
                    path.unlink(missing_ok=True)
                changed = True
            with write_errors_told(writer.paths.bin):
                sync(writer.paths.bin.parent)
        for kind in zip(
            *(zip(in_order(one._temporary), in_order(one.paths), strict=True) for one in writers), strict=True
        ):
            for temporary, path in kind:
                with write_errors_told(path):
                    os.replace(temporary, path)
        for writer in writers:
            with write_errors_told(writer.paths.bin):
                sync(writer.paths.bin.parent)
    except BaseException:
        for writer in writers if changed else ():
            with contextlib.suppress(OSError):
                remove(writer.paths)
        raise


def _pieces(file: BinaryIO, dtype: str) -> Iterator[npt.NDArray[Any]]:
    """The numbers in a file, from its beginning, some at a time."""
    file.seek(0)
    while content := file.read(_CHUNK * np.dtype(dtype).itemsize):
        yield np.frombuffer(content, dtype=dtype)


class _Checksum:
    """SHA-256 of blocks of bytes in a row, computed here or in a thread of its own that is some blocks behind."""

    def __init__(self, *, threaded: bool) -> None:
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checksum") if threaded else None
        self._pending: deque[Future[None]] = deque()

    def put(self, block: memoryview) -> None:
        """Add the next block, or see to it."""
        if self._pool is None:
            self._sha256.update(block)
            return
        self._pending.append(self._pool.submit(self._sha256.update, block))
        if len(self._pending) > _BLOCKS_BEHIND:
            self._pending.popleft().result()

    def hexdigest(self) -> str:
        """The checksum of the blocks since the last time this was asked."""
        while self._pending:
            self._pending.popleft().result()
        done, self._sha256 = self._sha256, hashlib.sha256()
        return done.hexdigest()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
