"""One task reads the same from LMDB databases, JSON lines and tables; and what none of them may hold."""

import csv
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_sample import csv_task, structure_record, write_csv, write_jsonl
from harmful_pickle import Calls

from megatron_plm.errors import UserError, run_command
from tape_finetune import evaluate, train
from tape_finetune.data import Example, content_sha256, read_records
from tape_finetune.tasks import TASKS, Task

lmdb = pytest.importorskip("lmdb")

PROTEINS = ["ACDEFGHIKLMN", "PQRSTVWYACDEF", "MKTAYIAK"]


def write_lmdb(path: Path, records: Iterable[Any], *, subdir: bool = True) -> Path:
    """A database as TAPE writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = list(records)
    with lmdb.open(str(path), map_size=1 << 24, subdir=subdir) as database, database.begin(write=True) as transaction:
        for index, record in enumerate(records):
            transaction.put(str(index).encode(), pickle.dumps(record))
        transaction.put(b"num_examples", pickle.dumps(len(records)))
    return path


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def _as_arrays(record: dict[str, Any]) -> dict[str, Any]:
    """The types that TAPE's databases hold."""
    types = {"valid_mask": bool, "tertiary": np.float32, "log_fluorescence": np.float32, "stability_score": np.float32}
    return {
        name: np.array(value, dtype=types.get(name)) if isinstance(value, list) else value
        for name, value in record.items()
    }


