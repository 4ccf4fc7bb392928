"""A run to go on with, and a way to see it refused."""

import shutil

import pytest
from pretraining_runs import checkpoint, pretrain


@pytest.fixture
def stopped(one_process, tmp_path):
    """A copy of the plain run as it was after step 10, when it went no further."""
    run = tmp_path / "stopped"
    shutil.copytree(one_process / "plain", run, symlinks=True)
    shutil.rmtree(checkpoint(run, 20))
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").symlink_to("step_00000010")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:12]))  # start, ten steps and a validation
    (run / "status").write_text("running\n")
    return run


@pytest.fixture
def refused(capsys):
    """Runs flags that must be refused, and returns the one line that says why."""

    def run(*argv):
        capsys.readouterr()
        assert pretrain(*argv) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        return errors

    return run
