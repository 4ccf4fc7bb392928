"""Compressed and plain input, whole, in several streams, cut short and damaged."""

import bz2
import dataclasses
import gzip
import lzma
import os
import random
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from processes import environment

from megatron_plm.data import formats
from megatron_plm.data.formats import BLOCK_SIZE, BlockReader
from megatron_plm.errors import UserError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
NAMES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
TEXT = b">P1\nMKV\n" * 450_000  # three blocks and a bit


@pytest.fixture(autouse=True, params=["isal", "zlib"])
def gzip_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with ISA-L's decompressor and, as where that is not installed, with zlib's."""
    if request.param == "zlib":
        monkeypatch.setitem(sys.modules, "isal", None)


def read(path: Path) -> bytes:
    return b"".join(BlockReader(path))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("extension", ["", *COMPRESS])
def test_content_is_read_in_blocks_of_the_promised_size(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path / f"a.fasta{extension}", COMPRESS.get(extension, bytes)(TEXT))
    reader = BlockReader(path)
    blocks = list(reader)
    assert b"".join(blocks) == TEXT
    assert reader.note is None
    assert reader.size == reader.position == path.stat().st_size
    if not extension:
        assert [len(block) for block in blocks[:-1]] == [BLOCK_SIZE] * 3
    assert all(len(block) >= BLOCK_SIZE for block in blocks[:-1])


@pytest.mark.parametrize("extension", COMPRESS)
def test_several_streams_and_zero_padding_are_one_content(tmp_path: Path, extension: str) -> None:
    compress = COMPRESS[extension]
    small = [b">P1\nMK", b"V\n>P2\n", b"", b"M\n"] * 500
    data = b"".join(map(compress, small)) + bytes(70_000)
    assert read(write(tmp_path / f"a{extension}", data)) == b"".join(small)


@pytest.mark.parametrize("flags", range(0, 32, 2))
def test_a_gzip_header_may_come_in_any_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int) -> None:
    """RFC 1952, section 2.3: extra field, name, comment and checksum of the header, each there or not."""
    head = b"\x1f\x8b\x08" + bytes([flags]) + bytes(6)
    head += b"\x05\x00ab\x01\x00c" if flags & 4 else b""
    head += b"name\0" if flags & 8 else b""
    head += b"comment\0" if flags & 16 else b""
    head += (zlib.crc32(head) & 0xFFFF).to_bytes(2, "little") if flags & 2 else b""
    member = head + gzip.compress(b">P1\nMKVLAG\n", mtime=0)[10:]
    path = write(tmp_path / "a.gz", member * 3)
    for size in (1, 3, 7, 11, 1 << 16):
        codecs = [dataclasses.replace(codec, slice_size=size) for codec in formats.CODECS]
        monkeypatch.setattr(formats, "CODECS", codecs)
        assert read(path) == b">P1\nMKVLAG\n" * 3


@pytest.mark.parametrize("extension", COMPRESS)
def test_a_cut_at_any_place_is_told_with_the_file_name(tmp_path: Path, extension: str) -> None:
    data = COMPRESS[extension](b">P1\nMKVLAG\n")
    for size in range(8, len(data)):
        path = write(tmp_path / f"cut{extension}", data[:size])
        with pytest.raises(UserError, match=rf"cut{extension}' is truncated: its {NAMES[extension]} data stop"):
            read(path)


@pytest.mark.parametrize("extension", COMPRESS)
def test_damaged_data_are_told_with_the_file_name(tmp_path: Path, extension: str) -> None:
    # Fixed bytes: whether a damaged stream looks damaged or cut short depends on them.
    good = COMPRESS[extension](random.Random(1).randbytes(5000))
    damaged = good[:2500] + bytes([good[2500] ^ 0xFF]) + good[2501:]
    # zstd checks nothing unless asked to; what follows the stream is wrong in any case.
    data = good + b"junk that is no stream" if extension == ".zst" else damaged
    with pytest.raises(UserError, match=rf"a{extension}' is damaged: {NAMES[extension]} data cannot be decompressed"):
        read(write(tmp_path / f"a{extension}", data))


@pytest.mark.parametrize(
    ("name", "data", "note"),
    [
        ("a.gz", b">P1\nMKV\n", "by its name gzip, by its content plain text; it is read as plain text"),
        ("a.fasta", gzip.compress(b">P1\nMKV\n"), "by its name plain text, by its content gzip; it is read as gzip"),
        ("a.zst", gzip.compress(b">P1\nMKV\n"), "by its name zstd, by its content gzip; it is read as gzip"),
    ],
)
def test_the_content_decides_and_a_wrong_name_is_told(tmp_path: Path, name: str, data: bytes, note: str) -> None:
    reader = BlockReader(write(tmp_path / name, data))
    assert b"".join(reader) == b">P1\nMKV\n"
    assert reader.note == f"'{tmp_path / name}': {note}"


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.fasta", b"\xef\xbb\xbf>P1\nMKV\n")) == b">P1\nMKV\n"
    assert read(write(tmp_path / "a.fasta.gz", gzip.compress(b"\xef\xbb\xbf>P1\nMKV\n"))) == b">P1\nMKV\n"


def test_a_pipe_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(gzip.compress(TEXT),))
    writer.start()
    reader = BlockReader(pipe)
    assert b"".join(reader) == TEXT
    assert reader.size == 0
    writer.join()


def test_files_that_cannot_be_input_are_told_apart(tmp_path: Path) -> None:
    for path, message in [
        (tmp_path / "none.fasta", "none.fasta' does not exist"),
        (tmp_path, "is a directory: name the files in it"),
        (write(tmp_path / "empty.fasta", b""), "empty.fasta' is empty"),
        (write(tmp_path / "a.zip", b"PK\x03\x04rest"), "a.zip' is a zip archive: unpack it first"),
        (tmp_path / "empty.fasta" / "a", "cannot be opened: Not a directory"),
    ]:
        with pytest.raises(UserError, match=message):
            BlockReader(path)


def test_zst_without_its_package_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.zst", COMPRESS[".zst"](b">P1\nMKV\n"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match=r"needs the package zstandard: run `pip install 'megatron-plm\[zst\]'`"):
        read(path)


@pytest.mark.parametrize("extension", COMPRESS)
def test_memory_stays_small_on_content_that_compresses_a_thousandfold(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"bomb{extension}"
    compressor = {
        ".gz": lambda: __import__("zlib").compressobj(9, wbits=31),
        ".zst": lambda: zstandard.ZstdCompressor(level=9).compressobj(),
        ".bz2": bz2.BZ2Compressor,
        ".xz": lambda: lzma.LZMACompressor(preset=0),
    }[extension]()
    with path.open("wb") as file:
        for _ in range(26):
            file.write(compressor.compress(b"A" * 10_000_000))
        file.write(compressor.flush())
    code = (
        "import re, sys; from megatron_plm.data.formats import BlockReader\n"
        "assert sum(map(len, BlockReader(sys.argv[1]))) == 260_000_000\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], check=True, capture_output=True, text=True, env=environment(), timeout=120
    )
    assert int(done.stdout) < 200_000, f"{done.stdout} kB for blocks of {formats.BLOCK_SIZE} bytes"
