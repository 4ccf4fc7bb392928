"""launch/pretrain.sh as a cluster starts it: once on every node."""

import socket
import subprocess

import pytest
from pretraining_runs import LAUNCHER, column, launcher_environment, records


def test_two_nodes_of_one_process_train_as_one(pair_data, one_process, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [LAUNCHER, *pair_data.flags, f"--save={tmp_path / 'run'}"],
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
    outputs = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert column(tmp_path / "run", "train", "loss") == pytest.approx(
        column(one_process / "plain", "train", "loss"), rel=1e-5
    )
    start = records(tmp_path / "run", "start")[0]
    assert start["world_size"] == 2
    assert start["command"].startswith("NNODES=2 NPROC_PER_NODE=1 launch/pretrain.sh --num-layers=2 ")
