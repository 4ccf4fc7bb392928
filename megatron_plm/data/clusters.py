"""Which records form a cluster: a table of representatives and members, joined with the records on disk.

Names are compared by 128-bit hashes of their first word, uint64 [k, 2]. Everything is sorted on disk, so memory is
bounded whatever the number of names.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from megatron_plm.data._native import read_cluster_lines
from megatron_plm.data.external_sort import Entries, ExternalSort, entries_of, entry_dtype, same_keys
from megatron_plm.data.formats import BlockReader
from megatron_plm.errors import UserError

# Names of the input and of the table meet by their hash. `value` and `value_second` are the representative's hash, or
# the record's index and 0.
_NAMES = entry_dtype(("value", "<u8"), ("value_second", "<u8"), ("kind", "u1"), wide=True)
_LINE, _KEPT, _LEFT_OUT = 0, 1, 2  # of the table; a record; a record that the dataset doesn't keep
# Members of a cluster meet by the representative's hash; `tie` is the record's index.
_MEMBERS = entry_dtype(wide=True)
# What becomes of the record whose index is `key`; `name` is the first half of its cluster's hash.
_PLACES = entry_dtype(("first", "<u8"), ("name", "<u8"))

_SHOWN = 60  # characters of a bad line
_LONGEST_LINE = 1 << 22  # bytes


@dataclass(frozen=True)
class ClusterCounts:
    """`num_clusters` includes the records that are in no cluster of the table, each a cluster of its own."""

    num_clusters: int
    num_members: int  # different names of members in the table
    num_members_missing: int  # those that no record of the input has


class ClusterJoin:
    """Joins the records with the table of clusters `path`: two columns, representative and member, tab-separated.

    Tell it the names of all records in turn, then ask for `places`. Raises UserError, naming the line, where the table
    has a line of other than two names, a member in two clusters, no lines, or no member that the input has.
    """

    def __init__(self, path: str | os.PathLike[str], folder: Path) -> None:
        self._path = os.fspath(path)
        self._folder = folder
        self._names = ExternalSort(folder, "names", _NAMES)
        self._num_names = self._num_records = 0
        self._num_clusters = self._num_alone = self._num_members = self._num_found = 0
        for representatives, members in _read_table(self._path):
            self._add_names(members, representatives[:, 0], representatives[:, 1], _LINE)

    def add(self, names: npt.NDArray[np.uint64], kept: npt.NDArray[np.bool_]) -> None:
        """Take the names' hashes of the next records, and which of them the dataset keeps."""
        indices = np.arange(self._num_records, self._num_records + len(names), dtype=np.uint64)
        self._add_names(names, indices, 0, np.where(kept, _KEPT, _LEFT_OUT))
        self._num_records += len(names)

    def add_left_out(self, names: npt.NDArray[np.uint64]) -> None:
        """Take names of the input that are not among the records: their members are not missing."""
        self._add_names(names, 0, 0, _LEFT_OUT)

    def places(self) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]:
        """Yield, for kept records in their order, the index of the first record of the cluster, and a hash of its name.

        Both are uint64 [k]; of the hash it is the first half, evenly distributed but not unique. An index counts all
        records that were added. A record that is in no cluster of the table is its own first, and its name is the
        cluster's. Raises the table's faults that only the join shows.
        """
        members = ExternalSort(self._folder, "members", _MEMBERS)
        by_index = ExternalSort(self._folder, "places", _PLACES, highest=max(0, self._num_records - 1))
        for clustered, alone in self._joined():
            members.add(clustered)
            by_index.add(entries_of(_PLACES, key=alone["value"], tie=0, first=alone["value"], name=alone["key"]))
            self._num_alone += len(alone)
        if not self._num_found:
            raise UserError(
                f"--clusters: none of the {self._num_members:,} members in '{self._path}' occurs in the input; names "
                "are compared up to the first blank: is it the table of another data set?"
            )
        last = np.zeros(0, dtype=_MEMBERS)  # the first record of the last cluster so far
        for entries, _ in members.sorted():
            begins = _group_begins(entries)
            heads = entries[begins]
            goes_on = bool(np.any(same_keys(last, entries[:1])))
            if goes_on:
                heads[0] = last[0]
            self._num_clusters += len(heads) - goes_on
            firsts = heads["tie"][_groups(entries, begins)]
            by_index.add(entries_of(_PLACES, key=entries["tie"], tie=0, first=firsts, name=entries["key"]))
            last = heads[-1:]
        for entries, _ in by_index.sorted():
            yield entries["first"], entries["name"]

    @property
    def counts(self) -> ClusterCounts:
        """Counts of what `places` has yielded."""
        num_missing = self._num_members - self._num_found
        return ClusterCounts(self._num_clusters + self._num_alone, self._num_members, num_missing)

    def _add_names(
        self,
        names: npt.NDArray[np.uint64],
        values: npt.ArrayLike,
        value_seconds: npt.ArrayLike,
        kinds: npt.NDArray[np.integer] | int,
    ) -> None:
        # Lines precede records, and records that are left out the others, since they come in this order.
        ties = np.arange(self._num_names, self._num_names + len(names), dtype=np.uint64)
        self._names.add(
            entries_of(
                _NAMES,
                key=names[:, 0],
                second=names[:, 1],
                tie=ties,
                value=values,
                value_second=value_seconds,
                kind=kinds,
            )
        )
        self._num_names += len(names)

    def _joined(self) -> Iterator[tuple[Entries, Entries]]:
        """Yield the kept records that the table lists, as _MEMBERS, and those that it doesn't, as _NAMES."""
        last = np.zeros(0, dtype=_NAMES)  # the first entry of the last name so far
        last_found = False
        for entries, _ in self._names.sorted():
            begins = _group_begins(entries)
            heads, is_line = entries[begins], entries["kind"] == _LINE
            goes_on = bool(np.any(same_keys(last, entries[:1])))
            if goes_on:
                heads[0] = last[0]
            head = heads[_groups(entries, begins)]
            differs = (entries["value"] != head["value"]) | (entries["value_second"] != head["value_second"])
            conflicts = entries[is_line & differs]
            if len(conflicts):
                _fail_conflict(self._path, (conflicts["key"][0], conflicts["second"][0]))
            kept = entries["kind"] == _KEPT
            listed = kept & (head["kind"] == _LINE)
            clusters, records = head[listed], entries[listed]
            yield (
                entries_of(_MEMBERS, key=clusters["value"], second=clusters["value_second"], tie=records["value"]),
                entries[kept & ~listed],
            )
            in_table = heads["kind"] == _LINE
            found = in_table & np.logical_or.reduceat(~is_line, begins)
            self._num_members += int(in_table.sum()) - bool(goes_on and in_table[0])
            self._num_found += int(found.sum()) - bool(goes_on and last_found and found[0])
            last_found = bool(found[-1] or (goes_on and last_found and len(heads) == 1))
            last = heads[-1:]


