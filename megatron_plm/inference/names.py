"""The columns that every work over proteins has: their names and lengths, in the order of the input."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_plm.data.dedup import DuplicateFinder
from megatron_plm.inference.proteins import Protein
from megatron_plm.inference.resumable import Column

LENGTHS = "lengths"  # tokens of each protein, without specials
_BYTES, _SIZES = "names", "name_sizes"
NAME_DTYPES: dict[str, np.dtype[Any]] = {
    _BYTES: np.dtype(np.uint8),
    _SIZES: np.dtype(np.int64),
    LENGTHS: np.dtype(np.int32),
}
PROTEINS_AT_A_TIME = 1 << 14


def name_columns(proteins: Sequence[Protein]) -> dict[str, npt.NDArray[Any]]:
    """What the columns get of some proteins."""
    texts = [protein.identifier.encode() for protein in proteins]
    return {
        _BYTES: np.frombuffer(b"".join(texts), dtype=np.uint8),
        _SIZES: np.array([len(text) for text in texts], dtype=np.int64),
        LENGTHS: np.array([len(protein.tokens) for protein in proteins], dtype=np.int32),
    }


def names_of(columns: Mapping[str, Column]) -> Iterator[list[str]]:
    """Yield the names, `PROTEINS_AT_A_TIME`."""
    with columns[_BYTES].reader() as texts:
        for sizes in columns[_SIZES].blocks(PROTEINS_AT_A_TIME):
            ends = np.cumsum(sizes).tolist()
            text = texts.take(ends[-1]).tobytes()
            yield [text[end - size : end].decode() for end, size in zip(ends, sizes.tolist(), strict=True)]


def num_repeated_names(columns: Mapping[str, Column], folder: Path) -> int:
    """How many proteins have the name of an earlier one; `folder` is for temporary files."""
    finder = DuplicateFinder(folder)
    for names in names_of(columns):
        digests = b"".join(hashlib.blake2b(name.encode(), digest_size=16).digest() for name in names)
        finder.add(np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2))
    return sum(int(flags.sum()) for flags in finder.flags())
