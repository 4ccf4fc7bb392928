"""What tape_report tells of splits and trainings beside the scores: counts, checksums, memory and time."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_sample import refused, report, result, run_file

TRAIN = {"num_examples": 1234, "cropped": 56, "num_undefined": 7, "num_dropped": 0, "file": "t.csv", "sha256": "c" * 64}


def _rows(report_file: Path, start: str) -> list[list[str]]:
    lines = [line for line in report_file.read_text().splitlines() if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_split_stands_there_with_what_was_done_to_its_proteins(tmp_path: Path) -> None:
    run = result(tmp_path / "r", "one", {"valid": 0.4, "test": 0.5}, train=TRAIN)
    content = json.loads((run / "results.json").read_text())
    content["splits"]["test"] |= {"cropped": 3, "num_dropped": 4, "num_undefined": 5, "num_in_train": 6}
    (run / "results.json").write_text(json.dumps(content))
    (task,) = report(tmp_path, [run])["tasks"]
    assert task["train"] == [{name: count for name, count in TRAIN.items() if name != "num_dropped"} | {"windowed": 0}]
    assert task["splits"]["test"]["num_in_train"] == 6
    page = tmp_path / "report" / "report.md"
    (train,) = _rows(page, "train")
    assert train == ["train", "t.csv", "1,234", "–", "56", "0", "0", "7", "–", "c" * 64]
    test = next(row for row in _rows(page, "test") if row[1] == "test.jsonl.gz")
    assert test[2:-1] == ["100", "27,217", "3", "0", "4", "5", "6"]


def test_runs_of_one_label_that_learnt_from_other_proteins_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = result(tmp_path / "r", "first", {"test": 0.5}, train=TRAIN)
    second = result(tmp_path / "r", "second", {"test": 0.6}, seed=2, train=TRAIN | {"sha256": "d" * 64})
    assert "were trained on different proteins" in refused(tmp_path, [first, second], capsys)


@pytest.mark.parametrize(
    ("peaks", "cell"),
    [
        ([{"peak_memory": 200_000_000}, {"peak_memory": 300_400_000}], "300 MB"),
        ([{"peak_memory": 9_000_000_000, "peak_gpu_memory": 1_500_000_000}] * 2, "1,500 MB (GPU)"),
        ([{}, {}], "–"),
    ],
    ids=["process", "gpu", "unknown"],
)
def test_memory_time_and_score_are_one_row(tmp_path: Path, peaks: list[dict[str, Any]], cell: str) -> None:
    runs = [
        result(tmp_path / "r", f"s{seed}", {"test": 0.5}, seed=seed, **peak) for seed, peak in enumerate(peaks, start=1)
    ]
    report(tmp_path, runs)
    row = next(row for row in _rows(tmp_path / "report" / "report.md", "Ours") if "1, 2" in row)
    assert row == ["Ours", "1, 2", "0.500 ± 0.000 (2)", "5", "3.0", cell]


def test_tables_with_other_labels_are_other_tasks(tmp_path: Path) -> None:
    runs = []
    for column, kind in (("charge", "regression"), ("label", "classification")):
        runs.append(result(tmp_path / "r", column, {"test": 0.5}, task="csv", metric="mse"))
        run_file(runs[-1], "csv", label_column=column, kind=kind)
    titles = [task["title"] for task in report(tmp_path, runs)["tasks"]]
    assert titles == ["csv (charge, regression): test.jsonl.gz", "csv (label, classification): test.jsonl.gz"]
