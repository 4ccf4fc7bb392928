"""Tables of variants, CSV or TSV, read as often as needed and never held."""

import csv
import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_plm.errors import UserError, suggestion
from megatron_plm.inference.variants import WildType, changes_of, undone

MUTATED_SEQUENCE = "mutated_sequence"  # ProteinGym's column


class VariantTable:
    """A file with column names and a column of variants."""

    def __init__(self, path: Path, column: str, measured: str | None = None) -> None:
        """`column` holds the variants, `measured`, if it is given, numbers to compare the scores with."""
        self.path = path
        self.column = column
        self.measured = measured

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield (place for messages, the row); raises UserError where the table lacks a column or is damaged."""
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
        wanted = [(self.column, "variants", "--mutant-column")]
        twice = next((name for name in names if list(names).count(name) > 1), None)
        if self.measured is not None:
            wanted.append((self.measured, "measured values", "--score-column"))
        for column, what, flag in wanted:
            if list(names).count(column) != 1:
                raise UserError(
                    f"{self.path} has no column {column!r}, or several: its columns are {', '.join(names)}"
                    f"{suggestion(column, names)}; name the column of the {what} with {flag}"
                )
        if twice is not None:
            raise UserError(f"{self.path} has several columns {twice!r}, and all are written again; rename them there")

    def wild_type(self, first: int) -> str:
        """The letters of the protein that the first row has a variant of, from its mutated sequence.

        `first` is the number of the protein's first residue. Raises UserError where the table has no such column.
        """
        place, row = next(self.rows())
        if MUTATED_SEQUENCE not in row:
            raise UserError(
                f"{self.path} has no column {MUTATED_SEQUENCE!r} to tell the wild type; give it with --wild-type or "
                "--sequence"
            )
        return undone(row[MUTATED_SEQUENCE].strip(), changes_of(row[self.column], place), first, place)


class Survey(NamedTuple):
    """What the rows of a table say.

    Attributes:
        positions: from 0, that the variants change, in order; int64 [P].
        measured: the column of that name, NaN where it is empty; float64, a value a row, or none without one.
    """

    positions: npt.NDArray[np.int64]
    measured: npt.NDArray[np.float64]


def survey(wild_type: WildType, table: VariantTable, score: str, *, derived: bool) -> Survey:
    """Read and check every row, before any work.

    A wild type that was `derived` from a row must give the mutated sequences of all. Raises UserError also where the
    table has a column `score`, which is to be written.
    """
    found: set[int] = set()
    measured = array("d")
    for place, row in table.rows():
        if score in row:
            raise UserError(f"{table.path} has a column {score!r} already, the name of the scores; rename it there")
        mutations = wild_type.parse(row[table.column], place)
        if derived and not wild_type.has_variant(row[MUTATED_SEQUENCE].strip(), mutations):
            raise UserError(
                f"{place}: {row[table.column]}: the {MUTATED_SEQUENCE} is not that of this variant of the protein of "
                "the first row; mend the row, or give the wild type with --wild-type"
            )
        found.update(mutation.position for mutation in mutations)
        if table.measured is not None:
            measured.append(_number(row[table.measured], table.measured, place))
    return Survey(np.array(sorted(found), dtype=np.int64), np.array(measured))


def _number(text: str, column: str, place: str) -> float:
    try:
        value = float(text) if text.strip() else math.nan
    except ValueError:
        raise UserError(
            f"{place}: {column}: {text!r} is no number; leave the field empty where there is none"
        ) from None
    if math.isinf(value):
        raise UserError(f"{place}: {column}: {text!r} has no place among numbers; leave the field empty")
    return value
