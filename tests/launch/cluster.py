"""A cluster of two nodes on this machine: stand-ins for `srun`, `scontrol` and `blaunch`, as far as we use them."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pretraining_runs import launcher_environment
from processes import REPOSITORY, wait_for

# Starts the tasks of all nodes, passes SIGUSR1 on to them, as Slurm gives them that of --signal, and ends with the
# highest exit code.
_SRUN = """#!/usr/bin/env bash
per_node=1
while [[ $1 == --* ]]; do
  [[ $1 == --ntasks-per-node=* ]] && per_node=${1#*=}
  shift
done
pids=()
for ((rank = 0; rank < SLURM_NNODES * per_node; rank++)); do
  env SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES="$SLURM_NNODES" SLURM_STEP_NUM_TASKS=$((SLURM_NNODES * per_node)) \\
    SLURM_STEP_NODELIST="$SLURM_JOB_NODELIST" SLURM_PROCID=$rank SLURM_LOCALID=$((rank % per_node)) "$@" &
  pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
echo $$ > "$CLUSTER/srun.pid"
highest=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
  ((code > highest)) && highest=$code
done
exit $highest
"""
_SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$CLUSTER/scontrol.log"
"""
# LSF starts the task on its host, under that host's name; here NODE_RANK stands for the name.
_BLAUNCH = """#!/usr/bin/env bash
echo "$1 $2" >> "$CLUSTER/blaunch.log"
shift 2
NODE_RANK=1 exec "$@"
"""


class Cluster:
    """Stand-ins for the commands of Slurm and LSF in a folder, and the variables of a job on two nodes.

    A node is called localhost, as this machine finds it by that name only; the other is never asked for by name.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        bin_folder = folder / "bin"
        bin_folder.mkdir(parents=True)
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL), ("blaunch", _BLAUNCH)):
            (bin_folder / name).write_text(text)
            (bin_folder / name).chmod(0o755)
        self.path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"

    def environment(self, **variables: str) -> dict[str, str]:
        """What a job sees: one process a node, and a port that is free now in place of the job number's."""
        return {
            **launcher_environment(1),
            "PATH": self.path,
            "CLUSTER": str(self.folder),
            "MASTER_PORT": str(self.port),
            **variables,
        }

    def slurm(self, nodes: int = 2) -> dict[str, str]:
        hosts = "localhost,other" if nodes > 1 else "localhost"
        return self.environment(SLURM_JOB_ID="4321", SLURM_NNODES=str(nodes), SLURM_JOB_NODELIST=hosts)

    def lsf(self, flags: Sequence[str]) -> dict[str, str]:
        hosts = self.folder / "hosts"
        hosts.write_text("localhost\nother\n")
        return self.environment(LSB_JOBID="99", LSB_DJOB_HOSTFILE=str(hosts), FLAGS=" ".join(flags), NODE_RANK="0")

    def start(self, command: Sequence[object], environment: dict[str, str]) -> subprocess.Popen:
        return subprocess.Popen(
            [str(word) for word in command], cwd=REPOSITORY, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""


def finish(process: subprocess.Popen, seconds: float = 200) -> tuple[str, str]:
    """Standard output and standard error of a process that should end by itself."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def wait_for_steps(process: subprocess.Popen, run: Path, number: int) -> None:
    """Until the run has made so many steps."""
    metrics = run / "metrics.jsonl"
    wait_for(
        lambda: metrics.exists() and metrics.read_text().count('"kind": "train"') >= number,
        f"{number} steps", process=process, seconds=150,
    )  # fmt: skip
