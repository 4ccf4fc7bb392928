"""The command `merge_datasets`: what it writes, what it refuses."""

import hashlib
import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from preprocess_command import run as preprocess
from test_selection import documents, proteins, sequences, write_fasta

from megatron_plm.data import merge as merge_module
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.indexed_writer import IndexedDatasetWriter
from megatron_plm.data.merge import main, merge
from megatron_plm.errors import USER_ERROR_EXIT_CODE, UserError, run_command

NO_DESCRIPTION = {"format": "megatron-plm-dataset", "version": 1, "num_sequences": 1, "num_residues": 3}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A folder with the datasets a, of one document a sequence, and b, of clusters."""
    write_fasta(tmp_path / "a.fasta", proteins(50))
    write_fasta(tmp_path / "b.fasta", proteins(70, seed=2))
    (tmp_path / "clusters.tsv").write_text("".join(f"C{i % 9}\tP{i}\n" for i in range(60)))
    assert preprocess(tmp_path, "--input", tmp_path / "a.fasta", "--output-prefix", tmp_path / "a") == 0
    flags = ["--clusters", tmp_path / "clusters.tsv"]
    assert preprocess(tmp_path, "--input", tmp_path / "b.fasta", "--output-prefix", tmp_path / "b", *flags) == 0
    return tmp_path


def run(folder: Path, *names: str, output: str = "m") -> int:
    inputs = [str(folder / name) for name in names]
    return run_command(main, ["--input", *inputs, "--output-prefix", str(folder / output)])


def left(folder: Path) -> list[str]:
    """The files that begin with the output's name."""
    return sorted(path.name for path in folder.glob("m*"))


@pytest.mark.parametrize("names", [["a", "b"], ["b", "a", "b"], ["a"]])
def test_sequences_and_documents_follow_each_other(
    pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], names: list[str]
) -> None:
    monkeypatch.setattr(merge_module, "_SEQUENCES", 7)
    monkeypatch.setattr(merge_module, "_TOKENS", 100)
    assert run(pair, *names) == 0
    assert documents(pair / "m") == [document for name in names for document in documents(pair / name)]
    assert left(pair) == ["m.bin", "m.idx", "m.json"]
    parts = [json.loads((pair / f"{name}.json").read_text()) for name in names]
    merged = json.loads((pair / "m.json").read_text())
    for key in ("num_sequences", "num_documents", "num_residues", "num_unknown_letters"):
        assert merged[key] == sum(part[key] for part in parts)
    for token, count in merged["token_counts"].items():
        assert count == sum(part["token_counts"][token] for part in parts)
    lengths = [len(letters) for name in names for letters in sequences(pair / name)]
    assert [count for *_, count in merged["length_histogram"]["bins"]] == [
        sum(low <= length < high for length in lengths) for low, high, _ in merged["length_histogram"]["bins"]
    ]
    assert merged["sources"] == [source for part in parts for source in part["sources"]]
    assert [part["prefix"] for part in merged["merged"]] == [str(pair / name) for name in names]
    for end in ("bin", "idx"):
        assert merged["sha256"][end] == hashlib.sha256((pair / f"m.{end}").read_bytes()).hexdigest()
    out = capsys.readouterr().out
    assert f"sequences        {len(lengths)} in {merged['num_documents']} documents\n" in out
    assert f"--data-path {pair / 'm'} --save runs/m\n" in out


def test_a_merge_of_parts_is_the_dataset_of_all_inputs(tmp_path: Path) -> None:
    inputs = [tmp_path / "a.fasta", tmp_path / "b.fasta"]
    for number, path in enumerate(inputs):
        write_fasta(path, proteins(30, seed=number))
        assert preprocess(tmp_path, "--input", path, "--output-prefix", path.with_suffix("")) == 0
    assert preprocess(tmp_path, "--input", *inputs, "--output-prefix", tmp_path / "all") == 0
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    for end in ("bin", "idx"):
        assert (tmp_path / f"m.{end}").read_bytes() == (tmp_path / f"all.{end}").read_bytes()


def test_wider_tokens_are_merged(tmp_path: Path) -> None:
    for name, tokens in [("a", [1, 300]), ("b", [65535])]:
        with IndexedDatasetWriter(tmp_path / name, dtype=np.uint16) as writer:
            writer.append(np.array(tokens, dtype=np.uint16), np.array([len(tokens)], dtype=np.int32))
            described = {"tokenizer": {"name": "wide", "sha256": "1"}, "token_counts": {"x": len(tokens)}}
            writer.commit({**NO_DESCRIPTION, "num_residues": len(tokens), **described})
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    dataset = IndexedDataset(tmp_path / "m")
    assert [sequence.tolist() for sequence in dataset] == [[1, 300], [65535]]
    assert dataset.tokens.dtype == np.uint16


