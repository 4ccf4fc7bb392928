"""Which proteins share a row: best fit inside a window of the shuffled order, as a pure function of (seed, epoch).

The stream of rows is endless: epoch after epoch, window after window, row after row. A `Cursor` names a place in it,
so that going on after a stop costs one window of packing, whatever the step and the number of processes.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_plm.data.order import permute
from megatron_plm.philox import derive_key, philox4x32

NUM_SPECIAL_TOKENS = 2  # <cls> before and <eos> behind every protein
_TOKENS_PER_SEGMENT = 8  # a row holds at most one protein per so many tokens, which fixes the size of cu_seqlens


@dataclass(frozen=True)
class Cursor:
    """The next row of the stream: the `row`-th of window `window` of epoch `epoch`."""

    epoch: int = 0
    window: int = 0
    row: int = 0


class Segment(NamedTuple):
    """A stretch of one protein's tokens `<cls> residues <eos>`: `length` tokens from token `start` on."""

    sequence: int
    start: int
    length: int


class RowLimits(NamedTuple):
    """What one row can hold; fixed by the options, so that every batch has the same shape."""

    tokens: int
    labels: int
    segments: int


def num_labels(num_tokens: NDArray | int, mask_prob: float) -> NDArray:
    """How many of `num_tokens` maskable tokens of one protein are predicted: the rounded share, at least one."""
    return np.maximum(np.minimum(num_tokens, 1), np.floor(np.asarray(num_tokens) * mask_prob + 0.5)).astype(np.int64)


def row_limits(seq_length: int, mask_prob: float) -> RowLimits:
    """Limits of a row of `seq_length` tokens. A third more labels than the mean leave room for short proteins, whose
    rounded shares are larger."""
    segments = max(1, seq_length // _TOKENS_PER_SEGMENT)
    labels = max(segments, int(np.ceil(seq_length * mask_prob * 4 / 3)) + 1)  # one at least for each segment
    return RowLimits(tokens=seq_length, labels=min(seq_length, labels), segments=segments)


class RowStream:
    """Rows of segments for a dataset of proteins with `lengths` residues (int array [sequences])."""

    def __init__(
        self, lengths: NDArray, *, seq_length: int, mask_prob: float, window: int, seed: int, dataset_id: str
    ) -> None:
        self._lengths = lengths
        self._limits = row_limits(seq_length, mask_prob)
        self._mask_prob = mask_prob
        self._window = window
        self._seed = seed
        self._dataset_id = dataset_id

    @property
    def num_windows(self) -> int:
        return -(-len(self._lengths) // self._window)

    def rows_from(self, cursor: Cursor) -> Iterator[tuple[list[Segment], Cursor]]:
        """The endless stream from `cursor` on: each row with the cursor behind it."""
        while True:
            rows = self._window_rows(cursor.epoch, cursor.window)
            following = self._next_window(cursor)
            for row in range(cursor.row, len(rows)):
                yield rows[row], following if row + 1 == len(rows) else replace(cursor, row=row + 1)
            cursor = following

    def _next_window(self, cursor: Cursor) -> Cursor:
        if cursor.window + 1 < self.num_windows:
            return Cursor(cursor.epoch, cursor.window + 1, 0)
        return Cursor(cursor.epoch + 1, 0, 0)

    def _window_rows(self, epoch: int, window: int) -> list[list[Segment]]:
        size = len(self._lengths)
        positions = np.arange(window * self._window, min((window + 1) * self._window, size))
        sequences = permute(positions, size, self._key("order", epoch))
        tokens = np.asarray(self._lengths[sequences], dtype=np.int64) + NUM_SPECIAL_TOKENS
        starts = self._crop_starts(epoch, sequences, tokens)
        segments = [
            Segment(sequence, start, min(length, self._limits.tokens))
            for sequence, start, length in zip(sequences.tolist(), starts.tolist(), tokens.tolist(), strict=True)
        ]
        rows = best_fit(segments, self._limits, self._mask_prob)
        # Best fit leaves rows of one long protein first and of many short ones last: mix them again.
        order = permute(np.arange(len(rows)), len(rows), self._key("rows", epoch, window))
        return [rows[i] for i in order]

    def _crop_starts(self, epoch: int, sequences: NDArray, tokens: NDArray) -> NDArray:
        """First token of each protein's crop: 0 where it fits, uniform over all crops of a full row where not."""
        choices = np.maximum(tokens - self._limits.tokens, 0) + 1
        words = sequences.astype(np.uint64)
        draws = philox4x32(self._key("crop", epoch), (words, words >> np.uint64(32), 0, 0))[0]
        return (draws.astype(np.uint64) * choices.astype(np.uint64)) >> np.uint64(32)

    def _key(self, purpose: str, *coordinates: int) -> int:
        return derive_key(purpose, self._seed, self._dataset_id, *coordinates)


def best_fit(segments: list[Segment], limits: RowLimits, mask_prob: float) -> list[list[Segment]]:
    """Pack segments into rows, longest first, each into the fullest row that still takes it.

    Best-fit decreasing (Johnson 1973); equal lengths keep their order. A row also stops at its limit of labels and of
    segments.
    """
    lengths = np.array([segment.length for segment in segments], dtype=np.int64)
    labels = num_labels(lengths, mask_prob)
    rows: list[list[Segment]] = []
    rooms: list[RowLimits] = []  # what is left in each row
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for item in np.argsort(-lengths, kind="stable").tolist():
        need = RowLimits(int(lengths[item]), int(labels[item]), 1)
        place = bisect_left(open_rows, (need.tokens, -1))
        while place < len(open_rows) and not _holds(rooms[open_rows[place][1]], need):
            place += 1
        if place < len(open_rows):
            row = open_rows.pop(place)[1]
        else:
            row = len(rows)
            rows.append([])
            rooms.append(limits)
        rows[row].append(segments[item])
        rooms[row] = RowLimits(*(have - used for have, used in zip(rooms[row], need, strict=True)))
        if rooms[row].tokens > NUM_SPECIAL_TOKENS and rooms[row].labels and rooms[row].segments:
            entry = (rooms[row].tokens, row)
            open_rows.insert(bisect_left(open_rows, entry), entry)
    return rows


def _holds(room: RowLimits, need: RowLimits) -> bool:
    return room.labels >= need.labels and room.segments >= need.segments
