"""Opening input files: plain or compressed, told apart by their first bytes, streamed in blocks of constant size."""

import bz2
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from megatron_plm.errors import UserError

BLOCK_SIZE = 1 << 20
_UTF8_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _Decoder(Protocol):
    """One compressed stream, as bz2.BZ2Decompressor handles it; a file may hold several in a row.

    `decompress` returns at most so many bytes; while `needs_input` is false it has more to give for no input.
    """

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipDecoder:
    """zlib's decompressor, which hands back the input that it had no room for."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


class _ZstdDecoder:
    """zstandard's decompressor, which knows no limit of its output; `_Codec.slice_size` keeps it within 70 MB."""

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        self._zstd = zstandard.ZstdDecompressor().decompressobj()

    @property
    def eof(self) -> bool:
        return self._zstd.eof

    @property
    def unused_data(self) -> bytes:
        return self._zstd.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:  # noqa: ARG002 (see the class)
        return self._zstd.decompress(data)


@dataclass(frozen=True)
class _Codec:
    """A compression format: `slice_size` bytes are decompressed at a time, errors come as `error()`."""

    name: str
    extension: str
    magic: bytes
    slice_size: int
    decoder: Callable[[], _Decoder]
    error: Callable[[], type[Exception]]


def _zstd_error() -> type[Exception]:
    try:
        import zstandard
    except ImportError:
        raise UserError(
            "reading .zst files needs the package zstandard: "
            "run `pip install 'megatron-plm[zst]'` or decompress the file first"
        ) from None
    return zstandard.ZstdError


_CODECS = (
    _Codec("gzip", ".gz", b"\x1f\x8b", 1 << 16, _GzipDecoder, lambda: zlib.error),
    _Codec("zstd", ".zst", b"\x28\xb5\x2f\xfd", 1 << 11, _ZstdDecoder, _zstd_error),
    _Codec("bzip2", ".bz2", b"BZh", 1 << 16, bz2.BZ2Decompressor, lambda: OSError),
    _Codec("xz", ".xz", b"\xfd7zXZ\x00", 1 << 16, lzma.LZMADecompressor, lambda: lzma.LZMAError),
)
_ZIP_MAGIC = b"PK\x03\x04"


class BlockReader:
    """The decompressed bytes of a file, in blocks of `BLOCK_SIZE` (the last one shorter); iterate over it once.

    Raises UserError, naming the file, where it is missing, a directory, empty, unreadable, truncated or damaged.

    Attributes:
        size: bytes of the file on disk, 0 where it is not a regular file (a pipe).
        position: bytes of the file read so far.
        note: a sentence for the user where the file's name and its content disagree, else None.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.position = 0
        try:
            self._file: BinaryIO = self.path.open("rb", buffering=BLOCK_SIZE)
        except FileNotFoundError:
            raise UserError(f"input file '{self.path}' does not exist") from None
        except IsADirectoryError:
            raise UserError(f"input '{self.path}' is a directory: name the files in it") from None
        except OSError as error:
            raise UserError(f"input file '{self.path}' cannot be opened: {error.strerror}") from None
        status = os.fstat(self._file.fileno())
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        try:
            self._head = self._read(len(max((codec.magic for codec in _CODECS), key=len)))
            if not self._head:
                raise UserError(f"input file '{self.path}' is empty")
            if self._head.startswith(_ZIP_MAGIC):
                raise UserError(f"input file '{self.path}' is a zip archive: unpack it first")
        except UserError:
            self.close()
            raise
        self._codec = next((codec for codec in _CODECS if self._head.startswith(codec.magic)), None)
        self.note = self._disagreement()

    def close(self) -> None:
        """Close the file; iterating to the end does so too."""
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        with self._file:
            pieces = self._plain() if self._codec is None else self._decompressed(self._codec)
            first = True
            for block in _in_blocks(pieces):
                yield block.removeprefix(_UTF8_BYTE_ORDER_MARK) if first else block
                first = False

    def _disagreement(self) -> str | None:
        extension = self.path.suffix.lower()
        named = next((codec.name for codec in _CODECS if codec.extension == extension), "plain text")
        content = self._codec.name if self._codec else "plain text"
        if named == content:
            return None
        return f"'{self.path}': by its name {named}, by its content {content}; it is read as {content}"

    def _read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise UserError(f"input file '{self.path}' cannot be read: {error.strerror}") from None
        self.position += len(data)
        return data

    def _plain(self) -> Iterator[bytes]:
        yield self._head
        # The first block is shorter by the head, so that whole blocks need no joining.
        data = self._read(BLOCK_SIZE - len(self._head))
        while data:
            yield data
            data = self._read(BLOCK_SIZE)

    def _decompressed(self, codec: _Codec) -> Iterator[bytes]:
        error_type = codec.error()
        decoder: _Decoder | None = None
        data = self._head + self._read(codec.slice_size)
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
                        f"input file '{self.path}' is damaged: {codec.name} data cannot be decompressed "
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
                f"input file '{self.path}' is truncated: its {codec.name} data stop in mid-stream "
                f"after {self.position:,} bytes; copy or download it again"
            )


def _in_blocks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Join pieces until they make a block or more."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= BLOCK_SIZE:
            yield b"".join(waiting)
            waiting, size = [], 0
    if size:
        yield b"".join(waiting)
