"""The flags that some tasks have and others have not; a task names its own in `own_flags`."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_plm.errors import UserError
from tape_finetune.flags import add_flag

if TYPE_CHECKING:
    from tape_finetune.tasks.base import Task

SPLIT_FILES = ("train_file", "valid_file", "test_file")
BALANCED = "balanced"

_FLAGS: dict[str, dict[str, Any]] = {
    "kind": {"metavar": "KIND", "help": "what the labels are"},
    "num_classes": {"type": int, "choices": [3, 8], "help": "helix, strand and coil, or DSSP's 8 states (default: 3)"},
    "class_weights": {"choices": [BALANCED], "help": "in the loss, weigh classes by their rarity in train"},
    "sequence_column": {"metavar": "NAME", "help": "column with the amino acids"},
    "label_column": {"metavar": "NAME", "help": "column to predict"},
    **{
        name: {"metavar": "FILE", "type": Path, "help": f"the split {split!r}, instead of one of DATA_DIR"}
        for name in SPLIT_FILES
        for split in [name.removesuffix("_file")]
    },
}


def add_task_flags(parser: argparse._ActionsContainer, tasks: Mapping[str, type["Task"]]) -> None:
    """Add every flag that one of the tasks has; those not given are None."""
    for name, options in _FLAGS.items():
        owners = {task.name: task.kinds for task in tasks.values() if name in task.own_flags}
        texts = [f"{task}: {', '.join(kinds)}" if name == "kind" else task for task, kinds in owners.items()]
        add_flag(parser, name, **{**options, "help": f"{options['help']} ({'; '.join(texts)})"})


def check_task_flags(arguments: argparse.Namespace, tasks: Mapping[str, type["Task"]]) -> None:
    """Raise UserError where a flag is given that the task or its kind has not, or a kind that the task has not."""
    task = tasks[arguments.task]
    for name in _FLAGS:
        if getattr(arguments, name) is not None and name not in task.own_flags:
            owners = [other.name for other in tasks.values() if name in other.own_flags]
            belongs = f"the task {owners[0]}" if len(owners) == 1 else f"the tasks {', '.join(owners)}"
            raise UserError(f"--{name} belongs to {belongs}, not to {task.name}; leave it out")
    kind = task.of_kind(arguments.kind)
    for name in task.own_flags:
        if getattr(arguments, name) is not None and name not in kind.own_flags:
            raise UserError(f"--{name} has no use with --kind {arguments.kind}; leave it out")
