"""Windows of long proteins, and rows, against definitions spelt out."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_plm.inference.rows import filled, pack
from megatron_plm.inference.windows import coverage, most_central, windows


@st.composite
def cuts(draw):
    longest = draw(st.integers(1, 12))
    return draw(st.integers(1, 60)), longest, draw(st.integers(0, longest - 1))


@given(cuts())
def test_windows_cover_the_protein_and_share_at_least_the_overlap(cut):
    length, longest, overlap = cut
    parts = windows(length, longest, overlap)
    if length <= longest:
        assert parts == [(0, length)]
        return
    assert all(end - start == longest for start, end in parts)
    assert (parts[0].start, parts[-1].end) == (0, length)
    shared = [one.end - other.start for one, other in pairwise(parts)]
    assert all(overlap <= count < longest for count in shared)
    assert all(count == overlap for count in shared[:-1])


@given(cuts())
def test_coverage_counts_the_windows_of_each_token(cut):
    parts = windows(*cut)
    assert coverage(parts).tolist() == [sum(s <= token < e for s, e in parts) for token in range(cut[0])]


@given(cuts())
def test_the_most_central_window_holds_the_longest_stretch_around_the_token(cut):
    length = cut[0]
    parts = windows(*cut)
    chosen = most_central(parts)
    assert len(chosen) == length
    for token in range(length):
        # The largest k such that all tokens up to k places from it, as far as there are such, lie in the window.
        reach = {}
        for start, end in parts:
            near = [k for k in range(length + 1) if start <= max(token - k, 0) and min(token + k, length - 1) < end]
            if start <= token < end:
                reach[(start, end)] = max(near)
        best = max(reach.values())
        assert parts[chosen[token]] == next(part for part in parts if reach.get(part) == best)


def test_the_work_grows_with_the_windows_and_not_with_their_square():
    parts = windows(200_002, 64, 32)
    looked_at = 0

    class Counted(list):
        def __iter__(self):
            nonlocal looked_at
            for part in list.__iter__(self):
                looked_at += 1
                yield part

    most_central(Counted(parts))
    coverage(Counted(parts))
    assert looked_at == 2 * len(parts)


class Item(NamedTuple):
    number: int
    num_tokens: int


@given(st.lists(st.integers(1, 12), max_size=30), st.integers(1, 20))
def test_rows_are_filled_in_order_and_none_takes_one_more(sizes, budget):
    rows = list(filled((Item(number, size) for number, size in enumerate(sizes)), budget))
    assert [item.number for row in rows for item in row] == list(range(len(sizes)))
    for row, following in pairwise(rows):
        assert sum(item.num_tokens for item in row) + following[0].num_tokens > budget
    assert all(len(row) == 1 or sum(item.num_tokens for item in row) <= budget for row in rows)


def test_a_packed_row_has_no_padding_and_restarts_positions():
    row = pack([np.array([5, 6, 7], dtype=np.uint8), np.array([8]), np.array([9, 10])])
    assert row.tokens.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert row.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert row.segment_ids.tolist() == [[1, 1, 1, 2, 3, 3]]
    assert (row.cu_seqlens.tolist(), row.starts.tolist(), row.max_length) == ([0, 3, 4, 6], [0, 3, 4], 3)
