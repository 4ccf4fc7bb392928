"""The record beside a measurement names the machine and the commit of this code."""

import json
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch
from processes import REPOSITORY

from megatron_plm.machine import describe_machine, package_versions, processor_name


def test_versions_are_those_that_run():
    versions = package_versions()
    assert versions["python"] == platform.python_version()
    assert torch.__version__.startswith(versions["torch"].partition("+")[0])


def test_the_description_is_plain_data():
    described = describe_machine()
    assert json.loads(json.dumps(described)) == described
    assert described["cores"] == os.cpu_count()
    assert described["processor"] == processor_name() != ""
    assert described["threads"] == torch.get_num_threads()


def test_the_commit_is_this_codes_wherever_it_is_started(tmp_path, monkeypatch):
    def git(*command: str) -> str:
        """What git says about the checkout that this file is in."""
        done = subprocess.run(["git", *command], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != REPOSITORY:
            pytest.skip("the repository is no git checkout of its own")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the repository is no git checkout")
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    described = describe_machine()["commit"].removesuffix("-dirty")
    assert git("rev-parse", f"{described}^{{commit}}") == git("rev-parse", "HEAD")
