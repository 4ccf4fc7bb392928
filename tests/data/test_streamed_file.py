"""The file that two threads write: whole, whatever the file system takes, and in whatever order."""

import errno
import fcntl
import os
import threading
import time

import numpy as np
import pytest

from megatron_plm.data import streamed_file
from megatron_plm.data.streamed_file import StreamedFile

BUFFER = 1 << 22
DIRECT = getattr(os, "O_DIRECT", 0)


def content_of(num_bytes: int) -> memoryview:
    return np.random.default_rng(num_bytes).integers(0, 256, num_bytes, dtype=np.uint8).data


@pytest.fixture
def write(tmp_path):
    """Writes a file in pieces of odd sizes, and returns what is in it."""

    def written(content: memoryview, piece: int = 1_234_567) -> bytes:
        path = tmp_path / "file"
        path.unlink(missing_ok=True)
        file = StreamedFile(path)
        try:
            for begin in range(0, len(content), piece):
                file.write(content[begin : begin + piece])
            file.finish()
        finally:
            file.close()
        return path.read_bytes()

    return written


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, BUFFER - 1, BUFFER, BUFFER + 1, 9 * BUFFER + 4095])
def test_all_bytes_are_in_their_places(write, num_bytes):
    content = content_of(num_bytes)
    assert write(content) == content


@pytest.mark.skipif(not DIRECT, reason="the system has no O_DIRECT")
def test_a_file_system_that_refuses_direct_writes_at_the_first_one_gets_others_from_both_threads(write, monkeypatch):
    """Such a one cannot be had without root; both threads are refused before either can do without."""
    real, both, refused = os.pwrite, threading.Barrier(2), []

    def pwrite(descriptor: int, content: memoryview, place: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT:
            refused.append(place)
            both.wait(timeout=60)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, content, place)

    monkeypatch.setattr(streamed_file.os, "pwrite", pwrite)
    content = content_of(10 * BUFFER + 77)
    assert write(content) == content
    assert sorted(refused) in ([0, BUFFER], []), "none where this file system refuses it on opening already"


def test_short_writes_go_on_where_they_ended_and_the_order_of_the_threads_is_of_no_account(write, monkeypatch):
    real, turns = os.pwrite, iter(range(1 << 20))

    def pwrite(descriptor: int, content: memoryview, place: int) -> int:
        if next(turns) % 3 == 0:
            time.sleep(0.01)
        return real(descriptor, content[: BUFFER // 3], place)  # no multiple of a sector

    monkeypatch.setattr(streamed_file.os, "pwrite", pwrite)
    content = content_of(9 * BUFFER + 5)
    assert write(content) == content


def test_a_write_that_fails_in_one_thread_is_told_while_the_other_goes_on(tmp_path, monkeypatch):
    real = os.pwrite

    def pwrite(descriptor: int, content: memoryview, place: int) -> int:
        if place == 2 * BUFFER:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content, place)

    monkeypatch.setattr(streamed_file.os, "pwrite", pwrite)
    file = StreamedFile(tmp_path / "file")

    def write_all() -> None:
        file.write(content_of(20 * BUFFER))
        file.finish()

    try:
        with pytest.raises(OSError, match="No space left"):
            write_all()
    finally:
        file.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("write")]
