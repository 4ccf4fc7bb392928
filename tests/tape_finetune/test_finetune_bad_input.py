"""Bad input ends with one sentence and exit code 2, and leaves nothing behind."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_sample import structure_record, write_csv, write_jsonl

from megatron_plm.errors import RunFailed, run_command
from tape_finetune import evaluate, train

CSV = ["--sequence_column", "sequence", "--label_column", "label", "--kind", "classification"]
ROWS = [("ACDE", "a"), ("ACDF", "b")]
NUMBERS = {"train": "ACDF", "valid": "ACDG", "test": "ACDH"}


class Failing:
    """Runs a command that must fail; `tmp_path/data` is its data folder, `tmp_path/out` must stay empty."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.data, self.out = tmp_path / "data", tmp_path / "out"
        self.data.mkdir()
        self._capsys = capsys

    def train(self, *flags: object, task: str = "csv", base_model: str = "onehot", data: bool = True) -> str:
        folder = ["--data_dir", self.data] if data else []
        return self._run(train.main, base_model, task, *folder, "--output_dir", self.out, *flags)

    def evaluate(self, *arguments: object) -> str:
        return self._run(evaluate.main, *arguments)

    def _run(self, command: Callable[..., int], *arguments: object) -> str:
        self._capsys.readouterr()
        assert run_command(command, [str(argument) for argument in arguments]) == 2
        printed = self._capsys.readouterr()
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert not self.out.exists() or not list(self.out.iterdir())
        return printed.err

    def tables(self, **splits: list[Any]) -> None:
        own = {"train": ROWS, "valid": [*ROWS, ("ACDG", "a")], "test": [*ROWS, ("ACDH", "a")]}
        for split, rows in (own | splits).items():
            write_csv(self.data / f"{split}.csv", ("sequence", "label"), rows)

    def structures(self, edit: Callable[[dict[str, Any]], object], split: str = "test") -> Path:
        """Both structure tasks, with `edit` applied to the second record of a split."""
        rng = np.random.default_rng(0)
        for name in ("train", "valid", "test"):
            records = [structure_record(rng, f"{name}{i}", 30) for i in range(3)]
            if name == split:
                edit(records[1])
            for task in ("secondary_structure", "proteinnet"):
                write_jsonl(self.data / task / f"{task}_{name}.jsonl", records)
        return self.data


@pytest.fixture
def failing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Failing:
    return Failing(tmp_path, capsys)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("ACDE", "a"), ("ACDF", "")], ["test.csv, line 3", "label", "missing"]),
        ([("ACDE", "a"), ("ACDF", "NaN")], ["test.csv, line 3", "label", "missing"]),
        ([("ACDE", "c")], ["test.csv, line 2", "'c'", "a, b"]),
        ([("", "a")], ["test.csv, line 2", "sequence is missing"]),
        ([("AC1E", "a")], ["test.csv, line 2", "'1'"]),
        ([("ACDE", "a", "b")], ["test.csv, line 2", "3 fields", "2"]),
        ([], ["test.csv", "'test' holds no record"]),
    ],
)
def test_bad_rows_of_a_table_are_named(failing, rows, words):
    failing.tables(test=rows)
    message = failing.train(*CSV)
    assert all(word in message for word in words), message


def test_regression_labels_must_be_numbers_that_differ(failing):
    flags = [*CSV[:4], "--kind", "regression"]
    failing.tables(train=[("ACDE", "1.5"), ("ACDF", "high")])
    assert "train.csv, line 3: the label 'high' is no number" in failing.train(*flags)
    failing.tables(train=[("ACDE", "1.5"), ("ACDF", "inf")])
    assert "line 3" in failing.train(*flags)
    failing.tables(**{split: [("ACDE", "1.5"), (letters, "1.5")] for split, letters in NUMBERS.items()})
    assert "every label is 1.5" in failing.train(*flags)


def test_one_class_is_no_classification(failing):
    failing.tables(train=[("ACDE", "a"), ("ACDF", "a")])
    assert "every label is 'a'" in failing.train(*CSV)


