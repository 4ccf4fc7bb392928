"""The training of a task model."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_sample import csv_task

from megatron_plm.data.loader import IGNORED_LABEL
from megatron_plm.errors import RunFailed
from megatron_plm.training.optimizer import build_optimizer
from tape_finetune.data import Example
from tape_finetune.fit import Epoch, FitOptions, calibrate, fit, is_better, train_step
from tape_finetune.heads import MLPHead
from tape_finetune.model import TaskModel, random_transformer, transformer
from tape_finetune.scoring import observe, score_one
from tape_finetune.source import Source
from tape_finetune.tasks import TASKS, Task

OPTIONS = FitOptions(
    epochs=4,
    batch_size=16,
    accumulation=1,
    learning_rate=3e-3,
    warmup=None,
    weight_decay=0.01,
    max_grad_norm=1.0,
    patience=None,
    seed=1,
)


def _task(folder: Path, kind: str = "classification", label: str = "label") -> Task:
    return csv_task(folder, kind, label)


def _model(checkpoint: Path, task: Task) -> TaskModel:
    base = transformer(checkpoint)
    head = MLPHead(base.num_features, task.num_outputs, hidden_size=16)
    head.initialize(seed=0)
    return TaskModel(base, head, task.level)


def test_a_model_drops_in_the_passes_of_training_only(dropout_checkpoint, peptide_dir):
    task = _task(peptide_dir)
    model = _model(dropout_checkpoint, task)
    modes = []
    model.base.encoder.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    examples = task.load("train", peptide_dir / "train.csv", model.base.max_residues).examples
    source = Source(model, examples)
    calibrate(model, source, seed=1)
    optimizer = build_optimizer(model.parameters(), lr=1e-3, weight_decay=0.0)
    before = len(modes)
    train_step(model, task, source, [[0, 1], [2]], optimizer, max_grad_norm=0.0)
    assert modes == [False] * before + [True] * 2
    score_one(source, task, "accuracy")
    assert not any(modes[before + 2 :])


def _source(model: TaskModel, task: Task, folder: Path, split: str) -> Source:
    return Source(model, task.load(split, folder / f"{split}.csv", None).examples)


def _step(checkpoint: Path, folder: Path, parts: list[list[int]], steps: int = 1, lr: float = 0.0):
    """Norms of the gradient of each step, and the model after them."""
    task = _task(folder)
    model = _model(checkpoint, task)
    source = _source(model, task, folder, "train")
    optimizer = build_optimizer(model.parameters(), lr=lr, weight_decay=0.0)
    results = [train_step(model, task, source, parts, optimizer, max_grad_norm=0.0) for _ in range(steps)]
    return results, model


def test_gradients_do_not_pile_up_from_step_to_step(checkpoint, peptide_dir):
    (first, second, third), _ = _step(checkpoint, peptide_dir, [list(range(8))], steps=3)
    assert first[2] > 0
    assert second == pytest.approx(first, rel=1e-6)
    assert third == pytest.approx(first, rel=1e-6)


def test_accumulation_changes_nothing_but_rounding(checkpoint, peptide_dir):
    (whole,), model = _step(checkpoint, peptide_dir, [list(range(9))], lr=1e-3)
    (parts,), other = _step(checkpoint, peptide_dir, [[0, 1, 2, 3], [4], [5, 6, 7, 8]], lr=1e-3)
    assert parts == pytest.approx(whole, rel=1e-5)
    gradient_free = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        # Adam's first step is lr · sign(gradient), so only a gradient of about 0 could differ by more.
        assert (parameter - gradient_free[name]).abs().mean() < 1e-5, name


def test_step_follows_the_gradient_of_the_mean_loss(checkpoint, peptide_dir):
    task = _task(peptide_dir)
    model = _model(checkpoint, task)
    source = _source(model, task, peptide_dir, "train")
    indices = list(range(6))
    mean_loss = task.loss(source.outputs(indices), source.chosen(indices)) / 6
    gradients = torch.autograd.grad(mean_loss, list(model.parameters()))
    expected = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    optimizer = build_optimizer(model.parameters(), lr=1e-4, weight_decay=0.0)
    loss_sum, num_labels, norm = train_step(model, task, source, [indices], optimizer, max_grad_norm=0.0)
    assert (loss_sum / num_labels, num_labels, norm) == pytest.approx((mean_loss.item(), 6, expected), rel=1e-5)
    assert task.loss(source.outputs(indices), source.chosen(indices)).item() < loss_sum


def test_the_best_epoch_on_valid_is_kept(checkpoint, peptide_dir):
    task = _task(peptide_dir)
    model = _model(checkpoint, task)
    train, valid = (_source(model, task, peptide_dir, split) for split in ("train", "valid"))
    calibrate(model, train, seed=1)
    seen: list[tuple[Epoch, float]] = []

    def spoil(epoch: Epoch) -> None:
        seen.append((epoch, score_one(valid, task, "accuracy")))
        if epoch.epoch == 2:  # dead units: from here on every peptide gets the same prediction
            torch.nn.init.zeros_(model.head.hidden.weight)
            torch.nn.init.constant_(model.head.hidden.bias, -1.0)

    epochs = fit(model, task, train, valid, "accuracy", OPTIONS, spoil)
    assert [epoch for epoch, _ in seen] == epochs
    assert [epoch.valid_metric for epoch, _ in seen] == [value for _, value in seen]
    best = max(epoch.valid_metric for epoch in epochs)
    assert best > 0.6
    assert epochs[3].valid_metric == 0.5
    assert score_one(valid, task, "accuracy") == best


def test_patience_stops_after_epochs_without_a_better_one(checkpoint, peptide_dir):
    task = _task(peptide_dir)
    model = _model(checkpoint, task)
    train, valid = (_source(model, task, peptide_dir, split) for split in ("train", "valid"))
    options = FitOptions(**{**vars(OPTIONS), "epochs": 9, "patience": 2, "learning_rate": 1e-12})
    assert len(fit(model, task, train, valid, "accuracy", options, lambda _: None)) == 3


def test_kept_features_give_the_outputs_of_the_running_base_model(checkpoint, peptide_dir, structure_dir):
    for task, path in (
        (_task(peptide_dir), peptide_dir / "valid.csv"),
        (TASKS["contact_prediction"](), structure_dir / "proteinnet" / "proteinnet_valid.jsonl.gz"),
    ):
        base = transformer(checkpoint)
        head = next(iter(task.heads.values()))(base.num_features, task.num_outputs)
        head.initialize(seed=0)
        model = TaskModel(base, head, task.level)
        live, kept = (Source(model, task.load("valid", path, None).examples) for _ in range(2))
        kept.keep_features("valid")
        for parameter in base.parameters():
            parameter.data.zero_()
        after = kept.outputs([3, 0, 2]).detach()
        fresh = TaskModel(transformer(checkpoint), head, task.level)
        expected = Source(fresh, live.examples).outputs([3, 0, 2]).detach()
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_without_labels_changes_no_weight(checkpoint):
    task = TASKS["secondary_structure"]()
    nothing = Example("record", "ACDE", np.full(4, IGNORED_LABEL))
    base = transformer(checkpoint)
    model = TaskModel(base, task.heads["linear"](base.num_features, 3), task.level)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model.parameters(), lr=1.0, weight_decay=0.1)
    assert train_step(model, task, Source(model, [nothing]), [[0]], optimizer, 1.0) == (0.0, 0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_without_a_finite_loss_or_gradient_ends_the_training(checkpoint, peptide_dir, monkeypatch):
    task = _task(peptide_dir)
    for result in ((math.nan, 4, 1.0), (1.0, 4, math.inf)):
        model = _model(checkpoint, task)
        train, valid = (_source(model, task, peptide_dir, split) for split in ("train", "valid"))
        results = iter([(1.0, 4, 1.0), result])
        monkeypatch.setattr("tape_finetune.fit.train_step", lambda *_, results=results: next(results))
        with pytest.raises(RunFailed, match="epoch 1, step 2: training diverged"):
            fit(model, task, train, valid, "accuracy", OPTIONS, lambda _: pytest.fail("scored"))


def test_weights_and_outputs_that_are_not_finite_are_not_scored(checkpoint, peptide_dir, monkeypatch):
    task = _task(peptide_dir)
    model = _model(checkpoint, task)
    train, valid = (_source(model, task, peptide_dir, split) for split in ("train", "valid"))
    model.head.output.bias.data[0] = math.inf
    with pytest.raises(RunFailed, match="scoring: the model's outputs are not numbers"):
        observe(valid, task, description="scoring")
    monkeypatch.setattr("tape_finetune.fit.train_step", lambda *_: (1.0, 4, 1.0))
    with pytest.raises(RunFailed, match="epoch 1: training diverged, with weights"):
        fit(model, task, train, valid, "accuracy", OPTIONS, lambda _: None)


def test_random_base_model_has_the_checkpoints_shape_and_the_seeds_weights(checkpoint):
    pretrained, a, b, c = transformer(checkpoint), *(random_transformer(checkpoint, seed) for seed in (3, 3, 4))
    weights = [dict(model.named_parameters()) for model in (pretrained, a, b, c)]
    assert all(w.keys() == weights[0].keys() for w in weights)
    name = "encoder.blocks.1.mlp.up.weight"
    assert torch.equal(weights[1][name], weights[2][name])
    assert not torch.equal(weights[1][name], weights[3][name])
    assert not torch.equal(weights[1][name], weights[0][name])
    # The checkpoint of the fixture is what a pretraining from seed 7 starts from.
    assert torch.equal(dict(random_transformer(checkpoint, 7).named_parameters())[name], weights[0][name])


@pytest.mark.parametrize(
    ("value", "best", "lower", "expected"),
    [
        (0.6, 0.5, False, True),
        (0.5, 0.5, False, False),
        (0.4, 0.5, True, True),
        (0.6, 0.5, True, False),
        (math.nan, 0.5, False, False),
        (-1.0, math.nan, False, True),
        (math.nan, math.nan, True, False),
    ],
)
def test_better_is_higher_or_lower_as_the_metric_says_and_never_undefined(value, best, lower, expected):
    assert is_better(value, best, lower) is expected


def test_weights_of_a_metric_belong_to_the_examples_in_the_files_order(checkpoint, peptide_dir):
    task = _task(peptide_dir, "regression", "charge")
    model = _model(checkpoint, task)
    source = _source(model, task, peptide_dir, "test")
    mse = observe(source, task, description="")["mse"]
    alone = [Source(model, [example]) for example in source.examples]
    expected = [score_one(one, task, "mse") for one in alone]
    np.testing.assert_allclose(mse(np.eye(len(alone))), expected, rtol=1e-4)
    assert np.std(expected) > 0
