"""What test_faults.py looks at: runs in which one process is not as the others. No torchrun starts or ends them.

`python fault_scenarios.py FOLDER FLAGS` imports torch once and forks the processes of each scenario, a few scenarios at
a time. It leaves FOLDER/NAME/RANK.txt, what that process said, FOLDER/NAME/result.json, the run directory
FOLDER/NAME/run, and FOLDER/NAME/status_writes, who wrote which status.

No outcome hangs on how fast the machine is. Faults come from the victim's own hand, in its third step; where the others
have to wait for it in vain, they wait shorter from that step on alone, when all have come. The clock of each process is
another day's.
"""

import functools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_plm.errors import UserError
from megatron_plm.invocation import EXIT_CODE_FILE
from megatron_plm.model import transformer
from megatron_plm.parallel import mesh
from megatron_plm.training import loop, pretrain, run_directory

AT_ONCE = 6
ABSENT_MINUTES = 0.2  # that the others wait for one who never comes
WAITED = timedelta(seconds=15)  # in collectives, where that has to pass
_ENDLESS = ["--train-iters=1000000", "--eval-interval=1000000", "--save-interval=1000000"]
_OF_THREE = [*_ENDLESS, "--global-batch-size=12"]


def _nan_loss(_argv: list[str]) -> None:
    score = loop.summed_cross_entropy
    loop.summed_cross_entropy = lambda logits, labels: score(logits, labels) * float("nan")


def _nan_activations(_argv: list[str]) -> None:
    forward = transformer.Block.forward
    transformer.Block.forward = lambda *arguments: forward(*arguments) * float("nan")


