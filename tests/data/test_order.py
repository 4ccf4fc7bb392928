"""The epoch order is a permutation, for any size, and looks shuffled."""

import numpy as np
import pytest
from scipy import stats

from megatron_plm.data.order import permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 255, 1000, 65537])
def test_every_index_comes_once(size):
    assert sorted(permute(np.arange(size), size, key=99).tolist()) == list(range(size))


def test_a_position_is_found_without_the_others():
    whole = permute(np.arange(1000), 1000, key=5)
    assert [int(permute(np.array([i]), 1000, key=5)[0]) for i in (0, 17, 999)] == whole[[0, 17, 999]].tolist()


def test_huge_sizes_stay_inside():
    size = 10**12 + 7
    values = permute(np.arange(size - 5000, size), size, key=3)
    assert values.min() >= 0
    assert values.max() < size
    assert len(set(values.tolist())) == 5000


def test_positions_are_uniform_over_keys_and_neighbours_part():
    size, keys = 64, 4000
    seen = np.array([permute(np.array([10, 11]), size, key=key) for key in range(keys)])
    counts = np.bincount(seen[:, 0], minlength=size)
    assert stats.chisquare(counts).pvalue > 1e-4
    differences = np.bincount((seen[:, 1] - seen[:, 0]) % size, minlength=size)[1:]
    assert stats.chisquare(differences).pvalue > 1e-4
