"""Lines, JSON lines and tables against plain Python, the modules json and csv, however the text is cut into blocks."""

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reading import LETTERS, Result, cut, encode, hash_of, scan_blocks

from megatron_plm.data import _native

BLOCK_SIZES = st.integers(1, 150)
SEQUENCE = st.text(LETTERS, min_size=1, max_size=30).filter(lambda text: text.strip("*"))
NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


class Fault(Exception):
    """At a line, counted from 0."""


def sequence_of(value: bytes, line: int) -> bytes:
    letters = value.translate(None, b" \t\r\n")
    if not letters.removesuffix(b"*") or any(not 0x20 < byte < 0x7F or byte == ord(">") for byte in letters):
        raise Fault(line)
    return letters


def check(text: bytes, whole: Result, in_blocks: Result, expected: Iterator[bytes]) -> None:
    """The scan, in one block or several, gives the sequences of the reference, or its fault's line."""
    assert in_blocks.fault == whole.fault
    line = None
    sequences = []
    try:
        sequences += expected
    except Fault as fault:
        (line,) = fault.args
    assert (whole.fault[0] if whole.fault else None) == line, (text, whole.fault)
    if line is None:
        assert in_blocks.sequences == whole.sequences == encode(sequences)


# --- one sequence a line ---


def text_lines(text: bytes) -> Iterator[bytes]:
    for number, line in enumerate(text.split(b"\n")):
        if line.strip(b" \t\r"):
            if b"\t" in line:
                raise Fault(number)
            yield sequence_of(line, number)


def scan_text(text: bytes, block_size: int = 1 << 20, *, strict: bool = False) -> Result:
    return scan_blocks(cut(text, block_size, _native.last_line_end), _native.scan_text, strict=strict)


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([b"MKV", b"LA*", b"m J", b"\n", b"\n", b"\r\n", b" ", b"\t", b"\xc3", b">"]), max_size=30),
    BLOCK_SIZES,
)
def test_lines_of_text(pieces: list[bytes], block_size: int) -> None:
    text = b"".join(pieces)
    check(text, scan_text(text), scan_text(text, block_size), text_lines(text))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (b"MKV\nMK\0V\n", 1, "byte 0x00 in the sequence: the file is damaged or not plain text"),
        (b"MKV\n\nM\xc3\x89\n", 2, "byte 0xC3 in the sequence: the file is damaged or not plain text"),
        (b"MKV\n *\n", 1, "the sequence is empty"),
        (b"P1\tMKV\n", 0, "a tab inside a line that should be one sequence: is this a table (tsv)?"),
        (b"MKV\n>P1\n", 1, "'>' inside the sequence after 0 letters: no sequence holds it (is this FASTA?)"),
    ],
)
def test_faults_of_text_are_told(text: bytes, line: int, message: str) -> None:
    assert scan_text(text).fault == (line, message)


def test_strict_lines_tell_the_unknown_letter() -> None:
    assert scan_text(b"MKV*\nMKJV\n", strict=True).fault == (1, "unknown letter 'J' at position 3 of the sequence")
    assert scan_text(b"MKV*\n", strict=True).sequences == encode([b"MKV"])


def test_a_line_of_ten_million_letters_is_read() -> None:
    assert scan_text(b"M\n" + b"MKVL" * 2_500_000 + b"\nM\n").sequences == encode([b"M", b"MKVL" * 2_500_000, b"M"])


# --- JSON lines ---


def json_lines(text: bytes) -> Iterator[bytes]:
    for number, line in enumerate(text.split(b"\n")):
        if line.strip(b" \t\r"):
            try:
                value = json.loads(line.decode("latin-1"))["seq"]
            except (ValueError, TypeError, KeyError, IndexError):
                raise Fault(number) from None
            if not isinstance(value, str):
                raise Fault(number)
            yield sequence_of(value.encode("utf-8", "surrogatepass"), number)


