"""How each format is cut and scanned: an input becomes jobs, each one block of whole records for any thread."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from megatron_plm.data import _native
from megatron_plm.data.readers.blocks import FindEnd, blocks_of_records
from megatron_plm.data.readers.inputs import Input
from megatron_plm.data.readers.lmdb_records import lmdb_values
from megatron_plm.data.readers.parquet import parquet_values
from megatron_plm.data.readers.values import Values
from megatron_plm.errors import UserError, suggestion

# Of text that is one record. A line of a text format is no longer than any chromosome.
_LONGEST_FASTA = 2**31 - 1
_LONGEST_LINE = 2**28
_SEPARATORS = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True)
class Scanned:
    """What became of one block: its tokens and what the scan found."""

    tokens: npt.NDArray[np.uint8]
    block: _native.RecordBlock
    names: npt.NDArray[np.uint64] | None


@dataclass(frozen=True)
class Job:
    """One block of an input.

    Attributes:
        num_bytes: its text.
        position: bytes of the input read by then, as they are on the disk.
        first_line: lines (or rows) of the input before the block that its scan doesn't count.
        scan: scans it, without the GIL where the time goes.
    """

    num_bytes: int
    position: int
    first_line: int
    scan: Callable[[], Scanned]


def line_word(format: str) -> str:
    """What messages call the places of a format: a line, a row, a record."""
    return {"parquet": "row", "lmdb": "record"}.get(format, "line")


def jobs(source: Input, alphabet: _native.Alphabet, *, with_names: bool) -> Iterator[Job]:
    """Yield the jobs of an input, in its order. Raises UserError where it cannot be read."""
    if source.format == "parquet":
        return _value_jobs(source, parquet_values(source, with_names=with_names), alphabet)
    if source.format == "lmdb":
        return _value_jobs(source, lmdb_values(source, with_names=with_names), alphabet)
    if source.format in _SEPARATORS:
        return _table_jobs(source, alphabet, _SEPARATORS[source.format], with_names)
    if source.format == "fasta":
        scan = partial(_native.scan_fasta, with_names=with_names)
        reason = "split it, or see that every '>' begins a line"
        return _text_jobs(source, alphabet, scan, _native.last_record_start, _LONGEST_FASTA, reason, with_names)
    reason = "a line break is missing"
    if source.format == "jsonl":
        name_key = source.fields.json_name_key if with_names else None
        scan = partial(_native.scan_json_lines, key=source.fields.json_key, name_key=name_key)
        return _text_jobs(source, alphabet, scan, _native.last_line_end, _LONGEST_LINE, reason, with_names)
    if with_names:
        raise UserError(f"{source.label}: text with one sequence a line has no names of records: use FASTA or a table")
    return _text_jobs(source, alphabet, _native.scan_text, _native.last_line_end, _LONGEST_LINE, reason, with_names)


Scan = Callable[..., _native.RecordBlock]


def _text_jobs(
    source: Input,
    alphabet: _native.Alphabet,
    scan: Scan,
    find_end: FindEnd,
    longest: int,
    reason: str,
    with_names: bool,
) -> Iterator[Job]:
    reader = source.open()
    try:
        for text in blocks_of_records(reader, find_end, longest, reason):
            yield Job(len(text), reader.position, 0, partial(_scan_text, scan, alphabet, text, with_names))
    finally:
        reader.close()


def _scan_text(scan: Scan, alphabet: _native.Alphabet, text: memoryview, with_names: bool) -> Scanned:
    tokens = np.empty(len(text), dtype=np.uint8)
    block = scan(alphabet, text, out=tokens)
    return Scanned(tokens[: block.num_tokens], block, block.names if with_names else None)


def _table_jobs(source: Input, alphabet: _native.Alphabet, separator: str, with_names: bool) -> Iterator[Job]:
    def find_end(text: memoryview, start: int) -> int:  # noqa: ARG001 (quotes are told from a row's begin only)
        return _native.last_row_end(text, separator)

    reader = source.open()
    scan: Scan | None = None
    reason = "a quote in it is never closed, or a line break is missing"
    try:
        for text in blocks_of_records(reader, find_end, _LONGEST_LINE, reason):
            num_bytes, lines_before = len(text), 0
            if scan is None:
                fields, size, lines_before, fault = _native.read_table_header(text, separator)
                if fault:
                    raise UserError(f"{source.label}, line {lines_before + 1}: {fault}")
                if not fields:
                    continue
                header = [field.decode("utf-8", "backslashreplace").strip() for field in fields]
                name_column = _column(source, header, source.fields.name_column) if with_names else None
                scan = partial(
                    _native.scan_table,
                    separator=separator,
                    num_columns=len(header),
                    column=_column(source, header, source.fields.column),
                    name_column=name_column,
                )
                text = text[size:]
            yield Job(num_bytes, reader.position, lines_before, partial(_scan_text, scan, alphabet, text, with_names))
    finally:
        reader.close()


def _column(source: Input, header: list[str], name: str) -> int:
    if header.count(name) != 1:
        found = f"{header.count(name)} columns" if name in header else "no column"
        shown = ", ".join(header[:20]) + (", ..." if len(header) > 20 else "")
        raise UserError(
            f"{source.label} has {found} '{name}': its first line names {shown}{suggestion(name, header)}; "
            "name the column of the sequences with --column"
        )
    return header.index(name)


def _value_jobs(source: Input, batches: Iterator[Values], alphabet: _native.Alphabet) -> Iterator[Job]:
    for values in batches:
        yield Job(values.num_bytes, source.size, 0, partial(_scan_values, alphabet, values))


def _scan_values(alphabet: _native.Alphabet, values: Values) -> Scanned:
    tokens = np.empty(len(values.data), dtype=np.uint8)
    block = _native.scan_values(alphabet, values.data, values.offsets, tokens)
    names = values.names
    hashes = None if names is None else _native.hash_names(names.data, names.offsets)
    return Scanned(tokens[: block.num_tokens], block, hashes)
