"""Plain files cut into byte ranges of whole records: whoever scans a range reads it too."""

import os
import weakref
from collections.abc import Iterator

import numpy as np

from megatron_plm.data.formats import BLOCK_SIZE, UTF8_BYTE_ORDER_MARK
from megatron_plm.errors import UserError

_PIECE = 1 << 14  # read at a time in search of a record's begin


class RangeFile:
    """A regular file, read at any place by any thread.

    `path` and `size` are those of the file when it was looked at; `label` names it in messages. It is closed when
    nothing refers to it any more. Raises UserError where it cannot be opened or read, or has become shorter.
    """

    def __init__(self, path: str, size: int, label: str) -> None:
        self._label = label
        self._size = size
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{label} cannot be opened: {error.strerror}") from None
        weakref.finalize(self, os.close, self._descriptor)

    def ranges(self, mark: bytes, longest: int, reason: str) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of ranges of about BLOCK_SIZE bytes that end where a record begins, or with the file.

        A record begins behind the first byte of each `mark`. Only some bytes around the end of a range are read here.
        Of a record longer than `longest` bytes a UserError tells `reason`.
        """
        head = self._pread(len(UTF8_BYTE_ORDER_MARK), 0)
        begin = len(head) if head == UTF8_BYTE_ORDER_MARK else 0
        while begin < self._size:
            end = self._next_record(begin + BLOCK_SIZE, mark, begin + longest)
            if end is None:
                raise UserError(f"{self._label}: a record in it is longer than {longest:,} bytes: {reason}")
            yield begin, end
            begin = end
        if os.fstat(self._descriptor).st_size > self._size:
            raise UserError(
                f"{self._label} has grown beyond the {self._size:,} bytes it had when it was opened: something else "
                "writes it; wait until it is complete"
            )

    def read(self, begin: int, end: int) -> memoryview:
        """The bytes of a range."""
        buffer = np.empty(end - begin, dtype=np.uint8).data
        filled = 0
        while filled < len(buffer):
            count = self._into(buffer[filled:], begin + filled)
            if not count:
                raise UserError(
                    f"{self._label} ends after {begin + filled:,} bytes, of {self._size:,} it had when it was opened: "
                    "something else writes it; wait until it is complete"
                )
            filled += count
        return buffer

    def _next_record(self, place: int, mark: bytes, limit: int) -> int | None:
        """Where the first record at or behind `place` begins, the file's size if none does, None beyond `limit`."""
        place -= 1
        while place < self._size:
            if place > limit:
                return None
            piece = self._pread(_PIECE, place)
            found = piece.find(mark)
            if found >= 0:
                return min(place + found + 1, self._size)
            if len(piece) < len(mark):
                break
            place += len(piece) - len(mark) + 1
        return self._size

    def _pread(self, size: int, place: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, place)
        except OSError as error:
            raise UserError(f"{self._label} cannot be read: {error.strerror}") from None

    def _into(self, buffer: memoryview, place: int) -> int:
        try:
            return os.preadv(self._descriptor, [buffer], place)
        except OSError as error:
            raise UserError(f"{self._label} cannot be read: {error.strerror}") from None
