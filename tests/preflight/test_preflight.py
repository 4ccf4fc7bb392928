"""The preflight is green where a run can go, and red, with the place, where one thing is wrong."""

import json
from pathlib import Path

import pytest
from preflight_work import CASES, FLAGS, little_space, work
from pretraining_runs import checkpoint, in_processes, pretrain

from megatron_plm.config.load import load_config
from megatron_plm.errors import run_command
from megatron_plm.preflight import command, storage
from megatron_plm.preflight.bandwidth import compare_groups
from megatron_plm.preflight.facts import check_equal, check_limits
from megatron_plm.preflight.page import Check, is_green, page
from megatron_plm.preflight.storage import checkpoint_bytes


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory) -> Path:
    """The reports of all cases by name."""
    folder = tmp_path_factory.mktemp("preflight")
    in_processes(2, work, folder, groups=len(CASES))
    return folder


def checks_of(folder: Path, name: str) -> dict[str, dict]:
    report = json.loads((folder / f"{name}.json").read_text())
    return {check["name"]: check for check in report["checks"]}


RED = {
    "version": ("versions", "torch is 1.0 on rank 1 (node1) and"),
    "configuration": ("configuration", "sha256 is"),
    "clock": ("clocks", "node1 is 5.0"),
    "space": ("free space", "0.0 GB free in"),
    "own_folder": ("shared folder", "node1 doesn't see what rank 0 writes in"),
    "full_disk": ("storage", "No space left on device for 1048576 bytes (on node1)"),
    "missing": ("processes", "1 of 2 did not come: rank 1; those that came run on node0"),
}


@pytest.mark.parametrize("rank", [0, 1])
def test_both_processes_end_with_the_verdict(two_nodes, rank):
    codes = json.loads((two_nodes / f"codes_{rank}.json").read_text())
    expected = {name: int(name in RED) for name in CASES if (name, rank) != ("missing", 1)}
    assert codes == expected


@pytest.mark.parametrize("name", RED)
def test_one_fault_is_named_with_its_place_and_nothing_else_is_red(two_nodes, name):
    check, said = RED[name]
    checks = checks_of(two_nodes, name)
    assert [found for found in checks if checks[found]["good"] is False] == [check]
    assert said in checks[check]["text"]


@pytest.mark.parametrize("name", ["version", "configuration"])
def test_processes_that_differ_are_not_made_to_talk(two_nodes, name):
    assert checks_of(two_nodes, name)["bandwidth"]["text"] == "not measured, as the processes differ"


@pytest.mark.parametrize(
    ("name", "dim", "operations"),
    [
        ("green", "dp_shard_cp", ["all-reduce", "all-gather"]),
        ("tensor", "tp", ["all-reduce", "all-gather"]),
        ("pipeline", "pp", ["all-reduce", "all-gather", "send"]),
    ],
)
def test_the_dims_of_the_layout_are_measured(two_nodes, name, dim, operations):
    checks = checks_of(two_nodes, name)
    assert [found for found in checks if " " in found and found.split()[0] in ("dp_shard_cp", "tp", "pp")] == [
        f"{dim} {operation}" for operation in operations
    ]
    assert all(checks[f"{dim} {operation}"]["values"]["GB/s"]["0"] > 0 for operation in operations)


def test_the_clocks_of_one_machine_agree(two_nodes):
    skew = checks_of(two_nodes, "green")["clocks"]["values"]["seconds_ahead"]
    assert abs(skew["node1"]) < 0.5


def test_only_the_first_process_prints_and_nothing_stays_behind(two_nodes):
    assert (two_nodes / "output_0.txt").read_text().count("Preflight of 2 processes on 2 nodes") == len(CASES) - 1
    assert "Preflight" not in (two_nodes / "output_1.txt").read_text()
    assert list(two_nodes.glob(".preflight*")) == []
    assert not (two_nodes / "run").exists()


# --- one process ----------------------------------------------------------------------------------------------------


def test_one_process_alone(tmp_path, capsys):
    report = tmp_path / "report.json"
    argv = [*FLAGS, f"--save={tmp_path / 'a' / 'run'}", f"--output={report}"]
    assert run_command(command.main, argv) == 0
    output = capsys.readouterr().out
    assert output.startswith("Preflight of 1 process on 1 node: dp 1\n")
    assert output.endswith("GREEN: nothing stands in the way of the run\n")
    assert "\033" not in output, "no colour where there is no terminal"
    assert json.loads(report.read_text())["green"] is True
    assert list(tmp_path.iterdir()) == [report]


