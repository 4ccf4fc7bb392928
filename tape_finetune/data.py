"""Labelled proteins: the records of LMDB databases, JSON lines and CSV tables, and the files of splits.

`read_records` gives the records of any of them alike, as (place for messages, {field: value}). LMDB databases are
TAPE's: pickles, of which nothing but plain values and NumPy arrays is loaded and nothing is run.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_plm.data.readers.lmdb_records import lmdb_records
from megatron_plm.errors import JSON_ERRORS, UserError, json_fault, suggestion

DEFAULT_DATA_DIR = Path("data")  # TAPE's
SUFFIXES = (".lmdb", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz")
_LMDB_FILE = "data.mdb"  # of a database that is a folder
# Letters of any vocabulary; '*' ends a translation, '.' and '-' are gaps.
_SEQUENCE = re.compile(r"[A-Za-z*.-]+")


@dataclass(frozen=True)
class Example:
    """One protein with its label; `record` names its file and place for messages."""

    record: str
    sequence: str
    label: NDArray[Any]  # no dims for a protein's label; per residue [L], or [L, …]
    cropped: bool = False
    window: int | None = None  # residues that a model reads at a time, where it doesn't read all at once

    def crop(self, max_length: int | None) -> "Example":
        """The first `max_length` residues with their labels; itself if it is not longer."""
        if max_length is None or len(self.sequence) <= max_length:
            return self
        label = self.label[:max_length] if self.label.ndim else self.label
        return replace(self, sequence=self.sequence[:max_length], label=label, cropped=True)

    def fit(self, max_length: int | None, *, windows: bool) -> "Example":
        """Itself if it is not longer than `max_length`, else cropped, or whole and to be read in windows."""
        if not windows or max_length is None or len(self.sequence) <= max_length:
            return self.crop(max_length)
        return replace(self, window=max_length)


@dataclass(frozen=True)
class Split:
    """The examples of one file; `sha256` is that of the file as it lies on disk.

    `num_undefined` examples have no label: they add nothing to a loss, and scores of single proteins leave them out.
    `num_dropped` proteins of the file were left out, as only `--compat proteinlm` does.
    """

    name: str
    path: Path
    sha256: str
    examples: tuple[Example, ...]
    num_undefined: int
    num_dropped: int = 0

    @property
    def num_cropped(self) -> int:
        return sum(example.cropped for example in self.examples)

    @property
    def num_windowed(self) -> int:
        return sum(example.window is not None for example in self.examples)


def split_files(folders: Sequence[Path], prefix: str) -> dict[str, Path]:
    """The files PREFIXsplit.SUFFIX of the folders by split, those of the first folder first, each folder's by name.

    Raises UserError where two files are one split.
    """
    files: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob(f"{prefix}*")):
            suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
            split = path.name.removeprefix(prefix).removesuffix(suffix or "")
            if suffix is None or not split:
                continue
            if split in files:
                raise UserError(f"{path} and {files[split]} are both the split {split!r}; remove one of them")
            files[split] = path
    return files


def tape_files(data_dir: Path | None, folder: str) -> dict[str, Path]:
    """The files of a TAPE task by split; `folder` is TAPE's name for its data. Raises UserError if there are none."""
    data_dir = data_dir or DEFAULT_DATA_DIR
    if not data_dir.is_dir():
        raise UserError(
            f"--data_dir {data_dir}: no such folder; it should hold {folder}/{folder}_SPLIT.lmdb or .jsonl.gz"
        )
    files = split_files((data_dir / folder, data_dir), f"{folder}_")
    if not files:
        known = ", ".join(SUFFIXES)
        raise UserError(f"--data_dir {data_dir}: holds no file named {folder}/{folder}_SPLIT with one of {known}")
    return files


def choose_file(files: dict[str, Path], split: str, place: str) -> Path:
    """The file of a split; `files` has at least one. Raises UserError listing the splits that exist, and where."""
    if split not in files:
        known, folder = ", ".join(files), next(iter(files.values())).parent
        raise UserError(
            f"{place}: {folder} holds no split {split!r}; those that exist: {known}{suggestion(split, files)}"
        )
    return files[split]


def read_records(path: Path, needed: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place for messages, fields by name) for each record of an LMDB database, JSON lines or a CSV table.

    The name decides: .lmdb or a folder, .jsonl or .jsonl.gz, else CSV. Values are JSON's or pickled ones, of a table
    text. A table must have the columns `needed`; raises UserError where one lacks, or for a damaged file.
    """
    if path.suffix == ".lmdb" or path.is_dir():
        return read_lmdb(path)
    return read_jsonl(path) if path.name.endswith((".jsonl", ".jsonl.gz")) else read_csv(path, needed)


def read_lmdb(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place for messages, fields) for each record of a TAPE database, a file or a folder."""
    if not path.exists():
        raise UserError(f"{path}: no such file; give a file with labelled proteins")
    for number, record in enumerate(lmdb_records(str(path), str(path))):
        yield _named(f"{path}, record {number}", record), record


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
        yield _named(f"{path}, line {number}", value), value


def read_csv(path: Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place for messages, text by column) for each row; the first row names the columns, `needed` among them."""
    # Proteins can be longer than the module's default limit of a field.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_lines(path), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise UserError(f"{path}: empty; expected a header row with the columns {', '.join(needed)}")
        for column in needed:
            if header.count(column) != 1:
                problem = f"no column {column!r}" if column not in header else f"two columns {column!r}"
                raise UserError(f"{path}: {problem}; it has {', '.join(header)}{suggestion(column, header)}")
        for row in reader:
            if not row:
                continue
            record = f"{path}, line {reader.line_num}"
            if len(row) != len(header):
                raise UserError(
                    f"{record}: {len(row)} fields, but the header has {len(header)}; quote commas in fields"
                )
            yield record, {column: text.strip() for column, text in zip(header, row, strict=True)}
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None


def content_sha256(path: Path) -> str:
    """SHA-256 of a file as it lies on disk, or of the data file of a database that is a folder."""
    with (path / _LMDB_FILE if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """The field `name` of a record; UserError if it is missing, null or an empty text."""
    found = value.get(name)
    if found is None or (isinstance(found, str) and not found):
        raise UserError(f"{record}: the field {name!r} is missing; it has {', '.join(map(str, value)) or 'none'}")
    return found


def _named(place: str, value: dict[str, Any]) -> str:
    """The place of a record with its `id`, where it has one."""
    return f"{place} (id {value['id']})" if "id" in value else place


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
