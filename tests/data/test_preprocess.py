"""The command `preprocess_data` on good input: what it writes, prints and uses."""

import gzip
import hashlib
import os
import pty
import random
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from preprocess_command import SEQUENCES, TEXT, command, environment, outputs, run
from shared_data import shared_data

from megatron_plm.data import formats
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.preprocess import preprocess
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer


def test_the_dataset_holds_the_file_and_says_what_it_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    tokenizer = get_tokenizer("esm2")
    dataset = IndexedDataset(folder / "out" / "p")
    assert [tokenizer.decode(sequence) for sequence in dataset] == [
        sequence.replace("J", "<unk>").replace("*", "<unk>") for sequence in SEQUENCES
    ]
    letters = "".join(SEQUENCES)
    metadata = dataset.metadata
    assert metadata.pop("sha256") == {
        end: hashlib.sha256((folder / "out" / f"p.{end}").read_bytes()).hexdigest() for end in ("idx", "bin")
    }
    counts = metadata.pop("token_counts")
    assert list(counts) == list(tokenizer.tokens)
    assert counts["<unk>"] == 2
    assert all(counts[token] == letters.count(token) for token in tokenizer.tokens if len(token) == 1)
    assert metadata == {
        "format": "megatron-plm-dataset",
        "version": 1,
        "tokenizer": {"name": "esm2", "sha256": tokenizer.sha256},
        "num_sequences": 3,
        "num_documents": 3,
        "num_residues": 48,
        "num_unknown_letters": 2,
        "unknown_letters": {"*": 1, "J": 1},
        "length_histogram": {
            "min": 8,
            "max": 20,
            "mean": 16.0,
            "bins": [[8, 10, 1], [10, 12, 0], [12, 14, 0], [14, 16, 0], [16, 20, 0], [20, 24, 2]],
        },
        "num_final_stops": 0,
        "keep_case": False,
        "sources": [{"path": str(folder / "in.fasta"), "format": "fasta", "bytes": len(TEXT)}],
        "tool_version": "0.1.0",
        "command": f"python tools/preprocess_data.py --input {folder}/in.fasta --output-prefix {folder}/out/p",
    }
    out = capsys.readouterr().out
    prefix = folder / "out" / "p"
    for line in [
        "sequences        3\n",
        "residues         48\n",
        "lengths          8 to 20, mean 16.0\n",
        "unknown letters  2 (4.2 %), written as <unk>: * 1, J 1\n",
        f"wrote            {prefix}.bin, {prefix}.idx, {prefix}.json\n",
        f"next:            launch/pretrain.sh --preset esm2-8m --data-path {prefix} --save runs/p\n",
    ]:
        assert line in out
    assert outputs(folder) == ["p.bin", "p.idx", "p.json"]


def test_the_recorded_command_can_be_typed_again_and_library_use_records_none(folder: Path) -> None:
    (folder / "it's.fasta").write_bytes(TEXT)
    flags = ["--input", str(folder / "it's.fasta"), "--output-prefix", str(folder / "out" / "p")]
    assert run(folder, *flags) == 0
    recorded = IndexedDataset(folder / "out" / "p").metadata["command"]
    assert shlex.split(recorded) == ["python", "tools/preprocess_data.py", *flags]
    preprocess([folder / "in.fasta"], folder / "out" / "q", get_tokenizer("esm2"))
    assert "command" not in IndexedDataset(folder / "out" / "q").metadata


