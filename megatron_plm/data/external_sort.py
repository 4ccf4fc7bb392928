"""Sorting more than fits into memory, on disk: entries with keys, each with or without bytes that go along."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_plm.data._native import gather
from megatron_plm.files import write_errors_told

Entries = npt.NDArray[np.void]
Payload = npt.NDArray[np.uint8]

MEMORY = 1 << 25  # bytes that are collected before they are written, and at most sorted at a time
_FANOUT_BITS = 8
_PIECE = struct.Struct("<QQ")  # entries and bytes of payload in a piece of a file

NO_PAYLOAD = np.empty(0, dtype=np.uint8)


def entry_dtype(*fields: tuple[str, str], wide: bool = False) -> np.dtype:
    """The dtype of entries: `key`, `tie` (uint64), by which they are sorted, and `fields`.

    A `wide` key has 128 bits: `key` holds the first half, `second` the other.
    """
    second = [("second", "<u8")] if wide else []
    return np.dtype([("key", "<u8"), *second, ("tie", "<u8"), *fields])


def same_keys(some: Entries, others: Entries) -> npt.NDArray[np.bool_]:
    """Whether two entries with wide keys have the same one, pair by pair."""
    return (some["key"] == others["key"]) & (some["second"] == others["second"])


def entries_of(dtype: np.dtype, **columns: npt.ArrayLike) -> Entries:
    """Return entries with these columns; the first must be an array."""
    entries = np.zeros(len(np.asarray(next(iter(columns.values())))), dtype=dtype)
    for name, column in columns.items():
        entries[name] = column
    return entries


@dataclass
class _Bucket:
    """A file of entries whose keys lie in one range, and what they span."""

    path: Path
    size: int
    low: tuple[int, ...]  # lowest value of each field that is sorted by
    high: tuple[int, ...]


class ExternalSort:
    """Entries in any order in, sorted by key and `tie` out; the order depends on nothing else where ties are unique.

    With a payload, the dtype has a field `size` (int64): the bytes of payload that belong to an entry.

    What exceeds MEMORY goes to files in `folder` that begin with `name`: one for each of 256 ranges of the key (of
    its second half or the tie, where all keys are equal so far), split up in turn where it is still too large.
    `highest` is the largest `key` that will come. Raises UserError where the files cannot be written.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, *, highest: int = 2**64 - 1) -> None:
        self._folder = folder
        self._name = name
        self._dtype = dtype
        names = dtype.names or ()
        self._has_payload = "size" in names
        self._sorted_by = [name for name in ("key", "second", "tie") if name in names]
        self._range = ("key", 0, highest)
        self._waiting: list[tuple[Entries, Payload]] = []
        self._waiting_size = 0
        self._buckets: dict[int, _Bucket] = {}

    def add(self, entries: Entries, payload: Payload = NO_PAYLOAD) -> None:
        """Take more entries, and their payloads end to end. The arrays must not be changed afterwards."""
        if len(entries):
            self._waiting.append((entries, payload))
            self._waiting_size += entries.nbytes + payload.nbytes
            if self._waiting_size >= MEMORY // 2:
                self._spill()

    def sorted(self) -> Iterator[tuple[Entries, Payload]]:
        """Yield everything in order, once, in arrays of about MEMORY bytes at most; files go as they are read."""
        if not self._buckets:
            if self._waiting:
                yield self._sort(self._take_waiting())
            return
        self._spill()
        for number in sorted(self._buckets):
            bucket = self._buckets[number]
            if bucket.size <= MEMORY or bucket.low == bucket.high:
                pieces = list(self._pieces(bucket))
                bucket.path.unlink()
                yield self._sort(_joined(pieces))
                continue
            inner = ExternalSort(self._folder, bucket.path.name, self._dtype)
            spans = zip(self._sorted_by, bucket.low, bucket.high, strict=True)
            inner._range = next(span for span in spans if span[1] < span[2])
            for entries, payload in self._pieces(bucket):
                inner.add(entries, payload)
            bucket.path.unlink()
            yield from inner.sorted()

    def _take_waiting(self) -> tuple[Entries, Payload]:
        waiting = self._waiting
        self._waiting, self._waiting_size = [], 0
        return _joined(waiting)

    def _sort(self, everything: tuple[Entries, Payload]) -> tuple[Entries, Payload]:
        entries, payload = everything
        order = np.lexsort([entries[name] for name in reversed(self._sorted_by)])
        return entries[order], self._picked(entries, payload, order)

    def _picked(self, entries: Entries, payload: Payload, order: npt.NDArray[np.intp]) -> Payload:
        if not self._has_payload:
            return NO_PAYLOAD
        sizes = np.ascontiguousarray(entries["size"])
        begins = np.cumsum(sizes) - sizes
        return gather(payload, begins[order], sizes[order])

    def _spill(self) -> None:
        """Write what waits to the files of its ranges."""
        if not self._waiting:
            return
        entries, payload = self._take_waiting()
        field, lowest, highest = self._range
        shift = max(0, (highest - lowest).bit_length() - _FANOUT_BITS)
        numbers = ((entries[field] - np.uint64(lowest)) >> np.uint64(shift)).astype(np.intp)
        order = np.argsort(numbers, kind="stable")
        entries, payload, numbers = entries[order], self._picked(entries, payload, order), numbers[order]
        firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
        ends = np.append(firsts[1:], len(entries))
        bytes_before = np.concatenate([[0], np.cumsum(entries["size"])]) if self._has_payload else None
        columns = [entries[name] for name in self._sorted_by]
        lows = zip(*(np.minimum.reduceat(column, firsts).tolist() for column in columns), strict=True)
        highs = zip(*(np.maximum.reduceat(column, firsts).tolist() for column in columns), strict=True)
        with write_errors_told(self._folder):
            for first, end, low, high in zip(firsts, ends, lows, highs, strict=True):
                part = NO_PAYLOAD if bytes_before is None else payload[bytes_before[first] : bytes_before[end]]
                self._write(int(numbers[first]), entries[first:end], part, low, high)

    def _write(
        self, number: int, entries: Entries, payload: Payload, low: tuple[int, ...], high: tuple[int, ...]
    ) -> None:
        bucket = self._buckets.get(number)
        if bucket is None:
            path = self._folder / f"{self._name}-{number:03}"
            bucket = self._buckets[number] = _Bucket(path, 0, low, high)
        bucket.low = tuple(map(min, bucket.low, low))
        bucket.high = tuple(map(max, bucket.high, high))
        bucket.size += entries.nbytes + payload.nbytes
        # Opened for each piece: hundreds of files kept open are more than some systems allow, and one that was would
        # outlive its folder where an error's traceback holds on to it.
        with bucket.path.open("ab", buffering=0) as file:
            for data in (_PIECE.pack(len(entries), payload.nbytes), entries.view(np.uint8).data, payload.data):
                unwritten = memoryview(data)
                while unwritten:
                    unwritten = unwritten[file.write(unwritten) :]

    def _pieces(self, bucket: _Bucket) -> Iterator[tuple[Entries, Payload]]:
        begin, size = 0, bucket.path.stat().st_size
        while begin < size:
            with bucket.path.open("rb") as file:
                file.seek(begin)
                count, num_bytes = _PIECE.unpack(file.read(_PIECE.size))
                entries = np.frombuffer(file.read(count * self._dtype.itemsize), dtype=self._dtype)
                payload = np.frombuffer(file.read(num_bytes), dtype=np.uint8)
                begin = file.tell()
            yield entries, payload


def _joined(pieces: list[tuple[Entries, Payload]]) -> tuple[Entries, Payload]:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate([entries for entries, _ in pieces]), np.concatenate([payload for _, payload in pieces])
