"""Fine-tuning in two processes is that in one: the same losses, scores and weights, written and told once."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pretraining_runs import in_processes, meet_anew
from processes import REPOSITORY, environment
from safetensors.torch import load_file

from megatron_plm.errors import run_command
from tape_finetune import train

# By name: base model, task, flags. 61 of the 200 peptides fill no batch of 8 evenly, nor do the 12 structures one of 5.
_FEW = ["--num_train_epochs=2", "--learning_rate=3e-3"]
_CSV = ["--sequence_column=sequence", "--label_column=label", "--kind=classification"]
RUNS = {
    "peptides": ["transformer", "csv", *_CSV, *_FEW, "--batch_size=61"],
    "accumulated": ["transformer", "csv", *_CSV, *_FEW, "--batch_size=61", "--gradient_accumulation_steps=3"],
    "structure": ["transformer", "secondary_structure", *_FEW, "--batch_size=5"],
    "contacts": ["transformer", "contact_prediction", *_FEW, "--batch_size=1", "--freeze"],
}


def _flags(name: str, checkpoint: Path, data: dict[str, Path], results: Path) -> list[str]:
    flags = RUNS[name]
    places = [f"--from_pretrained={checkpoint}", f"--data_dir={data['csv' if 'csv' in flags else 'structures']}"]
    return [*flags, *places, f"--output_dir={results}", f"--exp_name={name}"]


def _work(checkpoint: Path, data: dict[str, Path], folder: Path) -> None:
    codes = {}
    for name in RUNS:
        meet_anew()
        codes[name] = run_command(train.main, _flags(name, checkpoint, data, folder))
    meet_anew()
    broken = {**data, "csv": folder / "broken"}
    codes["broken"] = run_command(train.main, _flags("peptides", checkpoint, broken, folder / "none"))
    codes["wrong"] = run_command(train.main, [*_flags("peptides", checkpoint, data, folder / "none"), "--head=x"])
    (folder / f"codes_{os.environ['RANK']}.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def both(checkpoint, peptide_dir, structure_dir, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of the runs of one process and of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    data = {"csv": peptide_dir, "structures": structure_dir}
    for name in RUNS:
        assert run_command(train.main, _flags(name, checkpoint, data, one)) == 0
    shutil.copytree(peptide_dir, two / "broken")
    (two / "broken" / "valid.csv").write_text("sequence,label\nACDEF,nothing\n")
    in_processes(2, functools.partial(_work, checkpoint, data), two, groups=len(RUNS) + 1)
    return one, two


def _results(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "results.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name, both):
    """Sums of float32 in another order move a loss by some 1e-7 of it, and Adam makes of that a bit more."""
    one, two = (_results(folder, name) for folder in both)
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    for key in ("train_loss", "valid_metric"):
        found, expected = ([epoch[key] for epoch in results["epochs"]] for results in (two, one))
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)
    for split, result in one["splits"].items():
        assert two["splits"][split]["num_examples"] == result["num_examples"]
        for metric, score in result["metrics"].items():
            assert two["splits"][split]["metrics"][metric] == pytest.approx(score, abs=1e-5, nan_ok=True)
    weights = [load_file(folder / name / "model.safetensors") for folder in both]
    for key, expected in weights[0].items():
        assert (weights[1][key] - expected).norm() <= 1e-4 * expected.norm() + 1e-6, key


def test_the_first_process_writes_and_speaks(both):
    _, two = both
    spoken, silent = ((two / f"output_{rank}.txt").read_text() for rank in range(2))
    assert spoken.count("wrote ") == len(RUNS)
    assert "wrote" not in silent
    assert "epoch" not in silent
    assert {path.name for path in two.iterdir() if path.is_dir()} == {*RUNS, "broken"}


def test_an_error_is_told_once(both):
    _, two = both
    told = "".join((two / f"output_{rank}.txt").read_text() for rank in range(2))
    assert told.count("the label 'nothing' is none of the 2 classes") == 1
    assert told.count("--head x: the heads of csv are") == 1
    codes = json.loads((two / "codes_0.json").read_text())
    assert codes == {**dict.fromkeys(RUNS, 0), "broken": 2, "wrong": 2}


def test_torchrun_starts_the_command(peptide_dir, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "tape_finetune/tape_train.py", "onehot",
        "csv", *_CSV, f"--data_dir={peptide_dir}", "--num_train_epochs=1", f"--output_dir={tmp_path}", "--exp_name=a",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["num_processes"] == 2
    assert results["command"].startswith("torchrun --nproc-per-node 2 tape_finetune/tape_train.py onehot csv ")
    assert "next: python tape_finetune/tape_eval.py onehot csv" in done.stdout
