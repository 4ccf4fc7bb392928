"""Splits of protein chains in which similar sequences stay together."""

import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_plm.errors import UserError

_WORD_LENGTH = 4
_SHARED_WORDS = 0.2


def parse_splits(text: str) -> dict[str, float]:
    """Return {name: share} from `train=0.8,valid=0.1,test=0.1`; the shares are positive and add up to 1."""
    splits: dict[str, float] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z0-9_-]+)\s*=\s*([0-9]*\.?[0-9]+)\s*", item)
        if match is None or float(match[2]) <= 0 or match[1] in splits:
            raise UserError(
                f"--splits {text}: expected different names with positive shares, "
                f"as in train=0.8,valid=0.1,test=0.1, but found {item!r}"
            )
        splits[match[1]] = float(match[2])
    if abs(sum(splits.values()) - 1.0) > 1e-6:
        raise UserError(f"--splits {text}: the shares add up to {sum(splits.values()):g}, not to 1")
    return splits


def similar_groups(sequences: Sequence[str]) -> NDArray[np.int64]:
    """Return [len(sequences)] group numbers, equal for sequences that a split must not part.

    Two sequences are joined when they share at least a fifth of the four-letter words of the one with fewer:
    at 70 % identity 0.7**4 = 24 % of the words survive on average, unrelated proteins share about 1 %.
    Joining is transitive. A fragment is joined to the protein that contains it.
    """
    words = [_words(sequence) for sequence in sequences]
    num_words = np.array([len(own) for own in words])
    owners: dict[str, list[int]] = {}
    for index, own in enumerate(words):
        for word in own:
            owners.setdefault(word, []).append(index)
    group = np.arange(len(sequences))
    for index, own in enumerate(words):
        hits = [np.array(owners[word], dtype=np.int64) for word in own]
        shared = np.bincount(np.concatenate(hits), minlength=index + 1)[:index] if hits else np.zeros(index)
        enough = _SHARED_WORDS * np.minimum(len(own), num_words[:index])
        for other in np.flatnonzero((shared > 0) & (shared >= enough)).tolist():
            if group[other] != group[index]:
                group[group == group[index]] = group[other]
    return group


def _words(sequence: str) -> set[str]:
    """The distinct four-letter words without X (unknown); a sequence shorter than that is one word."""
    if len(sequence) < _WORD_LENGTH:
        return {sequence}
    words = {sequence[i : i + _WORD_LENGTH] for i in range(len(sequence) - _WORD_LENGTH + 1)}
    return {word for word in words if "X" not in word}


def assign_splits(sequences: Sequence[str], splits: Mapping[str, float]) -> list[str]:
    """Return the split of each sequence: a function of the set of sequences alone, not of their order.

    Groups of similar sequences are ordered by a hash and cut where the shares say.
    Raises UserError where a split would stay empty.
    """
    groups: dict[int, list[int]] = {}
    for index, group in enumerate(similar_groups(sequences).tolist()):
        groups.setdefault(group, []).append(index)
    ordered = sorted(groups.values(), key=lambda group: _hash(min(sequences[index] for index in group)))
    upper_bounds = np.cumsum(list(splits.values())) * len(sequences)
    names = list(splits)
    result = [""] * len(sequences)
    placed = 0
    for members in ordered:
        middle = placed + len(members) / 2
        name = names[min(int(np.searchsorted(upper_bounds, middle)), len(names) - 1)]
        for index in members:
            result[index] = name
        placed += len(members)
    empty = [name for name in names if name not in result]
    if empty:
        raise UserError(
            f"--splits: nothing is left for {empty[0]!r}, because the {len(sequences)} chains form only "
            f"{len(ordered)} groups of similar sequences; give more structures or fewer splits, "
            "for instance --splits test=1"
        )
    return result


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
