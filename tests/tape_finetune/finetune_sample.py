"""Small labelled data sets that a model can learn, in every format that fine-tuning reads."""

import argparse
import csv
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_plm.config.options import ModelOptions
from tape_finetune.tasks import TASKS, Task
from tape_finetune.tasks.flags import SPLIT_FILES

LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
OPTIONS = ModelOptions(num_layers=2, hidden_size=32, num_attention_heads=4)
HELIX, STRAND, COIL = 0, 1, 2


def sequence(rng: np.random.Generator, length: int) -> str:
    """Random residues."""
    return "".join(rng.choice(LETTERS, length))


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """One object a line, gzipped where the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """A table with a header row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def csv_task(folder: Path, kind: str, label_column: str, **flags: Any) -> Task:
    """The task csv on the tables of a folder, with what it takes from the training labels."""
    given = {"data_dir": folder, "kind": kind, "sequence_column": "sequence", "label_column": label_column, **flags}
    arguments = argparse.Namespace(**dict.fromkeys((*SPLIT_FILES, "class_weights", "compat")) | given)
    task = TASKS["csv"].from_arguments(arguments)
    task.learn(task.load("train", task.files(folder)["train"], None))
    return task


def peptides(folder: Path, counts: dict[str, int], *, seed: int = 0) -> Path:
    """{split}.csv with the columns id, sequence, label, charge: `amp` peptides have more K and R than `other`, and
    charge is their number."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        rows = []
        for index in range(count):
            is_amp = index % 2 == 0
            weights = np.where(np.isin(LETTERS, ["K", "R"]), 6.0 if is_amp else 1.0, 1.0)
            letters = rng.choice(LETTERS, rng.integers(8, 25), p=weights / weights.sum())
            charge = int(np.isin(letters, ["K", "R"]).sum())
            rows.append((f"{split}{index}", "".join(letters), "amp" if is_amp else "other", charge))
        write_csv(folder / f"{split}.csv", ("id", "sequence", "label", "charge"), rows)
    return folder


def structure_record(rng: np.random.Generator, name: str, length: int) -> dict[str, Any]:
    """One protein in TAPE's fields: the letter decides ss3, the chain is a random walk, some residues are unknown."""
    letters = sequence(rng, length)
    states = [HELIX if letter in "AELKM" else STRAND if letter in "VIYFW" else COIL for letter in letters]
    valid = rng.random(length) > 0.1
    points = np.where(valid[:, None], random_walk(rng, length), 0.0)
    return {
        "id": name,
        "primary": letters,
        "protein_length": length,
        "ss3": states,
        "tertiary": points.round(2).tolist(),
        "valid_mask": valid.astype(int).tolist(),
    }


def random_walk(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    """Points 3.8 Å apart, [length, 3], coiled up enough to have contacts."""
    steps = rng.normal(size=(length, 3))
    steps *= 3.8 / np.linalg.norm(steps, axis=1, keepdims=True)
    return 0.7 * np.cumsum(steps, axis=0)


def structures(folder: Path, counts: dict[str, int], *, seed: int = 0) -> Path:
    """TAPE's folder of both structure tasks."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        records = [structure_record(rng, f"{split}{i}", int(rng.integers(30, 60))) for i in range(count)]
        for task in ("secondary_structure", "proteinnet"):
            write_jsonl(folder / task / f"{task}_{split}.jsonl.gz", records)
    return folder
