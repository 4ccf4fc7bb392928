"""The commands of an experiment, from sequences to scores, as each left them beside what it wrote.

Read are PREFIX.json of the datasets that config.toml names, the starts of the pretraining run, conversion.json of the
converted checkpoints, and results.json. Paths mean what they meant to the commands, typed in the same folder.
"""

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_plm.report.records import Run
from megatron_plm.report.results import Result, Task
from megatron_plm.report.schema import read_object

_DATASETS = {"data_path": "training data", "valid_data_path": "validation data"}


@dataclass(frozen=True)
class Command:
    """One command line of the experiment, with what it did."""

    purpose: str
    line: str


@dataclass(frozen=True)
class _Dataset:
    """What the report needs of PREFIX.json; only datasets made by the command have one."""

    command: str | None = None


@dataclass(frozen=True)
class _Conversion:
    """What the report needs of conversion.json."""

    command: str
    to: str
    input: str


def experiment(run: Run, tasks: Sequence[Task]) -> list[Command]:
    """Return the recorded commands in the order of the work; what left no record, or has gone, is left out.

    Raises UserError where a record is there and cannot be read.
    """
    starts = [
        Command(f"{'Pretraining' if index == 0 else 'Pretraining, resumed'}, {start.time}", start.command)
        for index, start in enumerate(run.starts)
    ]
    results = [result for task in tasks for result in task.results]
    fine_tunings = [Command(_purpose(result), result.command) for result in results]
    return [*_preprocessings(run), *starts, *_conversions(results), *fine_tunings]


def _preprocessings(run: Run) -> list[Command]:
    """Return what made the run's datasets."""
    data = tomllib.loads(run.config).get("data")
    purposes: dict[str, list[str]] = {}
    for key, what in _DATASETS.items():
        words = data.get(key) if isinstance(data, dict) else None
        # One prefix, or several, with their weights between them: a weight names no file.
        for prefix in words if isinstance(words, list) else [words]:
            if not os.path.isfile(f"{prefix}.json"):
                continue
            dataset = read_object(_Dataset, Path(f"{prefix}.json"), "make the dataset again")
            if dataset.command is not None:
                purposes.setdefault(dataset.command, []).append(what)
    return [Command(f"Preprocessing of the {' and '.join(whats)}", line) for line, whats in purposes.items()]


@dataclass
class _Trail:
    """The conversions behind some directories, each once and after the one that made its input."""

    commands: list[Command] = field(default_factory=list)
    visited: set[str] = field(default_factory=set)

    def follow(self, directory: str) -> None:
        """Add the conversion that made the directory, if one did, behind those that made its input."""
        path = os.path.join(directory, "conversion.json")
        if os.path.realpath(path) in self.visited or not os.path.isfile(path):
            return
        self.visited.add(os.path.realpath(path))
        conversion = read_object(_Conversion, Path(path), "convert the checkpoint again")
        self.follow(conversion.input)
        self.commands.append(Command(f"Conversion to {conversion.to}", conversion.command))


def _conversions(results: Sequence[Result]) -> list[Command]:
    """Return what made the checkpoints that the results began with."""
    trail = _Trail()
    for result in results:
        if result.from_pretrained is not None:
            trail.follow(result.from_pretrained)
    return trail.commands


def _purpose(result: Result) -> str:
    """Return what a downstream command did."""
    weights = f", from {result.from_pretrained}" if result.from_pretrained is not None else ""
    return f"{result.task}: {result.label}{weights}, seed {result.seed}"
