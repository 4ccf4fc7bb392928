"""Variants of a protein: tables of them, as ProteinGym has them, and their scores.

`A42G` puts G in place of A at position 42 (from 1); `A42G:L50P` does two such things, and `WT` or `_wt` none.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_plm.errors import UserError
from megatron_plm.tokenizers import Tokenizer

_SEPARATORS = re.compile("[:,]")
_UNCHANGED = ("wt", "_wt")  # in capitals or not
_MUTATION = re.compile(r"([A-Za-z])([0-9]{1,9})([A-Za-z])")
_STOP = re.compile(r"[A-Za-z][0-9]+(\*|Ter)", re.IGNORECASE)
_INDEL = re.compile(r"[A-Za-z]?[0-9]+-|.*(del|ins|dup|fs).*", re.IGNORECASE)


class Change(NamedTuple):
    """One mutation as it is written: letters in capitals, the number as it stands there, and the text."""

    before: str
    number: int
    after: str
    text: str


class Mutation(NamedTuple):
    """Token `wild_type` at `position` (from 0) becomes `mutant`."""

    position: int
    wild_type: int
    mutant: int


def changes_of(text: str, place: str) -> list[Change]:
    """What a variant changes, none for the wild type itself; raises UserError, naming `place`, where it is none."""
    if text.strip().lower() in _UNCHANGED:
        return []
    changes = [_change(part.strip(), place) for part in _SEPARATORS.split(text.strip())]
    numbers = [change.number for change in changes]
    for number in numbers:
        if numbers.count(number) > 1:
            raise UserError(f"{place}: {text!r} changes position {number} twice; give one letter for it")
    return changes


def _change(text: str, place: str) -> Change:
    match = _MUTATION.fullmatch(text)
    if match:
        return Change(match[1].upper(), int(match[2]), match[3].upper(), text)
    if _STOP.fullmatch(text):
        raise UserError(f"{place}: {text!r} is a stop codon, of which the model knows nothing; leave the row out")
    if _INDEL.fullmatch(text):
        raise UserError(
            f"{place}: {text!r} is a deletion or an insertion, and only substitutions, such as A42G, have these "
            "scores; leave the row out, or compare whole proteins with `score perplexity`"
        )
    raise UserError(
        f"{place}: {text!r} is no mutation; expected the wild type's letter, the position and the new letter, "
        "as A42G, several of them with ':' between"
    )


@dataclass(frozen=True)
class WildType:
    """The protein that variants are of.

    Attributes:
        name: of the protein, for messages.
        letters: the text of each of its tokens: a letter, or the unknown token.
        first: the number of its first residue in the variants.
        tokenizer: of the model.
    """

    name: str
    letters: Sequence[str]
    first: int
    tokenizer: Tokenizer

    def parse(self, text: str, place: str) -> list[Mutation]:
        """The mutations of one variant; raises UserError, naming `place`, where it is none of this protein."""
        return [self._mutation(change, place) for change in changes_of(text, place)]

    def has_variant(self, sequence: str, mutations: Sequence[Mutation]) -> bool:
        """Whether these letters are the variant with these mutations; letters that the model lacks are all alike."""
        expected = list(self.letters)
        for mutation in mutations:
            expected[mutation.position] = self.tokenizer.tokens[mutation.mutant]
        return [self.tokenizer.tokens[i] for i in self.tokenizer.encode(sequence).tolist()] == expected

    def _mutation(self, change: Change, place: str) -> Mutation:
        before, number, after, text = change
        last = self.first + len(self.letters) - 1
        if not self.first <= number <= last:
            raise UserError(
                f"{place}: {text}: there is no position {number}; the wild type, {self.name}, has {self.first} to "
                f"{last}, and --first-position says where its numbers begin"
            )
        position = number - self.first
        found = self.letters[position]
        if found != before:
            raise UserError(
                f"{place}: {text}: the wild type, {self.name}, has {found} at position {number}, not {before}; give "
                "the protein that the list is of, or --first-position if its numbers begin elsewhere"
            )
        for letter in (before, after):
            if letter not in self._ids:
                raise UserError(f"{place}: {text}: the model's vocabulary has no letter {letter}")
        return Mutation(position, self._ids[before], self._ids[after])

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {self.tokenizer.tokens[i]: i for i in self.tokenizer.residue_ids.tolist()}


def undone(mutated: str, changes: Sequence[Change], first: int, place: str) -> str:
    """The wild type of a protein with these changes; raises UserError where it does not have them."""
    letters = list(mutated.upper())
    for before, number, after, text in changes:
        if not first <= number < first + len(letters):
            raise UserError(
                f"{place}: {text}: there is no position {number} in the mutated sequence, which has {first} to "
                f"{first + len(letters) - 1}; --first-position says where its numbers begin"
            )
        if letters[number - first] != after:
            raise UserError(
                f"{place}: {text}: the mutated sequence has {letters[number - first]} at position {number}, not "
                f"{after}; give --first-position if its numbers begin elsewhere, or the wild type with --wild-type"
            )
        letters[number - first] = before
    return "".join(letters)


def variant_scorer(
    positions: npt.NDArray[np.int64], log_probabilities_PV: npt.NDArray[np.float32]
) -> Callable[[Sequence[Mutation]], float]:
    """The score of a variant: the sum over its mutations of log p(mutant) − log p(wild type), in nats.

    With one residue hidden at a time these are masked marginals, with none wild-type marginals (Meier et al. 2021,
    doi:10.1101/2021.07.09.450648), as their code and ProteinGym's compute them: mutations of one variant add up.
    """
    row = {position: number for number, position in enumerate(positions.tolist())}

    def score(mutations: Sequence[Mutation]) -> float:
        rows = ((log_probabilities_PV[row[m.position]].astype(np.float64), m) for m in mutations)
        return float(sum(log_p_V[m.mutant] - log_p_V[m.wild_type] for log_p_V, m in rows))

    return score


def spearman(some: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> float:
    """Spearman's rank correlation, equal values sharing the mean of their ranks; NaN where one side is constant."""
    a, b = (_mean_ranks(values) for values in (some, others))
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / spread) if spread else float("nan")


def _mean_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]