def test_missing_splits_and_columns_name_what_is_there(failing):
    assert "holds no .csv file" in failing.train(*CSV)
    failing.tables()
    (failing.data / "valid.csv").rename(failing.data / "validation.csv")
    message = failing.train(*CSV)
    assert "no split 'valid'" in message
    assert "test, train, validation" in message
    assert "did you mean 'validation'" in message
    (failing.data / "validation.csv").rename(failing.data / "valid.csv")
    message = failing.train("--sequence_column", "sequences", *CSV[2:])
    assert "no column 'sequences'" in message
    assert "did you mean 'sequence'" in message
    message = failing.train(task="secondary_structure")
    assert "holds no file named secondary_structure/secondary_structure_SPLIT with one of .lmdb, .jsonl" in message


def test_two_files_of_one_split_are_named(failing):
    failing.tables()
    (failing.data / "test.csv.gz").write_bytes(gzip.compress((failing.data / "test.csv").read_bytes()))
    assert "test.csv.gz and" in failing.train(*CSV)
    failing.structures(dict.copy)
    path = failing.data / "proteinnet" / "proteinnet_test.jsonl"
    (failing.data / path.name).write_bytes(path.read_bytes())
    assert "are both the split 'test'" in failing.train(task="contact_prediction")


def test_damaged_files_are_named(failing):
    failing.tables()
    packed = gzip.compress((failing.data / "test.csv").read_bytes() * 50)
    (failing.data / "test.csv").unlink()
    (failing.data / "test.csv.gz").write_bytes(packed[: len(packed) // 2])
    assert "test.csv.gz: the gzip data is damaged or cut off" in failing.train(*CSV)
    (failing.data / "test.csv.gz").unlink()
    (failing.data / "test.csv").write_bytes(b"\xff\xfe\x00\x01")
    assert "test.csv: not UTF-8" in failing.train(*CSV)
    failing.structures(dict.copy)
    (failing.data / "proteinnet" / "proteinnet_valid.jsonl").write_text('{"id": "a"\n')
    assert "proteinnet_valid.jsonl, line 1: not valid JSON" in failing.train(task="contact_prediction")


@pytest.mark.parametrize(
    ("task", "edit", "words"),
    [
        ("secondary_structure", lambda r: r["ss3"].pop(), ["ss3 has 29 entries for 30 residues"]),
        ("secondary_structure", lambda r: r.pop("ss3"), ["'ss3' is missing"]),
        ("secondary_structure", lambda r: r.update(ss3=[3] * 30), ["ss3 is 3 at residue", "0 (helix)"]),
        ("secondary_structure", lambda r: r.update(ss3=[0.5] * 30), ["ss3 must hold one whole number"]),
        ("secondary_structure", lambda r: r.update(ss3=[None] * 30), ["ss3 must hold one whole number"]),
        ("secondary_structure", lambda r: r.update(ss3=["H"] * 30), ["something other than numbers"]),
        ("secondary_structure", lambda r: r.update(protein_length=31), ["protein_length is 31", "30 residues"]),
        ("secondary_structure", lambda r: r.update(primary=7), ["sequence is missing"]),
        ("secondary_structure", lambda r: r.update(valid_mask=[2] * 30), ["valid_mask must hold one 0 or 1"]),
        ("contact_prediction", lambda r: r["tertiary"].pop(), ["tertiary has 29 entries for 30 residues"]),
        (
            "contact_prediction",
            lambda r: r.update(tertiary=[[float("nan")] * 3] * 30, valid_mask=[1] * 30),
            ["no number at residue 1"],
        ),
        (
            "contact_prediction",
            lambda r: r.update(tertiary=[[1.0, 2.0]] * 30),
            ["tertiary must hold three coordinates"],
        ),
    ],
)
def test_bad_structure_records_are_named(failing, task, edit, words):
    failing.structures(edit)
    message = failing.train(task=task)
    assert "_test.jsonl, line 2 (id test1)" in message
    assert all(word in message for word in words), message


def test_a_split_without_labels_is_named_and_so_is_the_crop_that_cut_them_off(failing):
    failing.structures(dict.copy)
    assert "within --max_length 6; take a larger one" in failing.train("--max_length", 6, task="contact_prediction")
    path = failing.data / "secondary_structure" / "secondary_structure_valid.jsonl"
    write_jsonl(path, [structure_record(np.random.default_rng(0), "v", 9) | {"valid_mask": [0] * 9}])
    assert "no protein of the split 'valid' has a label" in failing.train(task="secondary_structure")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--primary_metric", "spearmanr"],
            ["--primary_metric spearmanr", "doesn't fit the task csv", "accuracy, mcc"],
        ),
        (["--head", "conv"], ["--head conv", "mlp, linear"]),
        (["--batch_size", "0"], ["--batch_size", "at least 1", "'0'"]),
        (["--learning_rate", "nan"], ["--learning_rate", "above 0"]),
        (["--lerning_rate", "1"], ["unknown flag --lerning_rate", "did you mean '--learning_rate'"]),
        (["--from_pretrained", "x"], ["--from_pretrained has no use with the base model onehot"]),
        (["--time_or_name", "a/b"], ["--time_or_name 'a/b'"]),
        (["--exp_name", "a/b"], ["--exp_name", "without slashes"]),
        (["--exp_name", "a", "--time_or_name", "b"], ["not allowed with"]),
        (["--patience", "0"], ["--patience", "at least 1"]),
        (["--num_workers", "8"], ["--num_workers: not supported here", "leave it out"]),
        (["--log-dir=logs"], ["--log-dir: not supported here", "results.json"]),
        (["--resume_from_checkpoint"], ["not supported here", "start it again"]),
        (["--eval_freq", "2"], ["--eval_freq", "invalid choice: 2"]),
        (["--save_freq", "5"], ["--save_freq", "'improvement'"]),
        (["--train_file", "x.csv"], ["--data_dir and --train_file", "exclude each other"]),
    ],
)
def test_flags_that_cannot_work_are_named(failing, flags, words):
    failing.tables()
    message = failing.train(*CSV, *flags)
    assert all(word in message for word in words), message


