"""Counter-based random numbers against published answers and their statistics."""

import numpy as np
import pytest
from scipy import stats

from megatron_plm import philox
from megatron_plm.philox import derive_key, normal, philox4x32


# Known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_blocks_equal_the_published_known_answers(counter, key, expected):
    assert tuple(philox4x32(key, counter).tolist()) == expected


def test_any_slice_of_the_normal_stream_equals_the_whole():
    whole = normal(7, 0, 1000)
    for start, count in [(0, 1), (3, 10), (8, 8), (499, 501), (5, 0)]:
        np.testing.assert_array_equal(normal(7, start, count), whole[start : start + count])


@pytest.mark.parametrize(("rows", "columns"), [((10, 20), (0, 96)), ((0, 40), (24, 48)), ((7, 9), (5, 6))])
def test_a_box_of_a_matrix_is_that_of_the_whole_and_little_else_is_drawn(rows, columns, monkeypatch):
    whole = normal(7, 0, 40 * 96).reshape(40, 96)
    drawn = []
    blocks = philox._normal_blocks
    monkeypatch.setattr(
        philox, "_normal_blocks", lambda key, numbers: drawn.append(numbers.size) or blocks(key, numbers)
    )
    box = philox.normal_box(7, 96, rows, columns)
    np.testing.assert_array_equal(box, whole[slice(*rows), slice(*columns)])
    assert 8 * sum(drawn) <= box.size + 2 * 8 * len(box), "at most a block of eight at each end of a row"


def test_normal_values_follow_the_normal_distribution():
    values = normal(derive_key("init", 1, "a.weight"), 0, 200_000).astype(np.float64)
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


def test_keys_differ_by_every_part_and_by_where_the_parts_are_cut():
    keys = {derive_key(*parts) for parts in [("a", 1, 2), ("a", 12), ("a", 2, 1), ("b", 1, 2), ("a1", 2)]}
    assert len(keys) == 5