def scan_json(text: bytes, block_size: int = 1 << 20, name_key: str | None = None) -> Result:
    scan = partial(_native.scan_json_lines, key="seq", name_key=name_key)
    return scan_blocks(cut(text, block_size, _native.last_line_end), scan)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("seq"), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(SEQUENCE, NAME, st.dictionaries(NAME, JSON, max_size=3), st.booleans()), min_size=1, max_size=5),
    BLOCK_SIZES,
    st.sampled_from([(",", ":"), (" , ", " : ")]),
)
def test_json_lines_as_python_writes_them(
    records: list[tuple[str, str, dict[str, Any], bool]], block_size: int, separators: tuple[str, str]
) -> None:
    lines = [
        json.dumps({**extra, "id": name, "seq": sequence}, ensure_ascii=ascii_only, separators=separators)
        for sequence, name, extra, ascii_only in records
    ]
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    result = scan_json(text, block_size, "id")
    assert result.fault is None
    assert result.sequences == encode([record[0].encode() for record in records])
    assert result.names == [hash_of(record[1].encode("utf-8", "surrogatepass")) for record in records]


PIECES = [
    b"{", b"}", b"[", b"]", b":", b",", b'"', b" ", b"\n", b"\t", b"\\", b'"seq":"MKV"', b'{"seq":"LA*"}',
    b'{"seq":"M',
    b'"s\\u0065q":', b"null", b"true", b"-", b"0", b"12", b".5", b"e+3", b"NaN", b"-Infinity", b"\\u004",
    b"\\ud83d\\ude00",
    b"\\n", b"\\x", b"\x01", b'"a":', b'"seq":', b"1", b'{"x":{"seq":"V"},"seq":"L"}',
]  # fmt: skip


@settings(max_examples=700)
@given(st.lists(st.sampled_from(PIECES), max_size=14), BLOCK_SIZES)
@example([b'{"seq":"M","seq":"V"}'], 3)
@example([b'{"seq":"M"} x'], 3)
@example([b'{"x":01,"seq":"M"}'], 3)
@example([b'{"seq":"\\u004d\\u000aK"}'], 3)
@example([b'{"seq":"M",}'], 3)
@example([b'{"x":[1,],"seq":"M"}'], 3)
@example([b'{"x":-,"seq":"M"}'], 3)
@example([b'{"x":1.,"seq":"M"}'], 3)
@example([b'{"x":"\t","seq":"M"}'], 3)
def test_any_json_is_read_or_refused_as_pythons_json_does(pieces: list[bytes], block_size: int) -> None:
    text = b"".join(pieces)
    check(text, scan_json(text), scan_json(text, block_size), json_lines(text))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": 1}', "the object has no key 'seq': name the sequence's with --json-key"),
        (b'{"seq": ["M"]}', "the value of 'seq' is not a string"),
        (b'["M"]', 'not a JSON object: expected one a line, as {"seq": "MKV"}'),
        (b'{"seq": "M"', 'not a JSON object: expected one a line, as {"seq": "MKV"}'),
        (b'{"seq": ""}', "the sequence is empty"),
        (b'{"seq": "M\\u0000K"}', "byte 0x00 in the sequence: the file is damaged or not plain text"),
        ('{"seq": "MÉ"}'.encode(), "byte 0xC3 in the sequence: the file is damaged or not plain text"),
        (b'{"seq": "M", "id": []}', "the record's name, the value of 'id', is not a string or a number"),
        (b'{"seq": "M", "x": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", "not a JSON object"),
    ],
)
def test_faults_of_json_lines_are_told(line: bytes, message: str) -> None:
    fault = scan_json(b'{"seq": "MKV", "id": "P1"}\n\n' + line + b"\n", name_key="id").fault
    assert fault is not None
    assert fault[0] == 2
    assert fault[1].startswith(message)


def test_names_of_json_lines_may_be_numbers() -> None:
    assert scan_json(b'{"seq": "M", "id": 42}', name_key="id").names == [hash_of(b"42")]


# --- tables ---