def _signal_itself(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def _fail(error: type[Exception]) -> None:
    raise error("a fault of our own")


@dataclass(frozen=True)
class Scenario:
    """Some processes, and what becomes of one of them.

    Attributes:
        spoil: changes the program or the flags of the victim before it starts.
        act: what the victim does in its third step.
        waits: the others have to wait for it until their time is up.
        absent: the victim is never started.
        stays: it would never end.
        has_agent: a process beside them holds the store, as torchrun's agent does under launch/pretrain.sh, which asks
            for the exit code in a file; else process 0 does.
    """

    processes: int
    victim: int
    flags: list[str] = field(default_factory=list)
    spoil: Callable[[list[str]], object] | None = None
    act: Callable[[], object] | None = None
    waits: bool = False
    absent: bool = False
    stays: bool = False
    has_agent: bool = False


_stop = functools.partial(_signal_itself, signal.SIGSTOP)
_kill = functools.partial(_signal_itself, signal.SIGKILL)
_hang = functools.partial(time.sleep, 3600)

SCENARIOS = {  # those that wait longest first
    "holder_stopped": Scenario(3, 0, _OF_THREE, act=_stop, waits=True, stays=True),
    "judge_stopped": Scenario(3, 0, _OF_THREE, act=_stop, waits=True, stays=True, has_agent=True),
    "stopped": Scenario(3, 1, _OF_THREE, act=_stop, waits=True, stays=True),
    "hung": Scenario(3, 2, _OF_THREE, act=_hang, waits=True),
    "judge_hung": Scenario(3, 0, _OF_THREE, act=_hang, waits=True, has_agent=True),
    "absent": Scenario(
        3, 1, [f"--distributed-timeout-minutes={ABSENT_MINUTES}", "--global-batch-size=12"], absent=True
    ),
    "killed": Scenario(3, 1, _OF_THREE, act=_kill),
    "judge_killed": Scenario(3, 0, _OF_THREE, act=_kill, has_agent=True),
    "holder_killed": Scenario(3, 0, _OF_THREE, act=_kill),
    "crashed": Scenario(3, 1, _OF_THREE, act=functools.partial(_fail, LookupError)),
    "judge_crashed": Scenario(3, 0, _OF_THREE, act=functools.partial(_fail, LookupError)),
    "failed_alone": Scenario(3, 2, _OF_THREE, act=functools.partial(_fail, UserError)),
    "other_options": Scenario(2, 1, spoil=lambda argv: argv.append("--lr=0.125")),
    "nan": Scenario(2, 1, spoil=_nan_loss),
    "nan_tp": Scenario(2, 1, ["--tensor-model-parallel-size=2"], spoil=_nan_loss),
    "nan_cp": Scenario(2, 1, ["--context-parallel-size=2"], spoil=_nan_activations),
    "nan_pp": Scenario(
        3, 1, ["--pipeline-model-parallel-size=3", "--num-layers=3", "--micro-batch-size=2"], spoil=_nan_activations
    ),
}


def _in_step_3(scenario: Scenario, *, is_victim: bool) -> None:
    step = loop.train_step
    steps = []

    def spoiled(run, batch):
        steps.append(batch)
        if len(steps) == 3:
            groups = [run.world.mesh.get_group(name) for name in mesh.MESH_DIMS]
            for group in [dist.group.WORLD, *groups] if scenario.waits else []:
                mesh.set_timeout(group, WAITED)
            if is_victim and scenario.act:
                scenario.act()
        return step(run, batch)

    loop.train_step = spoiled


def _set_clocks(seconds: int) -> None:
    for name in ("time", "monotonic", "perf_counter"):
        clock = getattr(time, name)
        setattr(time, name, lambda clock=clock: clock() + seconds)


def _note_statuses(rank: int, path: Path) -> None:
    write = run_directory.write_status

    def noted(directory: Path, status: str) -> None:
        write(directory, status)
        with path.open("a") as file:
            file.write(f"{rank} {status}\n")

    run_directory.write_status = noted


class Running:
    """One scenario, going on."""

    def __init__(self, scenario: Scenario, folder: Path, flags: list[str]) -> None:
        self.scenario, self.folder = scenario, folder
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.codes: dict[int, int] = {}
        self.begin = time.monotonic()
        self.agent = self._fork_agent() if scenario.has_agent else None
        ranks = [rank for rank in range(scenario.processes) if not (scenario.absent and rank == scenario.victim)]
        argv = [*flags, *scenario.flags, f"--save={folder / 'run'}"]
        self.processes = {rank: self._fork(rank, list(argv)) for rank in ranks}

    def _fork_agent(self) -> int:
        process = os.fork()
        if process:
            return process
        store = dist.TCPStore("localhost", self.port, is_master=True, wait_for_workers=False)
        while store:
            signal.pause()
        raise AssertionError

    def _fork(self, rank: int, argv: list[str]) -> int:
        process = os.fork()
        if process:
            return process
        output = os.open(self.folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        scenario, size = self.scenario, str(self.scenario.processes)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(self.port))
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE=str(scenario.has_agent))
        if scenario.has_agent:
            os.environ[EXIT_CODE_FILE] = str(self.folder / "exit_code")
        _set_clocks(86400 * rank)
        _note_statuses(rank, self.folder / "status_writes")
        _in_step_3(scenario, is_victim=rank == scenario.victim)
        if rank == scenario.victim and scenario.spoil:
            scenario.spoil(argv)
        raise SystemExit(pretrain.launch(argv))

    def goes_on(self) -> bool:
        """Whether one of the processes that should end still runs."""
        scenario = self.scenario
        for rank in set(self.processes) - set(self.codes):
            process, status = os.waitpid(self.processes[rank], os.WNOHANG)
            if process:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        if set(self.processes) - set(self.codes) - ({scenario.victim} if scenario.stays else set()):
            return True
        seconds = time.monotonic() - self.begin
        self.end()
        (self.folder / "result.json").write_text(json.dumps({"codes": self.codes, "seconds": seconds}))
        return False

    def end(self) -> None:
        """End what still runs."""
        left = [process for rank, process in self.processes.items() if rank not in self.codes]
        for process in [*left, *([self.agent] if self.agent else [])]:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def main(folder: Path, flags: list[str]) -> None:
    """Play all scenarios."""
    torch.set_num_threads(1)
    todo, running, parent = dict(SCENARIOS), [], os.getpid()
    try:
        while todo or running:
            while todo and len(running) < AT_ONCE:
                name = next(iter(todo))
                running.append(Running(todo.pop(name), folder / name, flags))
            running = [scenario for scenario in running if scenario.goes_on()]
            time.sleep(0.05)
    finally:
        for scenario in running if os.getpid() == parent else []:
            scenario.end()


if __name__ == "__main__":
    assert mesh.world_size() == 1
    main(Path(sys.argv[1]), sys.argv[2:])
