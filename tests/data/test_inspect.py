"""`inspect_data`: what it shows is what a plain count finds, and --verify names the first fault."""

import json
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import preprocess_command
import pytest
from processes import REPOSITORY, environment
from test_indexed import pack, put

from megatron_plm.data.inspect.command import main
from megatron_plm.data.inspect.contents import TokenCounter
from megatron_plm.data.inspect.text import WIDTH, bars, length_rows
from megatron_plm.errors import run_command

SEQUENCES = preprocess_command.SEQUENCES


@pytest.fixture
def prefix(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The dataset of preprocess_command.TEXT."""
    assert preprocess_command.run(folder) == 0
    capsys.readouterr()
    return folder / "out" / "p"


def shown(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What the command prints: its output, or where it must fail its one line of error."""
    assert run_command(main, list(map(str, arguments))) == code
    printed = capsys.readouterr()
    if code:
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        return printed.err
    assert printed.err == ""
    histograms = printed.out.partition("\nlengths\n")[2].partition("\nwrote ")[0].partition("\nverified")[0]
    assert max(map(len, histograms.splitlines())) <= WIDTH
    return printed.out


@pytest.mark.parametrize("flags", [[], ["--verify"]])
def test_the_counts_are_those_of_the_sequences(
    prefix: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = shown(capsys, prefix, *flags)
    for line in ("tokenizer   esm2 (33 tokens)", "token type  uint8, 1 byte a token", "sequences   3", "documents   3"):
        assert line in output
    residues = sum(map(len, SEQUENCES))
    assert f"tokens      {residues}\n" in output
    assert f"lengths     8 to 20, mean {residues / 3:.1f}" in output
    counts = Counter("".join(SEQUENCES).replace("J", "?").replace("*", "?"))
    table = dict(re.findall(r"^ *([A-Z]|<unk>) +[█▏▎▍▌▋▊▉]* +(\d+)  ", output, re.M))
    assert table == {letter.replace("?", "<unk>"): str(count) for letter, count in counts.items()}
    for index, sequence in enumerate(SEQUENCES):
        decoded = sequence.replace("J", "<unk>").replace("*", "<unk>")
        assert f"sequence {index}, {len(sequence)} tokens\n{decoded}\n" in output


def test_samples_are_the_first_or_random_by_seed(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def indices(*flags: object) -> list[str]:
        return re.findall(r"^sequence (\d)", shown(capsys, prefix, *flags), re.M)

    assert indices("--samples", 2) == ["0", "1"]
    assert indices("--samples", 0) == []
    assert indices("--samples", 99) == ["0", "1", "2"]
    drawn = {tuple(indices("--samples", 1, "--seed", seed)) for seed in range(20)}
    assert drawn == {("0",), ("1",), ("2",)}
    assert indices("--samples", 2, "--seed", 5) == indices("--samples", 2, "--seed", 5)


@pytest.mark.filterwarnings("ignore:::megatron")
def test_a_dataset_of_megatron_is_read_and_what_is_unknown_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "p.bin"), dtype=np.int32)
    builder.add_document([70_000, 7, 7, 9], [3, 1])
    builder.add_document([7] * 1000, [1000])
    builder.finalize(str(tmp_path / "p.idx"))
    output = shown(capsys, tmp_path / "p", "--verify", "--samples", 3)
    assert "tokenizer   unknown (" in output
    assert "checksums   unknown (" in output
    assert "verified: checksums are unknown" in output
    assert "sequences   3\ndocuments   2\n" in output
    assert re.search(r"^ +7 █+ 1,002 ", output, re.M)
    assert re.search(r"^other ids +1 ", output, re.M)
    assert "sequence 1, 1 tokens, document 0\n9\n" in output
    assert re.search(r"sequence 2, 1,000 tokens, document 1\n(7 ){39}7\n.*\n…\nverified", output, re.S)


def test_an_unknown_tokenizer_is_named_and_ids_are_shown(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = prefix.with_suffix(".json")
    metadata = json.loads(path.read_text())
    for change, expected in [
        ({"sha256": "0"}, "tokenizer   esm2, but with another vocabulary"),
        ({"name": "words"}, "tokenizer   words, which isn't known here"),
    ]:
        path.write_text(json.dumps({**metadata, "tokenizer": {**metadata["tokenizer"], **change}}))
        output = shown(capsys, prefix, "--verify")
        assert expected in output
        assert "sequence 0, 20 tokens\n20 15 11 5 " in output


def damage(prefix: Path, extension: str, offset: int, content: bytes) -> None:
    path = prefix.with_suffix(extension)
    data = path.read_bytes()
    path.write_bytes(data[:offset] + content + data[offset + len(content) :])


# The index of three sequences of 20, 8 and 20 tokens: lengths at 34, pointers at 46, documents at 70.
@pytest.mark.parametrize(
    ("extension", "offset", "content", "expected"),
    [
        (".idx", 38, struct.pack("<i", -8), "sequence 1 has length -8"),
        (".idx", 38, struct.pack("<i", 9), "sequence 2 begins at byte 28 of .*, but the one before it ends at 29"),
        (".idx", 54, struct.pack("<q", 21), "sequence 1 begins at byte 21 of .*, but the one before it ends at 20"),
        (".idx", 54, struct.pack("<q", -(2**63)), "sequence 1 begins at byte -9,223"),
        (".idx", 70, struct.pack("<q", 1), "document 0 begins at sequence 1, expected 0"),
        (".idx", 78, struct.pack("<q", 4), "document 1 begins at sequence 4, expected 0 to 3"),
        (".idx", 86, struct.pack("<q", 0), "document 2 begins at sequence 0, expected 1 to 3"),
        (".bin", 25, b"\x21", "sequence 1 has token id 33 at position 6, but esm2's vocabulary ends at 32"),
        (".bin", 25, b"\x05", "counts .* times .*, but the dataset holds"),
    ],
)
def test_the_first_fault_is_named(
    prefix: Path,
    extension: str,
    offset: int,
    content: bytes,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(prefix, extension, offset, content)
    error = shown(capsys, prefix, "--verify", code=2)
    assert re.search(expected, error), error
    assert f"p{'.json' if 'counts' in expected else extension}'" in error


def test_letters_that_changed_places_are_found_by_the_checksum(
    prefix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prefix.with_suffix(".bin").read_bytes()[:2]
    damage(prefix, ".bin", 0, first[::-1])
    shown(capsys, prefix)  # without --verify nothing reads them all
    assert "p.bin' was changed: its SHA-256 is" in shown(capsys, prefix, "--verify", code=2)


def test_bytes_of_no_sequence_are_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, tokens = pack([[4, 5], [6]], "uint16")
    put(tmp_path / "p", index, tokens + b"\0")
    error = shown(capsys, tmp_path / "p", "--verify", code=2)
    assert "p.bin' has 7 bytes, but the last sequence of" in error
    put(tmp_path / "p", index, tokens)
    assert "verified: 2 sequences lie end to end" in shown(capsys, tmp_path / "p", "--verify")


def test_a_negative_id_is_a_fault_without_a_tokenizer_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "p", *pack([[4, 5], [], [6, -3]], "int32"))
    error = shown(capsys, tmp_path / "p", "--verify", code=2)
    assert "sequence 2 has token id -3 at position 2, but ids are 0 or more" in error
    assert re.search(r"^other ids +[█▉]+ +1 ", shown(capsys, tmp_path / "p"), re.M)


@pytest.mark.parametrize(
    ("change", "flags", "expected"),
    [
        ({"length_histogram": {"min": 8, "max": 20, "bins": [[8, 10, 1], [20, 24, 1]]}}, ["--verify"], "other lengths"),
        ({"length_histogram": 5}, [], "length_histogram or token_counts isn't what"),
        ({"token_counts": {"A": "x"}}, [], "length_histogram or token_counts isn't what"),
        ({"length_histogram": {"min": 1, "max": 2, "bins": [[3, 3, 1]]}}, [], "length_histogram or token_counts isn't"),
    ],
)
def test_a_description_that_tells_wrong_counts_is_a_fault(
    prefix: Path, change: dict, flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prefix.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    error = shown(capsys, prefix, *flags, code=2)
    assert "p.json'" in error
    assert expected in error


def test_a_description_without_counts_leads_to_counting(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = shown(capsys, prefix)
    path = prefix.with_suffix(".json")
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in metadata.items() if k not in ("length_histogram", "token_counts")}))
    after = shown(capsys, prefix)
    assert "counted     the files" in after
    assert after.split("\nlengths\n")[1] == before.split("\nlengths\n")[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["absent"], "'absent.idx' does not exist"),
        (["p", "--samples", "-1"], "--samples must be 0 or more"),
        (["p", "--plot", "p.jpg"], "--plot p.jpg: expected the name of a file that ends in .png"),
        (["p", "--plot", "absent/p.png"], "there is no folder absent"),
        (["p", "--verfy"], "did you mean '--verify'?"),
    ],
)
def test_a_wrong_flag_is_a_sentence(
    arguments: list[str],
    expected: str,
    prefix: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(prefix.parent)
    assert expected in shown(capsys, *arguments, code=2)


def test_the_plot_is_a_png_and_its_package_is_named(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "p.png"
    assert f"wrote {plot}" in shown(capsys, prefix, "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'megatron-plm[report]'" in shown(capsys, prefix, "--plot", plot, code=2)


def test_a_terminal_without_unicode_gets_plain_bars(prefix: Path) -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "inspect_data.py", prefix],
        capture_output=True, timeout=60, env=environment(PYTHONIOENCODING="ascii"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b" ####" in done.stdout


def test_bars_fit_the_terminal_and_are_as_long_as_their_counts() -> None:
    rows = [("a", 10**12), ("<long token>", 10**12 // 2), ("c", 1), ("d", 0)]
    for unicode in (True, False):
        lines = bars(rows, unicode=unicode)
        assert max(map(len, lines)) <= WIDTH
        whole, half, one, none = (line.count("█" if unicode else "#") for line in lines)
        assert abs(whole - 2 * half) <= 1
        assert (one, none) == (0, 0)
    assert bars([], unicode=True) == []
    assert len({line.index("1") for line in bars([("x", 100), ("y", 199)], unicode=True)}) == 1, "counts are aligned"


def test_joined_bins_are_two_for_every_doubling_and_lose_nothing() -> None:
    histogram = [(0, 1, 2), (1, 2, 3), (7, 8, 1), (8, 10, 4), (10, 12, 5), (12, 14, 6), (14, 16, 7), (16, 20, 8)]
    assert length_rows(histogram) == [("0", 2), ("1", 3), ("7", 1), ("8 to 11", 9), ("12 to 15", 13), ("16 to 19", 8)]


def test_ids_beyond_every_vocabulary_are_counted_together() -> None:
    counter = TokenCounter()
    counter.add(np.array([3, -1, 65_535, 65_536, 2**31 - 1, 3], dtype=np.int32))
    counter.add(np.array([255, 3], dtype=np.uint8))
    assert counter.by_name(None) == {"3": 3, "255": 1, "65535": 1, "other ids": 3}


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    num, length = 3_000_000, 40
    lengths = np.full(num, length, dtype="<i4")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 1, num, num + 1)
    pointers, documents = np.arange(num, dtype="<i8") * length, np.arange(num + 1, dtype="<i8")
    (tmp_path / "p.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + documents.tobytes())
    (tmp_path / "p.bin").write_bytes(bytes([5, 6, 7, 8]) * (num * length // 4))
    code = (
        "import re, sys; from megatron_plm.data.inspect.command import main; import numpy, threading, time\n"
        "peak = [0]\n"
        "def look():\n"
        "    while True:\n"
        "        text = open('/proc/self/status').read()\n"
        "        peak[0] = max(peak[0], int(re.search(r'RssAnon:\\s+(\\d+)', text)[1])); time.sleep(0.01)\n"
        "threading.Thread(target=look, daemon=True).start(); time.sleep(0.1); before = peak[0]\n"
        "main([sys.argv[1], '--verify', '--samples', '0'])\n"
        "print('grown', peak[0] - before, 'kB')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "p"], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert "verified: 120,000,000 token ids" in done.stdout
    # .idx and .bin are 180 MB; a chunk of 2^20 entries takes 8 MB, and several of them live at a time.
    assert int(re.search(r"grown (\d+) kB", done.stdout)[1]) < 100_000
