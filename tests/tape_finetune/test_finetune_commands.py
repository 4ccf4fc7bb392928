"""tape_train and tape_eval from data and checkpoint to scores."""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from finetune_sample import structure_record, write_csv, write_jsonl

from megatron_plm.errors import UserError
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
    return {key: value for key, value in results.items() if key not in ("seconds", "command", "peak_memory")}


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


@pytest.mark.parametrize("freeze", [[], ["--freeze"]], ids=["whole", "frozen"])
def test_dropout_acts_in_training_alone_and_by_the_seed(freeze, dropout_checkpoint, peptide_dir, tmp_path):
    flags = ["--data_dir", peptide_dir, *CSV, "--from_pretrained", dropout_checkpoint, *FEW, *freeze]
    (directory, first), (_, second) = (_train(tmp_path, "transformer", "csv", *flags, name=name) for name in "ab")
    assert _without_times(first) == _without_times(second)
    for split in ("valid", "test"):
        assert evaluate.main(["transformer", "csv", str(directory), "--split", split]) == 0
    again = json.loads((directory / "results.json").read_text())
    assert again["splits"] == first["splits"]


def test_proteins_longer_than_the_learned_positions_are_cropped_and_counted(
    dropout_checkpoint, peptide_dir, tmp_path, capsys
):
    flags = ["--data_dir", peptide_dir, *CSV, "--from_pretrained", dropout_checkpoint, *FEW]
    directory, results = _train(tmp_path, "transformer", "csv", *flags)
    with (peptide_dir / "test.csv").open() as file:
        longer = sum(len(row["sequence"]) > 18 for row in csv.DictReader(file))
    assert results["splits"]["test"]["cropped"] == longer > 0
    assert json.loads((directory / "run.json").read_text())["max_length"] == 18
    capsys.readouterr()
    assert evaluate.main(["transformer", "csv", str(directory), "--split", "test"]) == 0
    assert f"{longer} cropped" in capsys.readouterr().out
    with pytest.raises(UserError, match="--max_length 19: the model has learned positions for 18 residues"):
        _train(tmp_path, "transformer", "csv", *flags, "--max_length", "19", name="longer")


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
    assert results["note"] is None  # what a split of few proteins can rank, the report says


def test_proteins_without_pairs_are_counted_and_left_out_and_the_results_are_json(structure_dir, tmp_path, capsys):
    """One protein of `test` has no known residue, another one three pairs where L/5 would take more."""
    data = tmp_path / "data" / "proteinnet"
    shutil.copytree(structure_dir / "proteinnet", data)
    path = data / "proteinnet_test.jsonl.gz"
    records = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    lengths = [len(record["primary"]) for record in records]
    records[0]["valid_mask"] = [0] * lengths[0]
    records[1]["valid_mask"] = [1] * 8 + [0] * (lengths[1] - 8)
    write_jsonl(path, records)
    # No two residues of a protein of 24 are 24 apart, so the long range is undefined for the whole split.
    flags = ["--data_dir", tmp_path / "data", *FEW, "--max_length", "24"]
    directory, results = _train(tmp_path, "onehot", "contact_prediction", *flags)
    assert results["splits"]["test"]["num_undefined"] == 1
    assert results["splits"]["valid"]["num_undefined"] == 0
    scores = results["splits"]["test"]["metrics"]
    assert 0 <= scores["precision_at_l5"]["value"] <= 1
    assert scores["precision_at_l5_long"] == {"value": None, "low": None, "high": None}
    printed = capsys.readouterr().out
    assert printed.count("1 without a label") == 1
    strict = {"parse_constant": lambda name: pytest.fail(f"{name} is no JSON")}
    json.loads((directory / "results.json").read_text(), **strict)
    evaluate.main(["onehot", "contact_prediction", str(directory), "--metrics", "precision_at_l5_long"])
    assert "nan" in capsys.readouterr().out
    assert json.loads((directory / "results.json").read_text(), **strict) == results


