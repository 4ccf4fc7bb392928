"""Opening input: plain or compressed, told apart by its first bytes, streamed in constant memory."""

import contextlib
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from megatron_plm.data.compression import CODECS, Codec, Decoder
from megatron_plm.errors import UserError

BLOCK_SIZE = 1 << 20
_BUFFER_SIZE = 1 << 16  # below a block, so that blocks are read straight to their place
STANDARD_INPUT = "-"
UTF8_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")
_ZIP_MAGIC = b"PK\x03\x04"


class BlockReader:
    """The decompressed bytes of a file, or of standard input ('-'), read once from its begin to its end.

    Take them by `readinto`, or iterate over blocks of `BLOCK_SIZE` (the last one shorter). Nothing is sought, so pipes
    are read as files are. A UTF-8 byte order mark is no part of them. Raises UserError, naming the file, where it is
    missing, a directory, empty, unreadable, truncated, damaged or UTF-16.

    Attributes:
        label: how messages name it.
        size: bytes of the file on disk, 0 where it is not a regular file (a pipe).
        position: bytes of the file read so far.
        compression: what it is compressed with, None: nothing.
        note: a sentence for the user where the file's name and its content disagree, else None.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._is_standard_input = os.fspath(path) == STANDARD_INPUT
        self.label = "standard input" if self._is_standard_input else f"input file '{self.path}'"
        self.position = 0
        self._file = self._open()
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            status = self._status()
            self.size = status.st_size if status and stat.S_ISREG(status.st_mode) else 0
            head = self._first_bytes()
            self._codec = next((codec for codec in CODECS if head.startswith(codec.magic)), None)
            self.compression = self._codec.name if self._codec else None
            self.note = self._disagreement()
            self._pieces = self._plain(head) if self._codec is None else self._decompressed(self._codec, head)
            self._waiting = memoryview(b"")  # content read, but not taken yet
            failed.pop_all()
        self._started = False

    def close(self) -> None:
        """Close the file; reading to the end does so too."""
        if not self._is_standard_input:
            self._file.close()

    def peek(self, size: int, *, until: Callable[[bytes], bool] | None = None) -> bytes:
        """Return the first bytes of what comes next, without taking them.

        At least `size` of them, or all there are, or enough for `until`: from a pipe no more may come for a while.
        """
        self._start()
        found = bytes(self._waiting)
        while len(found) < size and not (until and until(found)):
            piece = next(self._pieces, None)
            if piece is None:
                break
            found += piece
        self._waiting = memoryview(found)
        return found

    def skip_lines(self, count: int) -> int:
        """Take the first `count` lines; returns how many there were."""
        skipped = 0
        while skipped < count and (waiting := self.peek(1)):
            end = 0
            while skipped < count and (found := waiting.find(b"\n", end)) >= 0:
                skipped, end = skipped + 1, found + 1
            self._waiting = self._waiting[end if skipped == count else len(waiting) :]
        return skipped

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer`; returns how many bytes it now holds, fewer than all only at the end of the content."""
        self._start()
        filled = 0
        while filled < len(buffer):
            if not self._waiting:
                if self._codec is None:  # straight to its place
                    count = self._read_file_into(buffer[filled:])
                    if not count:
                        break
                    filled += count
                    continue
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._waiting = memoryview(piece)
            count = min(len(buffer) - filled, len(self._waiting))
            buffer[filled : filled + count] = self._waiting[:count]
            self._waiting = self._waiting[count:]
            filled += count
        if filled < len(buffer):
            self.close()
        return filled

    def __iter__(self) -> Iterator[bytes]:
        block = bytearray(BLOCK_SIZE)
        count = BLOCK_SIZE
        while count == BLOCK_SIZE:
            count = self.readinto(memoryview(block))
            if count:
                yield bytes(memoryview(block)[:count])

    def _open(self) -> BinaryIO:
        if self._is_standard_input:
            if sys.stdin is None:
                raise UserError("standard input is closed: name a file, or pipe something into the command")
            return sys.stdin.buffer
        try:
            return self.path.open("rb", buffering=_BUFFER_SIZE)
        except FileNotFoundError:
            raise UserError(f"{self.label} does not exist") from None
        except IsADirectoryError:
            raise UserError(f"input '{self.path}' is a directory: name the files in it") from None
        except OSError as error:
            raise UserError(f"{self.label} cannot be opened: {error.strerror}") from None

    def _status(self) -> os.stat_result | None:
        try:
            return os.fstat(self._file.fileno())
        except io.UnsupportedOperation:  # standard input may be an object in memory
            return None

    def _first_bytes(self) -> bytes:
        head = b""
        longest = max(len(codec.magic) for codec in CODECS)
        while len(head) < longest and (more := self._read(longest - len(head))):
            head += more
        if not head:
            raise UserError(f"{self.label} is empty")
        if head.startswith(_ZIP_MAGIC):
            raise UserError(f"{self.label} is a zip archive: unpack it first")
        return head

    def _start(self) -> None:
        """Look at the content's first bytes, once."""
        if self._started:
            return
        self._started = True
        head = self.peek(len(UTF8_BYTE_ORDER_MARK))
        if head.startswith(_UTF16_BYTE_ORDER_MARKS):
            raise UserError(f"{self.label} is UTF-16 text: save it as UTF-8")
        self._waiting = memoryview(head.removeprefix(UTF8_BYTE_ORDER_MARK))

    def _disagreement(self) -> str | None:
        if self._is_standard_input:
            return None
        extension = self.path.suffix.lower()
        named = next((codec.name for codec in CODECS if codec.extension == extension), "plain text")
        content = self.compression or "plain text"
        if named == content:
            return None
        return f"'{self.path}': by its name {named}, by its content {content}; it is read as {content}"

    def _read(self, size: int) -> bytes:
        """At most `size` bytes of the file, what can be had at once; none only at its end."""
        try:
            data = cast(io.BufferedReader, self._file).read1(size)
        except OSError as error:
            raise UserError(f"{self.label} cannot be read: {error.strerror}") from None
        self.position += len(data)
        return data

    def _read_file_into(self, buffer: memoryview) -> int:
        try:
            count = cast(io.BufferedReader, self._file).readinto(buffer)
        except OSError as error:
            raise UserError(f"{self.label} cannot be read: {error.strerror}") from None
        self.position += count
        return count

    def _plain(self, data: bytes) -> Iterator[bytes]:
        while data:
            yield data
            data = self._read(BLOCK_SIZE)

    def _decompressed(self, codec: Codec, data: bytes) -> Iterator[bytes]:
        error_type = codec.error()
        decoder: Decoder | None = None
        while data:
            if decoder is None:
                data = data.lstrip(b"\0")  # streams may be padded with zeros
                if data:
                    decoder = codec.decoder()
            while decoder is not None:
                try:
                    content = decoder.decompress(data, BLOCK_SIZE)
                except error_type as error:
                    raise UserError(
                        f"{self.label} is damaged: {codec.name} data cannot be decompressed "
                        f"in the {self.position:,} bytes read so far ({error})"
                    ) from None
                yield content
                data = b""
                if decoder.eof:
                    data = decoder.unused_data
                    decoder = None
                elif decoder.needs_input:
                    break
            data = data or self._read(codec.slice_size)
        if decoder is not None:
            raise UserError(
                f"{self.label} is truncated: its {codec.name} data stop in mid-stream "
                f"after {self.position:,} bytes; copy or download it again"
            )
