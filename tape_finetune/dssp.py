"""Secondary structure from backbone coordinates: the algorithm of Kabsch and Sander.

W. Kabsch and C. Sander, "Dictionary of protein secondary structure: pattern recognition of hydrogen-bonded
and geometrical features", Biopolymers 22 (1983) 2577-2637. Two habits of the `mkdssp` program that the paper
leaves open are followed, because published labels come from it: an N-H keeps only its two strongest bonds,
and a pi-helix (I) wins over an alpha-helix (H). mkdssp 4's poly-proline helix (P) is not assigned: TAPE's
eight classes have no place for it.

Index legend: N residues; a hydrogen bond (i, j) goes from the C=O of residue i to the N-H of residue j, as in
the paper.
"""

import numpy as np
from numpy.typing import NDArray

# TAPE's numbering (NetSurfP-2.0): the index of a letter is its class. C is everything without a pattern.
SS8_LETTERS = "GHIBESTC"
_G, _H, _I, _B, _E, _S, _T, _C = range(8)
# ss8 class -> ss3 class, 0 = helix, 1 = strand, 2 = coil.
SS3_OF_SS8: NDArray[np.uint8] = np.array([0, 0, 0, 1, 1, 2, 2, 2], dtype=np.uint8)

_COUPLING = 0.42 * 0.20 * 332.0  # partial charges times the conversion to kcal/mol, in kcal·Å/mol
_BOND_ENERGY = -0.5  # kcal/mol: a hydrogen bond is anything below
_LOWEST_ENERGY = -9.9  # kcal/mol: for clashing atoms
_SHORTEST_DISTANCE = 0.5  # Å
_PAIR_CUTOFF = 9.0  # Å between C-alphas; no hydrogen bond is possible beyond it
_PEPTIDE_BOND_CUTOFF = 2.5  # Å between C and the next N; longer is a chain break
_BEND_ANGLE = 70.0  # degrees
_ROWS_AT_A_TIME = 512  # residues whose distances to all others are held in memory

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


def secondary_structure(backbone: Floats, chain: Ints, is_proline: Bools) -> NDArray[np.uint8]:
    """Return the ss8 class of every residue.

    backbone: [N, 4, 3] float64, Å: the atoms N, CA, C, O, in sequence order. Residues without all four are
        left out by the caller; the missing peptide bond then shows as a chain break.
    chain: [N] integers, another value for another chain; hydrogen bonds between chains count, as in mkdssp.
    is_proline: [N] bool; a proline has no N-H.
    Returns [N] uint8, classes as in SS8_LETTERS.
    """
    num_residues = len(backbone)
    if num_residues == 0:
        return np.zeros(0, dtype=np.uint8)
    segment: Ints = np.cumsum(~_linked(backbone, chain), dtype=np.int64)
    acceptor, donor = _hydrogen_bonds(backbone, segment, is_proline)
    bonds = _BondTable(acceptor, donor, num_residues)

    classes = np.full(num_residues, _C, dtype=np.uint8)
    for first, last, letter in _strand_ranges(_bridges(acceptor, donor, bonds, segment), segment):
        part = classes[first : last + 1]
        part[part != _E] = letter
    turn_start = {n: _turn_starts(n, bonds, segment) for n in (3, 4, 5)}
    # The order and what may be overwritten are the paper's priorities, with I before H as in mkdssp.
    for n, letter, replaceable in ((4, _H, None), (3, _G, (_C, _G)), (5, _I, (_C, _I, _H))):
        starts = turn_start[n]
        for first in (np.flatnonzero(starts[1:] & starts[:-1]) + 1).tolist():
            part = classes[first : first + n]
            if replaceable is None or np.isin(part, replaceable).all():
                part[:] = letter
    in_turn = np.zeros(num_residues, dtype=bool)
    for n, starts in turn_start.items():
        for offset in range(1, n):
            in_turn[offset:] |= starts[:-offset] if offset < num_residues else False
    coil = classes == _C
    classes[coil & _bends(backbone, segment)] = _S
    classes[coil & in_turn] = _T
    return classes


