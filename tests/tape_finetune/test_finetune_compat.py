"""--compat: each fault of the old code on request, and never otherwise."""

import json

import pytest
from finetune_sample import OPTIONS

from megatron_plm.errors import UserError
from megatron_plm.training.optimizer import build_optimizer
from tape_finetune import evaluate, train
from tape_finetune.fit import train_step
from tape_finetune.heads import LinearHead
from tape_finetune.model import TaskModel, transformer
from tape_finetune.source import Source
from tape_finetune.tasks import TASKS

FEW = ["--num_train_epochs=2", "--learning_rate=3e-3", "--batch_size=4"]


def _run(tmp_path, checkpoint, structure_dir, name, *flags):
    words = ["transformer", "secondary_structure", f"--from_pretrained={checkpoint}", f"--data_dir={structure_dir}"]
    assert train.main([*words, *FEW, f"--output_dir={tmp_path}", f"--exp_name={name}", *flags]) == 0
    return json.loads((tmp_path / name / "results.json").read_text())


def test_gradients_that_are_not_zeroed_add_up(checkpoint, structure_dir):
    task = TASKS["secondary_structure"]()
    base = transformer(checkpoint)
    model = TaskModel(base, LinearHead(base.num_features, 3), task.level)
    model.head.initialize(0)
    path = structure_dir / "secondary_structure" / "secondary_structure_train.jsonl.gz"
    source = Source(model, task.load("train", path, None).examples)
    optimizer = build_optimizer(model.parameters(), lr=0.0, weight_decay=0.0)
    norms = [train_step(model, task, source, [[0, 1]], optimizer, 0.0, False)[2] for _ in range(3)]
    assert norms == pytest.approx([norms[0], 2 * norms[0], 3 * norms[0]], rel=1e-5)


def test_compat_changes_the_training_and_is_recorded(checkpoint, structure_dir, tmp_path):
    plain = _run(tmp_path, checkpoint, structure_dir, "plain")
    for compat in ("tape", "proteinlm"):
        results = _run(tmp_path, checkpoint, structure_dir, compat, f"--compat={compat}")
        assert results["label"] == f"Pretrained Transformer (compat {compat})"
        losses = [[epoch["train_loss"] for epoch in one["epochs"]] for one in (plain, results)]
        assert losses[0] != pytest.approx(losses[1], rel=1e-3)
        words = ["transformer", "secondary_structure", str(tmp_path / compat), "--split", "test"]
        assert evaluate.main(words) == 0
        assert json.loads((tmp_path / compat / "results.json").read_text()) == results
    names = (tmp_path / "proteinlm" / "run.json").read_text()
    assert json.loads(names)["compat"] == "proteinlm"
    assert OPTIONS.norm_placement == "pre"


def test_what_the_fault_needs_is_asked_for(monkeypatch, structure_dir):
    words = ["onehot", "secondary_structure", f"--data_dir={structure_dir}"]
    with pytest.raises(UserError, match="--compat proteinlm: discards the norm"):
        train.main([*words, "--compat=proteinlm"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--compat tape: the fault is of TAPE in one process"):
        train.main([*words, "--compat=tape"])
