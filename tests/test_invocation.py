"""Commands that are printed can be typed: they name the door that was used."""

import shlex
import sys
from pathlib import Path

import pytest

from megatron_plm import invocation
from megatron_plm.cli import VERBS
from megatron_plm.invocation import command_line, typeable

REPOSITORY = Path(__file__).resolve().parents[1]
PROCESSES = ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", invocation.EXIT_CODE_FILE)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in PROCESSES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("verb", VERBS)
def test_a_checkout_names_its_files_and_the_installed_command_its_verbs(verb, monkeypatch):
    argv = ["--input", "a b"]
    monkeypatch.setattr(sys, "argv", ["tools/any.py"])
    *program, flag, value = shlex.split(command_line(verb, argv))
    assert (flag, value) == ("--input", "a b")
    assert (REPOSITORY / program[-1]).is_file()
    monkeypatch.setattr(sys, "argv", ["/usr/bin/megatron-plm", verb])
    assert shlex.split(command_line(verb, argv)) == ["megatron-plm", verb, *argv]


def test_without_a_checkout_there_are_only_verbs(monkeypatch, tmp_path):
    monkeypatch.setattr(invocation, "__file__", str(tmp_path / "megatron_plm" / "invocation.py"))
    assert command_line("report", []) == "megatron-plm report"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    expected = "torchrun --nproc-per-node 2 -m megatron_plm.training.pretrain --lr 1"
    assert command_line("pretrain", ["--lr", 1]) == expected


@pytest.mark.parametrize("verb", ["report", "pretrain"])
def test_a_command_for_the_working_directory_finds_its_file(verb, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tools/any.py"])
    monkeypatch.chdir(REPOSITORY)
    assert typeable(verb, ["a b"]) == command_line(verb, ["a b"])
    (tmp_path / "else where").mkdir()
    monkeypatch.chdir(tmp_path / "else where")
    *program, argument = shlex.split(typeable(verb, ["a b"]))
    assert argument == "a b"
    assert Path(program[-1]).samefile(REPOSITORY / shlex.split(command_line(verb, []))[-1])
    monkeypatch.setattr(sys, "argv", ["/usr/bin/megatron-plm", verb])
    assert shlex.split(typeable(verb, ["a b"])) == ["megatron-plm", verb, "a b"]


@pytest.mark.parametrize(
    ("processes", "nodes", "launcher", "program"),
    [
        ("1", "1", False, "launch/pretrain.sh"),
        ("4", "1", True, "NPROC_PER_NODE=4 launch/pretrain.sh"),
        ("4", "2", True, "NNODES=2 NPROC_PER_NODE=4 launch/pretrain.sh"),
        ("4", "1", False, "torchrun --nproc-per-node 4 launch/pretrain.sh"),
        ("8", "3", False, "torchrun --nnodes 3 --nproc-per-node 8 launch/pretrain.sh"),
    ],
)
def test_pretraining_says_how_many_processes_there_are(processes, nodes, launcher, program, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    if launcher:
        monkeypatch.setenv(invocation.EXIT_CODE_FILE, "code")
    assert command_line("pretrain", ["--seed", "1"]) == f"{program} --seed 1"
