"""Variants of a protein: tables of them, as ProteinGym has them, and their scores.

`A42G` puts G in place of A at position 42 (from 1); `A42G:L50P` does two such things, and `WT` or `_wt` none.
"""

import csv
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_plm.errors import UserError, suggestion
from megatron_plm.tokenizers import Tokenizer

SEPARATOR = ":"
_UNCHANGED = ("wt", "_wt")  # in capitals or not
_MUTATION = re.compile(r"([A-Za-z])([0-9]{1,9})([A-Za-z])")


class Mutation(NamedTuple):
    """Token `wild_type` at `position` (from 0) becomes `mutant`."""

    position: int
    wild_type: int
    mutant: int


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
        """The mutations of one variant; raises UserError, naming `place`, where it is none of this protein.

        The wild type itself has no mutations.
        """
        if text.strip().lower() in _UNCHANGED:
            return []
        mutations = [self._parse_one(part.strip(), place) for part in text.strip().split(SEPARATOR)]
        positions = [mutation.position for mutation in mutations]
        for mutation in mutations:
            if positions.count(mutation.position) > 1:
                number = mutation.position + self.first
                raise UserError(f"{place}: {text!r} changes position {number} twice; give one letter for it")
        return mutations

    def _parse_one(self, text: str, place: str) -> Mutation:
        match = _MUTATION.fullmatch(text)
        if not match:
            raise UserError(
                f"{place}: {text!r} is no mutation; expected the wild type's letter, the position and the new letter, "
                f"as A42G, several of them with {SEPARATOR!r} between"
            )
        before, number, after = match[1].upper(), int(match[2]), match[3].upper()
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


class VariantTable:
    """A CSV or TSV file with column names and a column of variants, read as often as needed."""

    def __init__(self, path: Path, column: str) -> None:
        self.path = path
        self.column = column

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield (place for messages, the row); raises UserError where the table lacks the column or is damaged."""
        separator = "\t" if self.path.suffix.lower() in (".tsv", ".tab") else ","
        csv.field_size_limit(2**31 - 1)
        num_rows = 0
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{self.path}: is no file; give the list of variants as one, since it is read twice")
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, delimiter=separator, strict=True)
                self._check_header(reader.fieldnames)
                for row in reader:
                    place = f"{self.path}, line {reader.line_num}"
                    if None in row or None in row.values():
                        raise UserError(f"{place}: the row has not as many fields as there are column names")
                    num_rows += 1
                    yield place, row
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read: {error.strerror or error}; give the list of variants"
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: not UTF-8 text; expected a CSV file of variants") from None
        except csv.Error as error:
            raise UserError(
                f"{self.path}, line {reader.reader.line_num}: {error}; expected a CSV file of variants"
            ) from None
        if not num_rows:
            raise UserError(f"{self.path}: holds no variant; expected a row for each below the column names")

    def _check_header(self, names: Sequence[str] | None) -> None:
        if not names:
            raise UserError(f"{self.path}: empty; expected a CSV file with a column {self.column!r}")
        if list(names).count(self.column) != 1:
            raise UserError(
                f"{self.path} has no column {self.column!r}, or several: its columns are {', '.join(names)}"
                f"{suggestion(self.column, names)}; name the column of the variants with --mutant-column"
            )


def needed_positions(wild_type: WildType, table: VariantTable, score: str) -> npt.NDArray[np.int64]:
    """The positions, from 0, that the variants of a table change, in order; reads and checks all of them.

    Raises UserError also where the table has a column `score`, which is to be written.
    """
    found: set[int] = set()
    for place, row in table.rows():
        if score in row:
            raise UserError(f"{table.path} has a column {score!r} already, the name of the scores; rename it there")
        found.update(mutation.position for mutation in wild_type.parse(row[table.column], place))
    return np.array(sorted(found), dtype=np.int64)


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
