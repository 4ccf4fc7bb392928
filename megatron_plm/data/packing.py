"""Which proteins share a row: best fit inside a window of the shuffled order, as a pure function of (seed, epoch).

The stream of a dataset's rows is endless: epoch after epoch, window after window, row after row. A `Place` names a
spot in it, so that going on after a stop costs one window of packing, whatever the step and the number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_plm.config.options import DataOptions
from megatron_plm.data._native import pack_best_fit
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.masking import Masking
from megatron_plm.data.order import EpochOrder, permute
from megatron_plm.errors import UserError
from megatron_plm.philox import derive_key, philox4x32

NUM_SPECIAL_TOKENS = 2  # <cls> before and <eos> behind every protein
_UNPACKED_BUNCH = 64  # rows of one protein each that stay together, so that a batch is of about one length
_TOKENS_PER_SEGMENT = 8  # a row holds at most one protein per so many tokens, which bounds the number of its labels


@dataclass(frozen=True)
class Place:
    """The next row of a dataset's stream: the `row`-th of window `window` of epoch `epoch`."""

    epoch: int = 0
    window: int = 0
    row: int = 0


class Row(NamedTuple):
    """One row: of each `sequence` (int64 [n]) the `length` tokens from token `start` on of `<cls> residues <eos>`."""

    dataset: int
    epoch: int
    sequence: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]


class RowLimits(NamedTuple):
    """What one row can hold; fixed by the options, so that every batch has the same shape."""

    tokens: int
    labels: int
    segments: int


