"""tape_train and tape_eval from data and checkpoint to scores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_plm.report.results import read_result
from tape_finetune import evaluate, train

ROOT = Path(__file__).parents[2]
CSV = ["--sequence-column", "sequence", "--label-column", "label", "--kind", "classification"]
FEW = ["--num_train_epochs", "2"]


def _train(out: Path, base_model: str, task: str, *flags: object, name: str = "a") -> tuple[Path, dict]:
    arguments = [base_model, task, "--output_dir", out, "--time_or_name", name, *flags]
    assert train.main([str(argument) for argument in arguments]) == 0
    directory = out / f"{task}-{base_model}-{name}"
    return directory, json.loads((directory / "results.json").read_text())


def _without_times(results: dict) -> dict:
    return {key: value for key, value in results.items() if key not in ("seconds", "command")}


@pytest.mark.parametrize("base_model", ["transformer", "random", "onehot"])
def test_base_models_learn_an_easy_property(base_model, checkpoint, peptide_dir, tmp_path, capsys):
    source = [] if base_model == "onehot" else ["--from_pretrained", checkpoint]
    flags = ["--data_dir", peptide_dir, *CSV, *source, "--learning_rate", "3e-3", "--num_train_epochs", "6"]
    directory, results = _train(tmp_path, base_model, "csv", *flags)
    score = results["splits"]["test"]["metrics"]["accuracy"]
    assert score["low"] > 0.6  # half is chance
    assert score["low"] <= score["value"] <= score["high"]
    assert set(results["splits"]) == {"valid", "test"}
    assert results["from_pretrained"] == (str(checkpoint) if base_model == "transformer" else None)
    assert results["num_trained_parameters"] == results["num_parameters"]
    assert [epoch["epoch"] for epoch in results["epochs"]] == list(range(1, 7))
    best = max(epoch["valid_metric"] for epoch in results["epochs"])
    assert results["splits"]["valid"]["metrics"]["accuracy"]["value"] == best
    report = read_result(directory)  # as the report reads it
    assert report.splits["test"].num_examples == 60
    printed = capsys.readouterr().out
    assert f"wrote {directory}" in printed
    assert f"next: python tape_finetune/tape_eval.py {base_model} csv {directory} --split test" in printed


@pytest.mark.parametrize("task", ["csv", "secondary_structure", "contact_prediction"])
@pytest.mark.parametrize("base_model", ["transformer", "onehot"])
def test_eval_gives_the_numbers_that_training_wrote(
    task, base_model, checkpoint, peptide_dir, structure_dir, tmp_path, capsys
):
    source = [] if base_model == "onehot" else ["--from_pretrained", checkpoint]
    data = ["--data_dir", peptide_dir, *CSV] if task == "csv" else ["--data_dir", structure_dir]
    directory, results = _train(tmp_path, base_model, task, *data, *source, *FEW, "--max_length", "40")
    assert set(results["splits"]) == {"valid", "test"} | (set() if task == "csv" else {"casp12"})
    metrics = list(results["splits"]["test"]["metrics"])
    for split in results["splits"]:
        capsys.readouterr()
        arguments = [base_model, task, directory, "--split", split, "--metrics", metrics[-1]]
        assert evaluate.main([str(argument) for argument in arguments]) == 0
        printed = capsys.readouterr().out
        value = results["splits"][split]["metrics"][metrics[-1]]["value"]
        assert f"{value:8.3f}" in printed
        assert metrics[0] not in printed.replace(metrics[-1], "")
    assert json.loads((directory / "results.json").read_text()) == results


def test_eval_adds_a_split_that_training_did_not_have(structure_dir, tmp_path):
    data = tmp_path / "data"
    for path in (structure_dir / "secondary_structure").iterdir():
        if "casp12" not in path.name:
            (data / "secondary_structure").mkdir(parents=True, exist_ok=True)
            (data / "secondary_structure" / path.name).write_bytes(path.read_bytes())
    directory, results = _train(tmp_path, "onehot", "secondary_structure", "--data_dir", data, *FEW)
    arguments = ["onehot", "secondary_structure", directory, "--split", "casp12", "--data_dir", structure_dir]
    evaluate.main([str(argument) for argument in arguments])
    after = json.loads((directory / "results.json").read_text())
    assert set(after["splits"]) == {"valid", "test", "casp12"}
    assert after["splits"]["casp12"]["num_examples"] == 5
    assert {**after, "splits": None} == {**results, "splits": None}


@pytest.mark.parametrize("freeze", [[], ["--freeze"]], ids=["whole", "frozen"])
def test_two_runs_write_the_same_results(freeze, checkpoint, peptide_dir, tmp_path):
    flags = ["--data_dir", peptide_dir, *CSV, "--from_pretrained", checkpoint, *FEW, *freeze]
    (_, first), (_, second) = (_train(tmp_path, "transformer", "csv", *flags, name=name) for name in "ab")
    (_, other) = _train(tmp_path, "transformer", "csv", *flags, "--seed", "7", name="c")
    assert _without_times(first) == _without_times(second)
    assert first["epochs"] != other["epochs"]


def test_freezing_trains_the_head_only(checkpoint, peptide_dir, tmp_path):
    from safetensors.torch import load_file

    flags = ["--data_dir", peptide_dir, *CSV, "--from_pretrained", checkpoint, *FEW]
    whole, whole_results = _train(tmp_path, "transformer", "csv", *flags, name="whole")
    frozen, frozen_results = _train(tmp_path, "transformer", "csv", *flags, "--freeze", name="frozen")
    untrained = tmp_path / "untrained"
    train.main([str(f) for f in ["transformer", "csv", *flags, "--force_save", untrained]])
    start, moved, kept = (load_file(d / "model.safetensors") for d in (untrained, whole, frozen))
    name = "base.encoder.blocks.0.mlp.up.weight"
    assert not moved[name].equal(start[name])
    assert all(kept[key].equal(start[key]) for key in start if key.startswith("base."))
    assert not kept["head.output.weight"].equal(start["head.output.weight"])
    head = sum(p.numel() for k, p in kept.items() if k.startswith("head.") and "standardize" not in k)
    assert frozen_results["num_trained_parameters"] == head < whole_results["num_trained_parameters"]
    assert frozen_results["label"] == "Pretrained Transformer (frozen)"


def test_force_save_writes_a_model_that_can_be_scored_and_stops(checkpoint, peptide_dir, tmp_path, capsys):
    saved = tmp_path / "saved"
    flags = ["--data_dir", peptide_dir, *CSV, "--from_pretrained", checkpoint, "--output_dir", tmp_path / "out"]
    assert train.main([str(f) for f in ["random", "csv", *flags, "--force_save", saved]]) == 0
    assert not (tmp_path / "out").exists()
    assert evaluate.main(["random", "csv", str(saved), "--split", "valid"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_crops_are_counted_in_the_results(structure_dir, tmp_path):
    flags = ["--data_dir", structure_dir, *FEW, "--max_length", "40"]
    _, results = _train(tmp_path, "onehot", "contact_prediction", *flags)
    assert results["splits"]["test"]["cropped"] > 0
    assert results["note"] == "only 5 proteins in a scored split, which shows that the path works and ranks nothing"


def test_explicit_files_and_hyphens_and_the_other_primary_metric(peptide_dir, tmp_path):
    files = [f"--{split}-file={peptide_dir / f'{split}.csv'}" for split in ("train", "valid")]
    flags = ["--sequence_column", "sequence", "--label_column", "charge", "--kind", "regression", *files]
    flags += ["--num-train-epochs=2", "--batch-size", "8", "--primary-metric", "mse"]
    directory, results = _train(tmp_path, "onehot", "csv", *flags)
    assert set(results["splits"]) == {"valid"}
    assert results["primary_metric"] == "mse"
    best = min(epoch["valid_metric"] for epoch in results["epochs"])
    assert results["splits"]["valid"]["metrics"]["mse"]["value"] == best
    assert evaluate.main(["onehot", "csv", str(directory), "--split", "valid"]) == 0


def test_proteinlm_name_of_the_contact_metric_is_understood(structure_dir, tmp_path, capsys):
    directory, _ = _train(tmp_path, "onehot", "contact_prediction", "--data_dir", structure_dir, *FEW)
    capsys.readouterr()
    evaluate.main(["onehot", "contact_prediction", str(directory), "--metrics", "L5"])
    assert "precision_at_l5 " in capsys.readouterr().out


@pytest.mark.parametrize("script", ["tape_train.py", "tape_eval.py"])
def test_scripts_run_from_the_repository_root(script):
    command = [sys.executable, f"tape_finetune/{script}", "--help"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "BASE_MODEL" in result.stdout
