"""Run directories with given scores, and the benchmark report of them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_plm.errors import run_command
from tape_finetune.reporting.command import main


def result(
    folder: Path,
    name: str,
    values: dict[str, float | None],
    *,
    task: str = "fluorescence",
    metric: str = "spearmanr",
    seed: int = 1,
    base: str = "transformer",
    label: str = "Ours",
    data: str = "a",
    **changes: Any,
) -> Path:
    """A run directory with the scores `values` by split; `data` stands for the content of the splits."""
    directory = folder / name
    directory.mkdir(parents=True)

    def score(value: float | None) -> dict[str, float | None]:
        return {
            "value": value,
            **{end: None if value is None else value + x for end, x in (("low", -0.1), ("high", 0.1))},
        }

    splits = {
        split: {
            "num_examples": 100,
            "cropped": 2,
            "num_undefined": 0,
            "num_in_train": 0,
            "file": f"{split}.jsonl.gz",
            "sha256": (data + split).encode().hex().ljust(64, "0"),
            "metrics": {metric: score(value), "mse": score(0.5)},
        }
        for split, value in values.items()
    }
    document = {
        "task": task, "base_model": base, "label": label, "seed": seed, "seconds": 2.0 * seed, "note": None,
        "from_pretrained": "out/tape" if base == "transformer" else None, "command": f"tape_train {name}",
        "num_parameters": 10, "num_trained_parameters": 5, "primary_metric": metric, "splits": splits, "epochs": [],
    }  # fmt: skip
    (directory / "results.json").write_text(json.dumps(document | changes))
    return directory


def run_file(directory: Path, task: str, **state: Any) -> None:
    (directory / "run.json").write_text(json.dumps({"task": {"name": task, "state": state}, "data_dir": None}))


def report(folder: Path, runs: list[Path], *flags: str) -> dict[str, Any]:
    output = folder / "report"
    assert run_command(main, ["--results", *map(str, runs), "--output", str(output), *flags]) == 0
    assert {path.name for path in output.iterdir()} == {"report.html", "report.md", "report.json", "plots"}
    return json.loads((output / "report.json").read_text())


def refused(folder: Path, runs: list[Path], capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert run_command(main, ["--results", *map(str, runs), "--output", str(folder / "report"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def save(directory: Path, split: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]], length: int = 30) -> None:
    lines = [{"length": length, "cropped": False, "truth": truth, "prediction": found} for truth, found in pairs]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / f"predictions_{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
