"""Sorting on disk against sorting in memory, whatever fits into memory."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_plm.data import external_sort
from megatron_plm.data.external_sort import ExternalSort, entries_of, entry_dtype
from megatron_plm.errors import UserError

KEYS = st.integers(0, 2**64 - 1) | st.integers(0, 3) | st.just(2**64 - 1)
WITH_PAYLOAD = entry_dtype(("size", "<i8"), ("note", "u1"))


def sort(folder: Path, keys: list[int], payloads: list[bytes], piece: int, highest: int) -> list[tuple]:
    """Sort entries numbered in reverse, told in pieces, and take the result apart again."""
    sorter = ExternalSort(folder, "x", WITH_PAYLOAD, highest=highest)
    for first in range(0, len(keys), piece):
        part = payloads[first : first + piece]
        ties = len(keys) - np.arange(first, first + len(part), dtype=np.uint64)
        entries = entries_of(
            WITH_PAYLOAD, key=np.array(keys[first : first + piece], dtype=np.uint64), tie=ties,
            size=[len(data) for data in part], note=ties % 200,
        )  # fmt: skip
        sorter.add(entries, np.frombuffer(b"".join(part), dtype=np.uint8))
    found = []
    for entries, payload in sorter.sorted():
        data, begin = payload.tobytes(), 0
        for key, tie, size, note in entries.tolist():
            found.append((key, tie, note, data[begin : begin + size]))
            begin += size
        assert begin == len(data)
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(KEYS, st.binary(max_size=12)), max_size=60),
    st.integers(1, 20),
    st.sampled_from([1, 100, 700, 1 << 25]),
    st.booleans(),
)
def test_entries_and_payloads_come_out_sorted_whatever_fits_into_memory(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[int, bytes]], piece: int, memory: int, known: bool
) -> None:
    folder = tmp_path_factory.mktemp("sort")
    keys, payloads = [key for key, _ in records], [payload for _, payload in records]
    highest = max(keys, default=0) if known else 2**64 - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_sort, "MEMORY", memory)
        found = sort(folder, keys, payloads, piece, highest)
    expected = [
        (key, len(keys) - i, (len(keys) - i) % 200, payload)
        for i, (key, payload) in enumerate(zip(keys, payloads, strict=True))
    ]
    assert found == sorted(expected)
    assert list(folder.iterdir()) == [], "a file was left"


def test_many_entries_are_sorted_in_arrays_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_sort, "MEMORY", 1 << 14)
    keys = np.random.default_rng(1).integers(0, 2**64, 40_000, dtype=np.uint64)
    keys[10_000:30_000] = keys[10_000]  # more of one key than fit
    sorter = ExternalSort(tmp_path, "x", entry_dtype())
    for first in range(0, len(keys), 999):
        part = keys[first : first + 999]
        ties = np.arange(first, first + len(part), dtype=np.uint64)
        sorter.add(entries_of(entry_dtype(), key=part, tie=ties))
    arrays = [entries for entries, _ in sorter.sorted()]
    assert max(array.nbytes for array in arrays) <= 1 << 14
    found = np.concatenate(arrays)
    order = np.argsort(keys, kind="stable")
    assert np.array_equal(found["key"], keys[order])
    assert np.array_equal(found["tie"], order)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_sort, "MEMORY", 1)
    sorter = ExternalSort(tmp_path / "none", "x", entry_dtype())
    with pytest.raises(UserError, match="none: cannot be written: No such file or directory"):
        sorter.add(entries_of(entry_dtype(), key=np.zeros(1, dtype=np.uint64), tie=0))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(KEYS, KEYS), max_size=60), st.integers(1, 20), st.sampled_from([1, 100, 700, 1 << 25]))
def test_wide_keys_are_sorted_by_both_halves(
    tmp_path_factory: pytest.TempPathFactory, keys: list[tuple[int, int]], piece: int, memory: int
) -> None:
    folder = tmp_path_factory.mktemp("sort")
    wide = entry_dtype(wide=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_sort, "MEMORY", memory)
        sorter = ExternalSort(folder, "x", wide)
        for first in range(0, len(keys), piece):
            part = np.array(keys[first : first + piece], dtype=np.uint64)
            ties = len(keys) - np.arange(first, first + len(part), dtype=np.uint64)
            sorter.add(entries_of(wide, key=part[:, 0], second=part[:, 1], tie=ties))
        found = [entry for entries, _ in sorter.sorted() for entry in entries.tolist()]
    assert found == sorted((*key, len(keys) - i) for i, key in enumerate(keys))
    assert list(folder.iterdir()) == [], "a file was left"
