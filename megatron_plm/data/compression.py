"""Compression formats of input files, told by their first bytes."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from megatron_plm.errors import UserError

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_CHECKSUM, _GZIP_EXTRA, _GZIP_NAME, _GZIP_COMMENT = 2, 4, 8, 16  # flags of a header
_LONGEST_HEADER = 1 << 20


class Decoder(Protocol):
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


class _IsalDecoder:
    """ISA-L's decompressor, two to three times as fast.

    It misreads some headers that come in pieces: those with a checksum, or with an extra field and a name. So the first
    header is gathered before it is handed over; one that is longer than any sane one goes as it is.
    """

    def __init__(self) -> None:
        from isal import igzip_lib

        self._isal = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        self._head: bytes | None = b""  # what has come of the header; None: it was handed over

    @property
    def eof(self) -> bool:
        return bool(self._isal.eof)

    @property
    def needs_input(self) -> bool:
        return self._head is not None or bool(self._isal.needs_input)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._isal.unused_data)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if self._head is not None:
            data = self._head + data
            if len(data) < _LONGEST_HEADER and not _has_whole_header(data):
                self._head = data
                return b""
            self._head = None
        return bytes(self._isal.decompress(data, max_length))


def _has_whole_header(data: bytes) -> bool:
    """Whether the header of a gzip member ends in `data`, or is none (RFC 1952, section 2.3)."""
    if not data.startswith(_GZIP_MAGIC[: len(data)]):
        return True
    if len(data) < 10:
        return False
    flags, end = data[3], 10
    if flags & _GZIP_EXTRA:
        end += 2 + int.from_bytes(data[10:12], "little")
    for text in (_GZIP_NAME, _GZIP_COMMENT):  # each ends in a zero byte
        if flags & text:
            end = data.find(b"\0", end) + 1 or len(data) + 1
    return end + (2 if flags & _GZIP_CHECKSUM else 0) <= len(data)


def _gzip_decoder() -> Decoder:
    try:
        return _IsalDecoder()
    except ImportError:
        return _GzipDecoder()


def _gzip_error() -> type[Exception]:
    try:
        from isal import igzip_lib
    except ImportError:
        return zlib.error
    return cast(type[Exception], igzip_lib.error)


class _ZstdDecoder:
    """zstandard's decompressor, which knows no limit of its output; `Codec.slice_size` keeps it within 70 MB."""

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
class Codec:
    """A compression format: `slice_size` bytes are decompressed at a time, errors come as `error()`."""

    name: str
    extension: str
    magic: bytes
    slice_size: int
    decoder: Callable[[], Decoder]
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


CODECS = (
    Codec("gzip", ".gz", _GZIP_MAGIC, 1 << 16, _gzip_decoder, _gzip_error),
    Codec("zstd", ".zst", b"\x28\xb5\x2f\xfd", 1 << 11, _ZstdDecoder, _zstd_error),
    Codec("bzip2", ".bz2", b"BZh", 1 << 16, bz2.BZ2Decompressor, lambda: OSError),
    Codec("xz", ".xz", b"\xfd7zXZ\x00", 1 << 16, lzma.LZMADecompressor, lambda: lzma.LZMAError),
)
