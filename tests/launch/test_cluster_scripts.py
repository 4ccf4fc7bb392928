"""The scripts for Slurm and LSF really run, in jobs of two nodes that stand-ins of the schedulers' commands start."""

import os
import re
import signal
import socket
import subprocess

import pytest
from cluster import Cluster, finish, wait_for_steps
from pretraining_runs import LAUNCHER, checkpoint, column, records
from processes import REPOSITORY

SLURM, LSF = (REPOSITORY / "launch" / name for name in ("slurm.sbatch", "lsf.bsub"))
# Sums are made in another order, as in tests/parallel/test_two_processes.py.
LOSS = 1e-5
ENDLESS = ["--train-iters=1000000", "--eval-interval=1000000", "--save-interval=1000000"]


@pytest.fixture
def cluster(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return Cluster(tmp_path / "cluster", port)


def test_a_job_of_slurm_saves_before_its_end_is_requeued_and_goes_on_by_the_same_command(
    cluster, pair_data, one_process, tmp_path
):
    run = tmp_path / "run"
    flags = [*pair_data.flags, f"--save={run}", f"--load={run}"]
    job = cluster.start(["bash", SLURM, *flags], cluster.slurm())
    wait_for_steps(job, run, 2)
    os.kill(int((cluster.folder / "srun.pid").read_text()), signal.SIGUSR1)
    _, errors = finish(job)
    assert job.returncode == 75, errors
    assert "Traceback" not in errors, errors
    assert cluster.log("scontrol") == "requeue 4321\n"
    assert (run / "status").read_text() == "interrupted\n"
    stopped = records(run, "end")[0]["step"]
    assert checkpoint(run).resolve() == checkpoint(run, stopped)

    job = cluster.start(["bash", SLURM, *flags], cluster.slurm())
    output, errors = finish(job)
    assert job.returncode == 0, errors
    assert cluster.log("scontrol") == "requeue 4321\n", "a run that is done is not queued again"
    assert f"going on from {checkpoint(run, stopped).resolve()}" in output
    assert {start["world_size"] for start in records(run, "start")} == {2}
    assert column(run, "train", "step") == list(range(1, 21))
    assert column(run, "train", "loss") == pytest.approx(column(one_process / "plain", "train", "loss"), rel=LOSS)


@pytest.mark.parametrize("starter", ["srun", "mpirun"])
def test_tasks_become_the_processes_where_there_is_one_for_each(starter, cluster, pair_data, one_process, tmp_path):
    argv = [LAUNCHER, *pair_data.flags, f"--save={tmp_path / 'run'}"]
    if starter == "srun":
        tasks = [cluster.start(["srun", "--ntasks-per-node=2", *argv], cluster.slurm(nodes=1))]
    else:
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        values = [(rank, "2", rank, "2") for rank in "01"]
        ours = [{f"OMPI_COMM_WORLD_{name}": v for name, v in zip(names, row, strict=True)} for row in values]
        tasks = [cluster.start(argv, cluster.environment(**variables)) for variables in ours]
    outputs = [finish(task) for task in tasks]
    assert {task.returncode for task in tasks} == {0}, outputs
    assert records(tmp_path / "run", "start")[0]["world_size"] == 2
    assert column(tmp_path / "run", "train", "loss") == pytest.approx(
        column(one_process / "plain", "train", "loss"), rel=LOSS
    )


def test_a_job_of_lsf_saves_on_all_hosts_when_the_first_is_warned(cluster, pair_data, tmp_path):
    run = tmp_path / "run"
    flags = [*pair_data.flags, *ENDLESS, f"--save={run}", f"--load={run}"]
    job = cluster.start(["bash", LSF], cluster.lsf(flags))
    wait_for_steps(job, run, 2)
    os.kill(job.pid, signal.SIGUSR1)
    _, errors = finish(job)
    assert job.returncode == 75, errors
    assert cluster.log("blaunch") == "-z other\n"
    assert (run / "status").read_text() == "interrupted\n"
    assert records(run, "start")[0]["world_size"] == 2
    assert checkpoint(run).resolve() == checkpoint(run, records(run, "end")[0]["step"])


def test_a_job_of_slurm_runs_the_preflight_and_ends_with_its_verdict(cluster, tmp_path):
    flags = ["--preset=tiny", f"--save={tmp_path}", f"--load={tmp_path}", "--storage-mebibytes=1"]
    no_space = "--keep-last=1000000000000"
    program = {"PROGRAM": "tools/preflight.py"}
    job = cluster.start(["bash", SLURM, *flags, no_space], {**cluster.slurm(), **program})
    output, errors = finish(job)
    assert job.returncode == 1, errors
    assert "Traceback" not in errors, errors
    assert output.startswith("Preflight of 2 processes on 2 nodes: ")
    assert output.endswith("RED: free space\n")
    assert cluster.log("scontrol") == ""


@pytest.mark.parametrize("script", [SLURM, LSF], ids=lambda path: path.name)
def test_a_script_refuses_what_could_not_be_requeued(script, cluster, tmp_path):
    for folder, flags, said in (
        (REPOSITORY, ["--save=x"], "no --load|--load is missing"),
        (tmp_path, ["--save=x", "--load=x"], "no launch/pretrain.sh here"),
    ):
        environment = {**cluster.slurm(), **cluster.lsf(flags)}
        done = subprocess.run(["bash", script, *flags], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert re.search(said, done.stderr)


def directives(path, word: str) -> dict[str, str]:
    """The scheduler's options in a script, by name; those below the first command would be ignored."""
    head = re.split(r"^(?!#).+$", path.read_text(), maxsplit=1, flags=re.M)[0] if word == "#SBATCH" else ""
    lines = re.findall(rf"^{word} (\S+?)(?:[ =](.+))?$", head or path.read_text(), re.M)
    assert len(lines) == path.read_text().count(f"\n{word} ")
    return dict(lines)


def test_the_options_of_the_scripts_make_runs_that_can_be_requeued():
    slurm = directives(SLURM, "#SBATCH")
    assert slurm["--ntasks-per-node"] == "1"
    assert re.fullmatch(r"USR1@\d+", slurm["--signal"])
    assert re.fullmatch(r"\d+:\d\d:\d\d", slurm["--time"])
    assert (slurm["--requeue"], slurm["--open-mode"]) == ("", "append")
    lsf = directives(LSF, "#BSUB")
    assert (lsf["-Q"], lsf["-wa"], lsf["-r"]) == ('"75"', "USR1", "")
    assert lsf["-wt"].isdecimal()
    per_host = re.fullmatch(r'"span\[ptile=(\d+)\]"', lsf["-R"])[1]
    assert lsf["-gpu"] == f'"num={per_host}"'
    assert f"NPROC_PER_NODE:-{per_host}}}" in LSF.read_text()


@pytest.mark.parametrize("script", [SLURM, LSF, LAUNCHER], ids=lambda path: path.name)
def test_a_script_parses_and_can_be_executed(script):
    text = script.read_text().split('\n":"""\n')[0]  # behind it launch/pretrain.sh is Python
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(script, os.X_OK)


def test_the_configurations_that_the_scripts_name_exist():
    for script in (SLURM, LSF):
        named = re.findall(r"launch/configs/\S+\.toml", script.read_text())
        assert named
        assert [name for name in named if not (REPOSITORY / name).exists()] == []
