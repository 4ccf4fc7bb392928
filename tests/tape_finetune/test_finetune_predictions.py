"""What tasks say of proteins without labels, against numpy."""

import json
import math

import numpy as np
import pytest
import torch

from tape_finetune.data import Example
from tape_finetune.tasks import TASKS, Task
from tape_finetune.tasks.contact_prediction import ContactPrediction
from tape_finetune.tasks.secondary_structure import SecondaryStructure


def _unlabelled(*lengths: int) -> list[Example]:
    return [Example("x", "A" * length, np.asarray(math.nan)) for length in lengths]


def _softmax(logits: torch.Tensor) -> np.ndarray:
    exponentials = np.exp(logits.double().numpy())
    return exponentials / exponentials.sum(-1, keepdims=True)


def _csv(kind: str, **learned: object) -> Task:
    state = {"kind": kind, "sequence_column": "s", "label_column": "l", "split_files": {}, "class_weights": None}
    return TASKS["csv"].from_state({"copies_proteinlm": False} | state | learned)


def _predictions(task: Task, outputs: torch.Tensor, examples: list[Example]) -> list[dict]:
    rows = task.predictions(outputs, examples)
    assert len(rows) == len(examples)
    return json.loads(json.dumps(rows, allow_nan=False))


def test_classes_come_with_the_probability_of_each():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 4.0]])
    rows = _predictions(_csv("classification", classes=["a", "b", "c"]), logits, _unlabelled(3, 4))
    assert [row["label"] for row in rows] == ["a", "c"]
    for row, expected in zip(rows, _softmax(logits), strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(expected, abs=1e-6)
        assert list(row["probabilities"]) == ["a", "b", "c"]


def test_numbers_are_in_the_labels_unit():
    rows = _predictions(
        _csv("regression", mean=100.0, deviation=20.0), torch.tensor([[0.5], [-2.0]]), _unlabelled(3, 4)
    )
    assert rows == [{"value": 110.0}, {"value": 60.0}]


def test_residues_get_a_letter_and_probabilities_each():
    logits = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    first, second = _predictions(SecondaryStructure(), logits, _unlabelled(5, 7))
    assert first["labels"] + second["labels"] == "".join("HEC"[c] for c in logits.argmax(-1))
    assert len(first["labels"]) == len(first["probabilities"]) == 5
    np.testing.assert_allclose(first["probabilities"] + second["probabilities"], _softmax(logits), atol=1e-6)


def test_residues_with_classes_of_several_letters_get_a_list():
    task = _csv("token", classes=["loop", "turn"])
    (row,) = _predictions(task, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), _unlabelled(2))
    assert row["labels"] == ["turn", "loop"]
    assert _predictions(_csv("token", classes=["a", "b"]), torch.eye(2), _unlabelled(2))[0]["labels"] == "ab"


def test_a_protein_may_have_several_locations_or_none():
    logits = torch.tensor([[2.0, -1.0, 0.5] + [-3.0] * 7, [-4.0] * 10])
    task = TASKS["localization"].of_kind("location")()
    rows = _predictions(task, logits, _unlabelled(3, 4))
    assert [row["labels"] for row in rows] == [["Cytoplasm", "Extracellular"], []]
    for row, expected in zip(rows, 1 / (1 + np.exp(-logits.double().numpy())), strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(expected, abs=1e-6)
        assert len(row["probabilities"]) == 10


def test_the_kinds_of_localization_name_their_classes():
    task = TASKS["localization"].of_kind("membrane")()
    (row,) = _predictions(task, torch.tensor([[0.0, 1.0]]), _unlabelled(3))
    assert row["label"] == "membrane"


def test_contacts_are_the_l_likeliest_pairs_six_apart_counted_from_one():
    rng = np.random.default_rng(0)
    lengths = (5, 8, 16)  # no pair at all, fewer than L, more than L
    maps = [rng.normal(size=(length, length)).astype(np.float32) for length in lengths]
    outputs = torch.from_numpy(np.concatenate([m.reshape(-1) for m in maps]))
    rows = _predictions(ContactPrediction(), outputs, _unlabelled(*lengths))
    for row, logits, length in zip(rows, maps, lengths, strict=True):
        pairs = [
            (1 / (1 + math.exp(-logits[i - 1, j - 1])), i, j)
            for i in range(1, length + 1)
            for j in range(i + 6, length + 1)
        ]
        expected = sorted(pairs, reverse=True)[:length]
        assert [(i, j) for i, j, _ in row["contacts"]] == [(i, j) for _, i, j in expected]
        assert [p for *_, p in row["contacts"]] == pytest.approx([p for p, _, _ in expected], abs=1e-6)
    assert [len(row["contacts"]) for row in rows] == [0, 3, 16]
