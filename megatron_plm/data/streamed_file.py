"""A large file written from its begin to its end: by threads of its own, past the page cache where that can be."""

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

_BUFFER_BYTES = 1 << 22  # a multiple of every page and sector size
_NUM_BUFFERS = 6  # a disk that takes its time now and then doesn't stop whoever writes
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
_NUM_THREADS = 2  # so that the disk has the next buffer already when it is done with one
_SYNC_BYTES = 1 << 25


class StreamedFile:
    """Written to by `write`, complete after `finish`; errors are the OSErrors of the writes before.

    The file is opened with O_DIRECT: the disk takes the bytes from our buffers while the processor goes on, and other
    files keep their place in the page cache. A file system that refuses it (tmpfs, some network ones) gets ordinary
    writes, synced every 32 MB so that the last sync has little to wait for.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        try:
            self._direct = bool(_DIRECT)
            self._descriptor = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some systems create the file before they refuse the flag
            self._direct = False
            self._descriptor = os.open(path, flags, 0o666)
        self._buffers: list[mmap.mmap] = []
        self._current = 0  # the buffer that is being filled
        self._filled = 0  # bytes of it
        self._handed_on = 0  # bytes of the file before it
        self._under_way: deque[Future[None]] = deque()  # the buffers before the current one, oldest first
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="write")

    def write(self, content: memoryview) -> None:
        """Append bytes, which are copied; raises what an earlier write to the disk raised."""
        while content:
            if self._current == len(self._buffers):
                self._buffers.append(mmap.mmap(-1, _BUFFER_BYTES))  # aligned to a page, as O_DIRECT wants it
            count = min(len(content), _BUFFER_BYTES - self._filled)
            # NumPy's copy lets other threads run meanwhile, that of a memoryview doesn't.
            place = np.frombuffer(self._buffers[self._current], np.uint8, count, self._filled)
            place[:] = np.frombuffer(content, np.uint8, count)
            self._filled += count
            content = content[count:]
            if self._filled == _BUFFER_BYTES:
                full = memoryview(self._buffers[self._current])
                self._under_way.append(self._threads.submit(self._put, full, self._handed_on))
                self._handed_on += _BUFFER_BYTES
                self._wait(until=_NUM_BUFFERS - 1)
                self._current = (self._current + 1) % _NUM_BUFFERS
                self._filled = 0

    def finish(self) -> None:
        """Write what is left and sync the file to the disk."""
        self._wait(until=0)
        if self._filled:
            self._go_through_the_cache()  # the last piece is no multiple of a sector
            self._put(memoryview(self._buffers[self._current])[: self._filled], self._handed_on)
            self._filled = 0
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file, whatever was written of it."""
        self._threads.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def _wait(self, *, until: int) -> None:
        """Wait until at most so many buffers are on their way."""
        while len(self._under_way) > until:
            self._under_way.popleft().result()

    def _put(self, content: memoryview, place: int) -> None:
        while content:
            direct = self._direct  # the other thread may be refused at the same time, and be the first to change it
            try:
                count = os.pwrite(self._descriptor, content, place)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._go_through_the_cache()
                continue
            content = content[count:]
            place += count
        if not self._direct and place % _SYNC_BYTES == 0:
            os.fsync(self._descriptor)

    def _go_through_the_cache(self) -> None:
        if not self._direct:
            return
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        self._direct = False
