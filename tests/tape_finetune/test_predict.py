"""tape_predict: a row for every protein, in the order of the input, equal to what the model says of it alone."""

import csv
import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from finetune_sample import sequence, write_csv, write_jsonl
from full_disk import full_disk
from processes import REPOSITORY, environment, wait_for

from megatron_plm.errors import run_command
from tape_finetune import predict as predicting
from tape_finetune import train
from tape_finetune.evaluate import main as evaluate
from tape_finetune.predict import main


def trained(folder: Path, name: str, *argv: str) -> Path:
    """A run directory of a short training."""
    flags = [
        "--num_train_epochs",
        "1",
        "--freeze",
        "--output_dir",
        str(folder),
        "--exp_name",
        name,
        "--batch_size",
        "8",
    ]
    assert run_command(train.main, [*argv, *flags]) == 0
    return folder / name


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, peptide_dir: Path, structure_dir: Path
) -> dict[str, Path]:
    """Small runs by what they predict."""
    folder = tmp_path_factory.mktemp("runs")
    model = ["--from_pretrained", str(checkpoint)]
    table = ["transformer", "csv", *model, "--data_dir", str(peptide_dir), "--sequence_column", "sequence"]
    structures = [*model, "--data_dir", str(structure_dir)]
    return {
        "class": trained(folder, "class", *table, "--label_column", "label", "--kind", "classification"),
        "number": trained(folder, "number", *table, "--label_column", "charge", "--kind", "regression"),
        "residues": trained(folder, "residues", "transformer", "secondary_structure", *structures),
        "contacts": trained(folder, "contacts", "transformer", "contact_prediction", *structures),
    }


@pytest.fixture(scope="module")
def proteins() -> dict[str, str]:
    """1,000 proteins of many lengths, in no order of them."""
    rng = np.random.default_rng(5)
    return {f"P{number}|x y": sequence(rng, int(rng.integers(1, 60))) for number in range(1000)}


def write_fasta(path: Path, proteins: dict[str, str]) -> Path:
    path.write_text("".join(f">{name}\n{letters}\n" for name, letters in proteins.items()))
    return path


def predicted(run: Path, source: Path, output: Path, *flags: str) -> list[dict[str, Any]]:
    assert run_command(main, [str(run), "--input", str(source), "--output", str(output), *flags]) == 0
    content = gzip.decompress(output.read_bytes()) if output.suffix == ".gz" else output.read_bytes()
    lines = content.decode().splitlines()
    return list(csv.DictReader(lines)) if ".csv" in output.name else [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", ["class", "number"])
def test_a_thousand_proteins_give_a_thousand_rows_in_order(
    runs: dict[str, Path], proteins: dict[str, str], tmp_path: Path, kind: str
) -> None:
    source = write_fasta(tmp_path / "in.fasta", proteins)
    rows = predicted(runs[kind], source, tmp_path / "out.csv")
    assert [row["id"] for row in rows] == [name.split()[0] for name in proteins]
    assert [int(row["length"]) for row in rows] == [len(letters) for letters in proteins.values()]
    assert {row["cropped"] for row in rows} == {"false"}
    if kind == "class":
        p = np.array([[float(row[f"probability_{name}"]) for name in ("amp", "other")] for row in rows])
        np.testing.assert_allclose(p.sum(1), 1, atol=2e-6)
        assert [row["label"] for row in rows] == [("amp", "other")[k] for k in p.argmax(1)]
    else:
        assert len({row["value"] for row in rows}) > 900


@pytest.mark.parametrize("kind", ["class", "number", "residues", "contacts"])
def test_a_proteins_row_does_not_depend_on_the_others(
    runs: dict[str, Path], proteins: dict[str, str], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dict(list(proteins.items())[:40])
    source = write_fasta(tmp_path / "in.fasta", few)
    together = predicted(runs[kind], source, tmp_path / "together.jsonl")
    monkeypatch.setattr(predicting, "_BLOCK_PROTEINS", 7)
    alone = predicted(runs[kind], source, tmp_path / "alone.jsonl.gz", "--batch_size", "1")
    assert [row["id"] for row in alone] == [row["id"] for row in together]
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        if kind == "class":
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=2e-6)
        elif kind == "number":
            assert one["value"] == pytest.approx(other["value"], rel=1e-5, abs=1e-5)
        elif kind == "residues":
            np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=2e-6)
            assert len(one["labels"]) == one["length"]
        else:
            scores = {(i, j): p for i, j, p in other["contacts"]}
            assert len(scores) == len(one["contacts"])
            # Pairs that tie but for rounding may change places at the end of the list.
            assert sum((i, j) in scores for i, j, _ in one["contacts"]) >= len(scores) - 1
            assert all(scores.get((i, j), p) == pytest.approx(p, abs=2e-6) for i, j, p in one["contacts"])


