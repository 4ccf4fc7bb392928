"""The record beside a measurement names the machine and the commit of this code."""

import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from megatron_plm.machine import describe_machine, package_versions, processor_name

REPOSITORY = Path(__file__).resolve().parents[1]


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

    def commit() -> str | None:
        return (describe_machine()["commit"] or "").removesuffix("-dirty")

    here = commit()
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    assert commit() == here
