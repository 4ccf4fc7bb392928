"""Which files the inputs are, what they hold, and pipes."""

import gzip
import io
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from preprocess_command import command, environment
from reading import COMPRESS, ESM2, SEQUENCES, TEXTS, read, write

from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.readers import SequenceReader, open_inputs
from megatron_plm.errors import UserError

# --- which files ---


def test_patterns_keep_their_order_and_each_is_sorted(tmp_path: Path) -> None:
    for name in ("b2.fasta", "b10.fasta", "b1.fasta", "a.fasta"):
        write(tmp_path / name, TEXTS["fasta"])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / "deep" / "er" / "c.fasta", TEXTS["fasta"])

    def names(*patterns: str) -> list[str]:
        return [Path(source.path).name for source in open_inputs([f"{tmp_path}/{pattern}" for pattern in patterns])]

    assert names("b*.fasta", "a.fasta") == ["b1.fasta", "b10.fasta", "b2.fasta", "a.fasta"]
    assert names("**/c.fasta", "b?.fasta") == ["c.fasta", "b1.fasta", "b2.fasta"]
    write(tmp_path / "odd[1].fasta", TEXTS["fasta"])
    assert names("odd[1].fasta") == ["odd[1].fasta"]


def test_what_is_no_input_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fasta", TEXTS["fasta"])
    (tmp_path / "b.fasta").symlink_to(path)
    for patterns, message in [
        (["none.fasta"], "none.fasta' does not exist"),
        (["*.csv"], r"input pattern '.*\*.csv' matches no file"),
        (["a.fasta", "a.fasta"], r"a.fasta' is given twice: name every input once"),
        (["a.fasta", "*.fasta"], r"a.fasta' is given twice"),
        (["*.fasta"], r"b.fasta' is given twice, also as '.*a.fasta'"),
        ([""], r"is a folder: name the files in it \(a pattern such as"),
    ]:
        with pytest.raises(UserError, match=message):
            open_inputs([f"{tmp_path}/{pattern}" for pattern in patterns])
    with pytest.raises(UserError, match=r"unknown format 'fastq': expected one of fasta, jsonl,.*did you mean 'fasta'"):
        open_inputs([path], format="fastq")
    with pytest.raises(UserError, match=r"standard input \('-'\) is given twice"):
        open_with_stdin([b">P1\nMK\n"], ["-", "-"])


