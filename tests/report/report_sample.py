"""A realistic pretraining run and downstream results on disk, for the report's tests."""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LONG_NOTE = "fine-tuned with another head than the models before it"
CONFIG = """[model]
preset = "esm2-8m"
num_layers = 6
hidden_size = 320

[training]
train_iters = 200
lr = 0.0004
seed = 1
"""


def start(command: str = "launch/pretrain.sh --config launch/configs/demo.toml --seed 1", **changes: Any) -> dict:
    """Return a start record, with `changes` in place of its usual values."""
    return {
        "kind": "start",
        "command": command,
        "time": "2026-03-01T10:00:00+00:00",
        "versions": {"python": "3.11.9", "torch": "2.13.0", "megatron_plm": "0.1.0"},
        "machine": "x86_64, 2 cores, CPU",
        "world_size": 1,
        "num_parameters": 7_512_673,
        "seed": 1,
        "train_sequences": 4_512,
        "train_residues": 1_612_345,
    } | changes


def train(step: int, loss: float = 2.9, **changes: Any) -> dict:
    """Return a train record."""
    return {
        "kind": "train",
        "step": step,
        "loss": loss,
        "lr": 4e-4,
        "grad_norm": 0.8,
        "tokens": 8_150,
        "consumed_tokens": 8_150 * step,
        "fill": 0.995,
        "tokens_per_second": 5_400.0,
        "elapsed_seconds": 1.5 * step,
    } | changes


def valid(step: int, perplexity: float = 17.25, **changes: Any) -> dict:
    """Return a valid record."""
    return {
        "kind": "valid",
        "step": step,
        "loss": math.log(perplexity) - 0.02,  # easier labels count too
        "perplexity": perplexity,
        "accuracy": 0.0915,
        "unigram_perplexity": 17.97,
        "num_labels": 21_345,
    } | changes


def end(step: int, status: str = "finished", seconds: float = 321.0) -> dict:
    """Return an end record."""
    return {"kind": "end", "step": step, "status": status, "elapsed_seconds": seconds}


def realistic_records(num_steps: int = 200) -> list[dict]:
    """Return the records of a run that warms up, learns, validates every 20 steps and finishes."""
    noise = random.Random(7)
    records = [start()]
    for step in range(1, num_steps + 1):
        loss = 2.80 + 0.55 * math.exp(-step / 22) + noise.gauss(0, 0.012)
        rate = 4e-4 * min(step / 20, 1 - 0.9 * (step - 20) / (num_steps - 20))
        speed = 5_400 + noise.gauss(0, 120) - (1_800 if step == 1 else 0)
        fill = 0.994 + noise.gauss(0, 0.001)
        records.append(train(step, loss, lr=rate, tokens_per_second=speed, fill=fill))
        if step % 20 == 0:
            perplexity = math.exp(2.81 + 0.55 * math.exp(-step / 22))
            records.append(valid(step, perplexity, accuracy=0.095 - 0.04 * math.exp(-step / 30)))
    return [*records, end(num_steps)]


def write_run(directory: Path, records: Sequence[dict], config: str = CONFIG) -> Path:
    """Write a run directory and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.toml").write_text(config, encoding="utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return directory


def result(task: str = "peptides", base_model: str = "transformer", label: str = "pretrained", **changes: Any) -> dict:
    """Return the content of a results.json."""
    pretrained = base_model == "transformer"
    return {
        "task": task,
        "base_model": base_model,
        "label": label,
        "from_pretrained": "out/tape" if pretrained else None,
        "seed": 1,
        "command": f"python tape_finetune/tape_train.py {base_model} {task} --batch_size 32",
        "seconds": 41.27,
        "num_parameters": 7_833_122,
        "num_trained_parameters": 320_449,
        "primary_metric": "accuracy",
        "note": None,
        "splits": {
            "valid": scores(510, accuracy=(0.871, 0.842, 0.899)),
            "test": scores(523, accuracy=(0.862, 0.831, 0.891), auroc=(0.931, 0.909, 0.951)),
        },
        "epochs": [{"epoch": 1, "train_loss": 0.51, "valid_metric": 0.84}],
    } | changes


def scores(num_examples: int, cropped: int = 0, **metrics: tuple[float | None, float | None, float | None]) -> dict:
    """Return one split's scores from (value, low, high) by metric name.

    Splits of one size stand for one file, so that the results of several models are of the same data.
    """
    named = {name: dict(zip(("value", "low", "high"), ends, strict=True)) for name, ends in metrics.items()}
    file, sha256 = f"{num_examples}.csv", hashlib.sha256(str(num_examples).encode()).hexdigest()
    return {"num_examples": num_examples, "cropped": cropped, "file": file, "sha256": sha256, "metrics": named}


def realistic_results() -> list[dict]:
    """Return one model on contacts and three on secondary structure, of too few proteins to rank, and three that do."""
    peptides = [
        result(),
        result(
            base_model="random",
            label="random-initialised",
            splits={
                "valid": scores(510, accuracy=(0.801, 0.767, 0.835)),
                "test": scores(523, accuracy=(0.797, 0.761, 0.832), auroc=(0.871, 0.840, 0.900)),
            },
        ),
        result(
            base_model="onehot",
            label="one-hot",
            num_trained_parameters=21_122,
            seconds=6.1,
            splits={
                "valid": scores(510, accuracy=(0.832, 0.798, 0.862)),
                "test": scores(523, accuracy=(0.826, 0.793, 0.858), auroc=(0.899, 0.872, 0.924)),
            },
        ),
    ]
    small = [
        result(
            "secondary_structure",
            base_model,
            label,
            splits={
                "valid": scores(3, accuracy=(value, value - 0.08, value + 0.07)),
                "test": scores(4, 1, accuracy=(value + 0.01, value - 0.07, value + 0.09)),
            },
        )
        for base_model, label, value in (
            ("transformer", "pretrained", 0.47),
            ("random", "random-initialised", 0.44),
            ("onehot", "one-hot", 0.45),
        )
    ]
    contacts = [
        result(
            "contact_prediction",
            "transformer",
            "pretrained",
            primary_metric="precision_at_l5",
            note=LONG_NOTE,
            splits={"test": scores(4, 0, precision_at_l5=(0.11, 0.02, 0.21), precision_at_l5_long=(0.04, 0.0, 0.1))},
        )
    ]
    return contacts + small + peptides


def write_results(parent: Path, results: Sequence[dict], data_dir: str | None = None) -> list[Path]:
    """Write each results.json into a directory of its own, a run.json beside it where `data_dir` is given, and
    return the directories."""
    directories = []
    for index, content in enumerate(results):
        directory = parent / f"{content['base_model']}-{index}"
        directory.mkdir(parents=True)
        (directory / "results.json").write_text(json.dumps(content), encoding="utf-8")
        if data_dir is not None:
            (directory / "run.json").write_text(json.dumps({"data_dir": data_dir, "seed": 1}), encoding="utf-8")
        directories.append(directory)
    return directories


def arguments(run: Path, results: list[Path], output: Path) -> list[str]:
    """Return the command line of a report."""
    flags = ["--pretraining", str(run), "--output", str(output)]
    return [*flags, "--results", *map(str, results)] if results else flags
