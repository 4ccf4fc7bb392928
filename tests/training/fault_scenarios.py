"""What test_faults.py looks at: runs in which one process is not as the others. No torchrun starts or ends them.

`python fault_scenarios.py FOLDER FLAGS` imports torch once and forks the processes of each scenario, a few scenarios at
a time. It leaves FOLDER/NAME/RANK.txt, what that process said, and FOLDER/NAME/result.json.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_plm.model import transformer
from megatron_plm.parallel import mesh
from megatron_plm.training import loop, pretrain

AT_ONCE = 5
TIMEOUT_MINUTES = 0.2
_ENDLESS = ["--train-iters=1000000", "--eval-interval=1000000", "--save-interval=1000000"]
_BRIEF = [f"--distributed-timeout-minutes={TIMEOUT_MINUTES}"]


def _nan_loss(_argv: list[str]) -> None:
    score = loop.summed_cross_entropy
    loop.summed_cross_entropy = lambda logits, labels: score(logits, labels) * float("nan")


def _nan_activations(_argv: list[str]) -> None:
    forward = transformer.Block.forward
    transformer.Block.forward = lambda *arguments: forward(*arguments) * float("nan")


def _at_step_3(act: Callable[[], object]) -> Callable[[list[str]], None]:
    def spoil(_argv: list[str]) -> None:
        step = loop.train_step
        steps = []

        def spoiled(run, batch):
            steps.append(batch)
            if len(steps) == 3:
                act()
            return step(run, batch)

        loop.train_step = spoiled

    return spoil


def _crash() -> None:
    raise LookupError("a fault of our own")


@dataclass(frozen=True)
class Scenario:
    """Some processes, and what becomes of one of them.

    Attributes:
        spoil: changes the program or the flags of the victim before it starts.
        number: signal that the victim gets after a few steps.
        absent: the victim is never started.
        stays: it would never end.
    """

    processes: int
    victim: int
    flags: list[str] = field(default_factory=list)
    spoil: Callable[[list[str]], object] | None = None
    number: signal.Signals | None = None
    absent: bool = False
    stays: bool = False


SCENARIOS = {  # those that wait longest first
    "stopped": Scenario(2, 1, [*_ENDLESS, *_BRIEF], number=signal.SIGSTOP, stays=True),
    "hung": Scenario(2, 1, [*_ENDLESS, *_BRIEF], spoil=_at_step_3(lambda: time.sleep(3600))),
    "absent": Scenario(2, 1, _BRIEF, absent=True),
    "killed": Scenario(3, 1, [*_ENDLESS, "--global-batch-size=12"], number=signal.SIGKILL),
    "first_killed": Scenario(2, 0, _ENDLESS, number=signal.SIGKILL),
    "crashed": Scenario(3, 1, [*_ENDLESS, "--global-batch-size=12"], spoil=_at_step_3(_crash)),
    "other_options": Scenario(2, 1, spoil=lambda argv: argv.append("--lr=0.125")),
    "nan": Scenario(2, 1, spoil=_nan_loss),
    "nan_tp": Scenario(2, 1, ["--tensor-model-parallel-size=2"], spoil=_nan_loss),
    "nan_cp": Scenario(2, 1, ["--context-parallel-size=2"], spoil=_nan_activations),
    "nan_pp": Scenario(
        3, 1, ["--pipeline-model-parallel-size=3", "--num-layers=3", "--micro-batch-size=2"], spoil=_nan_activations
    ),
}


class Running:
    """One scenario, going on."""

    def __init__(self, scenario: Scenario, folder: Path, flags: list[str]) -> None:
        self.scenario, self.folder = scenario, folder
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.codes: dict[int, int] = {}
        self.begin = None if scenario.number else time.monotonic()
        ranks = [rank for rank in range(scenario.processes) if not (scenario.absent and rank == scenario.victim)]
        self.processes = {rank: self._fork(rank, port, [*flags, *scenario.flags]) for rank in ranks}

    def _fork(self, rank: int, port: int, argv: list[str]) -> int:
        process = os.fork()
        if process:
            return process
        output = os.open(self.folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        size = str(self.scenario.processes)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        if rank == self.scenario.victim and self.scenario.spoil:
            self.scenario.spoil(argv)
        raise SystemExit(pretrain.launch(argv))

    def goes_on(self) -> bool:
        """Let the victim have its signal when it is time; whether one of the other processes still runs."""
        scenario, victim = self.scenario, self.processes.get(self.scenario.victim)
        said = self.folder / "0.txt"
        if self.begin is None and said.exists() and "\nstep 3/" in said.read_text():
            os.kill(victim, scenario.number)
            self.begin = time.monotonic()
        waiting = set(self.processes) - set(self.codes)
        for rank in waiting:
            process, status = os.waitpid(self.processes[rank], os.WNOHANG)
            if process:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        if set(self.processes) - set(self.codes) - ({scenario.victim} if scenario.stays else set()):
            return True
        seconds = time.monotonic() - self.begin
        if scenario.stays:
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
        (self.folder / "result.json").write_text(json.dumps({"codes": self.codes, "seconds": seconds}))
        return False


def main(folder: Path, flags: list[str]) -> None:
    """Play all scenarios."""
    torch.set_num_threads(1)
    todo, running = dict(SCENARIOS), []
    while todo or running:
        while todo and len(running) < AT_ONCE:
            name = next(iter(todo))
            running.append(Running(todo.pop(name), folder / name, flags))
        running = [scenario for scenario in running if scenario.goes_on()]
        time.sleep(0.02)


if __name__ == "__main__":
    assert mesh.world_size() == 1
    main(Path(sys.argv[1]), sys.argv[2:])
