"""Inputs of every format read, plain and compressed, on any number of threads."""

import gzip
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import zstandard
from processes import environment
from reading import COMPRESS, ESM2, EXTENSIONS, NAMES, SEQUENCES, TEXTS, hash_of, read, write

from megatron_plm.data.readers import SequenceReader, blocks, open_inputs
from megatron_plm.errors import UserError


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("format", TEXTS)
def test_every_text_format_is_read_plain_and_compressed_with_and_without_its_name(
    tmp_path: Path, format: str, compression: str
) -> None:
    data = COMPRESS[compression](TEXTS[format].encode())
    named = write(tmp_path / f"in.{EXTENSIONS.get(format, format)}{compression}", data)
    for path in (named, write(tmp_path / f"nameless{compression}", data)):
        (source,) = open_inputs([path])
        assert (source.format, source.notes, source.size) == (format, [], len(data))
        reader = SequenceReader(ESM2)
        assert read(path, reader=reader) == SEQUENCES
        assert reader.num_bytes == len(TEXTS[format])
        assert reader.byte_counts[ord("M")] == sum(sequence.count("M") for sequence in SEQUENCES)
        assert reader.byte_counts.sum() == sum(map(len, SEQUENCES))


@pytest.mark.parametrize("format", [format for format in TEXTS if format != "text"])
def test_names_are_hashed_where_asked_for(tmp_path: Path, format: str) -> None:
    path = write(tmp_path / f"in.{format}", TEXTS[format])
    batches = list(SequenceReader(ESM2, names=True).read(open_inputs([path])))
    assert all(batch.names is not None for batch in batches)
    assert np.concatenate([batch.names for batch in batches]).tolist() == [hash_of(name.encode()) for name in NAMES]
    assert all(batch.names is None for batch in SequenceReader(ESM2).read(open_inputs([path])))