def _group_begins(entries: Entries) -> npt.NDArray[np.intp]:
    """Where entries of another key than before begin, the first included."""
    return np.concatenate([[0], np.flatnonzero(~same_keys(entries[1:], entries[:-1])) + 1])


def _groups(entries: Entries, begins: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """The number of the group, from 0, to which each entry belongs."""
    return np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(entries))))


def _read_table(path: str) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]:
    """Yield hashes of representatives and members, uint64 [k, 2] each."""
    num_names = 0
    for first_line, text in _line_blocks(path):
        representatives, members, bad_line = read_cluster_lines(text)
        if bad_line >= 0:
            line = bytes(text).split(b"\n", bad_line + 1)[bad_line]
            raise UserError(
                f"--clusters: '{path}', line {first_line + bad_line:,}: expected two columns, representative and "
                f"member, with a tab between them, found {line[:_SHOWN].decode(errors='backslashreplace')!r}"
            )
        num_names += len(members)
        yield representatives, members
    if not num_names:
        raise UserError(f"--clusters: '{path}' lists no clusters; expected lines of representative, tab, member")


def _line_blocks(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield blocks of whole lines, each with the number, from 1, of its first line."""
    line, rest = 1, b""
    for block in BlockReader(path):
        end = block.rfind(b"\n") + 1
        if len(rest) > _LONGEST_LINE:
            raise UserError(
                f"--clusters: '{path}', line {line:,}: more than {_LONGEST_LINE:,} bytes without a line break; "
                "expected lines of representative, tab, member"
            )
        if not end:
            rest += block
            continue
        text, rest = rest + block[:end], block[end:]
        yield line, text
        line += text.count(b"\n")
    yield line, rest


def _fail_conflict(path: str, member: tuple[int, int]) -> NoReturn:
    """Tell which member of the table, known by its hash, is in two clusters: the table is read once more."""
    seen: tuple[int, str] | None = None
    for first_line, text in _line_blocks(path):
        for number, line in enumerate(text.splitlines(), start=first_line):
            members = read_cluster_lines(line)[1]
            if not len(members) or tuple(members[0]) != member:
                continue
            cluster, name = (column.split()[0].decode(errors="backslashreplace") for column in line.split(b"\t")[:2])
            if seen is not None and seen[1] != cluster:
                raise UserError(
                    f"--clusters: '{path}': member '{name}' is in two clusters, '{seen[1]}' (line {seen[0]:,}) and "
                    f"'{cluster}' (line {number:,}); each member must be in one"
                )
            seen = seen or (number, cluster)
    raise UserError(f"--clusters: '{path}' has changed while it was read; start again")