def test_flags_of_another_task_and_missing_ones_are_named(failing):
    failing.structures(dict.copy)
    message = failing.train("--kind", "regression", task="secondary_structure")
    assert "--kind belongs to the tasks localization, csv, not to secondary_structure" in message
    assert "--label_column belongs to the task csv" in failing.train("--label_column", "x", task="stability")
    assert "the task csv needs --kind: regression, classification, token" in failing.train()
    message = failing.train("--sequence_column", "sequence", "--kind", "token")
    assert "the task csv needs --label_column" in message
    message = failing.train("--kind", "classifcation")
    assert "--kind classifcation: the kinds of csv are regression, classification" in message
    assert "did you mean 'classification'" in message
    message = failing.train(*CSV[:4], "--kind", "regression", "--class_weights", "balanced")
    assert "--class_weights has no use with --kind regression" in message
    assert "--valid_file is missing" in failing.train(*CSV, "--train_file", "x.csv", data=False)
    assert "invalid choice: 'secondary'" in failing.train(task="secondary")
    assert "needs --from_pretrained" in failing.train(task="secondary_structure", base_model="random")
    message = failing.train("--from_pretrained", failing.data, task="secondary_structure", base_model="transformer")
    assert str(failing.data) in message


def test_two_splits_of_one_content_are_no_splits(failing):
    failing.tables(test=ROWS)
    assert f"(the split 'test') holds the same as {failing.data / 'train.csv'} ('train')" in failing.train(*CSV)