def _linked(backbone: Floats, chain: Ints) -> Bools:
    """[N] bool: is residue i joined to residue i - 1 by a peptide bond?"""
    linked = np.zeros(len(backbone), dtype=bool)
    distance = np.linalg.norm(backbone[1:, 0] - backbone[:-1, 2], axis=-1)
    linked[1:] = (chain[1:] == chain[:-1]) & (distance <= _PEPTIDE_BOND_CUTOFF)
    return linked


def _hydrogen_bonds(backbone: Floats, segment: Ints, is_proline: Bools) -> tuple[Ints, Ints]:
    """Return the bonds as (acceptor, donor) index arrays: at most the two strongest of each donor."""
    n_atom, carbon, oxygen = backbone[:, 0], backbone[:, 2], backbone[:, 3]
    # The hydrogen lies 1 Å from N, opposite to the C=O of the residue before.
    carbonyl = carbon[:-1] - oxygen[:-1]
    hydrogen = n_atom.copy()
    hydrogen[1:] += carbonyl / np.linalg.norm(carbonyl, axis=-1, keepdims=True).clip(min=1e-6)
    has_hydrogen = ~is_proline
    has_hydrogen[0] = False
    has_hydrogen[1:] &= segment[1:] == segment[:-1]

    donor, acceptor = _near_pairs(backbone[:, 1])
    # C=O of i and N-H of i + 1 are one peptide group.
    keep = has_hydrogen[donor] & (acceptor != donor) & (acceptor != donor - 1)
    donor, acceptor = donor[keep], acceptor[keep]
    n_D, h_D, c_A, o_A = n_atom[donor], hydrogen[donor], carbon[acceptor], oxygen[acceptor]
    distances = np.stack([np.linalg.norm(a - b, axis=-1) for a, b in ((o_A, n_D), (c_A, h_D), (o_A, h_D), (c_A, n_D))])
    on, ch, oh, cn = distances.clip(min=1e-6)
    # Kept to 0.001 kcal/mol, the precision that DSSP files have.
    energy = np.round(_COUPLING * (1 / on + 1 / ch - 1 / oh - 1 / cn), 3)
    energy[(distances < _SHORTEST_DISTANCE).any(axis=0) | (energy < _LOWEST_ENERGY)] = _LOWEST_ENERGY

    keep = energy < _BOND_ENERGY
    donor, acceptor, energy = donor[keep], acceptor[keep], energy[keep]
    order = np.lexsort((acceptor, energy, donor))
    donor, acceptor = donor[order], acceptor[order]
    third_or_later = np.zeros(len(donor), dtype=bool)
    third_or_later[2:] = donor[2:] == donor[:-2]
    return acceptor[~third_or_later], donor[~third_or_later]


def _near_pairs(alpha: Floats) -> tuple[Ints, Ints]:
    """All ordered pairs (i, j) of residues with C-alphas nearer than the cutoff, self pairs included."""
    first, second = [], []
    for start in range(0, len(alpha), _ROWS_AT_A_TIME):
        squared = ((alpha[start : start + _ROWS_AT_A_TIME, None] - alpha[None]) ** 2).sum(axis=-1)
        i, j = np.nonzero(squared < _PAIR_CUTOFF**2)
        first.append(i + start)
        second.append(j)
    return np.concatenate(first), np.concatenate(second)


class _BondTable:
    """Answers, for arrays of pairs, whether the C=O of i is bonded to the N-H of j."""

    def __init__(self, acceptor: Ints, donor: Ints, num_residues: int) -> None:
        self._num_residues = num_residues
        self._codes = np.sort(acceptor * num_residues + donor)

    def __call__(self, i: Ints, j: Ints) -> Bools:
        inside = (i >= 0) & (j >= 0) & (i < self._num_residues) & (j < self._num_residues)
        return inside & np.isin(i * self._num_residues + j, self._codes)


def _turn_starts(n: int, bonds: _BondTable, segment: Ints) -> Bools:
    """[N] bool: does an n-turn start here: is the C=O of i bonded to the N-H of i + n of its segment?"""
    i = np.arange(len(segment))
    end = np.minimum(i + n, len(segment) - 1)
    return (segment == segment[end]) & (i + n == end) & bonds(i, i + n)


