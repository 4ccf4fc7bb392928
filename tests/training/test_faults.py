"""What becomes of a run when one of its processes is not as the others: it ends, soon, and says which."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pretraining_runs import LAUNCHER, launcher_environment
from processes import environment

# With another learning rate, or a loss that is no number, on the second process only.
SCRIPT = """
import os, sys
from megatron_plm.training import loop, pretrain
argv, second = sys.argv[2:], os.environ["RANK"] == "1"
if second and sys.argv[1] == "options":
    argv.append("--lr=0.125")
if second and sys.argv[1] == "nan":
    score = loop.summed_cross_entropy
    loop.summed_cross_entropy = lambda logits, labels: score(logits, labels) * float("nan")
sys.exit(pretrain.launch(argv))
"""


def run(script: Path, *argv: str) -> tuple[int, str, float]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    begin = time.monotonic()
    done = subprocess.run(
        [*torchrun, str(script), *argv],
        capture_output=True, text=True, timeout=120, env=environment(OMP_NUM_THREADS="1"),
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begin


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_a_process_with_other_options_is_told_and_ends_the_run(script, pair_data):
    code, said, seconds = run(script, "options", *pair_data.flags)
    assert code != 0
    sentence = "process 1 was started with other options than process 0: lr = 0.125 here, lr = 0.003 there"
    assert said.count(sentence) == 1
    assert "[rank0]" not in said, "a traceback"
    assert seconds < 60


@pytest.mark.parametrize("layout", [[], ["--tensor-model-parallel-size=2"]])
def test_a_loss_that_is_no_number_on_one_process_ends_all(script, pair_data, layout):
    code, said, seconds = run(script, "nan", *pair_data.flags, *layout)
    assert code != 0
    assert said.count("error: ") == 1, said
    assert "step 1" in said
    assert seconds < 60


def test_a_killed_process_is_named_and_ends_the_run(pair_data, tmp_path):
    with subprocess.Popen(
        ["bash", str(LAUNCHER), *pair_data.flags, "--train-iters=100000", f"--save={tmp_path / 'run'}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=launcher_environment(2),
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("step 5/"):
                break
        os.kill(worker(process.pid, rank=1), signal.SIGKILL)
        begin = time.monotonic()
        rest = process.stdout.read()
        assert process.wait(timeout=60) not in (0, 75)
    assert time.monotonic() - begin < 60
    assert "rank      : 1" in rest
    assert "exitcode  : -9" in rest


def worker(launcher: int, *, rank: int) -> int:
    """The process of this rank among the descendants of the launcher."""
    todo = [launcher]
    while todo:
        process = todo.pop()
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return process
        for thread in Path(f"/proc/{process}/task").iterdir():
            todo += map(int, (thread / "children").read_text().split())
    raise AssertionError(f"no process of rank {rank}")