@pytest.mark.parametrize("flags", [["--learning_rate", 1e38, "--max_grad_norm", 0], ["--learning_rate", 1e30]])
def test_a_training_that_diverges_fails_and_leaves_nothing(failing, flags, capsys):
    failing.tables()
    arguments = ["onehot", "csv", "--data_dir", failing.data, *CSV, "--output_dir", failing.out, *flags]
    assert run_command(train.main, [str(argument) for argument in arguments]) == RunFailed.exit_code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "lower --learning_rate" in message
    assert not failing.out.exists()


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory, peptide_dir: Path, checkpoint: Path) -> Path:
    """A fine-tuned transformer on the csv task."""
    out = tmp_path_factory.mktemp("runs")
    flags = ["--data_dir", peptide_dir, *CSV, "--from_pretrained", checkpoint, "--output_dir", out]
    train.main([str(f) for f in ["transformer", "csv", *flags, "--num_train_epochs", 1, "--time_or_name", "a"]])
    return out / "csv-transformer-a"


def test_eval_refuses_what_does_not_fit_the_run(failing, saved_run, tmp_path):
    run = ["transformer", "csv", saved_run]
    assert "--metrics spearmanr: doesn't fit the task csv" in failing.evaluate(*run, "--metrics", "spearmanr")
    message = failing.evaluate(*run, "--split", "tst")
    assert "no split 'tst'" in message
    assert "did you mean 'test'" in message
    assert "has the base model 'transformer'" in failing.evaluate("random", "csv", saved_run)
    assert "has the task 'csv'" in failing.evaluate("transformer", "secondary_structure", saved_run)
    assert "run.json: cannot be read" in failing.evaluate("transformer", "csv", tmp_path)


def test_eval_refuses_another_file_under_a_name_that_has_scores(failing, saved_run, peptide_dir):
    before = (saved_run / "results.json").read_bytes()
    write_csv(failing.data / "test.csv", ("sequence", "label"), [("ACDE", "amp"), ("ACDF", "other")])
    message = failing.evaluate("transformer", "csv", saved_run, "--data_dir", failing.data)
    assert "holds scores of another file as split 'test'" in message
    shutil.copyfile(peptide_dir / "test.csv", failing.data / "fresh.csv")
    message = failing.evaluate("transformer", "csv", saved_run, "--data_dir", failing.data, "--split", "fresh")
    assert "its file is that of the split 'test'" in message
    shutil.copyfile(peptide_dir / "train.csv", failing.data / "fresh.csv")
    message = failing.evaluate("transformer", "csv", saved_run, "--data_dir", failing.data, "--split", "fresh")
    assert "(the split 'fresh') holds the same as" in message
    assert "--output_dir: not supported here" in failing.evaluate("transformer", "csv", saved_run, "--output_dir", "x")
    assert (saved_run / "results.json").read_bytes() == before


def test_eval_refuses_weights_of_another_architecture(failing, saved_run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(saved_run, broken)
    description = json.loads((broken / "run.json").read_text())
    description["model"]["num_layers"] = 3
    (broken / "run.json").write_text(json.dumps(description))
    message = failing.evaluate("transformer", "csv", broken)
    assert "base.encoder.blocks.2" in message
    assert "another architecture" in message
    description["model"] |= {"num_layers": 2, "hidden_size": 64}
    (broken / "run.json").write_text(json.dumps(description))
    assert "another architecture" in failing.evaluate("transformer", "csv", broken)
    (broken / "model.safetensors").write_bytes(b"junk")
    assert "the weights cannot be read" in failing.evaluate("transformer", "csv", broken)
    (broken / "run.json").write_text(json.dumps({"format": "other"}))
    assert "not the description of a fine-tuned model" in failing.evaluate("transformer", "csv", broken)


def test_a_run_directory_is_not_overwritten_unless_asked(saved_run, peptide_dir, checkpoint, capsys):
    before = (saved_run / "results.json").read_bytes()
    flags = ["--data_dir", peptide_dir, *CSV, "--from_pretrained", checkpoint, "--output_dir", saved_run.parent]
    flags += ["--num_train_epochs", 1, "--time_or_name", "a"]
    arguments = [str(f) for f in ["transformer", "csv", *flags]]
    assert run_command(train.main, arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert (saved_run / "results.json").read_bytes() == before
    assert run_command(train.main, [*arguments, "--force"]) == 0
    assert [path.name for path in saved_run.parent.iterdir()] == [saved_run.name]
