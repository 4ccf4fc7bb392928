"""The variables that every scheduler sets become torchrun's, or one sentence says why not."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

from megatron_plm.errors import UserError
from megatron_plm.rendezvous import settings

PLAIN = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "NPROC_PER_NODE": "8"}


def slurm(rank: int, tasks_per_node: int, nodes: int = 4) -> dict[str, str]:
    """What srun sets in the task `rank`."""
    return {
        "SLURM_JOB_ID": "1234",
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": "login1,gpu[007-009,12]",
        "SLURM_STEP_ID": "2",
        "SLURM_STEP_NODELIST": "gpu[007-009,12]",
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": str(nodes * tasks_per_node),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % tasks_per_node),
    }


def open_mpi(rank: int, size: int, local_size: int) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % local_size),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
    }


def found(variables: dict[str, str], hostname: str = "here") -> str:
    """The settings in the order of their names."""
    return " ".join(f"{name}={value}" for name, value in sorted(settings(variables, hostname).items()))


def refusal(variables: dict[str, str]) -> str:
    with pytest.raises(UserError) as refused:
        settings(variables, "here")
    return str(refused.value)


PORT = 16384 + (1234 * 64 + 2) % 16384


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "NNODES=1 NPROC_PER_NODE=1"),
        ({"NPROC_PER_NODE": "2"}, "NNODES=1 NPROC_PER_NODE=2"),
        (PLAIN, "MASTER_ADDR=node0 MASTER_PORT=29500 NNODES=2 NODE_RANK=1 NPROC_PER_NODE=8"),
        ({**PLAIN, "MASTER_PORT": "5"}, "MASTER_ADDR=node0 MASTER_PORT=5 NNODES=2 NODE_RANK=1 NPROC_PER_NODE=8"),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0"},
            "LOCAL_RANK=1 MASTER_ADDR=node0 MASTER_PORT=29500 RANK=3 WORLD_SIZE=4",
        ),
    ],
)
def test_plain_variables(variables, expected):
    assert found(variables) == expected


def test_slurm_with_a_task_a_node():
    expected = f"MASTER_ADDR=gpu007 MASTER_PORT={PORT} NNODES=4 NODE_RANK=3 NPROC_PER_NODE="
    assert found(slurm(3, 1)) == expected + "1"
    assert found({**slurm(3, 1), "SLURM_GPUS_ON_NODE": "8"}) == expected + "8"
    assert found({**slurm(3, 1), "SLURM_GPUS_PER_NODE": "h100:4"}) == expected + "4"
    assert found({**slurm(3, 1), "CUDA_VISIBLE_DEVICES": "0,1,2"}) == expected + "3"


def test_slurm_with_a_task_a_process():
    assert found({**slurm(6, 2), "NPROC_PER_NODE": "2", "NNODES": "4", "CUDA_VISIBLE_DEVICES": "0,1"}) == (
        f"GROUP_RANK=3 GROUP_WORLD_SIZE=4 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=gpu007 MASTER_PORT={PORT} "
        "RANK=6 WORLD_SIZE=8"
    )


def test_slurm_without_srun_on_one_node():
    assert found({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"}) == "NNODES=1 NPROC_PER_NODE=8"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[10-12]", "gpu10"),
        ("gpu[3,10-12]x,gpu1", "gpu3x"),
        ("r[0-1]n[08-16]", "r0n08"),
        ("gpu-a[2]-ib,b", "gpu-a2-ib"),
    ],
)
def test_the_first_host_of_slurms_list(hosts, first):
    assert settings({**slurm(1, 1), "SLURM_STEP_NODELIST": hosts}, "here")["MASTER_ADDR"] == first


def test_lsf_counts_nodes_by_the_names_of_its_hosts(tmp_path: Path):
    expected = "MASTER_ADDR=a.site MASTER_PORT=16960 NNODES=2 NODE_RANK=1 NPROC_PER_NODE=2"
    (tmp_path / "hosts").write_text("a.site\na.site\nb.site\nb.site\n")
    gpus = {"LSB_JOBID": "9", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert found({**gpus, "LSB_DJOB_HOSTFILE": str(tmp_path / "hosts")}, "b") == expected
    assert found({**gpus, "LSB_MCPU_HOSTS": "a.site 2 b.site 2"}, "b.site") == expected
    one = {"LSB_MCPU_HOSTS": "a 2", "LSB_JOBID": "9"}
    assert found(one, "a") == "NNODES=1 NPROC_PER_NODE=1"


def test_jsrun_is_told_from_the_host_that_it_runs_on():
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    variables = {f"JSM_NAMESPACE_{name}": value for name, value in zip(names, ("7", "12", "1", "6"), strict=True)}
    hosts = {"LSB_MCPU_HOSTS": "batch 1 a 42 b 42", "LSB_JOBID": "9"}
    assert found({**variables, **hosts, **open_mpi(7, 12, 6)}) == (
        "GROUP_RANK=1 GROUP_WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=6 MASTER_ADDR=a MASTER_PORT=16960 RANK=7 "
        "WORLD_SIZE=12"
    )


def test_mpi_with_a_task_a_node_and_a_task_a_process():
    address = {"MASTER_ADDR": "a"}
    expected = "MASTER_ADDR=a MASTER_PORT=29500 NNODES=3 NODE_RANK=2 NPROC_PER_NODE=8"
    assert found({**open_mpi(2, 3, 1), **address, "NPROC_PER_NODE": "8"}) == expected
    process = "GROUP_RANK=1 GROUP_WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=29500"
    assert found({**open_mpi(3, 4, 2), **address}) == f"{process} RANK=3 WORLD_SIZE=4"
    mpich = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert found({**mpich, **address}) == f"{process} RANK=3 WORLD_SIZE=4"
    assert settings(open_mpi(1, 2, 2), "here")["MASTER_ADDR"] == "localhost"


def test_mpirun_inside_a_job_of_slurm_counts_its_own_tasks():
    """It starts its helpers by srun, whose variables are there too and mean those."""
    variables = settings({**slurm(1, 1, nodes=2), **open_mpi(5, 8, 4)}, "here")
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["MASTER_ADDR"]) == ("5", "8", "gpu007")


def test_what_is_given_wins_over_slurm():
    given = {"NODE_RANK": "0", "NNODES": "2", "NPROC_PER_NODE": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert found({**slurm(3, 1), "SLURM_GPUS_ON_NODE": "8", **given}) == (
        "MASTER_ADDR=a MASTER_PORT=1 NNODES=2 NODE_RANK=0 NPROC_PER_NODE=3"
    )
    assert found({**slurm(3, 1), "NNODES": "1"}) == "NNODES=1 NPROC_PER_NODE=1"
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}
    assert settings({**slurm(3, 1), **rank}, "here")["WORLD_SIZE"] == "1"


def test_jobs_that_share_a_node_get_ports_of_their_own():
    jobs = [{**slurm(0, 1), "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in (8, 9) for step in (0, 1)]
    ports = {settings(job, "here")["MASTER_PORT"] for job in jobs}
    assert len(ports) == 4
    assert all(1024 < int(port) < 32768 for port in ports)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE is gpu; give a whole number, 1 or more"),
        ({"NODE_RANK": "-1"}, "NODE_RANK is -1; give a whole number, 0 or more"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is http"),
        ({"NNODES": "2"}, "NODE_RANK is missing; with 2 nodes"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR is missing; with 2 nodes"),
        ({**PLAIN, "NODE_RANK": "2"}, "NODE_RANK is 2, and there are 2 nodes; give 0 to 1"),
        ({"RANK": "0"}, "WORLD_SIZE and LOCAL_RANK and MASTER_ADDR are missing"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, "RANK is 2, and WORLD_SIZE 2"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "NPROC_PER_NODE": "8"},
            "NPROC_PER_NODE is 8; unset one of them",
        ),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, "nothing was started on the others; start this by srun"),
        ({**slurm(0, 2), "NPROC_PER_NODE": "8"}, "NPROC_PER_NODE is 8, and srun started 2 tasks on each of 4 nodes"),
        ({**slurm(2, 2), "NODE_RANK": "0"}, "NODE_RANK is 0, and srun started 2 tasks"),
        ({**slurm(0, 2), "SLURM_STEP_NUM_TASKS": "7"}, "srun started 7 tasks on 4 nodes"),
        ({**slurm(1, 2), "SLURM_LOCALID": "0"}, "srun gave task 1 the place 0 of 2 on its node"),
        ({**slurm(0, 2), "SLURM_PROCID": "x"}, "SLURM_PROCID is x"),
        ({**slurm(0, 2), "CUDA_VISIBLE_DEVICES": "3"}, "srun shows each of 2 tasks on a node one GPU only"),
        ({**open_mpi(0, 5, 2)}, "mpirun started 5 tasks, 2 of them on this node"),
        ({**open_mpi(0, 4, 2)}, "MASTER_ADDR is missing; with 2 nodes"),
        ({"LSB_DJOB_HOSTFILE": "no/such"}, "LSB_DJOB_HOSTFILE no/such: No such file"),
        ({"LSB_MCPU_HOSTS": "a 1 b 1"}, "NODE_RANK is missing; with 2 nodes"),
    ],
)
def test_what_cannot_be_meant_is_refused(variables, said):
    assert said in refusal(variables)


def test_it_needs_no_torch_and_shares_out_the_cores():
    code = "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\n"
    code += "from megatron_plm.rendezvous import main; main([])"
    variables = environment(NPROC_PER_NODE="1000", OMP_NUM_THREADS="")
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout == "export NNODES=1\nexport NPROC_PER_NODE=1000\nexport OMP_NUM_THREADS=1\n"
