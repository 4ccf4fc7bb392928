"""launch/pretrain.sh as a cluster starts it: once on every node."""

import contextlib
import os
import signal
import socket
import subprocess

import pytest
from pretraining_runs import LAUNCHER, column, launcher_environment, records
from processes import descendants, wait_for


def start_two_nodes(*flags: str) -> list[subprocess.Popen]:
    """The launcher with these flags as on two machines, each with one process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [LAUNCHER, *flags],
            env={
                **launcher_environment(1),
                "NNODES": "2",
                "NODE_RANK": str(rank),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip


def test_two_nodes_of_one_process_train_as_one(pair_data, one_process, tmp_path):
    nodes = start_two_nodes(*pair_data.flags, f"--save={tmp_path / 'run'}")
    outputs = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert column(tmp_path / "run", "train", "loss") == pytest.approx(
        column(one_process / "plain", "train", "loss"), rel=1e-5
    )
    start = records(tmp_path / "run", "start")[0]
    assert start["world_size"] == 2
    assert start["command"].startswith("NNODES=2 NPROC_PER_NODE=1 launch/pretrain.sh --num-layers=2 ")


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (0, "error: the node of MASTER_ADDR localhost, which holds the store where all meet, has gone"),
        (1, f"error: process 1 on {os.uname().nodename} gave no sign of life for "),
    ],
)
def test_a_machine_that_is_lost_is_named_by_the_other_which_ends(lost, told, pair_data, tmp_path):
    run = tmp_path / "run"
    nodes = start_two_nodes(*pair_data.flags, "--train-iters=1000000", "--save-interval=1000000", f"--save={run}")
    left = nodes[1 - lost]
    metrics = run / "metrics.jsonl"
    try:
        wait_for(
            lambda: metrics.exists() and '"kind": "train"' in metrics.read_text(), "step", process=left, seconds=280
        )
        for process in [nodes[lost].pid, *descendants(nodes[lost].pid)]:
            with contextlib.suppress(ProcessLookupError):  # the launcher's end may have ended it
                os.kill(process, signal.SIGKILL)
        _, errors = left.communicate(timeout=280)
        nodes[lost].communicate(timeout=280)
    finally:
        for node in nodes:
            for process in [node.pid, *descendants(node.pid)] if node.poll() is None else []:
                os.kill(process, signal.SIGKILL)
    assert left.returncode == 1
    assert errors.count(told) == 1
    assert "Traceback" not in errors
    assert (run / "status").read_text() == "failed\n"
