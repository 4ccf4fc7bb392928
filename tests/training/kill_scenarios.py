"""Kills saving runs with SIGKILL, and writes what they left as JSON: kill_scenarios.py FOLDER FLAGS…

A program of its own, so that it can fork: one import of torch then serves a hundred runs, each of which may be killed.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pretraining_runs import checkpoint, pretrain, read_tensors, records, same_bits
from torch import Tensor

from megatron_plm.checkpoint_format import find_checkpoint, read_description
from megatron_plm.config.load import load_config
from megatron_plm.parallel.mesh import World
from megatron_plm.training.checkpoint_writer import save_checkpoint
from megatron_plm.training.loop import train_step
from megatron_plm.training.state import Run, build_run, open_datasets

# What Python reports before it touches the file system.
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}
FIRST_SAVED, FOURTH_SAVED = 40, 100  # accesses from the start of a run until so many checkpoints are there


def forked(work: Callable[[], object]) -> int:
    """Call `work` in a child process without output; returns the child's id."""
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        work()
    os._exit(0)


def was_killed(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def dying_at(number: int, folder: Path, work: Callable[[], object]) -> None:
    """Call `work`, and kill this process just before its access `number` to the file system below `folder`.

    TensorBoard's do not count: a thread of its own makes them, a few more or less by the clock.
    """
    seen = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        paths = [str(argument) for argument in arguments[:2]]
        touched = event in EVENTS and any(str(folder) in path for path in paths)
        if touched and not any("tensorboard" in path for path in paths) and next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()


def at_every_access(
    run: Run, template: Path, known: dict[int, dict[str, Tensor]], folder: Path
) -> list[dict[str, Any]]:
    """Save the run into a copy of `template` again and again, killed one access later each time, until it survives."""
    found: list[dict[str, Any]] = []
    while not found or found[-1]["killed"]:
        number = len(found) + 1
        directory = folder / f"killed_{number}"
        shutil.copytree(template, directory, symlinks=True)
        killed = was_killed(forked(lambda n=number, d=directory: dying_at(n, d, lambda: save_checkpoint(run, d))))
        left = sorted(os.listdir(directory / "checkpoints"))
        entry = {"killed": killed, "left": left, **judged(directory, known)}
        save_checkpoint(run, directory)  # as the next run does
        entry["after"] = sorted(os.listdir(directory / "checkpoints"))
        entry["after_latest"] = judged(directory, known)["latest"]
        found.append(entry)
        shutil.rmtree(directory)
    return found


def judged(directory: Path, known: dict[int, dict[str, Tensor]]) -> dict[str, Any]:
    """The step of the latest checkpoint, and whether every visible one holds what was saved at its step."""
    latest = find_checkpoint(directory)
    intact = all(
        same_bits(read_tensors(path), known[read_description(path)[1].step])
        for path in (directory / "checkpoints").glob("step_*")
    )
    return {"latest": read_description(latest)[1].step, "intact": intact}


def targeted(flags: list[str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Kills at every access while a second checkpoint is saved, and while one is saved that a kill had left."""
    config, _ = load_config([*flags, "--keep-last=1"])
    run = build_run(config, World(0, 1, torch.device("cpu"), None), open_datasets(config))
    steps = run.train_loader.steps(run.progress.cursor)
    first, both = folder / "first", folder / "both"

    def train_and_save(step: int, place: Path) -> dict[str, Tensor]:
        train_step(run, next(steps))
        run.progress.step = step
        save_checkpoint(run, place)
        return read_tensors(checkpoint(place, step))

    known = {1: train_and_save(1, first)}
    shutil.copytree(first, both, symlinks=True)
    known[2] = train_and_save(2, both)
    # As a kill leaves it after the renaming: the second is there, and `latest` still names the first.
    shutil.copytree(checkpoint(first, 1), checkpoint(both, 1))
    checkpoint(both).unlink()
    checkpoint(both).symlink_to("step_00000001")
    return {
        "second": at_every_access(run, first, known, folder),
        "again": at_every_access(run, both, known, folder),
    }


def at_random(flags: list[str], folder: Path, trials: int) -> list[dict[str, Any]]:
    """Kill a run that saves at every step, let it go on, kill it again; at last let it finish.

    The kills come at accesses that a generator with a seed draws, from the start of a run to about its fourth save;
    the first kill leaves a checkpoint to go on with.
    """
    directory, found = folder / "random", []
    draw = random.Random(1)
    flags = [*flags, "--save-interval=1", f"--save={directory}"]
    for trial in range(trials + 1):
        load = [f"--load={directory}"] if trial else []
        number = draw.randint(1 if trial else FIRST_SAVED, FOURTH_SAVED) if trial < trials else sys.maxsize
        work = functools.partial(pretrain, *flags, *load)
        killed = was_killed(forked(functools.partial(dying_at, number, directory, work)))
        latest = find_checkpoint(directory)
        saved = read_description(latest)[1]
        logged = max(record["step"] for record in records(directory, "train"))
        found.append({"killed": killed, "latest": saved.step, "logged": logged})
        read_tensors(latest)
    found[-1]["left"] = sorted(os.listdir(directory / "checkpoints"))
    return found


if __name__ == "__main__":
    place, *given = sys.argv[1:]
    torch.set_num_threads(1)
    result = {**targeted(given, Path(place)), "random": at_random(given, Path(place), trials=9)}
    (Path(place) / "found.json").write_text(json.dumps(result))