def test_names_of_files_may_be_of_any_bytes(folder: Path) -> None:
    odd = os.fsdecode(b"\xff.fasta")
    (folder / odd).write_bytes(TEXT)
    table = folder / os.fsdecode(b"\xfe.tsv")
    table.write_text("C\tP2\n")
    flags = ["--input", folder / odd, "--clusters", table, "--output-prefix", folder / "out" / "p"]
    done = subprocess.run(command(*flags), capture_output=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    described = IndexedDataset(folder / "out" / "p").metadata
    assert described["sources"][0]["path"].endswith(r"/\xff.fasta")
    assert described["selection"]["clusters"]["path"].endswith(r"/\xfe.tsv")
    assert r"\xff.fasta" in described["command"]


def test_without_case_folding_lower_case_is_unknown(folder: Path) -> None:
    assert run(folder, "--keep-case") == 0
    metadata = IndexedDataset(folder / "out" / "p").metadata
    assert metadata["unknown_letters"] == {"*": 1, "J": 1, "a": 1, "g": 1, "k": 1, "l": 1, "m": 1, "v": 1}


def test_another_tokenizer_gives_its_ids_and_names_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--tokenizer", "tape-iupac") == 0
    dataset = IndexedDataset(folder / "out" / "p")
    assert dataset[2].tolist() == get_tokenizer("tape-iupac").encode(SEQUENCES[2]).tolist()
    assert dataset.metadata["tokenizer"]["name"] == "tape-iupac"
    assert "--preset tape-transformer --data-path" in capsys.readouterr().out


def test_several_files_plain_and_compressed_follow_each_other_in_order(folder: Path) -> None:
    (folder / "b.fasta.gz").write_bytes(gzip.compress(b">b\nMM\n"))
    (folder / "ünïcode 蛋白.fasta").write_bytes(b">c\nKK")
    inputs = [folder / "ünïcode 蛋白.fasta", folder / "b.fasta.gz", folder / "in.fasta"]
    assert run(folder, "--input", *inputs, "--output-prefix", folder / "out" / "蛋白.v1 é") == 0
    dataset = IndexedDataset(folder / "out" / "蛋白.v1 é")
    assert dataset.lengths.tolist() == [2, 2, 20, 8, 20]
    assert [source["path"] for source in dataset.metadata["sources"]] == list(map(str, inputs))
    assert outputs(folder) == [f"蛋白.v1 é.{end}" for end in ("bin", "idx", "json")]


def random_fasta(num_records: int) -> bytes:
    source = random.Random(7)
    lines = []
    for number in range(num_records):
        sequence = "".join(source.choices("LAGVSERTIDPKQNFYMHWCXxJ*", k=source.randint(1, 700)))
        width = source.choice([60, 1000])
        lines += [f">P{number} some words", *(sequence[i : i + width] for i in range(0, len(sequence), width))]
    return "\n".join(lines).encode()


def test_the_files_are_the_same_for_every_number_of_workers_and_block_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [folder / "a.fasta", folder / "b.fasta.gz"]
    inputs[0].write_bytes(random_fasta(300))
    inputs[1].write_bytes(gzip.compress(random_fasta(200)))
    seen = set()
    for block_size, workers in [(1 << 20, 1), (1 << 20, 2), (997, 1), (997, 2), (64, 5)]:
        monkeypatch.setattr(formats, "BLOCK_SIZE", block_size)
        preprocess(inputs, folder / "out" / "p", get_tokenizer("esm2"), workers=workers, force=True)
        seen.add(tuple((folder / "out" / name).read_bytes() for name in outputs(folder)))
    assert len(seen) == 1


@pytest.mark.parametrize("workers", [1, 4])
def test_a_fault_far_into_a_file_is_told_with_its_line_for_every_number_of_workers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    text = random_fasta(100) + b"\n>last\n>more\n"
    (folder / "in.fasta").write_bytes(text + random_fasta(100))
    monkeypatch.setattr(formats, "BLOCK_SIZE", 256)
    line = text.count(b"\n") - 1
    with pytest.raises(UserError, match=f"in.fasta', line {line}: record 'last' has no sequence"):
        preprocess([folder / "in.fasta"], folder / "out" / "p", get_tokenizer("esm2"), workers=workers)
    assert outputs(folder) == []


def test_swissprot_is_what_a_plain_python_reader_makes_of_it(folder: Path) -> None:
    swissprot = shared_data("pretrain/swissprot_small.fasta.gz")
    tokenizer = get_tokenizer("esm2")
    sequences: list[str] = []
    with gzip.open(swissprot, "rt") as lines:
        for line in lines:
            if line.startswith(">"):
                sequences.append("")
            else:
                sequences[-1] += line.rstrip("\n")
    assert run(folder, "--input", swissprot) == 0
    dataset = IndexedDataset(folder / "out" / "p")
    assert dataset.lengths.tolist() == list(map(len, sequences))
    ids = {letter: tokenizer.tokens.index(letter) for letter in set("".join(sequences))}
    expected = hashlib.sha256(bytes(map(ids.__getitem__, "".join(sequences))))
    assert hashlib.sha256((folder / "out" / "p.bin").read_bytes()).hexdigest() == expected.hexdigest()


def test_a_terminal_sees_a_bar_and_a_log_does_not(folder: Path) -> None:
    arguments = command("--input", folder / "in.fasta", "--output-prefix", folder / "out" / "p", "--force")
    parent, child = pty.openpty()
    subprocess.run(arguments, env={**environment(), "TERM": "xterm"}, stderr=child, stdout=subprocess.PIPE, check=True)
    os.close(child)
    assert b"tokenizing" in os.read(parent, 100_000)
    os.close(parent)
    done = subprocess.run(arguments, env=environment(), capture_output=True, check=True)
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("flags", "num_kept"),
    [([], 480_001), (["--dedup", "--shuffle", "--split", "train=1", "--max-length", "402"], 240_000)],
    ids=["plain", "everything"],
)
def test_memory_stays_below_300_mb_on_long_input(folder: Path, flags: list[str], num_kept: int) -> None:
    """200 MB of FASTA, each record twice, and one of 10^7 letters; all memory counts here, mapped libraries too."""
    digits = bytes.maketrans(b"0123456789", b"ACDEFGHIKL")
    with gzip.open(folder / "big.fasta.gz", "wb", compresslevel=1) as file:
        for first in range(0, 480_000, 1000):
            codes = (b"%06d" % (number // 2) for number in range(first, first + 1000))
            rows = (b">P\n%s%s\n" % (code.translate(digits), b"MKVLAGSERTIDPKQNFY" * 22) for code in codes)
            file.write(b"".join(rows))
        file.write(b">long\n" + b"MKVLAGSERTIDPKQNFYHW" * 500_000)
    code = (
        "import re, sys; from megatron_plm.data.preprocess import main; main(sys.argv[1:])\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "assert 'torch' not in sys.modules"
    )
    prefix = folder / "out" / "p"
    arguments = ["--input", folder / "big.fasta.gz", "--output-prefix", prefix, "--workers", "2", *flags]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), check=True, capture_output=True, text=True
    )
    assert int(done.stdout.splitlines()[-1]) < 300_000
    lengths = IndexedDataset(f"{prefix}_train" if "--split" in flags else prefix).lengths
    assert len(lengths) == num_kept
    assert set(np.unique(lengths).tolist()) == ({402, 10_000_000} if not flags else {402})