def _records(task: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    if task in ("secondary_structure", "contact_prediction"):
        return [structure_record(rng, f"p{i}", 20 + i) for i in range(3)]
    labels = {"fluorescence": "log_fluorescence", "stability": "stability_score", "remote_homology": "fold_label"}
    return [
        {
            "id": f"p{i}",
            "primary": protein,
            "protein_length": len(protein),
            labels[task]: 7 * i if task == "remote_homology" else [1.5 + i],
        }
        for i, protein in enumerate(PROTEINS)
    ]


def _content(examples: Iterable[Example]) -> list[tuple[str, Any]]:
    return [(example.sequence, np.asarray(example.label, dtype=np.float64)) for example in examples]


@pytest.mark.parametrize(
    "name", ["secondary_structure", "contact_prediction", "remote_homology", "fluorescence", "stability"]
)
def test_every_format_gives_the_same_examples(name, tmp_path):
    task, records = TASKS[name](), _records(name)
    prefix = {"contact_prediction": "proteinnet"}.get(name, name)
    write_jsonl(tmp_path / "json" / prefix / f"{prefix}_train.jsonl.gz", records)
    write_lmdb(tmp_path / "lmdb" / prefix / f"{prefix}_train.lmdb", map(_as_arrays, records))
    write_lmdb(tmp_path / "file" / f"{prefix}_train.lmdb", map(_as_arrays, records), subdir=False)
    rows = [[_as_text(value) for value in record.values()] for record in records]
    write_csv(tmp_path / "csv" / f"{prefix}_train.csv", list(records[0]), rows)
    expected = None
    for folder in ("json", "lmdb", "file", "csv"):
        files = task.files(tmp_path / folder)
        split = task.load("train", files["train"], None)
        found = _content(split.examples)
        expected = expected or found
        assert [sequence for sequence, _ in found] == [record["primary"] for record in records]
        for (_, label), (_, other) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(label, other)
        assert split.sha256 == content_sha256(files["train"])
    # Not only equal, but what was written.
    if name in ("fluorescence", "stability"):
        assert [float(label) for _, label in expected] == [1.5, 2.5, 3.5]
    if name == "remote_homology":
        assert [int(label) for _, label in expected] == [0, 7, 14]


def test_classes_of_residues_are_letters_names_or_lists(tmp_path):
    labels = ["aabbaabbaabb", "a b a b a b a b a b a b a", list("abababab")]
    rows = [{"s": protein, "y": label} for protein, label in zip(PROTEINS, labels, strict=True)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    task = csv_task(tmp_path, "token", "y", sequence_column="s")
    assert task.classes == ["a", "b"]
    examples = task.load("train", tmp_path / "train.jsonl", None).examples
    expected = [[0, 0, 1, 1] * 3, [0, 1] * 6 + [0], [0, 1] * 4]
    assert [example.label.tolist() for example in examples] == expected
    assert task.level == "residue"


def test_numbers_are_classes_alike_in_every_format(tmp_path):
    for value in (3, 3.0, "3", np.int64(3), np.float32(3), np.array([3])):
        write_lmdb(tmp_path / str(type(value)) / "train.lmdb", [{"s": "ACD", "y": value}, {"s": "ACE", "y": 20}])
        task = csv_task(tmp_path / str(type(value)), "classification", "y", sequence_column="s")
        assert task.classes == ["3", "20"], value


class Refused:
    """Training that must be refused in one sentence."""

    def __init__(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.data, self._capsys = data, capsys

    def __call__(self, task: str, *flags: object) -> str:
        out = self.data / "out"
        arguments = ["onehot", task, "--data_dir", self.data, "--output_dir", out, *flags]
        assert run_command(train.main, [str(argument) for argument in arguments]) == 2
        message = self._capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert not out.exists()
        return message


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(tmp_path, capsys)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(refused):
    marker = refused.data / "marker"
    records = _records("fluorescence")
    for split in ("train", "valid"):
        write_lmdb(refused.data / f"fluorescence_{split}.lmdb", records)
    write_lmdb(refused.data / "fluorescence_test.lmdb", [records[0], Calls(os.mkdir, str(marker))])
    message = refused("fluorescence")
    assert "fluorescence_test.lmdb, record 1" in message
    assert "mkdir" in message
    assert not marker.exists()


@pytest.mark.parametrize(
    ("task", "value", "words"),
    [
        ("fluorescence", None, ["'log_fluorescence' is missing"]),
        ("fluorescence", [float("nan")], ["'log_fluorescence' is missing"]),
        ("fluorescence", np.array([np.nan], dtype=np.float32), ["'log_fluorescence' is missing"]),
        ("fluorescence", [1.0, 2.0], ["no number"]),
        ("stability", "high", ["'high' is no number"]),
        ("stability", float("inf"), ["no number"]),
        ("remote_homology", 1195, ["'1195' is none of the 1195 classes: 0, 1, 2"]),
        ("remote_homology", -1, ["'-1' is none of the 1195 classes"]),
        ("remote_homology", 2.5, ["'2.5' is none"]),
    ],
)
def test_labels_of_proteins_that_cannot_be_are_named(refused, task, value, words):
    records = _records(task)
    for split in ("train", "valid"):
        write_lmdb(refused.data / f"{task}_{split}.lmdb", records)
    label = list(records[1])[-1]
    write_lmdb(refused.data / f"{task}_test.lmdb", [records[0], records[1] | {label: value}])
    message = refused(task)
    assert f"{task}_test.lmdb, record 1 (id p1)" in message
    assert all(word in message for word in words), message


def test_damaged_databases_are_named(refused):
    records = _records("stability")
    write_lmdb(refused.data / "stability_train.lmdb", records)
    valid = refused.data / "stability_valid.lmdb"
    valid.write_bytes(b"no database" * 1000)
    assert "stability_valid.lmdb is no LMDB database" in refused("stability")
    valid.unlink()
    write_lmdb(valid, [])
    assert "the split 'valid' holds no record" in refused("stability")
    assert refused("stability", "--primary_metric", "accuracy").startswith("error: ")


def test_labels_that_are_not_as_many_as_residues_are_named(refused):
    flags = ["--kind", "token", "--sequence_column", "s", "--label_column", "y"]
    for split in ("train", "valid"):
        write_csv(refused.data / f"{split}.csv", ("s", "y"), [("ACDE", "HHEE")])
    write_csv(refused.data / "test.csv", ("s", "y"), [("ACDE", "HHEH"), ("ACDE", "HHE")])
    assert "test.csv, line 3: y has 3 entries for 4 residues" in refused("csv", *flags)
    write_csv(refused.data / "test.csv", ("s", "y"), [("ACDE", "HHEX")])
    assert "test.csv, line 2: the label 'X' is none of the 2 classes: E, H" in refused("csv", *flags)
    write_csv(refused.data / "test.csv", ("s", "y"), [("ACDE", "")])
    assert "test.csv, line 2: the field 'y' is missing" in refused("csv", *flags)
    write_csv(refused.data / "train.csv", ("s", "y"), [("ACDE", "HHHH")])
    assert "train.csv: every label is 'H'" in refused("csv", *flags)


def test_localization_that_cannot_be_is_named(refused):
    header = ("Sequence", "Membrane", "Localization")
    for split in ("train", "valid"):
        write_csv(refused.data / f"{split}.csv", header, [("ACDE", 1, "Nucleus"), ("ACDF", 0, "Cytoplasm|Nucleus")])
    write_csv(refused.data / "test.csv", header, [("ACDE", 2, "Nucleus|Core")])
    membrane, location = ["--kind", "membrane"], ["--kind", "location"]
    assert "test.csv, line 2: Membrane is '2'; expected 1" in refused("localization", *membrane)
    assert "the label 'Core' is none of the 10 classes: Cytoplasm, Nucleus" in refused("localization", *location)
    assert "the task localization needs --kind: membrane, location" in refused("localization")
    write_csv(refused.data / "test.csv", header, [("ACDE", 1, "")])
    assert "test.csv, line 2: the label 'Localization' is missing" in refused("localization", *location)
    write_csv(refused.data / "test.csv", header[:2], [("ACDE", 1)])
    assert "test.csv: no column 'Localization'" in refused("localization", *location)


def _trained(task: Task, data: Path, out: Path, *flags: str) -> dict[str, Any]:
    """Trains on tiny data, scores a split again, and gives the results."""
    common = ["--data_dir", str(data), "--output_dir", str(out), "--time_or_name", "a", "--num_train_epochs", "1"]
    assert train.main(["onehot", task.name, *common, *flags]) == 0
    directory = out / f"{task.name}-onehot-a"
    before = (directory / "results.json").read_bytes()
    assert evaluate.main(["onehot", task.name, str(directory), "--split", "valid"]) == 0
    assert (directory / "results.json").read_bytes() == before
    return json.loads(before)


@pytest.mark.parametrize("name", ["remote_homology", "fluorescence", "stability"])
def test_tasks_on_proteins_train_and_score_from_a_database(name, tmp_path):
    records = _records(name)
    for index, split in enumerate(("train", "valid", "test_fold_holdout")):
        write_lmdb(tmp_path / name / f"{name}_{split}.lmdb", records[: 3 - (index == 2)] + records[index : index + 1])
    results = _trained(TASKS[name](), tmp_path, tmp_path / "out")
    assert set(results["splits"]) == {"valid", "test_fold_holdout"}
    assert list(results["splits"]["valid"]["metrics"]) == list(TASKS[name]().metric_names)


@pytest.mark.parametrize("kind", ["membrane", "location"])
@pytest.mark.parametrize("weights", [[], ["--class_weights", "balanced"]], ids=["plain", "balanced"])
def test_localization_trains_and_scores_from_tables(kind, weights, tmp_path):
    header = ("Sequence", "Membrane", "Localization")
    rows = [
        ("ACDE", 1, "Nucleus"),
        ("ACDFK", 0, "Cytoplasm|Nucleus"),
        ("ACDG", 0, "Cell membrane"),
        ("ACDH", 1, "Plastid"),
    ]
    for index, split in enumerate(("train", "valid", "test", "test_hpa")):
        write_csv(tmp_path / "localization" / f"{split}.csv", header, rows[index:] + rows[:1])
    task = TASKS["localization"].of_kind(kind)()
    results = _trained(task, tmp_path, tmp_path / "out", "--kind", kind, *weights)
    scored = {"membrane": {"valid", "test"}, "location": {"valid", "test", "test_hpa"}}
    assert set(results["splits"]) == scored[kind]
    assert list(results["splits"]["valid"]["metrics"]) == list(task.metric_names)


def test_tables_give_the_columns_as_they_stand(tmp_path):
    path = write_csv(tmp_path / "a.csv", ("x", "y"), [("1", 'a "b", c'), (" 2 ", "")])
    with path.open(newline="") as file:
        expected = [{name: text.strip() for name, text in row.items()} for row in csv.DictReader(file)]
    assert [fields for _, fields in read_records(path, ["x"])] == expected
    with pytest.raises(UserError, match=r"a\.csv: no column 'z'; it has x, y"):
        list(read_records(path, ["z"]))
