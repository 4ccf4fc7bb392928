"""What a dataset holds, counted while it is written: lengths and letters."""

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_plm.data.indexed import METADATA_FORMAT, METADATA_VERSION
from megatron_plm.tokenizers import Tokenizer

# 1, 2, ..., 8, then four bins to every doubling, up to the format's longest sequence.
_BIN_EDGES = np.unique(np.outer(2.0 ** np.arange(29), [8, 10, 12, 14]).astype(np.int64).ravel())
_BIN_EDGES = np.concatenate([np.arange(1, 8), _BIN_EDGES[_BIN_EDGES < 2**31], [2**31]])
_LONG = 1 << 14  # the bins of shorter sequences are looked up, which takes a tenth of the time


def _bins_of(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
    return np.searchsorted(_BIN_EDGES, lengths, side="right") - 1


_BINS_OF_SHORT = _bins_of(np.arange(_LONG + 1))


class LengthStatistics:
    """Count, sum, extremes and histogram of sequence lengths, in constant memory."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0
        self.minimum = 0
        self.maximum = 0
        self._bins = np.zeros(len(_BIN_EDGES) - 1, dtype=np.int64)

    def add(self, lengths: npt.NDArray[np.int32]) -> None:
        """Count more sequences of the given lengths, each 1 to 2^31 - 1."""
        if not len(lengths):
            return
        self.minimum = min(self.minimum or int(lengths.min()), int(lengths.min()))
        self.maximum = max(self.maximum, int(lengths.max()))
        self.count += len(lengths)
        self.total += int(lengths.sum(dtype=np.int64))
        bins = _BINS_OF_SHORT[np.minimum(lengths, _LONG)]
        if lengths.max() > _LONG:
            long = lengths > _LONG
            bins[long] = _bins_of(lengths[long])
        self._bins += np.bincount(bins, minlength=len(self._bins))

    @property
    def mean(self) -> float:
        """Letters a sequence; 0 without sequences."""
        return self.total / self.count if self.count else 0.0

    def histogram(self) -> dict[str, float | list[list[int]]]:
        """Return min, max, mean and bins [low, high, count], low <= length < high, without the outer empty ones."""
        used = np.flatnonzero(self._bins)
        first, last = (used[0], used[-1]) if len(used) else (0, -1)
        bins = [[int(_BIN_EDGES[i]), int(_BIN_EDGES[i + 1]), int(self._bins[i])] for i in range(first, last + 1)]
        return {"min": self.minimum, "max": self.maximum, "mean": self.mean, "bins": bins}


def count_tokens(byte_counts: npt.NDArray[np.uint64], tokenizer: Tokenizer, *, fold_case: bool) -> dict[str, int]:
    """Return how often each token of the vocabulary was written, from how often each byte was read (uint64 [256]).

    For tokenizers of letters.
    """
    token_ids = tokenizer.lookup_table(fold_case)
    return {token: int(byte_counts[token_ids == token_id].sum()) for token_id, token in enumerate(tokenizer.tokens)}


def count_unknown_letters(
    byte_counts: npt.NDArray[np.uint64], tokenizer: Tokenizer, *, fold_case: bool
) -> dict[str, int]:
    """Return how often each letter that became the unknown token was read, most frequent first."""
    counts: dict[str, int] = {}
    for byte in np.flatnonzero((tokenizer.lookup_table(fold_case) == tokenizer.unknown_entry) & (byte_counts > 0)):
        letter = chr(byte).upper() if fold_case else chr(byte)
        counts[letter] = counts.get(letter, 0) + int(byte_counts[byte])
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def description(tokenizer: Tokenizer, contents: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """What PREFIX.json says, but for the checksums: what made the dataset, what it holds and where it comes from."""
    return {
        "format": METADATA_FORMAT,
        "version": METADATA_VERSION,
        "tokenizer": tokenizer.described(),
        **contents,
        **origin,
    }
