"""What becomes of a run when one of its processes is not as the others: it ends, soon, and says which."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from fault_scenarios import SCENARIOS, TIMEOUT_MINUTES
from pretraining_runs import LAUNCHER, launcher_environment
from processes import environment

SCRIPT = Path(__file__).with_name("fault_scenarios.py")


class Outcome(NamedTuple):
    """How a scenario ended: exit codes by rank, what each process said, seconds since the fault."""

    codes: dict[int, int]
    said: dict[int, str]
    seconds: float

    @property
    def errors(self) -> list[str]:
        """All lines of all processes that tell an error."""
        return [line for text in self.said.values() for line in text.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def outcomes(pair_data, tmp_path_factory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("faults")
    path = os.pathsep.join([environment()["PYTHONPATH"], str(SCRIPT.parent)])
    with open(folder / "said.txt", "w") as said:
        subprocess.run(
            [sys.executable, str(SCRIPT), str(folder), *pair_data.flags],
            env=environment(OMP_NUM_THREADS="1", PYTHONPATH=path), stdout=said, stderr=said, timeout=280, check=True,
        )  # fmt: skip
    found = {}
    for name in SCENARIOS:
        result = json.loads((folder / name / "result.json").read_text())
        said = {int(path.stem): path.read_text() for path in (folder / name).glob("*.txt")}
        found[name] = Outcome({int(rank): code for rank, code in result["codes"].items()}, said, result["seconds"])
    return found


def test_a_process_with_other_options_is_told_and_ends_the_run(outcomes):
    codes, said, _ = outcomes["other_options"]
    assert codes == {0: 2, 1: 2}
    sentence = "process 1 was started with other options than process 0: lr = 0.125 here, lr = 0.003 there"
    assert [sentence in line for line in outcomes["other_options"].errors] == [True]
    assert not any("Traceback" in text for text in said.values())


@pytest.mark.parametrize("name", ["nan", "nan_tp", "nan_cp", "nan_pp"])
def test_what_is_no_number_on_one_process_ends_all(outcomes, name):
    codes, said, seconds = outcomes[name]
    assert set(codes.values()) == {1}
    assert len(codes) == SCENARIOS[name].processes
    (error,) = outcomes[name].errors
    assert error.startswith("error: step 1: the loss is ")
    assert "gradient norm nan; lower --lr" in error
    assert not any("Traceback" in text for text in said.values())
    assert seconds < 60


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("killed", "process 1 on "),
        ("first_killed", "process 0, which holds the store where all meet, has gone"),
        ("stopped", "process 1 on "),
        ("hung", f"process 1 on {{}} did not come, though alive, to where the others waited for {TIMEOUT_MINUTES}"),
    ],
)
def test_a_process_that_goes_is_named_by_one_of_the_others_which_end(outcomes, name, told):
    codes, said, seconds = outcomes[name]
    rest = {rank: code for rank, code in codes.items() if rank != SCENARIOS[name].victim}
    assert set(rest.values()) == {1}
    assert len(rest) == SCENARIOS[name].processes - 1
    (error,) = outcomes[name].errors
    assert told.format(os.uname().nodename) in error
    assert error.endswith("; go on from the last checkpoint with --load")
    assert not any("Traceback" in said[rank] for rank in rest)
    if name in ("killed", "stopped"):
        assert "gave no sign of life" in error
    if name == "hung":
        assert codes[1] == 1, "it ends itself, when the others have found it late"
    # Beside the timeout, where it has to pass: noticing, and asking the others.
    assert seconds < 60 * TIMEOUT_MINUTES + 45


def test_a_process_that_crashes_says_why_and_ends_the_others(outcomes):
    codes, said, seconds = outcomes["crashed"]
    assert codes == {0: 1, 1: 1, 2: 1}
    assert "LookupError: a fault of our own" in said[1]
    assert "Traceback" not in said[0] + said[2]
    (error,) = outcomes["crashed"].errors
    assert error.startswith(f"error: process 1 on {os.uname().nodename} has ended: LookupError: a fault of our own; ")
    assert seconds < 60


def test_a_process_that_never_comes_is_named(outcomes):
    (error,) = outcomes["absent"].errors
    assert error.startswith(f"error: process 1 did not come within {TIMEOUT_MINUTES} minutes")
    assert outcomes["absent"].codes == {0: 1}


def test_a_process_killed_under_torchrun_is_named_with_its_signal(pair_data, tmp_path):
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
        assert process.wait(timeout=60) == 1
    assert time.monotonic() - begin < 60
    host = os.uname().nodename
    assert rest.count(f"error: process 1 on {host} gave no sign of life") == 1, "by the process that is left"
    assert rest.count(f"error: process 1 on {host} was ended by SIGKILL") == 1, "by the launcher"
    assert "Traceback" not in rest
    assert (tmp_path / "run" / "status").read_text() == "failed\n"


def test_a_second_attempt_meets_nothing_of_the_first(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(
        "import os\n"
        "from megatron_plm.parallel.mesh import joined_world\n"
        "attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "with joined_world(timeout_minutes=0.5) as world:\n"
        "    (first,) = world.sum(world.is_first('anything'))\n"
        "    if attempt == 0 and world.rank == 1:\n"
        "        raise LookupError('a fault of our own')\n"
        "    world.barrier()\n"
        "    print(f'attempt {attempt}: {first:g} was first', flush=True)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*command, str(script)], env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["attempt 1: 1 was first"] * 2


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
