"""The C++ parser against a Python one, however the file is cut into blocks."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_plm.data._native import Alphabet, FastaError, FastaStream, LineState, scan_block, state_after
from megatron_plm.tokenizers import get_tokenizer

ESM2 = get_tokenizer("esm2")


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

    def end_record() -> None:
        if sequences and not sequences[-1]:
            raise Fault("has no sequence", header_line, None)

    for number, line in enumerate(text.split(b"\n"), start=1):
        if line.startswith(b">"):
            end_record()
            sequences.append(b"")
            header_line = number
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
                if strict and chr(byte).upper() not in ESM2.tokens:
                    raise Fault(f"unknown letter {chr(byte)!r}", number, f"at position {len(sequences[-1]) + 1} of")
                sequences[-1] += bytes([byte])
    if not sequences:
        raise Fault("no FASTA record", None, None)
    end_record()
    return sequences


def native(text: bytes, cuts: Sequence[int] = (), *, strict: bool = False) -> tuple[list[bytes], np.ndarray]:
    """Run the C++ parser on `text` cut at the given places; returns the sequences' tokens and the byte counts.

    The blocks are scanned from the last to the first, as threads may, and joined in order.
    """
    alphabet = Alphabet(ESM2.lookup_table(fold_case=True), ESM2.unk_id, strict)
    places = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    blocks = [text[begin:end] for begin, end in pairwise(places)]
    states = [LineState.line_start]
    for block in blocks:
        states.append(state_after(block, states[-1]))
    scanned = []
    for block, state in list(zip(blocks, states, strict=False))[::-1]:
        out = np.full(len(block) + 8, 255, dtype=np.uint8)
        result = scan_block(alphabet, block, state, out)
        assert out[len(block) :].tolist() == [255] * 8, "wrote past the block's size"
        scanned.append((result, out[: result.num_tokens]))
    stream = FastaStream()
    lengths = []
    for result, _ in reversed(scanned):
        stream.add(result)
        lengths.append(stream.take_lengths())
    stream.finish()
    ends = np.cumsum(np.concatenate([*lengths, stream.take_lengths()]))
    tokens = np.concatenate([tokens for _, tokens in reversed(scanned)])
    assert ends[-1] == len(tokens)
    return [part.tobytes() for part in np.split(tokens, ends[:-1])], stream.byte_counts


def encode(sequences: Sequence[bytes]) -> list[bytes]:
    return [ESM2.encode(sequence.decode()).tobytes() for sequence in sequences]


LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZOJlagv*-.1|"
LINE = st.text(LETTERS + " \t", min_size=1, max_size=40).filter(lambda line: line.strip())
HEADER = st.text(st.characters(exclude_characters="\0\n", codec="utf-8"), max_size=20).map(str.encode)
FILLER = st.sampled_from([b"", b"\r", b"; a comment", b"  ", b";>x"])
CUTS = st.lists(st.integers(0, 400), max_size=12)


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
@given(fasta(), CUTS)
@example(b">a\r\nMK\r\nV", [2, 3, 4, 5, 6, 7, 8, 9])
@example(b">a\n" + b"M" * 300, [100, 101])
def test_any_cut_of_well_formed_fasta_gives_the_reference_sequences(text: bytes, cuts: list[int]) -> None:
    tokens, counts = native(text, cuts)
    sequences = parse(text)
    assert tokens == encode(sequences)
    joined = np.frombuffer(b"".join(sequences), dtype=np.uint8)
    assert counts.tolist() == np.bincount(joined, minlength=256).tolist()


@settings(max_examples=1500)
@given(
    st.lists(
        st.sampled_from([b">", b";", b"\n", b"\r\n", b" ", b"A", b"cJ", b"\0", b"\xc3", b"\x1f", b"\n>x\nM"]),
        max_size=40,
    ),
    CUTS,
    st.booleans(),
)
def test_any_bytes_give_the_reference_result_or_its_error_at_its_line(
    pieces: list[bytes], cuts: list[int], strict: bool
) -> None:
    text = b"".join(pieces)
    try:
        expected = encode(parse_anything(text, strict))
    except Fault as fault:
        what, line, where = fault.args
        with pytest.raises(FastaError) as whole:
            native(text, strict=strict)
        with pytest.raises(FastaError) as cut:
            native(text, cuts, strict=strict)
        message = str(whole.value)
        assert str(cut.value) == message
        assert what in message
        assert line is None or message.startswith(f"line {line}: ")
        assert where is None or where in message
    else:
        assert native(text, cuts, strict=strict)[0] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\x89PNG\r\n", "line 1: expected '>' at the start of the first FASTA record, found byte 0x89"),
        (b"\nid,sequence\n", "line 2: expected '>' at the start of the first FASTA record, found 'i'"),
        (b">P1 first\n>P2\nMK\n", "line 1: record 'P1' has no sequence"),
        (b">P1\nMK\n\n>P2 last\n", "line 4: record 'P2' has no sequence"),
        (b">\n\n>P2\nMK", "line 1: a record with an empty header has no sequence"),
        (
            b">P1\rMK\r>P2\rMK\r",
            "line 1: record 'P1' has no sequence; the lines end in bare carriage returns (old Mac text): "
            "convert them to newlines",
        ),
        (
            b">P1\nMKV>P2\nMK\n",
            "line 2: '>' inside the sequence of record 'P1' after 3 letters: a line break is missing before it "
            "(were files joined without one?)",
        ),
        (b">P1\nMK\0V\n", "line 2: byte 0x00 in the sequence of record 'P1': the file is damaged or not plain text"),
        (b">P1\0 x\nMK\n", "line 1: byte 0x00 in the header of record 'P1': the file is damaged or not plain text"),
        (b">\xff\xe9\x1b[31m x\n\n", r"line 1: record '\xff\xe9?[31m' has no sequence"),
        (b"", "no FASTA record: expected a line that begins with '>'"),
        (b"\n\n;only a comment\n", "no FASTA record: expected a line that begins with '>'"),
    ],
)
def test_faults_are_told_with_line_and_record(text: bytes, message: str) -> None:
    with pytest.raises(FastaError) as error:
        native(text)
    assert str(error.value) == message
    with pytest.raises(FastaError) as error:
        native(text, range(len(text)))
    assert str(error.value) == message


def test_strict_names_the_first_unknown_letter_its_record_and_position() -> None:
    text = b">P1\nMKV\n>sp|P2|X some protein\nMKV\nmkJ*\n"
    with pytest.raises(FastaError) as error:
        native(text, strict=True)
    assert str(error.value) == "line 5: unknown letter 'J' at position 6 of record 'sp|P2|X'"


def test_a_header_longer_than_what_is_kept_for_messages_changes_nothing_else() -> None:
    text = b">" + b"x" * 5000 + b"\nMK\n>y\nMKV\n"
    assert native(text, [100, 300, 4000])[0] == encode([b"MK", b"MKV"])


def test_a_record_of_ten_million_letters_on_one_line_is_read() -> None:
    text = b">titin\n" + b"MKVL" * 2_500_000 + b"\n>next\nM\n"
    tokens, counts = native(text, range(0, len(text), 1 << 20))
    assert tokens == encode([b"MKVL" * 2_500_000, b"M"])
    assert counts[ord("M")] == 2_500_001


def test_a_buffer_of_the_wrong_size_or_kind_is_refused() -> None:
    alphabet = Alphabet(ESM2.lookup_table(), ESM2.unk_id, False)
    with pytest.raises(ValueError, match="room for every byte"):
        scan_block(alphabet, b">a\nMK", LineState.line_start, np.empty(3, dtype=np.uint8))
    read_only = np.empty(9, dtype=np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        scan_block(alphabet, b">a\nMK", LineState.line_start, read_only)
    with pytest.raises(ValueError, match="256"):
        Alphabet(np.zeros(255, dtype=np.uint8), 3, False)
    with pytest.raises(ValueError, match="contiguous bytes"):
        state_after(memoryview(b">a\nMK")[::2], LineState.line_start)
