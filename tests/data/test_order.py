"""The epoch order is a permutation, for any size, and looks shuffled."""

import numpy as np
import pytest
from scipy import stats

from megatron_plm.data.order import EpochOrder, permute


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


@pytest.mark.parametrize("block_size", [0, 1, 7, 64, 1000, 5000])
@pytest.mark.parametrize("size", [1, 63, 64, 1000, 4099])
def test_an_epoch_in_blocks_holds_every_item_once_wherever_it_is_asked(size, block_size):
    order = EpochOrder(size, ("order", 1), block_size=block_size, blocks_at_once=4)
    for epoch in (0, 5):
        items = order.items(epoch, np.arange(size))
        assert sorted(items.tolist()) == list(range(size))
        some = np.random.default_rng(0).permutation(size)[:50]
        assert order.items(epoch, some).tolist() == items[some].tolist()


def test_blocks_bound_how_many_places_are_read_at_once():
    order = EpochOrder(10_000, ("order", 1), block_size=100, blocks_at_once=8)
    items = order.items(0, np.arange(10_000))
    for first in range(0, 10_000 - 800, 800):
        assert len(set((items[first : first + 800] // 100).tolist())) == 8
    assert len(set((items[:100] // 100).tolist())) == 8, "mixed item by item, not block after block"
    assert not np.array_equal(items, order.items(1, np.arange(10_000)))


def test_what_remains_behind_the_last_block_comes_last():
    items = EpochOrder(1050, ("order", 1), block_size=100, blocks_at_once=4).items(0, np.arange(1050))
    assert sorted(items[1000:].tolist()) == list(range(1000, 1050))
