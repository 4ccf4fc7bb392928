"""The order of an epoch: a keyed pseudo-random permutation of sequence indices, in constant memory.

A balanced Feistel network over the smallest even number of bits that holds the size, walked along its cycle until the
value is inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). Any position of any epoch is found
without the others, so a resumed run needs no shuffled array.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_plm.philox import philox4x32

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


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of MurmurHash3 (64 bits): every input bit reaches every output bit."""
    words = (words ^ (words >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    words = (words ^ (words >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return words ^ (words >> np.uint64(33))