def table_rows(text: bytes, separator: str) -> Iterator[bytes]:
    """The field `seq` of a table that begins `seq,...`."""
    reader = csv.reader(io.StringIO(text.decode("latin-1"), newline=""), delimiter=separator, strict=True)
    num_columns = len(next(reader))
    lines = text.split(b"\n")
    while True:
        first_line = reader.line_num
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            raise Fault(first_line) from None
        if not row:
            continue
        if len(row) != num_columns or b"\0" in b"\n".join(lines[first_line : reader.line_num]):
            raise Fault(first_line)
        yield sequence_of(row[0].encode("latin-1"), first_line)


def scan_table(text: bytes, separator: str, block_size: int = 1 << 20, name_column: int | None = None) -> Result:
    pieces = cut(text, block_size, lambda data, _: _native.last_row_end(data, separator))
    fields, size, num_lines, fault = _native.read_table_header(pieces[0], separator)
    assert not fault
    scan = partial(_native.scan_table, separator=separator, num_columns=len(fields), column=0, name_column=name_column)
    result = scan_blocks([pieces[0][size:], *pieces[1:]], scan)
    if result.fault is not None:
        result.fault = (result.fault[0] + num_lines, result.fault[1])
    return result


@settings(max_examples=150)
@given(
    st.lists(st.tuples(SEQUENCE, NAME.filter(lambda name: "\r" not in name)), min_size=1, max_size=6),
    BLOCK_SIZES,
    st.sampled_from([",", "\t"]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.lists(st.integers(0, 30), max_size=3),
)
def test_tables_as_python_writes_them(
    rows: list[tuple[str, str]], block_size: int, separator: str, line_end: str, quoting: Any, wraps: list[int]
) -> None:
    # Some sequences are wrapped, as fields with line breaks in them.
    wrapped = [(sequence[:wrap] + "\n" + sequence[wrap:]) for (sequence, _), wrap in zip(rows, wraps, strict=False)]
    sequences = [*wrapped, *(sequence for sequence, _ in rows[len(wrapped) :])]
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator, lineterminator=line_end, quoting=quoting)
    writer.writerow(["seq", "some\nname"])
    writer.writerows((sequence, name) for sequence, (_, name) in zip(sequences, rows, strict=True))
    text = file.getvalue().encode()
    result = scan_table(text, separator, block_size, name_column=1)
    assert result.fault is None
    assert result.sequences == encode([sequence.encode() for sequence, _ in rows])
    assert result.names == [hash_of(name.encode()) for _, name in rows]


@settings(max_examples=700)
@given(
    st.lists(
        st.sampled_from([b'"', b'"', b'""', b",", b"\t", b"\n", b"\n", b"\r\n", b"MKV", b"LA*", b" ", b"\0", b"\xe9"]),
        max_size=25,
    ),
    BLOCK_SIZES,
    st.sampled_from([",", "\t"]),
    st.integers(1, 2),
)
@example([b'MK"V,"a\n"', b'"\n",L\n'], 1, ",", 2)
@example([b'"M"K,x\n'], 1, ",", 2)
@example([b'M,"x\n'], 1, ",", 2)
@example([b'"M"', b"\r\n", b'"K"', b"\r\n"], 1, ",", 1)
def test_any_table_is_read_or_refused_as_pythons_csv_does(
    pieces: list[bytes], block_size: int, separator: str, num_columns: int
) -> None:
    header = separator.join(["seq", "x"][:num_columns]).encode() + b"\n"
    text = header + b"".join(pieces)
    check(text, scan_table(text, separator), scan_table(text, separator, block_size), table_rows(text, separator))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"MKV", "the row has 1 fields, the header 2"),
        (b"MKV,a,b", "the row has 3 fields, the header 2"),
        (b",a", "the sequence is empty"),
        (b'"MKV"x,a', "text after the quote that closes a field (is a quote inside not doubled?)"),
        (b'MKV,"a', "the quote that opens a field of this row is never closed"),
        (b"MKV,a\0", "byte 0x00 in the row: the file is damaged or not plain text"),
    ],
)
def test_faults_of_tables_are_told(row: bytes, message: str) -> None:
    assert scan_table(b'\nseq,id\r\n"M\nK",x\n\n' + row + b"\n", ",").fault == (5, message)
