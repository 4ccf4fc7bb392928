"""Losses and metrics of tasks with classes and numbers, against scikit-learn, scipy and torch's own means."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from shared_data import shared_data
from sklearn.metrics import f1_score, jaccard_score, matthews_corrcoef, top_k_accuracy_score
from sklearn.utils.class_weight import compute_class_weight

from megatron_plm.data.loader import IGNORED_LABEL
from tape_finetune.bootstrap import intervals, point_value
from tape_finetune.data import Example, Split
from tape_finetune.tasks import TASKS, Task

NO_FLAGS = {"kind": None, "num_classes": None, "class_weights": None, "compat": None}


def _task(name: str, **flags: object) -> Task:
    return TASKS[name].from_arguments(argparse.Namespace(**(NO_FLAGS | flags)))


def _split(labels: list[np.ndarray], lengths: list[int] | None = None) -> Split:
    lengths = lengths or [5] * len(labels)
    examples = tuple(Example("x", "A" * n, np.asarray(label)) for n, label in zip(lengths, labels, strict=True))
    return Split("train", Path("train"), "", examples, 0)


def _again(task: Task) -> Task:
    """The task as a saved run has it."""
    return type(task).from_state(json.loads(json.dumps(task.state())))


def _values(task: Task, outputs: torch.Tensor, examples: tuple[Example, ...]) -> dict[str, float]:
    table = task.metrics(task.observe(outputs, examples))
    assert list(table) == list(task.metric_names)
    drawn = intervals(table, len(examples), key=0)
    values = {name: point_value(metric, len(examples)) for name, metric in table.items()}
    assert all(drawn[name].value == value or np.isnan(value) for name, value in values.items())
    return values


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weights_of_classes_are_scikit_learns_and_the_loss_is_torchs_weighted_mean():
    labels = np.array([0] * 9 + [1] * 3)
    split, outputs = _split(list(labels)), _random(12, 2)
    task = _task("localization", kind="membrane", class_weights="balanced")
    task.learn(split)
    task = _again(task)
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    assert task.class_weights == pytest.approx(expected)
    mean = task.loss(outputs, split.examples) / sum(task.loss_weight(example) for example in split.examples)
    theirs = F.cross_entropy(outputs, torch.from_numpy(labels), weight=torch.tensor(expected, dtype=torch.float32))
    assert float(mean) == pytest.approx(float(theirs), rel=1e-6)
    assert float(mean) != pytest.approx(float(F.cross_entropy(outputs, torch.from_numpy(labels))), rel=1e-2)


def test_weights_of_residues_count_scored_residues_only():
    rng = np.random.default_rng(0)
    lengths = [30, 40, 25]
    labels = [rng.choice(8, size=length, p=[0.3, 0.3, 0, 0.1, 0.1, 0.1, 0.05, 0.05]) for length in lengths]
    for label in labels:
        label[rng.random(len(label)) < 0.2] = IGNORED_LABEL
    split, outputs = _split(labels, lengths), _random(95, 8)
    task = _task("secondary_structure", num_classes=8, class_weights="balanced")
    task.learn(split)
    task = _again(task)
    joined = np.concatenate(labels)
    scored = joined[joined != IGNORED_LABEL]
    present = np.unique(scored)
    expected = dict(zip(present, compute_class_weight("balanced", classes=present, y=scored), strict=True))
    assert task.class_weights == pytest.approx([expected.get(c, 1.0) for c in range(8)])
    mean = task.loss(outputs, split.examples) / sum(task.loss_weight(example) for example in split.examples)
    weight = torch.tensor(task.class_weights)
    theirs = F.cross_entropy(outputs, torch.from_numpy(joined), weight=weight, ignore_index=IGNORED_LABEL)
    assert float(mean) == pytest.approx(float(theirs), rel=1e-5)


def test_weights_of_several_labels_balance_having_and_lacking_each_class():
    rng = np.random.default_rng(0)
    truth = rng.random((20, 10)) < 0.3
    truth[:, 9] = False  # a class that no protein has
    split, outputs = _split(list(truth[:, None])), _random(20, 10)
    plain, task = (
        _task("localization", kind="location"),
        _task("localization", kind="location", class_weights="balanced"),
    )
    task.learn(split)
    task = _again(task)
    weights = np.ones((20, 10))
    for c in range(9):
        lacking, having = compute_class_weight("balanced", classes=np.array([False, True]), y=truth[:, c])
        weights[:, c] = np.where(truth[:, c], having, lacking)
    p = 1 / (1 + np.exp(-outputs.double().numpy()))
    losses = -np.where(truth, np.log(p), np.log(1 - p))
    for one, w in ((plain, np.ones((20, 10))), (task, weights)):
        mean = one.loss(outputs, split.examples) / sum(one.loss_weight(example) for example in split.examples)
        assert float(mean) == pytest.approx((w * losses).sum() / w.sum(), rel=1e-5)


def test_metrics_of_several_labels_are_scikit_learns():
    rng = np.random.default_rng(1)
    truth = rng.random((40, 10)) < 0.3
    truth[0] = False
    outputs = _random(40, 10) + 1.5 * torch.from_numpy(truth).float()
    outputs[0] = -1.0  # neither true nor predicted
    outputs[:, 8] = -1.0  # never predicted
    predicted = outputs.numpy() > 0
    task = _task("localization", kind="location")
    values = _values(task, outputs, _split(list(truth[:, None])).examples)
    mcc = [matthews_corrcoef(truth[:, c], predicted[:, c]) for c in range(10)]
    assert values["micro_f1"] == pytest.approx(f1_score(truth, predicted, average="micro"))
    assert values["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert values["accuracy"] == pytest.approx((truth == predicted).all(1).mean())
    assert values["jaccard"] == pytest.approx(jaccard_score(truth, predicted, average="samples", zero_division=0))
    assert values["mcc"] == pytest.approx(np.mean(mcc))
    assert values["mcc_golgi_apparatus"] == pytest.approx(0.0) == pytest.approx(mcc[8])
    assert values["mcc_endoplasmic_reticulum"] == pytest.approx(mcc[6])


def test_places_that_no_protein_of_a_split_has_are_in_no_mean_over_places():
    # As in the human set of DeepLoc 2, which has neither plastids nor proteins outside of cells.
    rng = np.random.default_rng(2)
    truth = rng.random((60, 10)) < 0.3
    truth[:, [2, 5]] = False
    outputs = _random(60, 10, seed=3) + 1.5 * torch.from_numpy(truth).float()
    outputs[:, 5] = -1.0  # not predicted either; the other one is, now and then
    predicted = outputs.numpy() > 0
    assert predicted[:, 2].any()
    values = _values(_task("localization", kind="location"), outputs, _split(list(truth[:, None])).examples)
    there = truth.any(0)
    assert there.sum() == 8
    assert values["macro_f1"] == pytest.approx(f1_score(truth[:, there], predicted[:, there], average="macro"))
    mcc = [matthews_corrcoef(truth[:, c], predicted[:, c]) for c in np.flatnonzero(there)]
    assert values["mcc"] == pytest.approx(np.mean(mcc))
    assert np.isnan([values["mcc_extracellular"], values["mcc_plastid"]]).all()
    # What is predicted wrongly counts where single predictions are counted.
    assert values["micro_f1"] == pytest.approx(f1_score(truth, predicted, average="micro"))


def test_top_five_of_the_folds_is_scikit_learns_and_a_constant_output_is_right_by_luck_alone():
    rng = np.random.default_rng(0)
    task, truth = _task("remote_homology"), rng.integers(1195, size=60)
    outputs = _random(60, 1195)
    outputs[torch.arange(60), torch.from_numpy(truth)] += 2.5
    examples = _split(list(truth)).examples
    values = _values(task, outputs, examples)
    for name, k in (("accuracy", 1), ("top5_accuracy", 5)):
        expected = top_k_accuracy_score(truth, outputs.numpy(), k=k, labels=np.arange(1195))
        assert 0 < expected < 1
        assert values[name] == pytest.approx(expected)
    constant = _values(task, torch.zeros(60, 1195), examples)
    assert constant == {"accuracy": (truth == 0).mean(), "top5_accuracy": (truth < 5).mean()}


def test_fluorescence_is_scored_within_each_mode_too():
    rng = np.random.default_rng(0)
    truth = np.concatenate([rng.normal(1.4, 0.2, 30), rng.normal(3.6, 0.2, 40), [2.5, 2.4999]])
    task = _task("fluorescence")
    split = _split(list(truth))
    task.learn(split)
    outputs = _random(72, 1) + torch.from_numpy(truth).float()[:, None]
    predicted = outputs[:, 0].double().numpy() * truth.std() + truth.mean()
    values = _values(_again(task), outputs, split.examples)
    for mode, inside in (("", truth > -9), ("_bright", truth >= 2.5), ("_dark", truth < 2.5)):
        assert values[f"spearmanr{mode}"] == pytest.approx(spearmanr(truth[inside], predicted[inside]).statistic)
        assert values[f"mse{mode}"] == pytest.approx(((truth - predicted)[inside] ** 2).mean())
    assert {"mse", "mse_bright", "mse_dark"} == task.lower_is_better
    dark_only = _split(list(truth[:30]))
    assert np.isnan(_values(task, outputs[:30], dark_only.examples)["spearmanr_bright"])


def test_residue_metrics_are_scikit_learns_over_the_residues():
    rng = np.random.default_rng(0)
    labels = [rng.integers(8, size=length) for length in (30, 20, 10)]
    labels[1][:] = IGNORED_LABEL
    labels[0][:9] = IGNORED_LABEL
    outputs = _random(60, 8)
    task = _task("secondary_structure", num_classes=8)
    values = _values(task, outputs, _split(labels, [30, 20, 10]).examples)
    joined, predicted = np.concatenate(labels), outputs.argmax(-1).numpy()
    scored = joined != IGNORED_LABEL
    assert values["mcc"] == pytest.approx(matthews_corrcoef(joined[scored], predicted[scored]))
    assert values["macro_f1"] == pytest.approx(f1_score(joined[scored], predicted[scored], average="macro"))
    assert values["accuracy"] == pytest.approx((joined == predicted)[scored].mean())
    own = [(joined == predicted)[a:b].mean() for a, b in ((9, 30), (50, 60))]
    assert values["accuracy_per_protein"] == pytest.approx(np.mean(own))


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [
        ("remote_homology", "test_fold_holdout", 395),
        ("remote_homology", "test_superfamily_holdout", 701),
        ("remote_homology", "test_family_holdout", 514),
        ("fluorescence", "valid", 5362),
        ("stability", "valid", 2512),
    ],
)
def test_records_of_the_shared_data_are_read(name, split, count):
    task = TASKS[name]()
    files = task.files(shared_data("tape"))
    assert len(task.load(split, files[split], None).examples) == count


def test_eight_states_of_the_shared_data_reduce_to_three():
    """DSSP's helices are helix; strand and bridge strand; the rest coil: one way to read the classes' order."""
    folder = shared_data("tape")
    three, eight = _task("secondary_structure"), _task("secondary_structure", num_classes=8)
    path = three.files(folder)["ts115"]
    pairs = zip(three.load("x", path, None).examples, eight.load("x", path, None).examples, strict=True)
    for one, other in pairs:
        scored = one.label != IGNORED_LABEL
        reduced = ["HHHEECCC"[state] for state in other.label[scored]]
        assert reduced == ["HEC"[state] for state in one.label[scored]]


def test_localization_of_the_shared_data_is_read():
    folder = shared_data("localization")
    for kind, split, count in (("membrane", "test", 5462), ("location", "test_hpa", 1717)):
        task = _task("localization", kind=kind)
        files = task.files(folder)
        examples = task.load(split, files[split], 512).examples
        assert len(examples) == count
        if kind == "location":
            # As counted in the data's description of classes.
            assert int(sum(example.label[0, 1] for example in examples)) == 893
        else:
            assert int(sum(int(example.label) for example in examples)) == 1496
