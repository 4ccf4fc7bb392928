"""tape_eval --save_predictions: truth and prediction of each protein, from which the scores can be computed again."""

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_sample import sequence, write_csv
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from megatron_plm.errors import run_command
from tape_finetune import evaluate, train

LOCATIONS = ("Nucleus|Cytoplasm", "Cytoplasm", "Cell membrane")


@pytest.fixture(scope="module")
def localization_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Proteins with one or two places in the cell."""
    folder = tmp_path_factory.mktemp("localization")
    rng = np.random.default_rng(3)
    for split, count in {"train": 60, "valid": 20, "test": 30}.items():
        rows = [(f"{split}{n}", 0, LOCATIONS[n % 3], sequence(rng, 20)) for n in range(count)]
        write_csv(folder / f"{split}.csv", ("ACC", "Membrane", "Localization", "Sequence"), rows)
    return folder


def saved(folder: Path, split: str, *argv: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Train a one-hot model and save its predictions: the lines, and the scores of the split."""
    flags = ["--num_train_epochs", "2", "--output_dir", str(folder), "--exp_name", "run", "--head", "linear"]
    assert run_command(train.main, ["onehot", *argv, *flags]) == 0
    run = folder / "run"
    assert run_command(evaluate.main, ["onehot", argv[0], str(run), "--split", split, "--save_predictions"]) == 0
    scores = json.loads((run / "results.json").read_text())["splits"][split]["metrics"]
    path = run / f"predictions_{split}.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    return lines, {name: score["value"] for name, score in scores.items()}


def csv_flags(folder: Path, label: str, kind: str) -> list[str]:
    columns = ["--sequence_column", "sequence", "--label_column", label]
    return ["csv", "--data_dir", str(folder), *columns, "--kind", kind]


def test_classes(peptide_dir: Path, tmp_path: Path) -> None:
    lines, scores = saved(tmp_path, "test", *csv_flags(peptide_dir, "label", "classification"))
    with (peptide_dir / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [line["truth"]["label"] for line in lines] == [row["label"] for row in rows]
    assert [line["length"] for line in lines] == [len(row["sequence"]) for row in rows]
    right = [line["truth"]["label"] == line["prediction"]["label"] for line in lines]
    assert np.mean(right) == pytest.approx(scores["accuracy"])


def test_numbers(peptide_dir: Path, tmp_path: Path) -> None:
    lines, scores = saved(tmp_path, "test", *csv_flags(peptide_dir, "charge", "regression"))
    truth = [line["truth"]["value"] for line in lines]
    found = [line["prediction"]["value"] for line in lines]
    assert spearmanr(truth, found).statistic == pytest.approx(scores["spearmanr"])
    assert np.mean((np.array(truth) - found) ** 2) == pytest.approx(scores["mse"])


def test_residues(structure_dir: Path, tmp_path: Path) -> None:
    lines, scores = saved(tmp_path, "test", "secondary_structure", "--data_dir", str(structure_dir))
    pairs = [
        (true, found)
        for line in lines
        for true, found in zip(line["truth"]["labels"], line["prediction"]["labels"], strict=True)
    ]
    scored = [true == found for true, found in pairs if true != "-"]
    assert 0 < len(scored) < len(pairs)
    assert np.mean(scored) == pytest.approx(scores["accuracy"])


def test_several_classes(localization_dir: Path, tmp_path: Path) -> None:
    flags = ["localization", "--kind", "location", "--data_dir", str(localization_dir)]
    lines, scores = saved(tmp_path, "test", *flags)
    assert [set(line["truth"]["labels"]) for line in lines] == [set(LOCATIONS[n % 3].split("|")) for n in range(30)]
    names = list(lines[0]["prediction"]["probabilities"])
    truth, found = (
        np.array([[name in line[key]["labels"] for name in names] for line in lines]) for key in ("truth", "prediction")
    )
    assert f1_score(truth, found, average="micro", zero_division=0) == pytest.approx(scores["micro_f1"])


def test_contacts(structure_dir: Path, tmp_path: Path) -> None:
    lines, _ = saved(tmp_path, "test", "contact_prediction", "--data_dir", str(structure_dir))
    path = structure_dir / "proteinnet" / "proteinnet_test.jsonl.gz"
    records = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert len(lines) == len(records)
    for line, record in zip(lines, records, strict=True):
        points, known = record["tertiary"], record["valid_mask"]
        expected = [
            [i + 1, j + 1]
            for i in range(len(points))
            for j in range(i + 6, len(points))
            if known[i] and known[j] and math.dist(points[i], points[j]) < 8
        ]
        assert line["truth"]["contacts"] == expected
        assert len(line["prediction"]["contacts"]) == len(points)
    assert any(line["truth"]["contacts"] for line in lines)
