"""Labelled proteins from JSON lines and CSV tables, every record checked; and the files of TAPE's splits.

TAPE's records as JSON lines, one object a line: `primary` (the sequence), `id`, `protein_length` and the task's label
fields, in DATA_DIR/TASK/TASK_SPLIT.jsonl(.gz) or DATA_DIR/TASK_SPLIT.jsonl(.gz).
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_plm.errors import JSON_ERRORS, UserError, json_fault, suggestion

DEFAULT_DATA_DIR = Path("data")  # TAPE's
_SUFFIXES = (".jsonl", ".jsonl.gz")
# Letters of any vocabulary; '*' ends a translation, '.' and '-' are gaps.
_SEQUENCE = re.compile(r"[A-Za-z*.-]+")


@dataclass(frozen=True)
class Example:
    """One protein with its label; `record` names its file and place for messages."""

    record: str
    sequence: str
    label: NDArray[Any]  # no dims for a protein's label; per residue [L], or [L, …]
    cropped: bool = False

    def crop(self, max_length: int | None) -> "Example":
        """The first `max_length` residues with their labels; itself if it is not longer."""
        if max_length is None or len(self.sequence) <= max_length:
            return self
        label = self.label[:max_length] if self.label.ndim else self.label
        return replace(self, sequence=self.sequence[:max_length], label=label, cropped=True)


@dataclass(frozen=True)
class Split:
    """The examples of one file; `sha256` is that of the file as it lies on disk.

    `num_undefined` examples have no label: they add nothing to a loss, and scores of single proteins leave them out.
    """

    name: str
    path: Path
    sha256: str
    examples: tuple[Example, ...]
    num_undefined: int

    @property
    def num_cropped(self) -> int:
        return sum(example.cropped for example in self.examples)


def tape_files(data_dir: Path | None, folder: str) -> dict[str, Path]:
    """The files of a TAPE task by split; `folder` is TAPE's name for its data. Raises UserError if there are none."""
    data_dir = data_dir or DEFAULT_DATA_DIR
    if not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir}: no such folder; it should hold {folder}/{folder}_SPLIT.jsonl.gz")
    files: dict[str, Path] = {}
    for place in (data_dir / folder, data_dir):
        for path in sorted(place.glob(f"{folder}_*.jsonl*")):
            suffix = next((s for s in _SUFFIXES if path.name.endswith(s)), None)
            if suffix is None:
                continue
            split = path.name.removeprefix(f"{folder}_").removesuffix(suffix)
            if split in files:
                raise UserError(f"{path} and {files[split]} are both the split {split!r}; remove one of them")
            files[split] = path
    if not files:
        raise UserError(f"--data_dir {data_dir}: holds no file named {folder}/{folder}_SPLIT.jsonl or .jsonl.gz")
    return files


def choose_file(files: dict[str, Path], split: str, place: str) -> Path:
    """The file of a split; `files` has at least one. Raises UserError listing the splits that exist, and where."""
    if split not in files:
        known, folder = ", ".join(files), next(iter(files.values())).parent
        raise UserError(
            f"{place}: {folder} holds no split {split!r}; those that exist: {known}{suggestion(split, files)}"
        )
    return files[split]


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place for messages, object) for each line that is not blank."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except JSON_ERRORS as error:
            raise UserError(
                f"{path}, line {number}: not valid JSON ({json_fault(error)}); expected one object a line"
            ) from None
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {type(value).__name__}")
        name = f" (id {value['id']})" if "id" in value else ""
        yield f"{path}, line {number}{name}", value


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (place for messages, values of `columns`) for each row; the first row names the columns."""
    # Proteins can be longer than the module's default limit of a field.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_lines(path), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise UserError(f"{path}: empty; expected a header row with the columns {', '.join(columns)}")
        for column in columns:
            if header.count(column) != 1:
                problem = f"no column {column!r}" if column not in header else f"two columns {column!r}"
                raise UserError(f"{path}: {problem}; it has {', '.join(header)}{suggestion(column, header)}")
        places = [header.index(column) for column in columns]
        for row in reader:
            if not row:
                continue
            record = f"{path}, line {reader.line_num}"
            if len(row) != len(header):
                raise UserError(
                    f"{record}: {len(row)} fields, but the header has {len(header)}; quote commas in fields"
                )
            yield record, [row[place].strip() for place in places]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None


def check_sequence(record: str, sequence: object) -> str:
    """A sequence without surrounding space; UserError if it is missing or holds what no protein sequence does."""
    text = sequence.strip() if isinstance(sequence, str) else None
    if not text:
        raise UserError(f"{record}: the sequence is missing; give the amino acids as letters")
    if not _SEQUENCE.fullmatch(text):
        strange = next(letter for letter in text if not _SEQUENCE.fullmatch(letter))
        raise UserError(f"{record}: the sequence holds {strange!r}; expected amino acids as letters")
    return text


def field(record: str, value: dict[str, Any], name: str) -> Any:
    """The field `name` of a record; UserError if it is missing or null."""
    if value.get(name) is None:
        raise UserError(f"{record}: the field {name!r} is missing; it has {', '.join(value) or 'none'}")
    return value[name]


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, plain or .gz; UserError where it cannot be read to its end."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a file with labelled proteins") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip data is damaged or cut off ({error}); fetch the file again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start} of a block); give a text file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
