"""Compression formats of input files, told by their first bytes."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from megatron_plm.errors import UserError


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


def _gzip_decoder() -> Decoder:
    """ISA-L's decompressor, two to three times as fast, where its package is installed."""
    try:
        from isal import igzip_lib
    except ImportError:
        return _GzipDecoder()
    return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)


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
    Codec("gzip", ".gz", b"\x1f\x8b", 1 << 16, _gzip_decoder, _gzip_error),
    Codec("zstd", ".zst", b"\x28\xb5\x2f\xfd", 1 << 11, _ZstdDecoder, _zstd_error),
    Codec("bzip2", ".bz2", b"BZh", 1 << 16, bz2.BZ2Decompressor, lambda: OSError),
    Codec("xz", ".xz", b"\xfd7zXZ\x00", 1 << 16, lzma.LZMADecompressor, lambda: lzma.LZMAError),
)
