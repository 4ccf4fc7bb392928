"""launch/pretrain.sh, by a shell and by torchrun: exit codes, signals, and no traceback for what is in order."""

import os
import signal
import subprocess
import sys
import time

import pytest
from pretraining_runs import LAUNCHER, checkpoint, column, launcher_environment, records
from processes import wait_for

ENDLESS = ["--train-iters=1000000", "--eval-interval=1000000", "--save-interval=1000000"]


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Standard output and standard error of a process that should end by itself."""
    try:
        return process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def start(num_processes: int, *argv: object) -> subprocess.Popen:
    return subprocess.Popen(
        [LAUNCHER, *map(str, argv)], env=launcher_environment(num_processes), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_steps(process: subprocess.Popen, run, number: int) -> None:
    metrics = run / "metrics.jsonl"
    try:
        wait_for(
            lambda: metrics.exists() and metrics.read_text().count('"kind": "train"') >= number,
            f"{number} steps", process=process, seconds=120,
        )  # fmt: skip
    except AssertionError as error:
        os.killpg(process.pid, signal.SIGTERM)
        pytest.fail(f"{error}: {finish(process)}")


@pytest.mark.parametrize(
    ("num_processes", "number", "to_all"),
    [
        (1, signal.SIGTERM, False),
        (1, signal.SIGUSR1, False),
        (2, signal.SIGTERM, False),
        (2, signal.SIGUSR1, False),
        (2, signal.SIGINT, True),  # Ctrl-C in a terminal goes to every process
        (2, signal.SIGHUP, False),  # the terminal is gone
    ],
)
def test_a_signal_saves_and_exits_with_75(num_processes, number, to_all, pair_data, tmp_path):
    process = start(num_processes, *pair_data.flags, *ENDLESS, f"--save={tmp_path / 'run'}")
    wait_for_steps(process, tmp_path / "run", 2)
    (os.killpg if to_all else os.kill)(process.pid, number)
    output, errors = finish(process)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors, errors
    run = tmp_path / "run"
    assert (run / "status").read_text() == "interrupted\n"
    step = records(run, "end")[0]["step"]
    assert checkpoint(run).resolve() == checkpoint(run, step)
    launcher = f"NPROC_PER_NODE={num_processes} launch/pretrain.sh" if num_processes > 1 else "launch/pretrain.sh"
    assert f"saved at step {step}\nnext: {launcher} --config {run / 'config.toml'} --load {run}\n" in output
    assert records(run, "start")[0]["world_size"] == num_processes


@pytest.mark.parametrize("num_processes", [1, 2])
def test_wrong_input_exits_with_2_and_leaves_nothing(num_processes, pair_data, tmp_path):
    process = start(num_processes, *pair_data.flags, "--hiden-size=3", f"--save={tmp_path / 'run'}")
    _, errors = finish(process)
    assert process.returncode == 2
    assert errors.count("unknown flag --hiden-size=3; did you mean '--hidden-size'?") == 1
    assert "Traceback" not in errors, errors
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_diverges_in_two_processes_exits_with_1(pair_data, tmp_path):
    flags = ["--lr=1e38", "--min-lr=0", "--lr-warmup-iters=0", "--clip-grad=0"]
    process = start(2, *pair_data.flags, *flags, f"--save={tmp_path / 'run'}")
    _, errors = finish(process)
    assert process.returncode == 1
    assert errors.count("error: step 2: the loss is nan") == 1
    assert "Traceback" not in errors, errors
    assert (tmp_path / "run" / "status").read_text() == "failed\n"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_fault_of_one_process_alone_ends_them_all(pair_data, tmp_path):
    """Only the first process writes; its trouble must not leave the other waiting."""
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    started = time.monotonic()
    process = start(2, *pair_data.flags, *ENDLESS, f"--save={tmp_path / 'run'}")
    _, errors = finish(process)
    assert process.returncode == 2
    assert errors.count(f"error: {tmp_path / 'run'}") == 1
    assert time.monotonic() - started < 100, "torchrun's own patience is longer"


def test_given_to_torchrun_it_is_the_program(pair_data, one_process, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, LAUNCHER, *pair_data.flags, f"--save={tmp_path / 'run'}"],
        env=launcher_environment(1), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    command = records(tmp_path / "run", "start")[0]["command"]
    assert command.startswith("torchrun --nproc-per-node 2 launch/pretrain.sh --num-layers=2 ")
    losses = column(one_process / "plain", "train", "loss")
    assert column(tmp_path / "run", "train", "loss") == pytest.approx(losses, rel=1e-5)
    assert f"wrote {tmp_path / 'run'}" in done.stdout
    assert "next: python tools/convert_checkpoint.py" in done.stdout


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE is gpu"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE is 0"),
        ({"NNODES": "-1"}, "NNODES is -1"),
        ({"NNODES": "2"}, "NODE_RANK is missing"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is missing"),
    ],
)
def test_variables_that_cannot_work_are_refused_by_name(variables, said, tmp_path):
    environment = {**launcher_environment(1), "TMPDIR": str(tmp_path), **variables}
    done = subprocess.run([LAUNCHER], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shell", [[], ["sh"]])
def test_it_runs_from_any_folder_and_shows_its_help(shell, tmp_path):
    done = subprocess.run(
        [*shell, LAUNCHER, "--help"], env=launcher_environment(1), capture_output=True, text=True, timeout=120,
        cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: launch/pretrain.sh")
