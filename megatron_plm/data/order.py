"""The order of an epoch: keyed pseudo-random permutations of sequence indices, in constant memory.

A balanced Feistel network over the smallest even number of bits that holds the size, walked along its cycle until the
value is inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). Any position of any epoch is found
without the others, so a resumed run needs no shuffled array.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_plm.philox import derive_key, philox4x32

_NUM_ROUNDS = 6


def permute(positions: NDArray, size: int, key: int) -> NDArray[np.int64]:
    """Where the permutation of `range(size)` under `key` sends `positions` (integers in [0, size), any shape)."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    round_keys = philox4x32(key, (np.arange(_NUM_ROUNDS), 0, 0, 0))[:2].astype(np.uint64)
    values = np.asarray(positions, dtype=np.uint64)
    shape = values.shape
    values = values.reshape(-1).copy()
    outside = np.arange(values.size)
    while outside.size:
        left, right = values[outside] >> shift, values[outside] & mask
        for low, high in round_keys.T:
            left, right = right, left ^ (_mix(right ^ low ^ (high << np.uint64(32))) & mask)
        values[outside] = (left << shift) | right
        outside = outside[values[outside] >= size]
    return values.reshape(shape).astype(np.int64)


@dataclass(frozen=True)
class EpochOrder:
    """The order in which an epoch reads `size` items, whole or in blocks.

    With `block_size` 0 every position is a jump to anywhere in the file. With a block size, whole blocks of so many
    neighbours are put in random order and `blocks_at_once` of them are mixed item by item: a reader then has at most
    so many places open, and reads each block from front to end of its file region. What remains behind the last whole
    block comes last, in an order of its own.
    """

    size: int
    key: tuple[object, ...]  # purpose and coordinates that all epochs share
    block_size: int = 0
    blocks_at_once: int = 64

    def items(self, epoch: int, positions: NDArray) -> NDArray[np.int64]:
        """The items at `positions` (int [n], in [0, size)) of an epoch: a permutation over the whole epoch."""
        positions = np.asarray(positions, dtype=np.int64)
        if not self.block_size or self.block_size >= self.size:
            return permute(positions, self.size, self._key(epoch, "all"))
        num_blocks = self.size // self.block_size
        whole = num_blocks * self.block_size
        items = np.empty_like(positions)
        tail = positions >= whole
        if tail.any():
            items[tail] = whole + permute(positions[tail] - whole, self.size - whole, self._key(epoch, "tail"))
        group_size = self.blocks_at_once * self.block_size
        for group in np.unique(positions[~tail] // group_size).tolist():
            inside = ~tail & (positions // group_size == group)
            first_block = group * self.blocks_at_once
            count = min(self.blocks_at_once, num_blocks - first_block)
            mixed = permute(
                positions[inside] - group * group_size, count * self.block_size, self._key(epoch, "mix", group)
            )
            blocks = permute(first_block + mixed // self.block_size, num_blocks, self._key(epoch, "blocks"))
            items[inside] = blocks * self.block_size + mixed % self.block_size
        return items

    def _key(self, epoch: int, *more: object) -> int:
        return derive_key(*self.key, epoch, *more)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of MurmurHash3 (64 bits): every input bit reaches every output bit."""
    words = (words ^ (words >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    words = (words ^ (words >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return words ^ (words >> np.uint64(33))
