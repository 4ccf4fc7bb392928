"""Masked-language-model corruption, keyed by protein and position, never by row or rank.

BERT's 80/10/10 rule (Devlin et al. 2019, section 3.1) with an exact count per protein: of the maskable tokens of a
segment a rounded share is chosen; of those 80 % become <mask>, 10 % a random amino acid, 10 % stay.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_plm.data.packing import num_labels
from megatron_plm.philox import philox4x32
from megatron_plm.tokenizers import Tokenizer

_MASK_BELOW = int(0.8 * 2**32)
_RANDOM_BELOW = int(0.9 * 2**32)


def choose_and_corrupt(
    tokens: NDArray[np.uint8],
    sequences: NDArray[np.int64],
    positions: NDArray[np.int64],
    *,
    tokenizer: Tokenizer,
    mask_prob: float,
    key: int,
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Choose the tokens to predict and corrupt them.

    All arrays have shape [T]: T tokens of several segments, the tokens of one segment side by side; `sequences` is
    the index of each token's protein and `positions` its place in `<cls> residues <eos>` of the whole protein.
    Returns the sorted indices of the chosen tokens and a corrupted copy of `tokens`.
    """
    maskable = np.zeros(256, dtype=bool)
    maskable[tokenizer.residue_ids] = True
    candidates = np.flatnonzero(maskable[tokens])
    words = sequences[candidates].astype(np.uint64)
    draws = philox4x32(key, (positions[candidates], 0, words, words >> np.uint64(32)))  # [4, candidates]

    # Rank the candidates of each segment by their first draw, ties by position; the lowest ranks are chosen.
    first = np.flatnonzero(np.r_[True, np.diff(sequences[candidates]) != 0]) if candidates.size else candidates
    counts = np.diff(np.r_[first, candidates.size])
    segment = np.repeat(np.arange(first.size), counts)
    by_draw = np.lexsort((draws[0], segment))
    rank = np.arange(candidates.size) - np.repeat(first, counts)
    chosen = np.sort(by_draw[rank < np.repeat(num_labels(counts, mask_prob), counts)])

    corrupted = tokens.copy()
    action, pick = draws[1, chosen], draws[2, chosen].astype(np.uint64)
    replacements = tokenizer.standard_ids[(pick * np.uint64(len(tokenizer.standard_ids))) >> np.uint64(32)]
    index = candidates[chosen]
    corrupted[index] = np.where(
        action < _MASK_BELOW, tokenizer.mask_id, np.where(action < _RANDOM_BELOW, replacements, tokens[index])
    )
    return index, corrupted
