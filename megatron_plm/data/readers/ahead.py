"""Inputs that are read side by side and come out in their order."""

import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_plm.data.readers.scans import Job, Place, Scanned
from megatron_plm.errors import UserError
from megatron_plm.files import write_errors_told

_AHEAD = 2  # scans of an input that wait in memory before its turn


def pipelined(jobs: Iterator[Job], scanners: Executor, num_ahead: int) -> Iterator[tuple[Place, Scanned]]:
    """Yield the blocks and what they held, in order, while `scanners` scan up to `num_ahead` more."""
    pending: deque[tuple[Place, Future[Scanned]]] = deque()
    error: list[UserError] = []
    for job in _until_error(jobs, error):
        pending.append((job.place, scanners.submit(job.scan)))
        if len(pending) > num_ahead:
            place, future = pending.popleft()
            yield place, future.result()
    for place, future in pending:
        yield place, future.result()
    if error:
        raise error[0]


def _until_error(jobs: Iterator[Job], found: list[UserError]) -> Iterator[Job]:
    """The jobs up to an error of cutting, which goes to `found`: what is wrong in the blocks before it comes first."""
    try:
        yield from jobs
    except UserError as error:
        found.append(error)


class Lane:
    """One input, read by the thread that calls `run`; its jobs are scanned by `scanners` and wait for `results`.

    Before its turn comes with `results`, few scans wait in memory, and with `spools_to` the others in a file without a
    name in that folder; without, reading stops there. After that `num_ahead` scans are under way.
    """

    def __init__(
        self, jobs: Iterator[Job], scanners: Executor, *, num_ahead: int, spools_to: Callable[[], Path] | None
    ) -> None:
        self._jobs = jobs
        self._scanners = scanners
        self._num_ahead = num_ahead
        self._spool = None if spools_to is None else _Spool(spools_to)
        self._waiting: deque[tuple[Place, Future[Scanned] | _Spooled]] = deque()
        self._num_spooled = 0  # of the waiting ones: those in front
        self._changed = threading.Condition()
        self._has_turn = self._is_stopped = self._is_done = False
        self._error: BaseException | None = None

    def run(self) -> None:
        """Read the input to its end, or until `stop`; an error waits for `results`."""
        try:
            for job in self._jobs:
                with self._changed:
                    self._make_room()
                    if self._is_stopped:
                        break
                    self._waiting.append((job.place, self._scanners.submit(job.scan)))
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._is_done = True
                self._changed.notify_all()

    def results(self) -> Iterator[tuple[Place, Scanned]]:
        """Yield the blocks and what they held, in order; raises what a scan, or cutting, raised."""
        with self._changed:
            self._has_turn = True
            self._changed.notify_all()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_done)
                if not self._waiting:
                    break
                place, item = self._waiting.popleft()
                self._num_spooled -= isinstance(item, _Spooled)
                self._changed.notify_all()
            if isinstance(item, _Spooled):
                assert self._spool is not None
                yield place, self._spool.take(item)
            else:
                yield place, item.result()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Let `run` end soon."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Remove the file of waiting scans; `run` has ended."""
        if self._spool is not None:
            self._spool.close()

    def _make_room(self) -> None:
        """Wait, or spool, until one more scan may be under way."""
        while not self._is_stopped:
            in_memory = len(self._waiting) - self._num_spooled
            if in_memory < (self._num_ahead if self._has_turn else _AHEAD):
                return
            if self._has_turn or self._spool is None:
                self._changed.wait()
                continue
            place, item = self._waiting[self._num_spooled]
            assert isinstance(item, Future)
            self._waiting[self._num_spooled] = place, self._spool.put(item.result())
            self._num_spooled += 1


@dataclass(frozen=True)
class _Spooled:
    """A scan in a spool: what is small of it, and where its arrays are."""

    place: int
    layout: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]  # name, dtype and shape of each array
    rest: dict[str, Any]


class _Spool:
    """Scans in a file without a name, made in `folder()` when the first one comes. Raises UserError where it cannot be
    written."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._file: Any = None
        self._size = 0

    def put(self, scanned: Scanned) -> _Spooled:
        """Append a scan."""
        place, arrays, rest = self._size, [], {}
        folder = self._folder()
        with write_errors_told(folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (see `close`)
            for name, value in vars(scanned).items():
                if isinstance(value, np.ndarray):
                    arrays.append((name, value.dtype, value.shape))
                    self._append(value)
                else:
                    rest[name] = value
        return _Spooled(place, tuple(arrays), rest)

    def take(self, spooled: _Spooled) -> Scanned:
        """Read a scan."""
        arrays: dict[str, Any] = {}
        place = spooled.place
        for name, dtype, shape in spooled.layout:
            arrays[name] = np.empty(shape, dtype)
            place += self._read(arrays[name], place)
        return Scanned(**arrays, **spooled.rest)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, array: npt.NDArray[Any]) -> None:
        left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        while left:
            count = os.pwrite(self._file.fileno(), left, self._size)
            self._size += count
            left = left[count:]

    def _read(self, array: npt.NDArray[Any], place: int) -> int:
        left, size = array.reshape(-1).view(np.uint8).data, array.nbytes
        while left:
            count = os.preadv(self._file.fileno(), [left], place)
            assert count, "the spool ended early"
            place += count
            left = left[count:]
        return size