def row_limits(options: DataOptions, masking: Masking) -> RowLimits:
    """The limits of every row."""
    segments = max(1, options.seq_length // _TOKENS_PER_SEGMENT) if options.row_layout == "packed" else 1
    return RowLimits(options.seq_length, masking.label_limit(options.seq_length, segments), segments)


class RowStream:
    """The rows of one dataset, the `index`-th of a blend.

    A document of several sequences is a cluster: each epoch reads one of its members, drawn anew (as ESM-2 samples
    UniRef50 clusters; Lin et al. 2023, doi:10.1126/science.ade2574, section A.1).
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        options: DataOptions,
        masking: Masking,
        *,
        seed: int,
        name: str,
        index: int = 0,
    ) -> None:
        self._dataset = dataset
        self._options = options
        self._masking = masking
        self._limits = row_limits(options, masking)
        self._key_parts = (seed, name)
        self._index = index
        self._order = EpochOrder(
            dataset.num_documents,
            ("order", seed, name),
            block_size=options.shuffle_block_size,
            blocks_at_once=options.shuffle_blocks_at_once,
        )

    @property
    def num_windows(self) -> int:
        return -(-self._dataset.num_documents // self._options.packing_window)

    def rows_from(self, place: Place) -> Iterator[tuple[Row, Place]]:
        """The endless stream from `place` on: each row with the place behind it. Raises UserError where every protein
        of an epoch is left out."""
        num_empty = 0
        while True:
            rows = self.window_rows(place.epoch, place.window)
            following = self._next_window(place)
            for number in range(place.row, len(rows)):
                yield rows[number], following if number + 1 == len(rows) else replace(place, row=number + 1)
            num_empty = 0 if rows else num_empty + 1
            if num_empty > self.num_windows:
                raise UserError(
                    f"dataset '{self._dataset.prefix}': every protein is longer than a row of --seq-length "
                    f"{self._options.seq_length}, and --long-sequences drop leaves it out; choose crop or chunk"
                )
            place = following

    def epoch_rows(self, epoch: int) -> Iterator[Row]:
        """The rows of one epoch."""
        for window in range(self.num_windows):
            yield from self.window_rows(epoch, window)

    def window_rows(self, epoch: int, window: int) -> list[Row]:
        """All rows of one window."""
        sequence = self._window_sequences(epoch, window)
        residues = np.asarray(self._dataset.lengths[sequence], dtype=np.int64)
        if (residues < 0).any():
            raise self._damaged(f"sequence {sequence[residues < 0][0]} has a negative length")
        sequence, start, length = self._segments(epoch, sequence, residues + NUM_SPECIAL_TOKENS)
        if not len(sequence):
            return []
        if self._options.row_layout == "packed":
            items, offsets = pack_best_fit(length, self._masking.num_labels(length), *self._limits)
        else:  # neighbours have about one length, so that a batch needs little padding
            items, offsets = np.argsort(-length, kind="stable"), np.arange(len(length) + 1)
        rows = [
            Row(self._index, epoch, sequence[chosen], start[chosen], length[chosen])
            for chosen in np.split(items, offsets[1:-1])
        ]
        return [rows[number] for number in self._mixed(len(rows), epoch, window)]

    def _mixed(self, num_rows: int, epoch: int, window: int) -> NDArray[np.int64]:
        """Best fit leaves rows of one long protein first and of many short ones last: mix them again.

        Rows of one protein each are mixed in bunches, that keep proteins of about one length together.
        """
        bunch = 1 if self._options.row_layout == "packed" else _UNPACKED_BUNCH
        num_bunches = -(-num_rows // bunch)
        bunches = permute(np.arange(num_bunches), num_bunches, self._key("rows", epoch, window))
        order = (bunches[:, None] * bunch + np.arange(bunch)).reshape(-1)
        return order[order < num_rows]

    def _window_sequences(self, epoch: int, window: int) -> NDArray[np.int64]:
        first, size = window * self._options.packing_window, self._dataset.num_documents
        documents = self._order.items(epoch, np.arange(first, min(first + self._options.packing_window, size)))
        if size == len(self._dataset):
            return documents
        begin = np.asarray(self._dataset.document_indices[documents], dtype=np.int64)
        end = np.asarray(self._dataset.document_indices[documents + 1], dtype=np.int64)
        wrong = (begin < 0) | (end < begin) | (end > len(self._dataset))
        if wrong.any():
            raise self._damaged(
                f"document {documents[wrong][0]} is said to be sequences {begin[wrong][0]} to {end[wrong][0]}"
            )
        members = end - begin
        drawn = begin + self._draw("member", epoch, documents, members)
        return drawn[members > 0]

    def _segments(self, epoch: int, sequence: NDArray, tokens: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """Sequence, first token and number of tokens of every segment that comes of the proteins of a window."""
        row, mode = self._limits.tokens, self._options.long_sequences
        if mode == "crop":  # uniform over all stretches of a full row
            return (
                sequence,
                self._draw("crop", epoch, sequence, np.maximum(tokens - row, 0) + 1),
                np.minimum(tokens, row),
            )
        if mode == "chunk":
            chunks = -(-tokens // row)
            number = np.arange(chunks.sum()) - np.repeat(np.cumsum(chunks) - chunks, chunks)
            sequence, tokens = np.repeat(sequence, chunks), np.repeat(tokens, chunks)
            return sequence, number * row, np.minimum(tokens - number * row, row)
        too_long = tokens > row
        if mode == "error" and too_long.any():
            raise UserError(
                f"dataset '{self._dataset.prefix}': sequence {sequence[too_long][0]} has {tokens[too_long][0] - 2} "
                f"residues, more than a row of --seq-length {row} holds; raise it, or choose crop, chunk or drop for "
                "--long-sequences"
            )
        fits = ~too_long
        return sequence[fits], np.zeros(int(fits.sum()), dtype=np.int64), tokens[fits]

    def _damaged(self, what: str) -> UserError:
        return UserError(f"dataset '{self._dataset.prefix}' is damaged: {what}; make the dataset again")

    def _draw(self, purpose: str, epoch: int, items: NDArray, choices: NDArray) -> NDArray[np.int64]:
        """For each item a number in [0, choices), keyed by purpose, epoch and item."""
        words = items.astype(np.uint64)
        draws = philox4x32(self._key(purpose, epoch), (words, words >> np.uint64(32), 0, 0))[0]
        return ((draws.astype(np.uint64) * choices.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)

    def _next_window(self, place: Place) -> Place:
        if place.window + 1 < self.num_windows:
            return Place(place.epoch, place.window + 1, 0)
        return Place(place.epoch + 1, 0, 0)

    def _key(self, purpose: str, *coordinates: int) -> int:
        return derive_key(purpose, *self._key_parts, *coordinates)
