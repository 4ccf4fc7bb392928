"""Inputs read side by side: their order, their errors, what waits on the disk, and that nothing is left behind."""

import contextlib
import gzip
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import COMPRESS, ESM2, write

from megatron_plm.data.readers import SequenceReader, ahead, open_inputs, ranges
from megatron_plm.data.readers.ranges import RangeFile
from megatron_plm.data.records import RecordBatch
from megatron_plm.errors import UserError


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six compressed files of four blocks each, with plain ones between them."""
    folder, rng = tmp_path_factory.mktemp("many"), random.Random(3)
    paths = []
    for number in range(9):
        lines = "".join(f">{number}.{i}\n{'LAGVSERTIDPKQNFYMHWC' * rng.randint(1, 40)}\n" for i in range(9000))
        text = lines.encode()
        compressed = number % 3 != 2
        data = gzip.compress(text, 1) if compressed else text
        paths.append(write(folder / f"{number}.fasta{'.gz' if compressed else ''}", data))
    return paths


def content(reader: SequenceReader, paths: list[Path], folder: Path | None = None) -> tuple[bytes, bytes, bytes]:
    batches = list(reader.read(open_inputs(paths), folder=None if folder is None else lambda: folder))
    names = [b"" if batch.names is None else batch.names.tobytes() for batch in batches]
    return b"".join(b.tokens for b in batches), b"".join(b.lengths for b in batches), b"".join(names)


@pytest.mark.parametrize("workers", [2, 5, 16])
def test_inputs_read_side_by_side_come_out_in_their_order(
    many: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    spooled = []
    put = ahead._Spool.put

    def counted(self: ahead._Spool, scanned: ahead.Scanned) -> ahead._Spooled:
        spooled.append(scanned)
        return put(self, scanned)

    monkeypatch.setattr(ahead._Spool, "put", counted)
    reader, plain = (SequenceReader(ESM2, workers=n, names=True) for n in (workers, 1))
    expected = content(plain, many)
    descriptors = set(os.listdir("/proc/self/fd"))
    assert content(reader, many, tmp_path) == expected
    assert reader.byte_counts.tolist() == plain.byte_counts.tolist()
    assert spooled, "nothing waited on the disk: the test shows nothing"
    assert list(tmp_path.iterdir()) == []
    assert set(os.listdir("/proc/self/fd")) <= descriptors
    assert content(SequenceReader(ESM2, workers=workers, names=True), many) == expected  # without a folder


def test_an_error_comes_behind_the_records_before_it_and_stops_the_rest(many: list[Path], tmp_path: Path) -> None:
    cut = write(tmp_path / "cut.fasta.gz", many[1].read_bytes()[:-20])
    missing = write(tmp_path / "gone.fasta", ">a\nMKV\n")
    inputs = open_inputs([many[0], many[2], cut, missing, *many[3:]])
    missing.unlink()
    threads = threading.active_count()
    batches: list[RecordBatch] = []
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(UserError, match=r"cut.fasta.gz' is truncated"):
        batches.extend(SequenceReader(ESM2, workers=4).read(inputs, folder=lambda: work))
    assert sum(len(batch.lengths) for batch in batches) >= 2 * 9000
    assert threading.active_count() == threads
    assert list(work.iterdir()) == []
    with pytest.raises(UserError, match=r"gone.fasta' cannot be opened: No such file"):
        list(SequenceReader(ESM2, workers=4).read([*open_inputs(many[:2]), *inputs[3:]]))


def test_reading_that_is_given_up_ends_its_threads(many: list[Path]) -> None:
    threads = threading.active_count()
    batches = SequenceReader(ESM2, workers=3).read(open_inputs(many))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def test_the_disk_being_full_is_told_by_whoever_takes_the_results(
    many: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ahead.os, "pwrite", full)
    with pytest.raises(UserError, match=rf"{tmp_path}: cannot be written: No space left on device; free some space"):
        list(SequenceReader(ESM2, workers=3).read(open_inputs(many), folder=lambda: tmp_path))


@pytest.mark.parametrize(("extension", "most"), [(".gz", 8), (".xz", 3), (".zst", 2), ("", 8)])
def test_only_so_many_are_read_at_once_as_memory_bears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str, most: int
) -> None:
    for number in range(12):
        write(tmp_path / f"{number}.fasta{extension}", COMPRESS[extension](b">a\nMKV\n"))
    inputs = open_inputs([str(tmp_path / "*")])
    made, closed = [], []
    close = ahead.Lane.close
    init = ahead.Lane.__init__

    def opened(lane: ahead.Lane, *args: object, **kwargs: object) -> None:
        init(lane, *args, **kwargs)  # type: ignore[arg-type]
        made.append(len(closed))

    monkeypatch.setattr(ahead.Lane, "__init__", opened)
    monkeypatch.setattr(ahead.Lane, "close", lambda lane: (closed.append(lane), close(lane))[1])
    assert sum(len(batch.lengths) for batch in SequenceReader(ESM2, workers=16).read(inputs)) == 12
    at_once = [1 + number - gone for number, gone in enumerate(made)]
    assert max(at_once) == most


def test_from_a_pipe_too_the_first_fault_is_told(tmp_path: Path, many: list[Path]) -> None:
    text = gzip.decompress(many[0].read_bytes())
    damaged = gzip.compress(text[:-1_500_000] + b"\n>x\nM\0K\n" + text[-1_500_000:], 1)[:-20]
    for workers in (1, 2, 4):
        pipe = tmp_path / f"pipe{workers}"
        os.mkfifo(pipe)
        producer = threading.Thread(target=pipe.write_bytes, args=(damaged,))
        producer.start()
        with pytest.raises(UserError, match="byte 0x00"):
            list(SequenceReader(ESM2, workers=workers).read(open_inputs([pipe])))
        producer.join()


def test_a_pipe_is_read_on_several_threads_and_does_not_outlive_an_error(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done = threading.Event()

    def produce() -> None:
        with contextlib.suppress(BrokenPipeError), pipe.open("wb") as file:
            file.write(b">a\nMKV\n>b\nM\0K\n" + b">c\nMKV\n" * 1_500_000)
            file.flush()
            done.wait(60)  # as a producer that has nothing to write for a while

    producer = threading.Thread(target=produce)
    producer.start()
    begin = time.monotonic()
    try:
        with pytest.raises(UserError, match=r"pipe', line 4: byte 0x00"):
            list(SequenceReader(ESM2, workers=2).read(open_inputs([pipe])))
        assert time.monotonic() - begin < 30
    finally:
        done.set()
        producer.join()


RECORD = st.tuples(
    st.sampled_from([b">", b">x y", b">a\r"]), st.lists(st.sampled_from([b"MK", b"", b"L" * 90, b"A\r"]))
)


@settings(max_examples=150, deadline=None)
@given(records=st.lists(RECORD, min_size=1, max_size=30), size=st.integers(1, 40), piece=st.integers(2, 50))
def test_ranges_cover_the_file_and_end_where_records_begin(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[bytes, list[bytes]]], size: int, piece: int
) -> None:
    text = b"".join(header + b"\n" + b"".join(line + b"\n" for line in lines) for header, lines in records)
    path = write(tmp_path_factory.mktemp("ranges") / "a.fasta", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "BLOCK_SIZE", size)
        patch.setattr(ranges, "_PIECE", piece)
        for mark in (b"\n>", b"\n"):
            file = RangeFile(str(path), len(text), "input")
            found = list(file.ranges(mark, 1 << 20, "too long"))
            assert b"".join(file.read(begin, end) for begin, end in found) == text
            starts = {0} | {i + 1 for i in range(len(text)) if text.startswith(mark, i)}
            assert [begin for begin, _ in found] == _expected_begins(sorted(starts), len(text), size)


def _expected_begins(starts: list[int], total: int, size: int) -> list[int]:
    begins = [0]
    while (following := next((s for s in starts if s >= begins[-1] + size), total)) < total:
        begins.append(following)
    return begins


def test_a_file_that_grows_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"MKV\n" * 100)
    (source,) = open_inputs([path])
    with path.open("ab") as file:
        file.write(b"MKV\n")
    with pytest.raises(UserError, match=r"a.txt' has grown beyond the 400 bytes it had when it was opened"):
        list(SequenceReader(ESM2).read([source]))


def test_a_range_file_tells_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"MKV\n" * 100)
    file = RangeFile(str(path), 400, "input 'a.txt'")
    path.write_bytes(b"MKV\n")
    with pytest.raises(UserError, match=r"input 'a.txt' ends after 4 bytes, of 400 it had when it was opened"):
        file.read(0, 400)
    path.write_bytes(b"M" * 3_000_000)
    with pytest.raises(UserError, match="a record in it is longer than 1,000 bytes: split it"):
        list(RangeFile(str(path), 3_000_000, "input").ranges(b"\n", 1000, "split it"))
    with pytest.raises(UserError, match="cannot be opened: No such file"):
        RangeFile(str(tmp_path / "b"), 1, "input")


def test_a_spooled_scan_is_what_it_was(many: list[Path], tmp_path: Path) -> None:
    (source,) = open_inputs(many[:1])
    reader = SequenceReader(ESM2, names=True)
    scans: Iterator[ahead.Scanned] = (job.scan() for job in reader._jobs(source))
    spool = ahead._Spool(lambda: tmp_path)
    kept = [(scanned, spool.put(scanned)) for scanned in scans]
    for scanned, spooled in reversed(kept):
        for name, value in vars(spool.take(spooled)).items():
            np.testing.assert_equal(value, getattr(scanned, name), err_msg=name)
    spool.close()