def test_sequences_that_stand_in_train_are_told_and_recorded(peptide_dir, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(peptide_dir, data)
    with (peptide_dir / "train.csv").open(newline="") as file:
        known = list(csv.DictReader(file))
    rows = [("x", row["sequence"].lower(), row["label"], 0) for row in known[:3]]
    for split in ("test", "more"):
        new = [(split, "ACDEFWWWWWWWWHH", "amp", 0)] * 2
        write_csv(data / f"{split}.csv", ("id", "sequence", "label", "charge"), [*rows, *new])
    directory, results = _train(tmp_path, "onehot", "csv", "--data_dir", data, *CSV, *FEW)
    assert {name: split["num_in_train"] for name, split in results["splits"].items()} == {"valid": 0, "test": 3}
    assert "test 5 (3 also in train)" in capsys.readouterr().out
    arguments = ["onehot", "csv", str(directory), "--split"]
    for split, count in (("more", 3), ("train", 200)):
        evaluate.main([*arguments, split])
        after = json.loads((directory / "results.json").read_text())["splits"]
        assert after[split]["num_in_train"] == count
    (data / "train.csv").rename(tmp_path / "elsewhere")
    write_csv(data / "last.csv", ("id", "sequence", "label"), [("x", "ACDFF", "amp"), ("y", "ACDFH", "other")])
    capsys.readouterr()
    evaluate.main([*arguments, "last"])
    assert "the training data is no longer where it was" in capsys.readouterr().out
    assert json.loads((directory / "results.json").read_text())["splits"]["last"]["num_in_train"] is None
    evaluate.main([*arguments, "test"])
    assert json.loads((directory / "results.json").read_text())["splits"]["test"]["num_in_train"] == 3


def test_flags_of_a_tape_command_that_mean_something_here(checkpoint, peptide_dir, tmp_path, capsys):
    flags = ["--data_dir", peptide_dir, *CSV, "--from_pretrained", checkpoint, "--output_dir", tmp_path, *FEW]
    flags += ["--patience", -1, "--no_cuda", "--eval_freq", 1, "--save_freq", "improvement", "--exp_name", "mine"]
    assert train.main([str(flag) for flag in ["transformer", "csv", *flags]]) == 0
    before = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert len(before["epochs"]) == 2
    capsys.readouterr()
    assert evaluate.main(["transformer", "csv", str(tmp_path / "mine"), "--batch_size", "7", "--no_cuda"]) == 0
    report = f"next: python tape_finetune/report.py --results {tmp_path / 'mine'} --output report"
    assert report in capsys.readouterr().out
    after = json.loads((tmp_path / "mine" / "results.json").read_text())
    one, other = (results["splits"]["test"]["metrics"]["accuracy"]["value"] for results in (before, after))
    assert one == pytest.approx(other, abs=0.02)


def test_a_reader_that_leaves_takes_no_model_with_it(peptide_dir, tmp_path):
    arguments = ["onehot", "csv", "--data_dir", peptide_dir, *CSV, *FEW, "--output_dir", tmp_path, "--exp_name", "a"]
    code = "from tape_finetune.train import main; import sys; sys.exit(main(sys.argv[1:]))"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "a" / "model.safetensors").is_file()


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


def test_scores_with_the_forks_faults_are_told_and_not_kept(structure_dir, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(structure_dir, data)
    path = data / "proteinnet" / "proteinnet_test.jsonl.gz"
    long = structure_record(np.random.default_rng(5), "long", 513)
    kept = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    write_jsonl(path, [*kept, long])
    directory, results = _train(tmp_path, "onehot", "contact_prediction", "--data_dir", data, *FEW)
    assert results["splits"]["test"]["num_dropped"] == 0
    arguments = ["onehot", "contact_prediction", str(directory), "--metrics", "precision_at_l5"]
    printed = []
    for compat in ([], ["--compat", "proteinlm"]):
        capsys.readouterr()
        assert evaluate.main([*arguments, *compat]) == 0
        printed.append(capsys.readouterr().out)
    assert "test 7" in printed[0]
    assert "test 6 (1 dropped" in printed[1]
    values = [next(line for line in text.splitlines() if "precision_at_l5" in line) for text in printed]
    assert values[0] != values[1]
    assert "no scores were written: the split was scored with faults of proteinlm" in printed[1]
    assert json.loads((directory / "results.json").read_text()) == results
    with pytest.raises(UserError, match="--save_predictions: --compat writes nothing"):
        evaluate.main([*arguments, "--compat", "proteinlm", "--save_predictions"])


@pytest.mark.parametrize("script", ["tape_train.py", "tape_eval.py"])
def test_scripts_run_from_the_repository_root(script):
    command = [sys.executable, f"tape_finetune/{script}", "--help"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "BASE_MODEL" in result.stdout