def test_the_score_of_the_rows_is_what_tape_eval_says(runs: dict[str, Path], peptide_dir: Path, tmp_path: Path) -> None:
    run = ["transformer", "csv", str(runs["class"]), "--split", "test"]
    assert run_command(evaluate, run) == 0
    scored = json.loads((runs["class"] / "results.json").read_text())["splits"]["test"]["metrics"]["accuracy"]["value"]
    rows = predicted(runs["class"], peptide_dir / "test.csv", tmp_path / "out.csv")
    with (peptide_dir / "test.csv").open() as file:
        truth = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [row["id"] for row in truth]
    right = [row["label"] == true["label"] for row, true in zip(rows, truth, strict=True)]
    assert np.mean(right) == pytest.approx(scored, abs=1e-9)


def test_every_format_of_input_and_output_says_the_same(
    runs: dict[str, Path], proteins: dict[str, str], tmp_path: Path
) -> None:
    few = {name.split()[0]: letters for name, letters in list(proteins.items())[:20]}
    pairs = list(few.items())
    fasta = write_fasta(tmp_path / "a.fasta", few)
    (tmp_path / "a.fasta.gz").write_bytes(gzip.compress(fasta.read_bytes()))
    write_csv(tmp_path / "b.csv", ("id", "sequence"), pairs)
    (tmp_path / "c.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in [("id", "sequence"), *pairs]))
    write_jsonl(tmp_path / "d.jsonl.gz", [{"id": name, "sequence": letters} for name, letters in pairs])
    expected = predicted(runs["class"], fasta, tmp_path / "expected.jsonl")
    for name in ("a.fasta.gz", "b.csv", "c.tsv", "d.jsonl.gz"):
        assert predicted(runs["class"], tmp_path / name, tmp_path / "out.jsonl", "--force") == expected
    table = predicted(runs["class"], fasta, tmp_path / "out.csv.gz")
    assert [float(row["probability_amp"]) for row in table] == [row["probabilities"]["amp"] for row in expected]
    assert run_command(main, [str(runs["class"]), "--input", str(fasta), "--output", str(tmp_path / "o.parquet")]) == 0
    columns = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert [row["probability_other"] for row in columns] == [row["probabilities"]["other"] for row in expected]
    assert [row["cropped"] for row in columns] == [False] * len(few)


@pytest.mark.parametrize("kind", ["residues", "contacts"])
def test_lists_are_the_same_in_all_formats(
    runs: dict[str, Path], proteins: dict[str, str], tmp_path: Path, kind: str
) -> None:
    source = write_fasta(tmp_path / "in.fasta", dict(list(proteins.items())[:8]))
    rows = predicted(runs[kind], source, tmp_path / "out.jsonl")
    key = "probabilities" if kind == "residues" else "contacts"
    table = predicted(runs[kind], source, tmp_path / "out.csv")
    assert [json.loads(row[key]) for row in table] == [row[key] for row in rows]
    assert run_command(main, [str(runs[kind]), "--input", str(source), "--output", str(tmp_path / "o.parquet")]) == 0
    assert pq.read_table(tmp_path / "o.parquet")[key].to_pylist() == [row[key] for row in rows]


def test_longer_proteins_are_cropped_and_marked(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    long, short = sequence(rng, 40), sequence(rng, 10)
    source = write_fasta(tmp_path / "in.fasta", {"long": long, "short": short})
    rows = predicted(runs["residues"], source, tmp_path / "out.jsonl", "--max_length", "25")
    assert [(row["length"], row["cropped"], len(row["labels"])) for row in rows] == [(40, True, 25), (10, False, 10)]
    assert "longer proteins: 1 of more than 25 residues" in capsys.readouterr().out


def test_repeated_names_and_unknown_letters_get_their_rows(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMKJT\n>a\nmkjt\n>b\nMKT*\n")
    rows = predicted(runs["class"], tmp_path / "in.fasta", tmp_path / "out.jsonl")
    assert [(row["id"], row["length"]) for row in rows] == [("a", 4), ("a", 4), ("b", 3)]
    assert rows[0] == rows[1]
    assert "unknown letters: 2, read as the unknown token" in capsys.readouterr().out


def test_a_killed_run_leaves_no_output(runs: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    source = write_fasta(tmp_path / "in.fasta", {f"P{n}": sequence(rng, 300) for n in range(4_000)})
    place = tmp_path / "out"
    place.mkdir()
    command = [sys.executable, str(REPOSITORY / "tape_finetune/tape_predict.py"), str(runs["residues"])]
    command += ["--input", str(source), "--output", str(place / "out.jsonl")]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: any(path.stat().st_size for path in place.iterdir()), "rows", process=process)
        process.send_signal(signal.SIGKILL)
    assert not (place / "out.jsonl").exists()
    write_fasta(source, {"P1": "MKT"})
    assert len(predicted(runs["residues"], source, place / "out.jsonl")) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "out.txt"], "ends in .csv"),
        (["--output", "out.csv", "--input", "nowhere.fasta"], "nowhere.fasta' does not exist"),
        (["--output", "in.fasta"], "ends in .csv"),
        (["--output", "exists.csv"], "exists.csv exists already"),
        (["--output", "out.csv", "--batch_size", "0"], "--batch_size"),
        (["--output", "out.csv", "--fp16"], "--fp16: not supported"),
        (["--output", "no/out.csv"], "there is no folder no"),
        (["--output", "out.csv", "--input", "table.csv"], "no column"),
    ],
)
def test_wrong_flags_are_one_sentence_and_leave_nothing(
    runs: dict[str, Path],
    tmp_path: Path,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.fasta").write_text(">a\nMKT\n")
    Path("table.csv").write_text("name,letters\na,MKT\n")
    Path("exists.csv").write_text("mine")
    before = sorted(tmp_path.iterdir())
    argv = [str(runs["class"]), *([] if "--input" in flags else ["--input", "in.fasta"]), *flags]
    assert run_command(main, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_no_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_fasta(tmp_path / "in.fasta", {"a": "MKT"})
    flags = ["--input", str(source), "--output", str(tmp_path / "out.csv")]
    assert run_command(main, [str(tmp_path), *flags]) == 2
    assert "give a directory that tape_finetune/tape_train.py wrote" in capsys.readouterr().err
    (tmp_path / "run.json").write_text('{"task": 3}')
    assert run_command(main, [str(tmp_path), *flags]) == 2
    assert "not the description of a fine-tuned model" in capsys.readouterr().err


def test_a_full_disk_leaves_no_output(
    runs: dict[str, Path], proteins: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_fasta(tmp_path / "in.fasta", proteins)
    with full_disk(2000):
        code = run_command(main, [str(runs["class"]), "--input", str(source), "--output", str(tmp_path / "out.csv")])
    assert code == 2
    assert "cannot be written" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in.fasta"}
