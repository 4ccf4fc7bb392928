"""Counter-based random numbers: the same value for the same (key, counter) on every machine and at every layout.

Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (doi:10.1145/2063384.2063405):
a keyed bijection of 128-bit counters. Only integer arithmetic and table look-ups follow, so no CPU's vector unit or
mathematical library changes a value.
"""

import hashlib
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10
_QUANTILE_BITS = 16
_VALUES_PER_BLOCK = 8  # a block is 128 bits, a normal value takes 16 of them


def derive_key(*parts: object) -> int:
    """A 64-bit key from a purpose and its coordinates, such as `derive_key("mask", seed, epoch)`."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def philox4x32(key: int, counters: tuple[NDArray | int, NDArray | int, NDArray | int, NDArray | int]) -> NDArray:
    """The Philox4x32-10 blocks of `counters` (four broadcastable arrays of 32-bit words) under a 64-bit `key`.

    Returns uint32 of shape [4, *broadcast shape].
    """
    words = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) & _LOW for word in counters))
    c0, c1, c2, c3 = (word.copy() for word in words)
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0)
        c2 = (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def normal(key: int, start: int, count: int) -> NDArray[np.float32]:
    """Values `start … start + count` of the standard normal stream of `key`: float32, shape [count].

    Each value is one of 2^16 equally likely quantiles, so the tails end at 4.3 standard deviations, and any slice of
    the stream can be made without the rest.
    """
    first, last = start // _VALUES_PER_BLOCK, -(-(start + count) // _VALUES_PER_BLOCK)
    values = _normal_blocks(key, np.arange(first, last, dtype=np.int64))
    offset = start - first * _VALUES_PER_BLOCK
    return values[offset : offset + count]


def normal_box(key: int, width: int, rows: tuple[int, int], columns: tuple[int, int]) -> NDArray[np.float32]:
    """A box, from first to behind last, of the matrix whose rows of `width` are the stream `normal` of `key`."""
    (top, bottom), (left, right) = rows, columns
    if (left, right) == (0, width):
        return normal(key, top * width, (bottom - top) * width).reshape(bottom - top, width)
    # Each row's piece is made in whole blocks of the stream, as many for every row, and cut out of them.
    begins = np.arange(top, bottom, dtype=np.int64) * width + left
    count = right - left
    num_blocks = -(-count // _VALUES_PER_BLOCK) + 1
    blocks = (begins // _VALUES_PER_BLOCK)[:, None] + np.arange(num_blocks)
    values = _normal_blocks(key, blocks.reshape(-1)).reshape(len(begins), num_blocks * _VALUES_PER_BLOCK)
    return np.take_along_axis(values, (begins % _VALUES_PER_BLOCK)[:, None] + np.arange(count), axis=1)


def _normal_blocks(key: int, blocks: NDArray) -> NDArray[np.float32]:
    """The values of blocks of the stream of `key`, one after the other, float32 [8 · len(blocks)]."""
    words = philox4x32(key, (blocks, blocks >> 32, 0, 0))  # [4, blocks]
    halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)  # [4, blocks, 2]
    return _normal_quantiles()[halves.transpose(1, 0, 2).reshape(-1)]


@cache
def _normal_quantiles() -> NDArray[np.float32]:
    size = 1 << _QUANTILE_BITS
    upper = [NormalDist().inv_cdf((i + 0.5) / size) for i in range(size // 2, size)]
    half = np.asarray(upper, dtype=np.float64).astype(np.float32)
    return np.concatenate([-half[::-1], half])