@pytest.mark.parametrize(
    ("name", "content", "format", "note"),
    [
        ("a.csv", "fasta", "fasta", "by its name csv, by its content fasta; it is read as fasta"),
        ("a.txt", "jsonl", "jsonl", "by its name text, by its content jsonl; it is read as jsonl"),
        ("a.csv", "tsv", "tsv", "by its name csv, by its content tsv; it is read as tsv"),
        ("a.parquet", "fasta", "fasta", "by its name parquet, by its content fasta; it is read as fasta"),
        ("a.fasta.gz", "fasta", "fasta", "by its name gzip, by its content plain text; it is read as plain text"),
    ],
)
def test_a_name_that_does_not_fit_the_content_is_told(
    tmp_path: Path, name: str, content: str, format: str, note: str
) -> None:
    path = write(tmp_path / name, TEXTS[content])
    (source,) = open_inputs([path])
    assert source.format == format
    assert source.notes == [f"'{path}': {note}"]
    assert list(SequenceReader(ESM2).read([source]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.fasta", b"id,sequence\nP1,MK\n", "line 1: expected '>' at the start of the first FASTA record, found 'i'"),
        ("a.fasta", b"\x7fELF\0" * 9, "line 1: expected '>' at the start of the first FASTA record, found byte 0x7F"),
        ("a.fasta", b"\n \n", "no FASTA record: expected a line that begins with '>'"),
        ("a.fasta", b"", "a.fasta' is empty"),
        ("a.fasta.gz", gzip.compress(b""), "no FASTA record: expected a line"),
        ("a.jsonl", b"id,sequence\nP1,MK\n", "line 1: not a JSON object"),
        ("a.jsonl", b'[{"sequence": "MK"}]', "line 1: not a JSON object"),
        (
            "a",
            b"\x7fELF\0" * 9,
            "its format cannot be told by its first bytes: expected one of .*; name it with --format",
        ),
        ("a", b"What's this?\n", "its format cannot be told by its first bytes"),
        ("a.parquet", b"id,sequence\n", r"its format cannot be told by its first bytes \(by its name parquet\)"),
        ("a.txt", "MKV\n".encode("utf-16"), "a.txt' is UTF-16 text: save it as UTF-8"),
        ("a.csv", b"id,sequence\n", r"a.csv' holds no sequence: expected at least one \(csv\)"),
        (
            "a.csv",
            b'\nid,"sequence\nP1,MK\n',
            "a.csv', line 2: the quote that opens a field of this row is never closed",
        ),
        ("a.csv", b"id,sequence\nP1,MK\nP2,\n", "a.csv', line 3: the sequence is empty"),
        ("a.fasta", b">P1\nMK\n>P2\n>P3\nM\n", "a.fasta', line 3: record 'P2' has no sequence"),
        ("a.fasta", b">\xff\xe9\n\n>P2\nM", r"a.fasta', line 1: record '\\xff\\xe9' has no sequence"),
    ],
)
def test_bad_content_is_one_sentence_that_names_the_file(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(write(tmp_path / name, content))
    assert name in str(error.value)


def test_an_explicit_format_wins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fasta", "MKV\nLA\n")
    assert read(path, format="text") == ["MKV", "LA"]
    with pytest.raises(UserError, match=r"line 1: expected '>' at the start"):
        read(path, format="fasta")
    with pytest.raises(UserError, match=r"'>' inside the sequence after 0 letters: no sequence holds it"):
        read(write(tmp_path / "b.fasta", TEXTS["fasta"]), format="text")


# --- pipes ---


def open_with_stdin(pieces: Sequence[bytes], patterns: Sequence[str]) -> list[str]:
    """Read `patterns` with the pieces on standard input."""
    before = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"".join(pieces))))
    try:
        return read(*patterns)
    finally:
        sys.stdin = before


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("format", TEXTS)
def test_standard_input_is_told_apart_without_seeking(tmp_path: Path, format: str, compression: str) -> None:
    path = write(tmp_path / "a.fasta", TEXTS["fasta"])
    data = COMPRESS[compression](TEXTS[format].encode())
    assert open_with_stdin([data], ["-", str(path)]) == SEQUENCES * 2


def test_a_pipe_that_gives_a_line_and_waits_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    opened = threading.Event()

    def give() -> None:
        with (tmp_path / "pipe").open("wb", buffering=0) as pipe:
            pipe.write(b">P1 first\nMK")
            assert opened.wait(30)
            pipe.write(b"V\n>P2\nLA\n")

    writer = threading.Thread(target=give)
    writer.start()
    try:
        inputs = open_inputs([tmp_path / "pipe"])
    finally:
        opened.set()
    (batch,) = SequenceReader(ESM2).read(inputs)
    writer.join()
    assert ESM2.decode(batch.tokens) == "MKVLA"
    assert inputs[0].size == 0
    assert inputs[0].position == len(b">P1 first\nMKV\n>P2\nLA\n")


@pytest.mark.parametrize("compressed", [False, True])
def test_standard_input_may_be_a_file(tmp_path: Path, compressed: bool) -> None:
    """As in `preprocess_data.py --input - < file`; larger than what is looked at to tell its format."""
    letters = "MKTAYIAKQRQISFVKSHFS"
    text = "".join(f">{number}\n{letters * 5}\n" for number in range(30_000)).encode()
    (tmp_path / "in").write_bytes(gzip.compress(text, 1) if compressed else text)
    with (tmp_path / "in").open("rb") as file:
        done = subprocess.run(
            command("--input", "-", "--output-prefix", tmp_path / "p"),
            stdin=file, env=environment(), capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dataset = IndexedDataset(tmp_path / "p")
    assert len(dataset) == 30_000
    assert {ESM2.decode(dataset[number]) for number in (0, 1, 29_999)} == {letters * 5}