def _bends(backbone: Floats, segment: Ints) -> Bools:
    """[N] bool: does the chain change direction by more than 70° at this residue?"""
    bends = np.zeros(len(backbone), dtype=bool)
    if len(backbone) < 5:
        return bends
    alpha = backbone[:, 1]
    before, after = alpha[2:-2] - alpha[:-4], alpha[4:] - alpha[2:-2]
    lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    cosine = (before * after).sum(axis=-1) / lengths.clip(min=1e-6)
    bends[2:-2] = (cosine < np.cos(np.radians(_BEND_ANGLE))) & (segment[4:] == segment[:-4])
    return bends


def _bridges(acceptor: Ints, donor: Ints, bonds: _BondTable, segment: Ints) -> list[tuple[int, int, bool]]:
    """Return all bridges (i, j, is_parallel), i < j, sorted; the four patterns of the paper.

    Every pattern is a pair of bonds, so it's enough to start from each bond and look for its mate.
    """
    found: dict[tuple[int, int], bool] = {}
    patterns = (
        (False, acceptor, donor, bonds(donor, acceptor)),  # (i, j) and (j, i)
        (False, acceptor + 1, donor - 1, bonds(donor - 2, acceptor + 2)),  # (i-1, j+1) and (j-1, i+1)
        (True, acceptor + 1, donor, bonds(donor, acceptor + 2)),  # (i-1, j) and (j, i+1)
    )
    for parallel, i, j, has_mate in patterns:
        low, high = np.minimum(i, j), np.maximum(i, j)
        ok = has_mate & (high - low >= 3) & (low >= 1) & (high + 1 < len(segment))
        for a, b in zip(low[ok].tolist(), high[ok].tolist(), strict=True):
            if segment[a - 1] == segment[a + 1] and segment[b - 1] == segment[b + 1]:
                found[a, b] = parallel
    return sorted((a, b, parallel) for (a, b), parallel in found.items())


def _strand_ranges(bridges: list[tuple[int, int, bool]], segment: Ints) -> list[tuple[int, int, int]]:
    """Join bridges to ladders and ladders across bulges; return (first, last, class) of both strands of each.

    A bulge joins two ladders of one type with at most one extra residue on one strand and four on the other.
    """
    ladders: list[list[int]] = []  # parallel, first i, last i, first j, last j, bridges
    open_ladders: dict[tuple[int, int, bool], list[int]] = {}  # by the bridge that would extend it
    for i, j, parallel in bridges:
        ladder = open_ladders.pop((i, j, parallel), None)
        if ladder is None:
            ladder = [int(parallel), i, i, j, j, 1]
            ladders.append(ladder)
        else:
            ladder[2] = i
            ladder[4 if parallel else 3] = j
            ladder[5] += 1
        open_ladders[i + 1, j + 1 if parallel else j - 1, parallel] = ladder

    ladders.sort(key=lambda ladder: ladder[1])
    for position, ladder in enumerate(ladders):
        following = position + 1
        while following < len(ladders) and ladders[following][1] - ladder[2] < 6:
            if _bulge_joins(ladder, ladders[following], segment):
                other = ladders.pop(following)
                ladder[2] = other[2]
                ladder[3], ladder[4] = min(ladder[3], other[3]), max(ladder[4], other[4])
                ladder[5] += other[5]
            else:
                following += 1
    ranges = []
    for _, first_i, last_i, first_j, last_j, num_bridges in ladders:
        letter = _E if num_bridges > 1 else _B
        ranges += [(first_i, last_i, letter), (first_j, last_j, letter)]
    return ranges


def _bulge_joins(ladder: list[int], other: list[int], segment: Ints) -> bool:
    """Is `other`, which starts at a later i, the continuation of `ladder` behind a bulge?"""
    parallel, first_i, last_i, first_j, last_j, _ = ladder
    other_parallel, other_first_i, other_last_i, other_first_j, other_last_j, _ = other
    if parallel != other_parallel or other_first_i <= last_i:
        return False
    if segment[first_i] != segment[other_last_i]:
        return False
    if segment[min(first_j, other_first_j)] != segment[max(last_j, other_last_j)]:
        return False
    step_i = other_first_i - last_i
    step_j = other_first_j - last_j if parallel else first_j - other_last_j
    return step_j > 0 and ((step_j < 6 and step_i < 3) or (step_j < 3 and step_i < 6))
