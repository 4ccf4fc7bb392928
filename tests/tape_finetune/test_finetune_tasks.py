"""What the tasks read, and their losses and metrics against brute force."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from finetune_sample import csv_task, structure_record, write_csv, write_jsonl
from shared_data import shared_data

from megatron_plm.data.loader import IGNORED_LABEL
from tape_finetune.bootstrap import point_value
from tape_finetune.data import Example
from tape_finetune.tasks import TASKS, Task
from tape_finetune.tasks.contact_prediction import ContactPrediction
from tape_finetune.tasks.secondary_structure import SecondaryStructure


def _records(count: int, *, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [structure_record(rng, f"p{i}", int(rng.integers(20, 45))) for i in range(count)]


def _read(task: Task, tmp_path: Path, records: list[dict], max_length: int | None = None) -> list[Example]:
    return list(task.load("test", write_jsonl(tmp_path / "x_test.jsonl", records), max_length).examples)


def _values(task: Task, outputs: torch.Tensor, examples: list[Example]) -> dict[str, float]:
    table = task.metrics(task.observe(outputs, examples))
    assert tuple(table) == task.metric_names
    return {name: point_value(metric, len(examples)) for name, metric in table.items()}


def test_secondary_structure_counts_scored_residues_only(tmp_path):
    task, records = SecondaryStructure(), _records(6)
    records[2]["valid_mask"] = [0] * len(records[2]["primary"])  # as two proteins of CB513
    records[3]["ss3"] = [7] * len(records[3]["primary"])  # no class where nothing is scored
    records[3]["valid_mask"] = [0] * len(records[3]["primary"])
    examples = _read(task, tmp_path, records)
    outputs = torch.randn(sum(len(r["primary"]) for r in records), 3, generator=torch.Generator().manual_seed(0))

    right, scored, loss, start, shares = 0, 0, 0.0, 0, []
    log_p = F.log_softmax(outputs, -1)
    for record in records:
        own_right = own_scored = 0
        for i, (state, valid) in enumerate(zip(record["ss3"], record["valid_mask"], strict=True)):
            if valid:
                own_right += int(outputs[start + i].argmax()) == state
                own_scored += 1
                loss -= float(log_p[start + i, state])
        start += len(record["primary"])
        right, scored = right + own_right, scored + own_scored
        if own_scored:
            shares.append(own_right / own_scored)
    values = _values(task, outputs, examples)
    assert values["accuracy"] == pytest.approx(right / scored)
    assert values["accuracy_per_protein"] == pytest.approx(np.mean(shares))
    assert sum(task.num_labels(example) for example in examples) == scored
    assert float(task.loss(outputs, examples)) == pytest.approx(loss, rel=1e-5)


def _contact_precision(record: dict, logits: np.ndarray, share: int, low: int, high: float) -> float:
    """Precision at L/share by the definition, pair by pair; the scores have no ties."""
    points, valid, length = np.array(record["tertiary"]), record["valid_mask"], len(record["primary"])
    pairs = []
    for i in range(length):
        for j in range(i + 1, length):
            if valid[i] and valid[j] and j - i >= 6 and low <= j - i < high:
                pairs.append((logits[i, j], math.dist(points[i], points[j]) < 8))
    pairs.sort(reverse=True)
    taken = pairs[: max(1, length // share)]
    return float(np.mean([hit for _, hit in taken])) if taken else math.nan


def test_contact_precision_is_the_brute_force_count_in_every_range(tmp_path):
    task, records = ContactPrediction(), _records(7)
    records.append(structure_record(np.random.default_rng(9), "short", 11))  # no medium or long range at all
    records[-1]["valid_mask"] = [1] * 11
    records += [structure_record(np.random.default_rng(seed), "few", 30) for seed in (10, 11)]
    records[-2]["valid_mask"] = [1] * 8 + [0] * 22  # three pairs, where L/5 would take six
    records[-1]["valid_mask"] = [0] * 30
    examples = _read(task, tmp_path, records)
    rng = np.random.default_rng(1)
    maps = [rng.normal(size=(len(r["primary"]),) * 2) for r in records]
    maps = [(m + m.T).astype(np.float32) for m in maps]
    values = _values(task, torch.from_numpy(np.concatenate([m.reshape(-1) for m in maps])), examples)

    ranges = {"": (6, math.inf), "_short": (6, 12), "_medium": (12, 24), "_long": (24, math.inf)}
    for suffix, (low, high) in ranges.items():
        for name, share in {"l5": 5, "l2": 2, "l": 1}.items():
            found = [_contact_precision(r, m, share, low, high) for r, m in zip(records, maps, strict=True)]
            assert math.isnan(found[-1])
            assert values[f"precision_at_{name}{suffix}"] == pytest.approx(np.nanmean(found)), (name, suffix)
    assert any(0 < value < 1 for value in values.values())


def test_compat_proteinlm_counts_each_contact_from_both_ends(tmp_path):
    task, records = ContactPrediction(), _records(6, seed=3)
    task.copies_proteinlm = True
    examples = _read(task, tmp_path, records)
    rng = np.random.default_rng(1)
    found, maps = [], []
    for record in records:
        points, valid, length = np.array(record["tertiary"]), record["valid_mask"], len(record["primary"])
        logits = rng.permutation(length**2).reshape(length, length).astype(np.float32)
        maps.append(logits + logits.T)
        entries = [
            (maps[-1][i, j], math.dist(points[i], points[j]) < 8)
            for i in range(length)
            for j in range(length)
            if abs(i - j) >= 6 and valid[i] and valid[j]
        ]
        entries.sort(reverse=True, key=lambda entry: entry[0])
        found.append(np.mean([hit for _, hit in entries[: length // 5 // 2 * 2]]))
    # Of an odd number of places the last pair fills one: the same proteins with an even number are compared.
    even = [index for index, record in enumerate(records) if len(record["primary"]) // 5 % 2 == 0]
    assert len(even) >= 2
    chosen = [examples[index] for index in even]
    outputs = torch.from_numpy(np.concatenate([maps[index].reshape(-1) for index in even]))
    doubled = _values(task, outputs, chosen)
    assert doubled["precision_at_l5"] == pytest.approx(np.mean([found[index] for index in even]))
    plain = _values(ContactPrediction(), outputs, chosen)
    assert plain["precision_at_l5"] != doubled["precision_at_l5"]
    assert plain["auprc"] == doubled["auprc"]


def test_compat_proteinlm_leaves_long_proteins_out_of_test_splits_alone_and_counts_them(tmp_path):
    rng = np.random.default_rng(0)
    records = [structure_record(rng, f"p{length}", length) for length in (40, 512, 513)]
    path = write_jsonl(tmp_path / "x.jsonl", records)
    for copies, split, kept in ((True, "test", 2), (True, "valid", 3), (True, "train", 3), (False, "test", 3)):
        task = SecondaryStructure()
        task.copies_proteinlm = copies
        loaded = task.load(split, path, 50)
        assert len(loaded.examples) == kept
        assert loaded.num_dropped == 3 - kept
    assert TASKS["secondary_structure"].from_state(task.state()).copies_proteinlm is False


def test_contact_loss_is_over_unique_known_pairs_six_apart(tmp_path):
    task, records = ContactPrediction(), _records(3)
    examples = _read(task, tmp_path, records)
    rng = np.random.default_rng(1)
    maps = [rng.normal(size=(len(r["primary"]),) * 2).astype(np.float32) for r in records]
    loss, count = 0.0, 0
    for record, logits in zip(records, maps, strict=True):
        points, valid = np.array(record["tertiary"]), record["valid_mask"]
        for i in range(len(points)):
            for j in range(i + 6, len(points)):
                if valid[i] and valid[j]:
                    sign = 1 if math.dist(points[i], points[j]) < 8 else -1
                    loss += math.log1p(math.exp(-sign * logits[i, j]))
                    count += 1
    outputs = torch.from_numpy(np.concatenate([m.reshape(-1) for m in maps]))
    assert float(task.loss(outputs, examples)) == pytest.approx(loss, rel=1e-5)
    assert sum(task.num_labels(example) for example in examples) == count


def test_a_constant_contact_score_gets_the_share_of_contacts_whatever_the_order(tmp_path):
    task, records = ContactPrediction(), _records(1)
    (example,) = _read(task, tmp_path, records)
    length = len(example.sequence)
    points, valid = np.array(records[0]["tertiary"]), np.array(records[0]["valid_mask"], dtype=bool)
    near = np.linalg.norm(points[:, None] - points[None], axis=-1) < 8
    counted = np.triu(np.ones((length, length), dtype=bool), k=6) & valid[:, None] & valid[None]
    values = _values(task, torch.zeros(length**2), [example])
    assert values["precision_at_l5"] == pytest.approx(near[counted].mean())
    assert values["precision_at_l"] == pytest.approx(near[counted].mean())


def test_crop_cuts_labels_with_the_sequence_and_is_counted(tmp_path):
    records = _records(4)
    for task in (SecondaryStructure(), ContactPrediction()):
        split = task.load("train", write_jsonl(tmp_path / "x.jsonl", records), max_length=30)
        for example, record in zip(split.examples, records, strict=True):
            assert example.sequence == record["primary"][:30]
            assert len(example.label) == len(example.sequence)
            assert example.cropped == (len(record["primary"]) > 30)
        assert split.num_cropped == sum(len(r["primary"]) > 30 for r in records) > 0
    known = np.array(records[0]["valid_mask"][:30], dtype=bool)
    labels = SecondaryStructure().load("train", tmp_path / "x.jsonl", 30).examples[0].label
    assert labels[known].tolist() == np.array(records[0]["ss3"][:30])[known].tolist()
    assert (labels[~known] == IGNORED_LABEL).all()


def _csv_task(folder: Path, kind: str, label: str) -> Task:
    # What is saved is what is used again.
    return TASKS["csv"].from_state(json.loads(json.dumps(csv_task(folder, kind, label).state())))


def test_classes_are_the_training_labels_in_numerical_or_alphabetical_order(tmp_path):
    rows = [("ACD", 10), ("ACE", 9), ("ACF", 100), ("ACG", 9)]
    write_csv(tmp_path / "train.csv", ("sequence", "label"), rows)
    task = _csv_task(tmp_path, "classification", "label")
    assert task.num_outputs == 3
    assert [int(e.label) for e in task.load("train", tmp_path / "train.csv", None).examples] == [1, 0, 2, 0]
    assert task.metric_names == ("accuracy", "mcc", "macro_f1")  # no AUROC of three classes
    write_csv(tmp_path / "train.csv", ("sequence", "label"), [("ACD", "b"), ("ACE", "a"), ("ACF", "10")])
    task = _csv_task(tmp_path, "classification", "label")
    assert [int(e.label) for e in task.load("train", tmp_path / "train.csv", None).examples] == [2, 1, 0]


def test_regression_is_scored_in_the_labels_unit(tmp_path):
    labels = [1000.0, 3000.0, 2000.0, 2500.0]
    write_csv(tmp_path / "train.csv", ("sequence", "label"), [("ACD", label) for label in labels])
    task = _csv_task(tmp_path, "regression", "label")
    examples = list(task.load("train", tmp_path / "train.csv", None).examples)
    outputs = torch.tensor([[-1.0], [0.5], [0.0], [2.0]])
    predicted = np.mean(labels) + np.std(labels) * outputs[:, 0].numpy()
    values = _values(task, outputs, examples)
    assert values["mse"] == pytest.approx(np.mean((predicted - labels) ** 2), rel=1e-6)
    assert values["spearmanr"] == pytest.approx(0.8)
    assert float(task.loss(outputs, examples)) == pytest.approx(4 * values["mse"] / np.var(labels), rel=1e-6)


def test_official_records_of_the_shared_data_are_read():
    folder = shared_data("tape")
    for name, split, count in (("secondary_structure", "ts115", 115), ("contact_prediction", "valid", 43)):
        task = TASKS[name]()
        examples = task.load(split, task.files(folder)[split], None).examples
        assert len(examples) == count
        assert all(task.num_labels(example) > 0 for example in examples)
