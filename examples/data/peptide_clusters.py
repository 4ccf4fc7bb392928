"""Clusters of short peptides, for which k-mer methods made for proteins find too little."""

import numpy as np
from numpy.typing import NDArray

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
JOINING_IDENTITY = 0.65
_PAIRS_AT_A_TIME = 20_000
_WORD = 64


def clusters_of(peptides: list[str]) -> list[list[str]]:
    """Single-linkage clusters: members of different clusters are less than JOINING_IDENTITY identical.

    Peptides are distinct. Each cluster is sorted; clusters are sorted by size, the largest first, then by the first
    member.
    """
    peptides = sorted(peptides, key=lambda peptide: (len(peptide), peptide))
    group = np.arange(len(peptides))
    for first, second in joined_pairs(peptides):
        if group[first] != group[second]:
            group[group == group[second]] = group[first]
    clusters = [sorted(peptides[i] for i in np.flatnonzero(group == g)) for g in np.unique(group)]
    return sorted(clusters, key=lambda cluster: (-len(cluster), cluster))


def joined_pairs(peptides: list[str]) -> list[tuple[int, int]]:
    """Index pairs at JOINING_IDENTITY or above, `peptides` sorted by length; all pairs are looked at."""
    codes, lengths = encode(peptides)
    joined = []
    candidates = []
    for index in range(len(peptides)):
        bound = common_subsequence(codes, lengths, index)
        others = index + 1 + np.flatnonzero(bound >= JOINING_IDENTITY * lengths[index])
        candidates.append(np.stack([np.full(len(others), index), others], axis=1))
    pairs = np.concatenate(candidates)
    pairs = pairs[np.argsort(lengths[pairs[:, 1]], kind="stable")]
    for start in range(0, len(pairs), _PAIRS_AT_A_TIME):
        part = pairs[start : start + _PAIRS_AT_A_TIME]
        matches = aligned_matches(codes, lengths, part)
        joined += part[matches >= JOINING_IDENTITY * lengths[part[:, 0]]].tolist()
    return [(first, second) for first, second in joined]


def encode(peptides: list[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return ([N, longest] uint8 letter codes, padded with len(LETTERS), and [N] lengths)."""
    lengths = np.array([len(peptide) for peptide in peptides], dtype=np.int64)
    codes = np.full((len(peptides), int(lengths.max())), len(LETTERS), dtype=np.uint8)
    for row, peptide in enumerate(peptides):
        codes[row, : len(peptide)] = [LETTERS.index(letter) for letter in peptide]
    return codes, lengths


def common_subsequence(codes: NDArray[np.uint8], lengths: NDArray[np.int64], index: int) -> NDArray[np.int64]:
    """Length of the longest common subsequence of peptide `index` with each later one: no alignment has more matches.

    Bit-parallel over the letters of the peptide: H. Hyyrö, "Bit-parallel LCS-length computation revisited", AWOCA
    2004. A peptide of more than 64 letters gets its own length, a bound that holds always.
    """
    later, own_length = lengths[index + 1 :], int(lengths[index])
    if own_length > _WORD:
        return np.full(len(later), own_length)
    places = np.zeros(len(LETTERS) + 1, dtype=np.uint64)
    for place, letter in enumerate(codes[index, :own_length].tolist()):
        places[letter] |= np.uint64(1 << place)
    zeros = np.full(len(later), np.uint64(2**64 - 1))
    for column in range(codes.shape[1]):
        start = int(np.searchsorted(later, column + 1))  # the later ones are no shorter than this
        if start == len(later):
            break
        row = zeros[start:]
        matching = row & places[codes[index + 1 + start :, column]]
        zeros[start:] = (row + matching) | (row - matching)
    own_bits = np.uint64(2**own_length - 1)
    found = (~zeros & own_bits).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(found, axis=1).sum(axis=1, dtype=np.int64)


def aligned_matches(
    codes: NDArray[np.uint8], lengths: NDArray[np.int64], pairs: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Most identical letters of a local alignment of each pair, every inserted or deleted letter costing one.

    Smith and Waterman 1981 with match 1, mismatch 0, gap -1; one row of the table at a time for all pairs together.
    """
    first, second = pairs[:, 0], pairs[:, 1]
    width = int(lengths[second].max())
    target = codes[second, :width]
    steps = np.arange(width + 1, dtype=np.int16)
    score = np.zeros((len(pairs), width + 1), dtype=np.int16)
    best = np.zeros(len(pairs), dtype=np.int16)
    for row in range(int(lengths[first].max())):
        letter = codes[first, row, None]
        equal = (target == letter) & (letter < len(LETTERS))
        new = np.maximum(score - 1, 0)
        np.maximum(new[:, 1:], score[:, :-1] + equal, out=new[:, 1:])
        # A gap in the other direction: the best of all cells to the left, less the distance.
        score = np.maximum.accumulate(new + steps, axis=1) - steps
        np.maximum(best, score.max(axis=1), out=best)
    return best.astype(np.int64)
