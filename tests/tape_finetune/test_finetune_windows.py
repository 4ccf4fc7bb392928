"""Proteins longer than a model takes, read in windows: no residue is lost, in training, scoring or prediction."""

import json
from pathlib import Path

import pytest

from megatron_plm.errors import run_command
from tape_finetune import evaluate, predict, train

TASK = "secondary_structure"


def _train(folder: Path, *flags: object) -> int:
    arguments = [TASK, "--output_dir", folder, "--num_train_epochs", "1", "--exp_name", "a", *flags]
    return run_command(train.main, [str(word) for word in ["onehot", *arguments]])


def _results(folder: Path) -> dict:
    return json.loads((folder / "a" / "results.json").read_text())


def test_windows_of_what_reads_single_residues_give_the_scores_of_whole_proteins(
    structure_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One-hot features depend on no neighbour, so that every loss and score must be that of whole proteins."""
    whole, windows, cropped = (tmp_path / name for name in ("whole", "windows", "cropped"))
    assert _train(whole, "--data_dir", structure_dir) == 0
    assert _train(windows, "--data_dir", structure_dir, "--max_length", "20", "--long_proteins", "window") == 0
    assert "test 6 (6 in windows)" in capsys.readouterr().out
    assert _train(cropped, "--data_dir", structure_dir, "--max_length", "20") == 0
    expected, found = _results(whole), _results(windows)
    assert found["epochs"][0]["train_loss"] == pytest.approx(expected["epochs"][0]["train_loss"], rel=1e-6)
    for split, scores in found["splits"].items():
        metrics = expected["splits"][split]["metrics"]
        assert scores["metrics"] == {name: pytest.approx(value, abs=1e-12) for name, value in metrics.items()}
        assert (scores["cropped"], scores["windowed"]) == (0, scores["num_examples"])
    assert found["train"]["windowed"] == found["train"]["num_examples"] == 12
    assert _results(cropped)["splits"]["test"]["metrics"] != expected["splits"]["test"]["metrics"]

    assert evaluate.main(["onehot", TASK, str(windows / "a"), "--split", "test"]) == 0
    assert _results(windows) == found
    proteins = tmp_path / "p.csv"
    proteins.write_text("id,sequence\nlong," + "MKVLAE" * 9 + "\nshort,MKVL\n")
    for run in (whole, windows):
        output = run / "p.jsonl"
        assert predict.main([str(run / "a"), "--input", str(proteins), "--output", str(output)]) == 0
    assert "1 of more than 20 residues, read in windows" in capsys.readouterr().out
    long, _ = (json.loads(line) for line in output.read_text().splitlines())
    assert (long["length"], long["cropped"], len(long["labels"])) == (54, False, 54)
    assert output.read_text() == (whole / "p.jsonl").read_text()


def test_a_model_with_learned_positions_scores_residues_beyond_them(
    dropout_checkpoint: Path, structure_dir: Path, tmp_path: Path
) -> None:
    flags = [TASK, "--from_pretrained", dropout_checkpoint, "--data_dir", structure_dir, "--output_dir", tmp_path]
    flags += ["--long_proteins", "window", "--num_train_epochs", "1", "--exp_name", "a", "--freeze"]
    assert train.main([str(word) for word in ["transformer", *flags]]) == 0
    results = _results(tmp_path)
    assert results["splits"]["test"]["windowed"] == 6
    assert results["splits"]["test"]["cropped"] == 0


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("contact_prediction", ["--max_length", "20"], "the task contact_prediction does not read single residues"),
        (TASK, ["--max_length", "20", "--head", "tape"], "--head tape does not read single residues"),
        (TASK, [], "this model takes proteins of any length; give --max_length too"),
    ],
)
def test_windows_that_would_do_nothing_are_refused(
    task: str, flags: list[str], message: str, structure_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["onehot", task, "--data_dir", str(structure_dir), "--long_proteins", "window", *flags]
    assert run_command(train.main, words) == 2
    assert message in capsys.readouterr().err