def edit(path: Path, place: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    path.write_bytes(data)


def other_tokenizer(folder: Path) -> None:
    flags = ["--input", folder / "b.fasta", "--output-prefix", folder / "b", "--force"]
    assert preprocess(folder, *flags, "--tokenizer", "tape-iupac") == 0


def other_width(folder: Path) -> None:
    described = json.loads((folder / "b.json").read_text())
    with IndexedDatasetWriter(folder / "b", dtype=np.uint16, force=True) as writer:
        writer.append(np.ones(3, dtype=np.uint16), np.array([3], dtype=np.int32))
        writer.commit({**described, "num_sequences": 1, "num_residues": 3})


def swapped_lengths(folder: Path) -> None:
    lengths = IndexedDataset(folder / "b").lengths
    number = next(i for i in range(5, 60) if lengths[i] != lengths[i + 1])
    edit(folder / "b.idx", 34 + 4 * number, lengths[[number + 1, number]].tobytes())


DAMAGES = {
    "missing": (lambda folder: (folder / "b.idx").unlink(), "b.idx' does not exist"),
    "no description": (lambda folder: (folder / "b.json").unlink(), "only datasets of tools/preprocess_data.py"),
    "tokenizer": (other_tokenizer, "is of tokenizer tape-iupac, '"),
    "width": (other_width, "b' holds uint16 tokens, '"),
    "token changed": (lambda folder: edit(folder / "b.bin", 100, b"\x09"), "b.bin' is damaged: its SHA-256 is not"),
    "lengths": (swapped_lengths, "b.idx' is damaged: sequences from 0 on, or documents with them, don't lie end"),
    "documents": (
        lambda folder: edit(folder / "b.idx", 34 + 12 * 70 + 8, (60).to_bytes(8, "little")),
        "b.idx' is damaged: sequences from 0 on, or documents with them, don't lie end",
    ),
    "first document": (
        lambda folder: edit(folder / "b.idx", 34 + 12 * 70, (1).to_bytes(8, "little")),
        "b.idx' is damaged: sequences from 0 on, or documents with them, don't lie end",
    ),
    "surplus": (
        lambda folder: (folder / "b.bin").write_bytes((folder / "b.bin").read_bytes() + b"\x09"),
        "b.json' describes",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_cannot_be_merged_is_told_and_leaves_nothing(
    pair: Path, capsys: pytest.CaptureFixture[str], damage: object, message: str
) -> None:
    assert callable(damage)
    damage(pair)
    capsys.readouterr()
    assert run(pair, "a", "b") == USER_ERROR_EXIT_CODE
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert left(pair) == []


def test_an_input_is_never_overwritten(pair: Path) -> None:
    before = (pair / "a.bin").read_bytes()
    with pytest.raises(UserError, match="is also an --input"):
        merge([pair / "a", pair / "b"], pair / "a", force=True)
    assert (pair / "a.bin").read_bytes() == before


def test_an_existing_dataset_is_replaced_only_with_force(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pair, "a") == 0
    assert run(pair, "b") == USER_ERROR_EXIT_CODE
    assert "exists already" in capsys.readouterr().err
    merge([pair / "b"], pair / "m", force=True)
    assert documents(pair / "m") == documents(pair / "b")


def test_two_merges_to_one_prefix_are_told_apart(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedDatasetWriter(pair / "m"):
        assert run(pair, "a", "b") == USER_ERROR_EXIT_CODE
        assert "another run is writing" in capsys.readouterr().err
    assert left(pair) == []


def test_a_full_disk_is_told_and_leaves_nothing(pair: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            merge([pair / "a", pair / "b"], pair / "m")
        except UserError as error:
            os._exit(17 if "cannot be written: File too large" in str(error) else 18)
        finally:
            os._exit(19)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    assert left(pair) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output-prefix", "m"], "required: --input"),
        (["--input", "a"], "required: --output-prefix"),
        (["--input", "a", "--output-prefix", "/"], "--output-prefix '/' is a folder: expected FOLDER/NAME"),
    ],
)
def test_bad_flags_are_told(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert run_command(main, flags) == USER_ERROR_EXIT_CODE
    assert message in capsys.readouterr().err
