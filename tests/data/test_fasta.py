"""The FASTA scanner against a Python one, however the file is cut into blocks."""

from functools import partial

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reading import ESM2, LETTERS, Result, cut, encode, hash_of, scan_blocks

from megatron_plm.data import _native


class Fault(Exception):
    """The reference parser's error: (kind, line, where in the record)."""


def parse(text: bytes) -> list[bytes]:
    """Return the sequences of well-formed FASTA."""
    sequences: list[bytes] = []
    for line in text.split(b"\n"):
        if line.startswith(b">"):
            sequences.append(b"")
        elif line.strip() and not line.startswith(b";"):
            sequences[-1] += line.translate(None, b" \t\r")
    return sequences


def parse_anything(text: bytes, strict: bool) -> list[bytes]:
    """`parse`, byte by byte, which raises Fault(kind, line, position) at the first fault."""
    sequences: list[bytes] = []
    header_line = 0
    stop: Fault | None = None  # of a '*' that is a fault if letters follow it

    def end_record() -> None:
        if sequences and not sequences[-1].removesuffix(b"*"):
            raise Fault("has no sequence", header_line, None)

    for number, line in enumerate(text.split(b"\n"), start=1):
        if line.startswith(b">"):
            end_record()
            sequences.append(b"")
            header_line = number
            stop = None
            if b"\0" in line:
                raise Fault("byte 0x00 in the header", number, None)
        elif not line.startswith(b";"):
            for byte in line.translate(None, b" \t\r"):
                if not sequences:
                    raise Fault("expected '>' at the start", number, None)
                if byte == ord(">"):
                    raise Fault("'>' inside the sequence", number, f"after {len(sequences[-1])} letters")
                if not 0x20 < byte < 0x7F:
                    raise Fault(f"byte 0x{byte:02X} in the sequence", number, None)
                if stop:
                    raise stop
                if strict and chr(byte).upper() not in ESM2.tokens:
                    place = f"at position {len(sequences[-1]) + 1} of"
                    fault = Fault(f"unknown letter {chr(byte)!r}", number, place)
                    if byte != ord("*"):
                        raise fault
                    stop = fault
                sequences[-1] += bytes([byte])
    end_record()
    return sequences


def native(text: bytes, block_size: int = 1 << 20, *, strict: bool = False) -> Result:
    pieces = cut(text, block_size, _native.last_record_start)
    return scan_blocks(pieces, partial(_native.scan_fasta, with_names=True), strict=strict)


LINE = st.text(LETTERS + " \t", min_size=1, max_size=40).filter(lambda line: line.strip(" \t*"))
HEADER = st.text(st.characters(exclude_characters="\0\n", codec="utf-8"), max_size=20).map(str.encode)
FILLER = st.sampled_from([b"", b"\r", b"; a comment", b"  ", b";>x"])
BLOCK_SIZES = st.integers(1, 200)


@st.composite
def fasta(draw: st.DrawFn) -> bytes:
    """Well-formed FASTA with any mixture of line ends, wrapping, blank lines and comments."""
    lines = draw(st.lists(FILLER, max_size=2))
    for header in draw(st.lists(HEADER, min_size=1, max_size=6)):
        lines += [b">" + header, *draw(st.lists(FILLER, max_size=2))]
        for line in draw(st.lists(LINE, min_size=1, max_size=4)):
            lines += [line.encode(), *draw(st.lists(FILLER, max_size=1))]
    ends = draw(st.lists(st.sampled_from([b"\n", b"\r\n"]), min_size=len(lines), max_size=len(lines)))
    ends[-1] = draw(st.sampled_from([b"\n", b"\r\n", b""]))
    return b"".join(line + end for line, end in zip(lines, ends, strict=True))


@settings(max_examples=400)
@given(fasta(), BLOCK_SIZES)
@example(b">a\r\nMK\r\nV*\r\n>b\nM", 1)
@example(b">a\n" + b"M" * 300, 100)
def test_any_cut_of_well_formed_fasta_gives_the_reference_sequences(text: bytes, block_size: int) -> None:
    result = native(text, block_size)
    sequences = parse(text)
    assert result.fault is None
    assert result.sequences == encode(sequences)
    assert result.num_stops == sum(sequence.endswith(b"*") for sequence in sequences)
    kept = np.frombuffer(b"".join(sequence.removesuffix(b"*") for sequence in sequences), dtype=np.uint8)
    assert result.byte_counts.tolist() == np.bincount(kept, minlength=256).tolist()


@settings(max_examples=200)
@given(st.lists(st.text("ab|. \t", max_size=8), min_size=1, max_size=8), BLOCK_SIZES)
def test_a_name_is_the_first_word_of_the_header(headers: list[str], block_size: int) -> None:
    text = "".join(f">{header}\nMKV\n" for header in headers).encode()
    words = [next(iter(header.split()), "") for header in headers]
    assert native(text, block_size).names == [hash_of(word.encode()) for word in words]


def test_a_uniprot_header_counts_by_its_accession():
    for name in (b"sp|P12345|NAME_HUMAN", b"tr|P12345|X", b"sp|P12345", b"P12345 more words"):
        assert hash_of(name) == hash_of(b"P12345")
    for name in (b"gb|P12345|X", b"sp|P1234|5", b"spx|P12345|X", b"|P12345|", b"UniRef50_P12345", b"sp"):
        assert hash_of(name) != hash_of(b"P12345")


