"""Where the processes of a run meet: from what a scheduler leaves in the environment to torchrun's variables.

`python -m megatron_plm.rendezvous` prints them as shell assignments, which launch/pretrain.sh evaluates. It needs no
torch. A *task* is one start of that script. Either there is one on each node, which starts the node's processes by
torchrun: it needs NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and NPROC_PER_NODE. Or there is one for each process,
which it then becomes: that needs RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
What is given under these names wins over what a scheduler says.

Sources of the schedulers' names: Slurm, slurm.schedmd.com/srun.html, "Output environment variables"; LSF, IBM Spectrum
LSF 10.1, "Environment variables set for job execution"; Open MPI, docs.open-mpi.org, "Environment variables".
"""

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_plm.errors import UserError, run_command

DEFAULT_PORT = 29500  # torchrun's own
# Ports of jobs: above the services', below those that Linux gives to outgoing connections (32768 and up).
_FIRST_PORT, _NUM_PORTS, _STEPS_OF_A_JOB = 16384, 16384, 64
_COUNTS = ("NNODES", "NPROC_PER_NODE", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_RANKS = ("NODE_RANK", "RANK", "LOCAL_RANK")

# Who starts tasks: rank, number of tasks, rank on the node, tasks on the node. jsrun sets Open MPI's names too.
_MPI = {
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
}


class Tasks(NamedTuple):
    """The tasks that were started together with this one.

    Attributes:
        starter: the command that started them, for messages.
        node_rank: of this task's node; None where nothing tells.
        rank, local_rank: of this task among all and on its node.
        first_host: name of the node with rank 0; None where nothing tells.
    """

    starter: str
    nodes: int = 1
    node_rank: int | None = 0
    tasks_per_node: int = 1
    rank: int = 0
    local_rank: int = 0
    first_host: str | None = None


def settings(environment: Mapping[str, str], hostname: str) -> dict[str, str]:
    """The variables to start with, by name.

    Raises UserError for values that cannot be meant, and where something that is needed is missing.
    """
    given = {name: environment[name] for name in (*_COUNTS, *_RANKS, "MASTER_ADDR") if environment.get(name)}
    for name in _COUNTS + _RANKS:
        lowest = 0 if name in _RANKS else 1
        if name in given and not (given[name].isdecimal() and int(given[name]) >= lowest):
            raise UserError(f"{name} is {given[name]}; give a whole number, {lowest} or more")
    if "RANK" in given:
        return _one_process(given)
    tasks = _started_tasks(environment, hostname)
    if tasks is not None and tasks.tasks_per_node > 1:
        return _process_of_tasks(tasks, given, environment)
    return _node(tasks, given, environment)


def _node(tasks: Tasks | None, given: dict[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """For one task a node."""
    nodes = int(given.get("NNODES", tasks.nodes if tasks else 1))
    processes = given.get("NPROC_PER_NODE") or str(_gpus(environment) if tasks else 1)
    if nodes == 1:
        return {"NNODES": "1", "NPROC_PER_NODE": processes}
    told_rank = tasks.node_rank if tasks else None
    node_rank = given.get("NODE_RANK") or ("" if told_rank is None else str(told_rank))
    if not node_rank:
        raise UserError(f"NODE_RANK is missing; with {nodes} nodes it is needed on every one")
    if int(node_rank) >= nodes:
        raise UserError(f"NODE_RANK is {node_rank}, and there are {nodes} nodes; give 0 to {nodes - 1}")
    return {
        "NNODES": str(nodes),
        "NODE_RANK": node_rank,
        "NPROC_PER_NODE": processes,
        **_master(tasks, nodes, given, environment),
    }


def _process_of_tasks(tasks: Tasks, given: dict[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """For one task a process. The names for one task a node may only repeat what holds."""
    holds = {
        "NNODES": (tasks.nodes,),
        "NODE_RANK": (tasks.node_rank,),
        "NPROC_PER_NODE": (1, tasks.tasks_per_node),
        "WORLD_SIZE": (tasks.nodes * tasks.tasks_per_node,),
    }
    for name, values in holds.items():
        if name in given and int(given[name]) not in values:
            raise UserError(
                f"{name} is {given[name]}, and {tasks.starter} started {tasks.tasks_per_node} tasks on each of "
                f"{tasks.nodes} nodes, each of them one process; unset {name}, or start one task a node"
            )
    if re.fullmatch("[^,]+", environment.get("CUDA_VISIBLE_DEVICES", "")):
        raise UserError(
            f"{tasks.starter} shows each of {tasks.tasks_per_node} tasks on a node one GPU only, and they reach each "
            "other's memory quickly only where all see all: ask for GPUs by node, not by task (--gpus-per-node), or "
            "start one task a node"
        )
    return {
        "RANK": str(tasks.rank),
        "WORLD_SIZE": str(tasks.nodes * tasks.tasks_per_node),
        "LOCAL_RANK": str(tasks.local_rank),
        "LOCAL_WORLD_SIZE": str(tasks.tasks_per_node),
        "GROUP_RANK": str(tasks.node_rank),
        "GROUP_WORLD_SIZE": str(tasks.nodes),
        **_master(tasks, tasks.nodes, given, environment),
    }


def _one_process(given: dict[str, str]) -> dict[str, str]:
    """For a process whose rank is given."""
    needed = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    missing = [name for name in needed if name not in given]
    if missing:
        raise UserError(
            f"RANK is given, so this is one process of several, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; give {', '.join(needed)} too, or unset RANK"
        )
    if int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        raise UserError(f"RANK is {given['RANK']}, and WORLD_SIZE {given['WORLD_SIZE']}; ranks begin at 0")
    if given.get("NPROC_PER_NODE", "1") != "1":
        raise UserError(
            f"RANK is given, so this is one process, and NPROC_PER_NODE is {given['NPROC_PER_NODE']}; unset one of them"
        )
    names = ("RANK", "LOCAL_WORLD_SIZE", *needed)
    return {
        **{name: given[name] for name in names if name in given},
        "MASTER_PORT": given.get("MASTER_PORT", str(DEFAULT_PORT)),
    }


def _master(tasks: Tasks | None, nodes: int, given: dict[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Where the process of rank 0 is reached."""
    address = given.get("MASTER_ADDR") or (tasks.first_host if tasks else None) or ("localhost" if nodes == 1 else None)
    if address is None:
        raise UserError(f"MASTER_ADDR is missing; with {nodes} nodes give every one the name of the node with rank 0")
    return {"MASTER_ADDR": address, "MASTER_PORT": given.get("MASTER_PORT") or str(_port(environment))}


def _port(environment: Mapping[str, str]) -> int:
    """A port that all tasks of a job agree on, and jobs that share a node don't, as their numbers are close."""
    job = environment.get("SLURM_JOB_ID") or environment.get("LSB_JOBID") or ""
    if not job.isdecimal():
        return DEFAULT_PORT
    step = environment.get("SLURM_STEP_ID", "")
    return _FIRST_PORT + (int(job) * _STEPS_OF_A_JOB + int(step if step.isdecimal() else 0)) % _NUM_PORTS


def _gpus(environment: Mapping[str, str]) -> int:
    """GPUs of this node that the scheduler gave to the job; 1 where it doesn't say."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        number = environment.get(name, "").rpartition(":")[2]  # "8", or with its type: "h100:8"
        if number.isdecimal() and int(number) > 0:
            return int(number)
    return len([device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]) or 1


# --- who started us -------------------------------------------------------------------------------------------------


def _started_tasks(environment: Mapping[str, str], hostname: str) -> Tasks | None:
    """What the scheduler says; None without one.

    An mpirun inside a job of Slurm or LSF counts its tasks itself, and starts its helpers by srun: it goes first.
    """
    for starter, names in _MPI.items():
        if all(environment.get(name) for name in names):
            return _mpi_tasks(starter, names, environment)
    if environment.get("SLURM_JOB_ID"):
        return _slurm_tasks(environment)
    hosts = _lsf_hosts(environment)
    if hosts:
        # blaunch tells its tasks no rank, so a node's is the place of its name.
        short = [host.partition(".")[0] for host in hosts]
        mine = hostname.partition(".")[0]
        return Tasks("blaunch", len(hosts), short.index(mine) if mine in short else None, first_host=hosts[0])
    return None


def _mpi_tasks(starter: str, names: Sequence[str], environment: Mapping[str, str]) -> Tasks:
    rank, size, local_rank, local_size = (_number(name, environment) for name in names)
    nodes = -(-size // max(local_size, 1))
    hosts = _lsf_hosts(environment)
    if len(hosts) == nodes + 1:  # the node that runs jsrun itself is listed first
        hosts = hosts[1:]
    first = hosts[0] if hosts else _first_slurm_host(environment)
    return _checked(starter, rank, size, local_rank, local_size, first)


def _slurm_tasks(environment: Mapping[str, str]) -> Tasks:
    if not environment.get("SLURM_STEP_ID"):
        allocated = environment.get("SLURM_NNODES") or "1"
        if allocated != "1" and not environment.get("NNODES"):
            raise UserError(
                f"Slurm gave this job {allocated} nodes, and nothing was started on the others; start this by "
                "srun --ntasks-per-node=1, as launch/slurm.sbatch does, or set NNODES=1 to use this node alone"
            )
        return Tasks("sbatch")
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES")
    rank, size, local_rank, nodes = (_number(name, environment) for name in names)
    if size % nodes:
        raise UserError(f"srun started {size} tasks on {nodes} nodes; give every node the same by --ntasks-per-node")
    return _checked("srun", rank, size, local_rank, size // nodes, _first_slurm_host(environment))


def _checked(starter: str, rank: int, size: int, local_rank: int, local_size: int, first_host: str | None) -> Tasks:
    if local_size < 1 or size % local_size or not 0 <= rank < size:
        raise UserError(
            f"{starter} started {size} tasks, {local_size} of them on this node, and this is number {rank}; start the "
            "same number on every node"
        )
    if rank % local_size != local_rank:
        raise UserError(
            f"{starter} gave task {rank} the place {local_rank} of {local_size} on its node, and neighbours in rank "
            "must share nodes, as tensor parallelism talks most among them; place tasks by node (srun "
            "--distribution=block, mpirun --map-by slot)"
        )
    return Tasks(starter, size // local_size, rank // local_size, local_size, rank, local_rank, first_host)


def _first_slurm_host(environment: Mapping[str, str]) -> str | None:
    """The first of a list as in `gpu[003-007,9],login1`; as `scontrol show hostnames` says, but in containers too."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None
    return re.sub(r"\[(\w*)[^\]]*\]", r"\1", first[0]) or None


def _lsf_hosts(environment: Mapping[str, str]) -> list[str]:
    """The job's hosts, each once, in LSF's order."""
    file = environment.get("LSB_DJOB_HOSTFILE")
    if file:
        try:
            words = Path(file).read_text(encoding="utf-8").split()
        except OSError as error:
            raise UserError(f"LSB_DJOB_HOSTFILE {file}: {error.strerror}; LSF should have written it") from None
    else:
        words = environment.get("LSB_MCPU_HOSTS", "").split()[::2]  # "hostA 8 hostB 8"
    return list(dict.fromkeys(words))


def _number(name: str, environment: Mapping[str, str]) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise UserError(f"{name} is {value or 'missing'}, and should be a whole number that the scheduler sets")
    return int(value)


def main(_argv: Sequence[str]) -> int:
    """Print the variables as lines that a shell evaluates."""
    found = settings(os.environ, socket.gethostname())
    processes = int(found.get("NPROC_PER_NODE") or found.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1 and not os.environ.get("OMP_NUM_THREADS"):
        # Unasked, torchrun gives each process one thread, and torch without it all cores: share them out.
        of_this_task = os.environ.get("SLURM_CPUS_PER_TASK", "") if "RANK" in found else ""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found["OMP_NUM_THREADS"] = of_this_task or str(max(1, cores // processes))
    for name, value in found.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