@pytest.mark.parametrize("format", [format for format in TEXTS if format != "text"])
@pytest.mark.parametrize("workers", [1, 3])
def test_names_come_as_they_stand_in_the_input_where_asked_for(tmp_path: Path, format: str, workers: int) -> None:
    text = TEXTS[format].replace("P1", "sp|P1|ÄÖ_HUMAN")
    paths = [write(tmp_path / f"{number}.{format}.gz", gzip.compress(text.encode())) for number in range(3)]
    reader = SequenceReader(ESM2, identifiers=True, workers=workers)
    batches = list(reader.read(open_inputs(paths), folder=lambda: tmp_path))
    assert all(batch.names is None for batch in batches)
    assert [name for batch in batches for name in batch.identifiers or []] == ["sp|P1|ÄÖ_HUMAN", "P2", "P3"] * 3


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.fasta", b">  first second\nMK\n>\nMK\n>\xe4\nMK\n", ["first", "", "\\xe4"]),
        ("a.csv", b'id,sequence\n"a ""b"", c",MK\n,MK\n', ['a "b", c', ""]),
        ("a.jsonl", rb'''{"id": "a\u00e4 \ud83d\ude00\u0000", "sequence": "MK"}
{"id": 1.50, "sequence": "MK"}''', ["aä 😀\\x00", "1.50"]),
    ],
)  # fmt: skip
def test_odd_names_come_as_text(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    (batch,) = SequenceReader(ESM2, identifiers=True).read(open_inputs([write(tmp_path / name, content)]))
    assert batch.identifiers == expected


def test_plain_lines_have_no_names(tmp_path: Path) -> None:
    path = write(tmp_path / "in.txt", TEXTS["text"])
    with pytest.raises(UserError, match=r"in.txt'.* has no names of records: use FASTA or a table"):
        list(SequenceReader(ESM2, names=True).read(open_inputs([path])))


def test_other_keys_and_columns_are_read_where_named(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", '{"primary": "MK"}'), json_key="primary") == ["MK"]
    table = write(tmp_path / "a.csv", "\ufeffid, seq ,x\nP1,MK,1\n")
    assert read(table, column="seq") == ["MK"]
    with pytest.raises(UserError, match=r"a.csv' has no column 'sequence': its columns are id, seq, x.*--column"):
        read(table)
    with pytest.raises(UserError, match="has 2 columns 'sequence'"):
        read(write(tmp_path / "b.csv", "sequence,sequence\nMK,MK\n"))
    assert read(write(tmp_path / "one.csv", "sequence\nMK\n")) == ["MK"]


def test_lines_above_the_column_names_are_passed_over(tmp_path: Path) -> None:
    metadata = '"{""Run"": ""x, y"", ""Link"": 1}"\n# and more\n'
    path = write(tmp_path / "a.csv.gz", gzip.compress((metadata + "sequence,x\nMKV,1\nMKL,2\n").encode()))
    assert read(path, skip_lines=2) == ["MKV", "MKL"]
    bad = write(tmp_path / "b.csv", metadata + "sequence,x\nMKV,1\nM\0K,2\n")
    with pytest.raises(UserError, match=r"b.csv', line 5: byte 0x00"):
        read(bad, skip_lines=2)
    with pytest.raises(UserError, match=r"b.csv': --skip-lines 9 passes over all of its lines"):
        read(bad, skip_lines=9)
    with pytest.raises(UserError, match=r"b.csv' holds no sequence: expected at least one \(csv\)"):
        read(bad, skip_lines=5)
    many = write(tmp_path / "d.csv", '"# a line\n' * 300_000 + "sequence,x\nMKV,1\n")
    assert read(many, skip_lines=300_000) == ["MKV"]
    with pytest.raises(UserError, match=r"c.txt' is text: --skip-lines is for CSV and TSV"):
        read(write(tmp_path / "c.txt", "MKV\n"), skip_lines=1)


# --- several inputs, any number of threads ---


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of several blocks and formats, whose records cross all seams."""
    folder = tmp_path_factory.mktemp("large")
    rng = random.Random(5)
    records = [f"MKV{'LAGVSERTIDPKQNFYMHWC' * rng.randint(1, 60)}" for _ in range(3000)]
    fasta = "".join(f">P{number}\n{sequence}\n" for number, sequence in enumerate(records))
    table = "id,sequence\n" + "".join(f'{number},"{sequence}"\n' for number, sequence in enumerate(records))
    return [
        write(folder / "a.fasta", fasta),
        write(folder / "b.csv.gz", gzip.compress(table.encode(), 1)),
        write(folder / "c.txt", "\n".join(records)),
    ]


def test_the_records_are_the_same_for_every_number_of_workers(large: list[Path]) -> None:
    def digest(reader: SequenceReader, paths: Sequence[Path]) -> tuple[bytes, bytes]:
        batches = list(reader.read(open_inputs(paths)))
        return b"".join(batch.tokens for batch in batches), b"".join(batch.lengths for batch in batches)

    one, three = SequenceReader(ESM2), SequenceReader(ESM2, workers=3)
    tokens, lengths = digest(one, large)
    assert digest(three, large) == (tokens, lengths)
    assert digest(SequenceReader(ESM2), large[:1]) == (tokens[: len(tokens) // 3], lengths[: len(lengths) // 3])
    assert tokens == tokens[: len(tokens) // 3] * 3
    assert three.byte_counts.tolist() == one.byte_counts.tolist()
    assert three.num_bytes == one.num_bytes > 5 * blocks.BLOCK_SIZE


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_fault_is_told_whatever_lies_behind_it(large: list[Path], tmp_path: Path, workers: int) -> None:
    text = large[0].read_bytes()
    place = text.index(b"\n", len(text) // 2) + 1
    line = text[:place].count(b"\n") + 1
    damaged = write(tmp_path / "a.fasta.gz", gzip.compress(text[:place] + b"MK\0V\n" + text[place:], 1)[:-20])
    with pytest.raises(UserError, match=rf"a.fasta.gz', line {line}: byte 0x00 in the"):
        read(large[2], damaged, reader=SequenceReader(ESM2, workers=workers))
    truncated = write(tmp_path / "b.fasta.gz", gzip.compress(text, 1)[:-20])
    with pytest.raises(UserError, match=r"b.fasta.gz' is truncated: its gzip data stop in mid-stream"):
        read(truncated, damaged, reader=SequenceReader(ESM2, workers=workers))


def test_progress_counts_the_bytes_on_the_disk(large: list[Path]) -> None:
    told: list[int] = []
    inputs = open_inputs(large)
    for _ in SequenceReader(ESM2, workers=2).read(inputs, told.append):
        pass
    assert told == sorted(told)
    assert told[-1] == sum(path.stat().st_size for path in large)
    assert [source.position for source in inputs] == [source.size for source in inputs]


def test_lines_are_counted_across_blocks(large: list[Path], tmp_path: Path) -> None:
    for path, bad in ((large[2], b"\nMK1\tV\n"), (large[0], b"\n>x\n>y\nM\n")):
        text = path.read_bytes().rstrip(b"\n")
        line = text.count(b"\n") + 2
        with pytest.raises(UserError, match=f"', line {line}: ") as error:
            read(write(tmp_path / path.name, text + bad))
        assert str(tmp_path / path.name) in str(error.value)


def test_a_record_beyond_the_limit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_SIZE", 64)
    monkeypatch.setattr("megatron_plm.data.readers.scans._LONGEST_LINE", 1000)
    quote = write(tmp_path / "a.csv", 'id,sequence\nP1,"MK\n' + "P2,MK\n" * 1000)
    with pytest.raises(UserError, match=r"a.csv': a record in it is longer than 1,000 bytes: a quote in it is never"):
        read(quote)
    assert read(write(tmp_path / "b.csv", "id,sequence\nP1," + "MK" * 400 + "\n")) == ["MK" * 400]


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    with (tmp_path / "a.csv.zst").open("wb") as file:
        file.write(compressor.compress(b"id,sequence\n"))
        for _ in range(30):
            file.write(compressor.compress((b'P1,"' + b"MKVL" * 100 + b'"\n') * 25_000))
        file.write(compressor.flush())
    code = (
        "import re, sys; from megatron_plm.data.readers import *; from megatron_plm.tokenizers import get_tokenizer\n"
        "reader = SequenceReader(get_tokenizer('esm2'), workers=2)\n"
        "assert sum(int(batch.lengths.sum()) for batch in reader.read(open_inputs(sys.argv[1:]))) == 300_000_000\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "a.csv.zst")]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment(), timeout=120)
    assert int(done.stdout) < 250_000, done.stdout
