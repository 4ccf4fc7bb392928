"""Finding records that repeat an earlier one, in bounded memory: hashes are sorted on disk, and equal ones meet."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_plm.data.external_sort import ExternalSort, entries_of, entry_dtype, same_keys

_HASHES = entry_dtype(wide=True)
_FLAGS = entry_dtype(("repeated", "u1"))


class DuplicateFinder:
    """Told the 128-bit hash of every record in turn, it says of each whether an earlier one has the same."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hashes = ExternalSort(folder, "hashes", _HASHES)
        self._count = 0

    def add(self, hashes: npt.NDArray[np.uint64]) -> None:
        """Take the hashes of the next records, uint64 [k, 2]."""
        indices = np.arange(self._count, self._count + len(hashes), dtype=np.uint64)
        self._hashes.add(entries_of(_HASHES, key=hashes[:, 0], second=hashes[:, 1], tie=indices))
        self._count += len(hashes)

    def flags(self) -> Iterator[npt.NDArray[np.bool_]]:
        """Yield, in the order of the records, whether each repeats an earlier one; once."""
        by_index = ExternalSort(self._folder, "repeated", _FLAGS, highest=max(0, self._count - 1))
        # Records with equal hashes follow each other, in their order.
        before = np.zeros(0, dtype=_HASHES)
        for entries, _ in self._hashes.sorted():
            joined = np.concatenate([before, entries])
            same = same_keys(joined[1:], joined[:-1])
            repeated = same if len(before) else np.concatenate([[False], same])
            by_index.add(entries_of(_FLAGS, key=entries["tie"], repeated=repeated))
            before = entries[-1:]
        for entries, _ in by_index.sorted():
            yield entries["repeated"].astype(bool)
