"""What becomes of the records between reading and writing: left out, put into another order, split, clustered."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_plm.data._native import gather
from megatron_plm.data.clusters import ClusterCounts, ClusterJoin
from megatron_plm.data.dedup import DuplicateFinder
from megatron_plm.data.external_sort import ExternalSort, entries_of, entry_dtype
from megatron_plm.data.letters import LetterHashes
from megatron_plm.data.records import RecordBatch
from megatron_plm.data.splits import Splits
from megatron_plm.data.store import Column, RecordStore
from megatron_plm.files import encodable
from megatron_plm.philox import derive_key
from megatron_plm.tokenizers import Tokenizer

_RECORDS = entry_dtype(("size", "<i8"), ("split", "u1"))


@dataclass(frozen=True)
class Selection:
    """What to do with the records. Lengths are in tokens, both ends included.

    dedup: leave out a record whose letters an earlier one has. splits: divide the rest. shuffle_seed: shuffle them
    (None: keep their order). clusters: table of clusters, whose members become one document each.
    """

    min_length: int | None = None
    max_length: int | None = None
    dedup: bool = False
    splits: Splits | None = None
    shuffle_seed: int | None = None
    clusters: str | None = None

    @property
    def split_names(self) -> tuple[str | None, ...]:
        """The splits in the order of their numbers; None for the only dataset where there are none."""
        return self.splits.names if self.splits else (None,)


@dataclass
class SelectionCounts:
    """What was left out, and what the table of clusters held."""

    num_read: int = 0
    num_shorter: int = 0
    num_longer: int = 0
    num_duplicates: int = 0
    clusters: ClusterCounts | None = None

    @property
    def num_left_out(self) -> int:
        """Records that are in no dataset."""
        return self.num_shorter + self.num_longer + self.num_duplicates


@dataclass(frozen=True)
class Arranged:
    """Records in the order in which they are written; the split of each (None: there are none), and whether it begins
    a document (None: each one does)."""

    batch: RecordBatch
    splits: npt.NDArray[np.uint8] | None = None
    starts: npt.NDArray[np.bool_] | None = None


def pick(batch: RecordBatch, records: npt.NDArray[np.integer]) -> RecordBatch:
    """Return the records of these indices, in this order."""
    width = batch.tokens.itemsize
    sizes = batch.lengths.astype(np.int64) * width
    begins = np.cumsum(sizes) - sizes
    data = gather(np.ascontiguousarray(batch.tokens).view(np.uint8), begins[records], sizes[records])
    names = None if batch.names is None else batch.names[records]
    return RecordBatch(data.view(batch.tokens.dtype), batch.lengths[records], names)


def scrambled(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """A keyed bijection of 64-bit numbers (two rounds of MurmurHash3's finaliser): equal ones stay equal, no others."""
    for addend in (np.uint64(key), np.uint64(key ^ 0x9E3779B97F4A7C15)):
        values = values + addend
        values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        values = values ^ (values >> np.uint64(33))
    return values


@dataclass(frozen=True)
class _Placed:
    """Records that stay, in the order of the input, with their numbers in it, and those of the first ones of their
    clusters (without clusters, their own)."""

    batch: RecordBatch
    indices: npt.NDArray[np.uint64]
    firsts: npt.NDArray[np.uint64]
    splits: npt.NDArray[np.uint8] | None


class Arranger:
    """Applies a Selection to the records of the input, in bounded memory.

    `dtype` is that of the tokens. Temporary files go to `folder()`, which is asked for only where they are needed. A
    context manager: when it is left, no file in the folder is open, also where an error's traceback still holds what
    was reading it.

    Attributes:
        counts: what has been left out; complete when everything has been yielded.
    """

    def __init__(
        self, selection: Selection, tokenizer: Tokenizer, dtype: npt.DTypeLike, folder: Callable[[], Path]
    ) -> None:
        self._wanted = selection
        self._dtype = np.dtype(dtype)
        self._folder = folder
        self._files = contextlib.ExitStack()
        self._split_hashes = LetterHashes(tokenizer, letters_only=True)
        self._duplicate_hashes = LetterHashes(tokenizer, letters_only=False)
        self.counts = SelectionCounts()

    def __enter__(self) -> "Arranger":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def arranged(self, batches: Iterable[RecordBatch]) -> Iterator[Arranged]:
        """Yield the records that stay, in the order in which they are written; clusters need the batches' names."""
        wanted = self._wanted
        reordered = wanted.shuffle_seed is not None or wanted.clusters is not None
        if not (reordered or wanted.dedup):
            return (Arranged(placed.batch, placed.splits) for placed in self._as_they_come(batches))
        folder = self._folder()
        decided_later = wanted.dedup or wanted.clusters is not None
        placed = self._decided(batches, folder) if decided_later else self._as_they_come(batches)
        if reordered:
            return self._sorted(placed, folder)
        return (Arranged(item.batch, item.splits) for item in placed)

    def described(self, split: str | None) -> dict[str, Any]:
        """What PREFIX.json tells of the selection; `split` is that of the dataset."""
        wanted, counts = self._wanted, self.counts
        told: dict[str, Any] = {"num_sequences_read": counts.num_read}
        for limit, value, count in (
            ("min_length", wanted.min_length, counts.num_shorter),
            ("max_length", wanted.max_length, counts.num_longer),
        ):
            if value is not None:
                told[limit] = {"length": value, "num_left_out": count}
        if wanted.dedup:
            told["dedup"] = {"num_left_out": counts.num_duplicates}
        if wanted.splits is not None:
            told["split"] = {"name": split, "fractions": wanted.splits.described()}
        if wanted.shuffle_seed is not None:
            told["shuffle"] = {"seed": wanted.shuffle_seed}
        if wanted.clusters is not None and counts.clusters is not None:
            told["clusters"] = {"path": encodable(wanted.clusters), **dataclasses.asdict(counts.clusters)}
        return told

    def _within_limits(self, batches: Iterable[RecordBatch]) -> Iterator[tuple[RecordBatch, RecordBatch | None]]:
        """Yield the records of the lengths that are wanted, and the others where there are some."""
        low, high = self._wanted.min_length or 0, self._wanted.max_length or 2**31
        for batch in batches:
            shorter, longer = batch.lengths < low, batch.lengths > high
            self.counts.num_read += len(batch.lengths)
            self.counts.num_shorter += int(shorter.sum())
            self.counts.num_longer += int(longer.sum())
            outside = shorter | longer
            if outside.any():
                yield pick(batch, np.flatnonzero(~outside)), pick(batch, np.flatnonzero(outside))
            else:
                yield batch, None

    def _as_they_come(self, batches: Iterable[RecordBatch]) -> Iterator[_Placed]:
        count = 0
        for batch, _ in self._within_limits(batches):
            indices = np.arange(count, count + len(batch.lengths), dtype=np.uint64)
            count += len(indices)
            yield _Placed(batch, indices, indices, self._splits_by_letters(batch))

    def _decided(self, batches: Iterable[RecordBatch], folder: Path) -> Iterator[_Placed]:
        """Read everything, decide about repetitions and clusters, then yield what stays."""
        clusters = self._wanted.clusters
        join = None if clusters is None else ClusterJoin(clusters, folder)
        finder = DuplicateFinder(folder) if self._wanted.dedup else None
        store = RecordStore(folder, self._dtype, self._files, names=join is not None)
        for batch, outside in self._within_limits(batches):
            store.append(batch)
            if finder is not None:
                finder.add(self._duplicate_hashes.of(batch))
            if join is not None and outside is not None:
                join.add_left_out(_names(outside))
        repeated = self._files.enter_context(Column(folder / "repeated", np.bool_, default=False))
        for flags in () if finder is None else finder.flags():
            repeated.append(flags)
            self.counts.num_duplicates += int(flags.sum())
        if join is None:
            yield from self._kept(store, repeated, None, None)
            return
        repeated.rewind()
        for names in store.names():
            join.add(names, ~repeated.take(len(names)))
        firsts = self._files.enter_context(Column(folder / "firsts", np.uint64))
        clusters_of = self._files.enter_context(Column(folder / "clusters", np.uint64))
        for first, name in join.places():
            firsts.append(first)
            clusters_of.append(name)
        self.counts.clusters = join.counts
        yield from self._kept(store, repeated, firsts, clusters_of)

    def _kept(
        self, store: RecordStore, repeated: Column, firsts: Column | None, clusters: Column | None
    ) -> Iterator[_Placed]:
        """Yield the stored records that are not repeated; the two last columns have values for these only."""
        count = 0
        for column in (repeated, firsts, clusters):
            if column is not None:
                column.rewind()
        for batch in store.read():
            kept = np.flatnonzero(~repeated.take(len(batch.lengths)))
            indices = kept.astype(np.uint64) + np.uint64(count)
            count += len(batch.lengths)
            stay = batch if len(kept) == len(batch.lengths) else pick(batch, kept)
            names = None if clusters is None else clusters.take(len(kept))
            splits = self._splits_by_letters(stay) if names is None else self._splits_by_name(names)
            yield _Placed(stay, indices, indices if firsts is None else firsts.take(len(kept)), splits)

    def _sorted(self, placed: Iterable[_Placed], folder: Path) -> Iterator[Arranged]:
        """Yield shuffled records, or, where not shuffled, clusters in the order of their first records."""
        seed, records = self._wanted.shuffle_seed, None
        for item in placed:
            if records is None:  # everything has been read now, unless the records are shuffled as they come
                highest = 2**64 - 1 if seed is not None else max(0, self.counts.num_read - 1)
                records = ExternalSort(folder, "records", _RECORDS, highest=highest)
            keys = item.firsts if seed is None else scrambled(item.firsts, derive_key("preprocess-shuffle", seed))
            sizes = item.batch.lengths.astype(np.int64) * self._dtype.itemsize
            numbers = 0 if item.splits is None else item.splits
            entries = entries_of(_RECORDS, key=keys, tie=item.indices, size=sizes, split=numbers)
            records.add(entries, np.ascontiguousarray(item.batch.tokens).view(np.uint8))
        last = np.empty(0, dtype=np.uint64)  # cluster of the record before
        for entries, payload in records.sorted() if records is not None else ():
            lengths = (entries["size"] // self._dtype.itemsize).astype(np.int32)
            batch = RecordBatch(payload.view(self._dtype), lengths)
            keys = np.concatenate([last, entries["key"]])
            starts = np.concatenate([np.ones(1 - len(last), dtype=bool), keys[1:] != keys[:-1]])
            last = entries["key"][-1:].copy()
            splits = None if self._wanted.splits is None else np.ascontiguousarray(entries["split"])
            yield Arranged(batch, splits, starts if self._wanted.clusters is not None else None)

    def _splits_by_letters(self, batch: RecordBatch) -> npt.NDArray[np.uint8] | None:
        if self._wanted.splits is None:
            return None
        return self._wanted.splits.of_hashes(self._split_hashes.of(batch)[:, 0])

    def _splits_by_name(self, names: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8] | None:
        if self._wanted.splits is None:
            return None
        return self._wanted.splits.of_hashes(scrambled(names, derive_key("split by cluster")))


def _names(batch: RecordBatch) -> npt.NDArray[np.uint64]:
    assert batch.names is not None, "the reader was not asked for names"
    return batch.names
