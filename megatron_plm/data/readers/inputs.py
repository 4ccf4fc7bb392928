"""The inputs that a user names: files, patterns of files and standard input, each with its format."""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_plm.data.formats import STANDARD_INPUT, BlockReader
from megatron_plm.data.readers.sniff import FORMATS, has_first_line, told_format
from megatron_plm.errors import UserError, suggestion

_HEAD_SIZE = 1 << 16
_LMDB_FILE = "data.mdb"


@dataclass(frozen=True)
class Fields:
    """Where the sequence and the name of a record stand, for the formats that have such places."""

    json_key: str = "sequence"
    json_name_key: str = "id"
    column: str = "sequence"
    name_column: str = "id"
    skip_lines: int = 0  # of tables: above the row of column names


@dataclass
class Input:
    """One input. Read it once: what comes from a pipe is gone then.

    Attributes:
        path: as it was named or found, '-' for standard input.
        format: one of FORMATS.
        size: bytes on the disk, 0 where they cannot be known (a pipe).
        notes: sentences for the user where its name and its content disagree.
        fields: where the sequence stands in a record.
        compression: what it is compressed with, None: nothing.
        kind: whether it is a plain file, a compressed one, or a stream, which has no size and is read only once.
        position: bytes read so far, as they are on the disk.
    """

    path: str
    format: str
    size: int
    notes: list[str]
    fields: Fields
    kind: Literal["plain", "compressed", "stream"]
    compression: str | None = None
    position: int = 0
    _opened: BlockReader | None = field(default=None, repr=False)  # a pipe, which is not opened twice

    @property
    def label(self) -> str:
        """How messages name it."""
        return "standard input" if self.path == STANDARD_INPUT else f"input file '{self.path}'"

    @property
    def most_at_once(self) -> int:
        """How many like it may be read side by side: a table of Parquet, or the window of a decompressor, takes up to
        a hundred MB."""
        if self.format in ("parquet", "lmdb"):
            return 1
        return {"zstd": 2, "xz": 3}.get(self.compression or "", 8)

    @property
    def is_slow(self) -> bool:
        """Whether reading it takes a multiple of the time of scanning, so that reading it ahead is worth the disk."""
        return self.kind == "compressed" or self.format in ("parquet", "lmdb")

    def open(self) -> BlockReader:
        """Return a reader of its decompressed bytes; call it once."""
        reader, self._opened = self._opened or BlockReader(self.path), None
        return reader


def open_inputs(
    patterns: Sequence[str | os.PathLike[str]],
    *,
    format: str | None = None,
    json_key: str = "sequence",
    json_name_key: str = "id",
    column: str = "sequence",
    name_column: str = "id",
    skip_lines: int = 0,
) -> list[Input]:
    """Return the inputs that `patterns` name, in their order, the files of one pattern sorted by name.

    A pattern is a file, a pattern of files (`*`, `?`, `[...]`, `**`), an LMDB folder, or '-' for standard input. Each
    is looked into, to tell its format unless `format` gives it; files are closed again.

    Raises UserError where one is missing, empty, a folder that is no LMDB, given twice, or of a format that cannot be
    told.
    """
    if format is not None and format not in FORMATS:
        raise UserError(
            f"--format: unknown format {format!r}: expected one of {', '.join(FORMATS)}{suggestion(format, FORMATS)}"
        )
    fields = Fields(json_key, json_name_key, column, name_column, skip_lines)
    seen: dict[object, str] = {}
    inputs = []
    for path in (path for pattern in patterns for path in _expanded(os.fspath(pattern))):
        identity = _identity(path)
        if identity in seen:
            also = "" if seen[identity] == path else f", also as '{seen[identity]}'"
            label = "standard input ('-')" if path == STANDARD_INPUT else f"input file '{path}'"
            raise UserError(f"{label} is given twice{also}: name every input once")
        seen[identity] = path
        inputs.append(_looked_into(path, format, fields))
    return inputs


def _expanded(pattern: str) -> Iterator[str]:
    if pattern == STANDARD_INPUT or os.path.lexists(pattern) or not glob.has_magic(pattern):
        yield pattern
        return
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UserError(f"input pattern '{pattern}' matches no file")
    yield from found


def _identity(path: str) -> object:
    """What is equal for two names of one file; a missing one is its own."""
    if path == STANDARD_INPUT:
        return path
    try:
        status = os.stat(path)
    except OSError:
        return path
    return status.st_dev, status.st_ino


def _looked_into(path: str, format: str | None, fields: Fields) -> Input:
    if os.path.isdir(path) and path != STANDARD_INPUT:
        return _folder(path, format, fields)
    reader = BlockReader(path)
    try:
        if reader.size and not reader.compression:
            head = reader.peek(_HEAD_SIZE)
        else:
            head = reader.peek(_HEAD_SIZE, until=has_first_line)
    except UserError:
        reader.close()
        raise
    notes = [reader.note] if reader.note else []
    if format is None:
        try:
            format, note = told_format(head, path, reader.label)
        except UserError:
            reader.close()
            raise
        notes += [note] if note else []
    if fields.skip_lines and format not in ("csv", "tsv"):
        reader.close()
        raise UserError(
            f"{reader.label} is {format}: --skip-lines is for CSV and TSV; give --format if it is such a table"
        )
    # Standard input is read once, from front to end, also where it is a file.
    regular = bool(reader.size) and path != STANDARD_INPUT
    kind: Literal["plain", "compressed", "stream"]
    kind = "stream" if not regular else "compressed" if reader.compression else "plain"
    if format in ("parquet", "lmdb") and kind != "plain":
        reader.close()
        raise UserError(f"{reader.label}: {format} is read in any order: decompress it, or write it to a file, first")
    if regular:
        reader.close()
    return Input(
        path, format, reader.size, notes, fields, kind, reader.compression, _opened=None if regular else reader
    )


def _folder(path: str, format: str | None, fields: Fields) -> Input:
    data = os.path.join(path, _LMDB_FILE)
    if not os.path.isfile(data):
        raise UserError(f"input '{path}' is a folder: name the files in it (a pattern such as '{path}/*.fasta' does)")
    if format not in (None, "lmdb"):
        raise UserError(f"input '{path}' is an LMDB folder, not {format}: leave out --format")
    return Input(path, "lmdb", os.stat(data)[stat.ST_SIZE], [], fields, "plain")