@given(st.text("abcP012345._", min_size=1, max_size=50))
def test_a_name_is_hashed_as_by_another_implementation(name: str) -> None:
    mmh3 = pytest.importorskip("mmh3")
    assert hash_of(name.encode()) == list(mmh3.hash64(name.encode(), 0, x64arch=True, signed=False))


@settings(max_examples=1500)
@given(
    st.lists(
        st.sampled_from([b">", b";", b"\n", b"\r\n", b" ", b"A", b"cJ", b"*", b"\0", b"\xc3", b"\x1f", b"\n>x\nM"]),
        max_size=40,
    ),
    BLOCK_SIZES,
    st.booleans(),
)
def test_any_bytes_give_the_reference_result_or_its_error_at_its_line(
    pieces: list[bytes], block_size: int, strict: bool
) -> None:
    text = b"".join(pieces)
    whole, in_blocks = native(text, strict=strict), native(text, block_size, strict=strict)
    assert in_blocks.fault == whole.fault
    try:
        expected = encode(parse_anything(text, strict))
    except Fault as fault:
        what, line, where = fault.args
        assert whole.fault is not None
        assert whole.fault[0] + 1 == line
        assert what in whole.fault[1]
        assert where is None or where in whole.fault[1]
    else:
        assert whole.fault is None
        assert in_blocks.sequences == whole.sequences == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\x89PNG\r\n", "1: expected '>' at the start of the first FASTA record, found byte 0x89"),
        (b"\nid,sequence\n", "2: expected '>' at the start of the first FASTA record, found 'i'"),
        (b">P1 first\n>P2\nMK\n", "1: record 'P1' has no sequence"),
        (b">P1\nMK\n\n>P2 last\n", "4: record 'P2' has no sequence"),
        (b">P1\n*\n>P2\nMK\n", "1: record 'P1' has no sequence"),
        (b">\n\n>P2\nMK", "1: a record with an empty header has no sequence"),
        (
            b">P1\rMK\r>P2\rMK\r",
            "1: record 'P1' has no sequence; the lines end in bare carriage returns (old Mac text): "
            "convert them to newlines",
        ),
        (
            b">P1\nMKV>P2\nMK\n",
            "2: '>' inside the sequence of record 'P1' after 3 letters: a line break is missing before it "
            "(were files joined without one?)",
        ),
        (b">P1\nMK\0V\n", "2: byte 0x00 in the sequence of record 'P1': the file is damaged or not plain text"),
        (b">P1\0 x\nMK\n", "1: byte 0x00 in the header of record 'P1': the file is damaged or not plain text"),
        (b">\xff\xe9\x1b[31m x\n\n", r"1: record '\xff\xe9?[31m' has no sequence"),
    ],
)
@pytest.mark.parametrize("block_size", [1, 1 << 20])
def test_faults_are_told_with_line_and_record(text: bytes, message: str, block_size: int) -> None:
    fault = native(text, block_size).fault
    assert fault is not None
    assert f"{fault[0] + 1}: {fault[1]}" == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b">P1\nMKV\n>sp|P2|X some\nMKV\nmkJ*\n", "5: unknown letter 'J' at position 6 of record 'sp|P2|X'"),
        (b">P1\nMKV*\n>P2\nMK*\n\nV\n", "4: unknown letter '*' at position 3 of record 'P2'"),
    ],
)
def test_strict_names_the_first_unknown_letter_its_record_and_position(text: bytes, message: str) -> None:
    fault = native(text, strict=True).fault
    assert fault is not None
    assert f"{fault[0] + 1}: {fault[1]}" == message
    assert native(text).fault is None


def test_final_stops_are_dropped_also_where_letters_are_strict() -> None:
    result = native(b">P1\nMKV*\n>P2\nMKV\n*\n", strict=True)
    assert result.sequences == encode([b"MKV", b"MKV"])
    assert result.num_stops == 2


def test_a_header_longer_than_a_block_changes_nothing() -> None:
    text = b">" + b"x" * 5000 + b" y\nMK\n>y\nMKV\n"
    result = native(text, 100)
    assert result.sequences == encode([b"MK", b"MKV"])
    assert result.names == [hash_of(b"x" * 5000), hash_of(b"y")]


def test_a_record_of_ten_million_letters_on_one_line_is_read() -> None:
    text = b">titin\n" + b"MKVL" * 2_500_000 + b"\n>next\nM\n"
    result = native(text)
    assert result.sequences == encode([b"MKVL" * 2_500_000, b"M"])
    assert result.byte_counts[ord("M")] == 2_500_001


def test_a_buffer_of_the_wrong_size_or_kind_is_refused() -> None:
    alphabet = _native.Alphabet(ESM2.lookup_table(), ESM2.unk_id, False)
    with pytest.raises(ValueError, match="room for every byte"):
        _native.scan_fasta(alphabet, b">a\nMK", np.empty(3, dtype=np.uint8), False)
    read_only = np.empty(9, dtype=np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        _native.scan_fasta(alphabet, b">a\nMK", read_only, False)
    with pytest.raises(ValueError, match="256"):
        _native.Alphabet(np.zeros(255, dtype=np.uint8), 3, False)
    with pytest.raises(ValueError, match="contiguous bytes"):
        _native.last_record_start(memoryview(b">a\nMK")[::2], 0)
    for offsets in ([], [0, 9], [-1, 3], [3, 2], [0, 4, 2]):
        with pytest.raises(ValueError, match="offsets"):
            _native.hash_names(b"MKVLA", np.array(offsets, dtype=np.int64))
