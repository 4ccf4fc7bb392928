"""What a dataset holds: lengths and letters, from its description or counted in constant memory."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.statistics import LengthStatistics
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import Tokenizer, get_tokenizer, recorded_tokenizer

CHUNK = 1 << 20  # entries or tokens looked at together
_MOST = 2**63 - 1  # of whatever is counted
_HIGHEST_ID = 1 << 16  # ids from here on, unless a vocabulary has them, are counted as one

Histogram = list[tuple[int, int, int]]  # (low, high, count), low <= length < high


@dataclass(frozen=True)
class Contents:
    """Counts over a whole dataset. `tokens` is keyed by the token's text, or its id where the tokenizer is unknown."""

    shortest: int
    longest: int
    lengths: Histogram
    tokens: dict[str, int]


def tokenizer_of(dataset: IndexedDataset) -> tuple[Tokenizer | None, str]:
    """The tokenizer that the dataset was made with, None where it isn't known here; and its name, or why there is
    none. Raises UserError where PREFIX.json says something else there."""
    described = dataset.tokenizer
    if described is None:
        return None, f"unknown ({dataset.prefix}.json, which names it, is missing or doesn't)"
    name = described["name"]
    if "model" in described:
        try:
            pieces = recorded_tokenizer(described, f"'{dataset.prefix}.json'")
        except UserError as error:
            return None, f"{name}, which cannot be used here ({error})"
        return pieces, f"{name} ({pieces.vocab_size} tokens)"
    try:
        tokenizer = get_tokenizer(name)
    except UserError:
        return None, f"{name}, which isn't known here"
    if tokenizer.sha256 != described["sha256"]:
        return None, f"{name}, but with another vocabulary than the one known here"
    return tokenizer, f"{name} ({tokenizer.vocab_size} tokens)"


def described(dataset: IndexedDataset) -> Contents | None:
    """What PREFIX.json says; None where it doesn't tell lengths and letters. Raises UserError for other content."""
    histogram, tokens = (dataset.metadata.get(key) for key in ("length_histogram", "token_counts"))
    if histogram is None or tokens is None:
        return None
    try:
        bins = [(int(low), int(high), int(count)) for low, high, count in histogram["bins"]]
        counts = {str(token): int(count) for token, count in tokens.items()}
        shortest, longest = int(histogram["min"]), int(histogram["max"])
        numbers = [shortest, longest, *counts.values(), *itertools.chain(*bins)]
        if not all(0 <= number <= _MOST for number in numbers) or any(low >= high for low, high, _ in bins):
            raise ValueError
        return Contents(shortest, longest, bins, counts)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise UserError(
            f"'{dataset.prefix}.json': length_histogram or token_counts isn't what tools/preprocess_data.py writes; "
            "make the dataset again"
        ) from None


def counted(dataset: IndexedDataset, tokenizer: Tokenizer | None, progress: Callable[[int], None]) -> Contents:
    """What the files hold; `progress` is told how many bytes of tokens were counted."""
    lengths, tokens = LengthCounter(), TokenCounter(tokenizer)
    for first in range(0, len(dataset), CHUNK):
        lengths.add(np.array(dataset.lengths[first : first + CHUNK]))
    for first in range(0, dataset.num_tokens, CHUNK):
        tokens.add(np.array(dataset.tokens[first : first + CHUNK]))
        progress(min(first + CHUNK, dataset.num_tokens) * dataset.tokens.itemsize)
    return contents(lengths, tokens, tokenizer)


class LengthCounter:
    """LengthStatistics, and empty sequences, which only datasets of others hold."""

    def __init__(self) -> None:
        self._statistics = LengthStatistics()
        self._num_empty = 0

    def add(self, lengths: npt.NDArray[np.int32]) -> None:
        """Count more lengths; a negative one, which only a damaged index has, as empty."""
        filled = lengths[lengths > 0]
        self._num_empty += len(lengths) - len(filled)
        self._statistics.add(filled)

    def range(self) -> tuple[int, int]:
        """Shortest and longest."""
        return 0 if self._num_empty else self._statistics.minimum, self._statistics.maximum

    def histogram(self) -> Histogram:
        """The bins, without the outer empty ones."""
        bins: Any = self._statistics.histogram()["bins"]
        return [(0, 1, self._num_empty)] * bool(self._num_empty) + [(low, high, count) for low, high, count in bins]


class TokenCounter:
    """How often each token id stands in a dataset."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._counts = np.zeros(max(_HIGHEST_ID, tokenizer.vocab_size if tokenizer else 0), dtype=np.int64)
        self._num_others = 0

    def add(self, tokens: npt.NDArray[Any]) -> None:
        """Count more tokens: uint8, uint16 or int32."""
        highest = len(self._counts)
        known = tokens[(tokens >= 0) & (tokens < highest)] if tokens.dtype.itemsize > 2 else tokens
        counts = np.bincount(known)
        self._counts[: len(counts)] += counts
        self._num_others += len(tokens) - len(known)

    def by_name(self, tokenizer: Tokenizer | None) -> dict[str, int]:
        """Counts by text; ids outside the vocabulary by number."""
        names = tokenizer.tokens if tokenizer else ()
        counts = {name: int(self._counts[token_id]) for token_id, name in enumerate(names)}
        beyond = np.flatnonzero(self._counts[len(names) :]) + len(names)
        counts |= {str(token_id): int(self._counts[token_id]) for token_id in beyond}
        return counts | ({"other ids": self._num_others} if self._num_others else {})


def contents(lengths: LengthCounter, tokens: TokenCounter, tokenizer: Tokenizer | None) -> Contents:
    """The counters' result."""
    return Contents(*lengths.range(), lengths.histogram(), tokens.by_name(tokenizer))


def most_frequent(counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """The entries that occur, most frequent first."""
    return ((name, count) for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count)
