"""Texts that lie end to end in memory, as scans take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Values:
    """Some texts: the i-th is data[offsets[i] : offsets[i + 1]].

    Attributes:
        data: their bytes.
        offsets: int64 [k + 1], ascending, inside `data`.
        names: the records' names, where asked for.
    """

    data: Any  # a buffer of bytes
    offsets: npt.NDArray[np.int64]
    names: "Values | None" = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the texts."""
        return int(self.offsets[-1] - self.offsets[0])

    def texts(self) -> list[str]:
        """The texts as strings: what is no UTF-8 in them, and a NUL, as \\xNN."""
        data, bounds = bytes(self.data), self.offsets.tolist()
        parts = (data[begin:end] for begin, end in pairwise(bounds))
        return [part.decode("utf-8", "backslashreplace").replace("\0", "\\x00") for part in parts]


def joined(texts: Sequence[bytes], names: Sequence[bytes] | None = None) -> Values:
    """Return the texts, and their records' names, as Values."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return Values(b"".join(texts), offsets, None if names is None else joined(names))
