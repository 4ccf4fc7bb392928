"""The fastest of several batch sizes is found with one of them in the memory at a time."""

import gc
import weakref
from typing import ClassVar

import pytest
import torch

from megatron_plm.benchmark import rounds
from megatron_plm.errors import UserError


class Work:
    """A step of so many tokens; those of more than 16 don't fit."""

    alive: ClassVar = weakref.WeakSet()

    def __init__(self, size: int) -> None:
        gc.collect()
        assert not self.alive
        self.alive.add(self)
        if size > 16:
            raise torch.OutOfMemoryError
        self.size = size

    def __call__(self) -> int:
        return self.size


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Speeds by a table: 8 is the fastest."""
    monkeypatch.setattr(rounds, "tokens_per_second", lambda step, *_: {4: 1.0, 8: 3.0, 16: 2.0}[step()])


@pytest.mark.parametrize("sizes", [[4, 8, 16, 32], [32, 16, 8, 4], [8]])
def test_the_fastest_is_found_and_made_again_alone(sizes):
    told = []
    size, step = rounds.fastest_size("ours", sizes, Work, 1.0, told.append)
    assert (size, step()) == (8, 8)
    assert ("ours of 32: out of memory" in told) == (32 in sizes)


def test_none_that_fits_is_told():
    with pytest.raises(UserError, match="none of the batch sizes 32, 64 fits the memory"):
        rounds.fastest_size("ours", [32, 64], Work, 1.0, lambda _: None)
