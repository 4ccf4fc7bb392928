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
from fault_scenarios import ABSENT_MINUTES, SCENARIOS
from pretraining_runs import LAUNCHER, launcher_environment
from processes import descendants, environment

SCRIPT = Path(__file__).with_name("fault_scenarios.py")
HOST = os.uname().nodename
BEFORE_TORCH = 300  # seconds: half of --distributed-timeout-minutes, after which torch would end the waiting


class Outcome(NamedTuple):
    """How a scenario ended: exit codes by rank, what each process said, who wrote which status, how long it took."""

    codes: dict[int, int]
    said: dict[int, str]
    statuses: list[str]
    status: str
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
            env=environment(OMP_NUM_THREADS="1", PYTHONPATH=path), stdout=said, stderr=said, timeout=560, check=True,
        )  # fmt: skip
    return {name: outcome(folder / name) for name in SCENARIOS}


def outcome(folder: Path) -> Outcome:
    """What a scenario left in its folder."""
    result = json.loads((folder / "result.json").read_text())
    said = {int(path.stem): path.read_text() for path in folder.glob("*.txt")}
    statuses, status = folder / "status_writes", folder / "run" / "status"
    return Outcome(
        {int(rank): code for rank, code in result["codes"].items()},
        said,
        statuses.read_text().splitlines() if statuses.exists() else [],
        status.read_text() if status.exists() else "",
        result["seconds"],
    )


def test_a_process_with_other_options_is_told_and_ends_the_run(outcomes):
    codes, said, statuses, _, _ = outcomes["other_options"]
    assert codes == {0: 2, 1: 2}
    sentence = "process 1 was started with other options than process 0: lr = 0.125 here, lr = 0.003 there"
    assert [sentence in line for line in outcomes["other_options"].errors] == [True]
    assert not any("Traceback" in text for text in said.values())
    assert statuses == [], "no run has begun"


@pytest.mark.parametrize("name", ["nan", "nan_tp", "nan_cp", "nan_pp"])
def test_what_is_no_number_on_one_process_ends_all(outcomes, name):
    codes, said, statuses, status, seconds = outcomes[name]
    assert set(codes.values()) == {1}
    assert len(codes) == SCENARIOS[name].processes
    (error,) = outcomes[name].errors
    assert error.startswith("error: step 1: the loss is ")
    assert "gradient norm nan; lower --lr" in error
    assert not any("Traceback" in text for text in said.values())
    assert (statuses, status) == (["0 running", "0 failed"], "failed\n")
    assert seconds < BEFORE_TORCH


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("killed", f"process 1 on {HOST} gave no sign of life for "),
        ("stopped", f"process 1 on {HOST} gave no sign of life for "),
        ("judge_killed", f"process 0 on {HOST} gave no sign of life for "),
        ("judge_stopped", f"process 0 on {HOST} gave no sign of life for "),
        ("hung", f"process 2 on {HOST} did not come, though alive, to where the others waited for 10 minutes"),
        ("judge_hung", f"process 0 on {HOST} did not come, though alive, to where the others waited for 10 minutes"),
        ("holder_killed", "process 0, which holds the store where all meet, has gone or hangs; go on"),
        ("holder_stopped", "process 0, which holds the store where all meet, has gone or hangs; go on"),
    ],
)
def test_a_process_that_goes_is_named_by_one_of_the_others_which_end(outcomes, name, told):
    codes, said, _, _, seconds = outcomes[name]
    scenario = SCENARIOS[name]
    rest = {rank: code for rank, code in codes.items() if rank != scenario.victim}
    assert set(rest.values()) == {1}, "by which torchrun, too, sees that it has to end one that stands still"
    assert len(rest) == scenario.processes - 1
    (error,) = outcomes[name].errors
    assert error.startswith(f"error: {told}")
    assert error.endswith("; go on from the last checkpoint with --load")
    assert not any("Traceback" in said[rank] for rank in rest)
    if "hung" in name:
        assert codes[scenario.victim] == 1, "it ends itself, when the others have found it late"
    assert seconds < BEFORE_TORCH


@pytest.mark.parametrize("name", ["crashed", "judge_crashed"])
def test_a_process_that_crashes_says_why_and_ends_the_others(outcomes, name):
    codes, said, _, _, seconds = outcomes[name]
    victim = SCENARIOS[name].victim
    assert codes == {0: 1, 1: 1, 2: 1}
    assert "LookupError: a fault of our own" in said.pop(victim)
    assert not any("Traceback" in text for text in said.values())
    (error,) = outcomes[name].errors
    assert error.startswith(f"error: process {victim} on {HOST} has ended: LookupError: a fault of our own; ")
    assert seconds < BEFORE_TORCH


def test_where_one_process_fails_alone_nobody_else_is_blamed(outcomes):
    codes, said, _, _, seconds = outcomes["failed_alone"]
    assert codes == {0: 1, 1: 1, 2: 1}
    assert said[2].count("error: a fault of our own\n") == 1
    told = [line for line in outcomes["failed_alone"].errors if "process" in line]
    assert [line.split("; ")[0] for line in told] == [
        f"error: process 2 on {HOST} has ended: RunFailed: a fault of our own"
    ]
    assert not any("Traceback" in text for text in said.values())
    assert seconds < BEFORE_TORCH


def test_a_process_that_never_comes_is_named(outcomes):
    (error,) = outcomes["absent"].errors
    assert error.startswith(f"error: process 1 did not come within {ABSENT_MINUTES} minutes")
    assert outcomes["absent"].codes == {0: 1, 2: 1}
    assert outcomes["absent"].statuses == [], "no run has begun"


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.act])
def test_one_process_writes_that_the_run_has_failed(outcomes, name):
    _, _, statuses, status, _ = outcomes[name]
    assert status == "failed\n"
    assert statuses[0] == "0 running"
    (writer,) = [line.removesuffix(" failed") for line in statuses[1:]]
    scenario = SCENARIOS[name]
    if name.endswith(("killed", "stopped")) and scenario.victim == 0:
        assert writer != "0"


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
        assert process.wait(timeout=280) == 1
    assert time.monotonic() - begin < BEFORE_TORCH
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
        "with joined_world(timeout_minutes=5) as world:\n"
        "    (first,) = world.sum(world.is_first('anything'))\n"
        "    if attempt == 0 and world.rank == 1:\n"
        "        raise LookupError('a fault of our own')\n"
        "    world.barrier()\n"
        "    print(f'attempt {attempt}: {first:g} was first', flush=True)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*command, str(script)], env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = "attempt 1: 1 was first"  # by both, whose lines may run into each other
    assert (done.stdout.count(said), done.stdout.replace(said, "").strip()) == (2, "")


def worker(launcher: int, *, rank: int) -> int:
    """The process of this rank among the descendants of the launcher."""
    (found,) = [
        process
        for process in descendants(launcher)
        if f"RANK={rank}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    ]
    return found