def test_too_little_space_is_red_and_tells_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", little_space)
    assert run_command(command.main, [*FLAGS, f"--save={tmp_path}", "--keep-last=2"]) == 1
    output = capsys.readouterr().out
    assert "free some, choose another --save, or lower --keep-last 2" in output
    assert output.endswith("RED: free space\n")


def test_checkpoints_that_are_there_need_no_room_again(tmp_path, monkeypatch):
    config, _ = load_config([*FLAGS[:3], f"--save={tmp_path}", "--keep-last=2"])
    size = checkpoint_bytes(config)
    monkeypatch.setattr(storage, "free_bytes", lambda _folder: 2 * size)
    assert not storage._check_space(config, tmp_path, tmp_path).good
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert storage._check_space(config, tmp_path, tmp_path).good


def test_a_checkpoint_is_as_large_as_was_said(pair_data, tmp_path):
    argv = [*pair_data.flags, "--hidden-size=256", "--train-iters=1", f"--save={tmp_path}"]
    assert pretrain(*argv) == 0
    size = sum(path.stat().st_size for path in checkpoint(tmp_path).resolve().iterdir())
    assert size == pytest.approx(checkpoint_bytes(load_config(argv)[0]), rel=0.05)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--hiden-size=3"], "unknown flag --hiden-size=3; did you mean '--hidden-size'?"),
        (["--wait-seconds=0"], "--wait-seconds must be above 0, not 0.0"),
        (["--storage-mebibytes=-1"], "--storage-mebibytes must be above 0, not -1"),
        (["--tensor-model-parallel-size=2"], "does not divide the 1 process"),
    ],
)
def test_wrong_flags_exit_with_2(argv, said, capsys):
    assert run_command(command.main, argv) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert said in errors


# --- the pieces -----------------------------------------------------------------------------------------------------


def fact(**changes) -> dict:
    devices = {"gpu": "H100", "gpu memory": 80}
    return {
        "equal": {"devices": {**devices, **changes.pop("devices", {})}},
        "open_files": 4096, "shared_memory": 2**34, "free_gpu_memory": 0.99, **changes,
    }  # fmt: skip


HOSTS = {rank: f"node{rank // 4}" for rank in range(8)}


def test_what_differs_is_told_by_the_few():
    facts = {rank: fact() for rank in range(8)}
    assert check_equal("devices", facts, HOSTS).text == "the same in all processes: gpu H100, gpu memory 80"
    facts[5] = fact(devices={"gpu": "A100"})
    different = check_equal("devices", facts, HOSTS)
    assert (different.good, different.text) == (False, "gpu is A100 on rank 5 (node1) and H100 on 7 processes")


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"open_files": 100}, "open files", "100 in a process at least, 576 needed (rank 6 on node1)"),
        ({"shared_memory": 2**26}, "shared memory", "0.06 GiB free in /dev/shm at least (on node1)"),
        ({"free_gpu_memory": 0.4}, "gpu memory", "40% of a GPU free at least (rank 6 on node1)"),
    ],
)
def test_the_scarcest_limit_counts(changes, name, said):
    facts = {rank: fact() for rank in range(8)}
    assert is_green(check_limits(facts, HOSTS, 4))
    facts[6] = fact(**changes)
    (bad,) = [check for check in check_limits(facts, HOSTS, 4) if not check.good]
    assert bad.name == name
    assert bad.text.startswith(said)


def test_no_limit_of_open_files_is_enough():
    assert is_green(check_limits({0: fact(open_files=-1)}, HOSTS, 1))


def test_colour_marks_what_is_good_and_bad():
    text = page("title", [Check("a", True, "fine"), Check("bb", False, "not"), Check("c", None, "-")], colour=True)
    assert text.split("\n")[2:5] == ["\033[32m  ok  a   fine\033[0m", "\033[31m RED  bb  not\033[0m", "   -  c   -"]
    assert text.endswith("\033[31mRED: bb\033[0m")


def test_a_group_at_less_than_half_the_speed_of_the_others_is_red():
    speeds = {0: 40e9, 8: 42e9, 16: 41e9, 24: 21e9}
    assert compare_groups("tp all-reduce", speeds, size=8, on_links=1.75).good
    slow = compare_groups("tp all-reduce", {**speeds, 24: 20e9}, size=8, on_links=1.75)
    assert (slow.good, slow.text) == (
        False,
        "40.50 GB/s (70.88 on the links) among 8 processes in the median of 4 groups, 20.00 GB/s in the slowest, that "
        "of rank 24; look for a bad link or another program there",
    )
