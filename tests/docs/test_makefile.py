"""What `make demo` runs again: a step whose input, code or commands changed, and what follows from it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = {
    "preprocess": "tools/preprocess_data.py --input",
    "pretrain": "launch/pretrain.sh --config",
    "convert": "tools/convert_checkpoint.py --from native",
    "evaluate": "tape_finetune/tape_train.py",
}
MADE = [".venv/.installed", "demo/data/train.json", "demo/data/valid.json"]
MADE += ["demo/.pretrained", "demo/.converted", "demo/.evaluated"]


def steps_to_run(folder: Path) -> tuple[list[str], str]:
    """The steps that `make demo` would run, in order, and all commands it would run."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # `make test` set some
    done = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [step for step, command in STEPS.items() if command in done.stdout], done.stdout


@pytest.fixture
def finished(tmp_path) -> Path:
    """A tree in which `make demo` has run: every file older than what was made of it."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "examples", "launch", "megatron_plm", "tape_finetune", "tools"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignore)
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    for second, name in enumerate(MADE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 + 1 + second, 1e9 + 1 + second))
    return tmp_path


def test_nothing_runs_again_where_nothing_changed(finished):
    steps, commands = steps_to_run(finished)
    assert steps == []
    assert "pip install" not in commands
    assert "tools/report.py" in commands


@pytest.mark.parametrize(
    ("changed", "steps"),
    [
        ("constraints.txt", []),
        ("csrc/data/fasta_block.cpp", [*STEPS]),
        ("megatron_plm/data/packing.py", [*STEPS]),
        ("examples/data/pretrain_valid.fasta.gz", [*STEPS]),
        ("megatron_plm/model/attention.py", ["pretrain", "convert", "evaluate"]),
        ("launch/configs/demo.toml", ["pretrain", "convert", "evaluate"]),
        ("megatron_plm/convert/tape.py", ["convert", "evaluate"]),
        ("tape_finetune/tasks/csv_table.py", ["evaluate"]),
        ("examples/data/peptides/train.csv", ["evaluate"]),
        ("megatron_plm/report/page.py", []),
        ("Makefile", [*STEPS]),
    ],
)
def test_a_change_reaches_the_steps_it_can_change(changed, steps, finished):
    (finished / changed).touch()
    found, commands = steps_to_run(finished)
    assert found == steps
    assert ("pip install" in commands) == (changed == "constraints.txt" or changed.startswith("csrc/"))
