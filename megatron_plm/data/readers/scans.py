"""How each format is cut and scanned: an input becomes jobs, each one block of whole records for any thread."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from megatron_plm.data import _native
from megatron_plm.data.readers.blocks import FindEnd, blocks_of_records
from megatron_plm.data.readers.inputs import Input
from megatron_plm.data.readers.lmdb_records import lmdb_values
from megatron_plm.data.readers.parquet import parquet_values
from megatron_plm.data.readers.ranges import RangeFile
from megatron_plm.data.readers.values import Values
from megatron_plm.errors import UserError, suggestion

# Of text that is one record. A line of a text format is no longer than any chromosome.
_LONGEST_FASTA = 2**31 - 1
_LONGEST_LINE = 2**28
_SEPARATORS = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True)
class Scanned:
    """What became of one block.

    Attributes:
        tokens: of its records, end to end, uint8 [n], or of the tokenizer's dtype (see segmenting.py).
        lengths: tokens of each record, int32 [k].
        byte_counts: how often each byte stood in a sequence, uint64 [256].
        names: a hash of each record's name, uint64 [k, 2]; None where not asked for.
        identifiers: those names, end to end, uint8 [m]; None where not asked for.
        identifier_offsets: where each of them begins, and the end, int64 [k + 1].
        num_lines: newlines (or values) in it.
        num_stops: records that ended in '*'.
        fault: the first fault, after which nothing was scanned: its line in the block, and what is wrong.
    """

    tokens: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int32]
    byte_counts: npt.NDArray[np.uint64]
    names: npt.NDArray[np.uint64] | None
    num_lines: int
    num_stops: int
    fault: tuple[int, str] | None
    identifiers: npt.NDArray[np.uint8] | None = None
    identifier_offsets: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Place:
    """Where a block of an input is.

    Attributes:
        num_bytes: its text.
        position: bytes of the input read by then, as they are on the disk.
        first_line: lines (or rows) of the input before the block that its scan doesn't count.
    """

    num_bytes: int
    position: int
    first_line: int = 0


@dataclass(frozen=True)
class Job:
    """One block of an input: `scan` holds its text, and scans it, without the GIL where the time goes; it raises
    UserError where it cannot be read."""

    place: Place
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
        texts = _texts(source, _native.last_record_start, b"\n>", _LONGEST_FASTA, reason)
        return _text_jobs(texts, alphabet, scan, with_names)
    texts = _texts(source, _native.last_line_end, b"\n", _LONGEST_LINE, "a line break is missing")
    if source.format == "jsonl":
        name_key = source.fields.json_name_key if with_names else None
        scan = partial(_native.scan_json_lines, key=source.fields.json_key, name_key=name_key)
        return _text_jobs(texts, alphabet, scan, with_names)
    if with_names:
        raise UserError(f"{source.label}: text with one sequence a line has no names of records: use FASTA or a table")
    return _text_jobs(texts, alphabet, _native.scan_text, with_names)


Scan = Callable[..., _native.RecordBlock]


@dataclass(frozen=True)
class _Text:
    """A block of whole records, which `load` gives."""

    place: Place
    load: Callable[[], memoryview]


def _texts(source: Input, find_end: FindEnd, mark: bytes, longest: int, reason: str) -> Iterator[_Text]:
    """Cut an input: a plain file by byte ranges (see RangeFile for `mark`), anything else as it comes."""
    if source.kind == "plain":
        file = RangeFile(source.path, source.size, source.label)
        for begin, end in file.ranges(mark, longest, reason):
            yield _Text(Place(end - begin, end), partial(file.read, begin, end))
        return
    with contextlib.closing(source.open()) as reader:
        for text in blocks_of_records(reader, find_end, longest, reason):
            yield _Text(Place(len(text), reader.position), _given(text))


def _given(text: memoryview) -> Callable[[], memoryview]:
    return lambda: text


def _text_jobs(texts: Iterator[_Text], alphabet: _native.Alphabet, scan: Scan, with_names: bool) -> Iterator[Job]:
    for text in texts:
        yield Job(text.place, partial(_scan_text, scan, alphabet, text.load, with_names))


def _scan_text(scan: Scan, alphabet: _native.Alphabet, load: Callable[[], memoryview], with_names: bool) -> Scanned:
    text = load()
    tokens = np.empty(len(text), dtype=np.uint8)
    block = scan(alphabet, text, out=tokens)
    scanned = _scanned(tokens, block)
    if not with_names:
        return scanned
    identifiers = np.frombuffer(block.identifiers, dtype=np.uint8)
    offsets = np.concatenate([[0], block.identifier_ends])
    return replace(scanned, names=block.names, identifiers=identifiers, identifier_offsets=offsets)


def _scanned(tokens: npt.NDArray[np.uint8], block: _native.RecordBlock) -> Scanned:
    tokens = tokens[: block.num_tokens]
    return Scanned(tokens, block.lengths, block.byte_counts, None, block.num_lines, block.num_stops, block.fault)


def _table_jobs(source: Input, alphabet: _native.Alphabet, separator: str, with_names: bool) -> Iterator[Job]:
    def find_end(text: memoryview, start: int) -> int:  # noqa: ARG001 (quotes are told from a row's begin only)
        return _native.last_row_end(text, separator)

    reader = source.open()
    scan: Scan | None = None
    skipped = source.fields.skip_lines
    if reader.skip_lines(skipped) < skipped:
        raise UserError(f"{source.label}: --skip-lines {skipped} passes over all of its lines")
    reason = "a quote in it is never closed, or a line break is missing"
    try:
        for text in blocks_of_records(reader, find_end, _LONGEST_LINE, reason):
            num_bytes, lines_before = len(text), 0
            if scan is None:
                fields, size, lines_before, fault = _native.read_table_header(text, separator)
                lines_before += skipped
                if fault:
                    raise UserError(f"{source.label}, line {lines_before + 1}: {fault}")
                if not fields:
                    continue
                header = [field.decode("utf-8", "backslashreplace").strip() for field in fields]
                name_column = None
                if with_names:
                    name_column = _column(source, header, source.fields.name_column, "names", "--name-column")
                scan = partial(
                    _native.scan_table,
                    separator=separator,
                    num_columns=len(header),
                    column=_column(source, header, source.fields.column, "sequences", "--column"),
                    name_column=name_column,
                )
                text = text[size:]
            place = Place(num_bytes, reader.position, lines_before)
            yield Job(place, partial(_scan_text, scan, alphabet, _given(text), with_names))
    finally:
        reader.close()


def _column(source: Input, header: list[str], name: str, what: str, flag: str) -> int:
    if header.count(name) != 1:
        found = f"{header.count(name)} columns" if name in header else "no column"
        shown = ", ".join(header[:20]) + (", ..." if len(header) > 20 else "")
        raise UserError(
            f"{source.label} has {found} '{name}': its columns are {shown}{suggestion(name, header)}; "
            f"name the column of the {what} with {flag}"
        )
    return header.index(name)


def _value_jobs(source: Input, batches: Iterator[Values], alphabet: _native.Alphabet) -> Iterator[Job]:
    for values in batches:
        yield Job(Place(values.num_bytes, source.size), partial(_scan_values, alphabet, values))


def _scan_values(alphabet: _native.Alphabet, values: Values) -> Scanned:
    tokens = np.empty(len(values.data), dtype=np.uint8)
    block = _native.scan_values(alphabet, values.data, values.offsets, tokens)
    scanned, names = _scanned(tokens, block), values.names
    if names is None:
        return scanned
    return replace(
        scanned,
        names=_native.hash_names(names.data, names.offsets),
        identifiers=np.frombuffer(names.data, dtype=np.uint8),
        identifier_offsets=names.offsets,
    )
