"""The pretraining command: from flags to a finished run directory."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from shlex import join, quote
from typing import Any

import torch

from megatron_plm.checkpoint_format import CHECKPOINTS, CONFIG_FILE
from megatron_plm.config.load import load_config, print_config_and_stop, to_toml
from megatron_plm.config.options import Config, problems
from megatron_plm.errors import RunFailed, UserError, run_command, tell
from megatron_plm.files import atomic_file
from megatron_plm.machine import package_versions, processor_name
from megatron_plm.parallel.mesh import World, joined_world, local_rank, world_size
from megatron_plm.training.checkpoint import load_checkpoint, load_pretrained_weights
from megatron_plm.training.guard import StopRequest
from megatron_plm.training.loop import train
from megatron_plm.training.metrics import RunLog
from megatron_plm.training.run_directory import (
    begins_anew,
    check_run_directory,
    own_run_directory,
    run_directory,
    write_status,
)
from megatron_plm.training.state import Datasets, Run, build_run, open_datasets

EXIT_CODES = {"finished": 0, "interrupted": 75}  # 75 is EX_TEMPFAIL: run me again; what fails raises
EXIT_CODE_FILE = "MEGATRON_PLM_EXIT_CODE_FILE"  # set by launch/pretrain.sh around torchrun
_SECONDS_TO_AGREE = 10.0


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says; returns the exit code. Raises UserError for what the user can mend."""
    try:
        config, print_config = load_config(argv)
        found = problems(config, world_size=world_size())
        if found:
            raise UserError("\n       ".join(found))
        if print_config:
            return print_config_and_stop(config) if local_rank() == 0 else 0
        datasets = open_datasets(config)
        check_run_directory(config)
    except UserError as error:
        error.told = local_rank() > 0  # all processes of a machine find it alike
        raise
    with joined_world(force_group=config.training.bf16) as world:
        try:
            with own_run_directory(config, world):
                return EXIT_CODES[_pretrain(config, world, datasets, argv)]
        except UserError as error:
            num_before, together = world.meet(str(error), seconds=_SECONDS_TO_AGREE)
            error.told = num_before > 0
            if together:
                raise
            # The others know nothing of it and would wait for this process: a crash makes torchrun end them.
            tell(error)
            raise SystemExit(error.exit_code) from None


def launch(argv: Sequence[str]) -> int:
    """`main` under launch/pretrain.sh: the exit code also goes to the file that the script names.

    torchrun reports every worker's non-zero code as a crash of its own, so a worker that ended in order (finished,
    saved after a signal, or stopped by an error that all workers find alike and have told) ends with 0 there, and the
    script exits with the code in the file.
    """
    code = run_command(main, argv)
    path = os.environ.get(EXIT_CODE_FILE)
    if path is None:
        return code
    if local_rank() == 0:
        Path(path).write_text(str(code))
    # Another node may lack a file that this one has, and would wait for the workers that left.
    may_differ = code not in EXIT_CODES.values() and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    return code if may_differ else 0


def _pretrain(config: Config, world: World, datasets: Datasets, argv: Sequence[str]) -> str:
    stop = StopRequest()
    run = build_run(config, world, datasets)
    begun_with = _load(run)
    directory = run_directory(config)
    if directory and world.is_main:
        with atomic_file(directory / CONFIG_FILE) as aside:
            aside.write_text(to_toml(config), encoding="utf-8")
        write_status(directory, "running")
    log = RunLog(run)
    description = _description(run, argv)
    log.start(description)
    log.say(
        f"{description['num_parameters']:,} parameters, {len(datasets.train):,} proteins, "
        f"{world.size} process{'es' if world.size > 1 else ''} on {world.device.type}" + begun_with
    )
    status = "failed"
    try:
        status = train(run, log, stop)
    except UserError as error:
        raise RunFailed(str(error)) from None
    finally:
        log.end(run.progress.step, status)
        if directory and world.is_main:
            write_status(directory, status)
    if world.is_main:
        _say_what_next(run, status)
    return status


def _load(run: Run) -> str:
    """Load what the options name, if anything; returns the words that say so."""
    options, directory = run.config.training, run_directory(run.config)
    if options.load and not begins_anew(run.config):
        path = load_checkpoint(run, Path(options.load))
        goes_on_there = directory is not None and path.parent == (directory / CHECKPOINTS).resolve()
        if run.progress.step >= options.train_iters and not goes_on_there:
            raise UserError(
                f"--load {path}: it is at step {run.progress.step} already; to train further, raise --train-iters "
                f"above its {options.train_iters}"
            )
        return f", going on from {path} at step {run.progress.step}"
    words = f", no checkpoint in {options.load} yet" if options.load else ""
    if options.pretrained_checkpoint:
        words += f", beginning with the weights of {load_pretrained_weights(run, Path(options.pretrained_checkpoint))}"
    return words


def _description(run: Run, argv: Sequence[str]) -> dict[str, Any]:
    world = run.world
    launcher = "launch/pretrain.sh" if world.size == 1 else f"torchrun --nproc-per-node {world.size} launch/pretrain.sh"
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else processor_name()
    return {
        "command": f"{launcher} {join(argv)}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": package_versions(),
        "machine": f"{device}, {torch.get_num_threads()} threads a process",
        "world_size": world.size,
        "num_parameters": sum(p.numel() for p in run.model.parameters()),
        "seed": run.config.training.seed,
        "train_sequences": len(run.datasets.train),
        "train_residues": run.datasets.train.num_tokens,
    }


def _say_what_next(run: Run, status: str) -> None:
    directory = run_directory(run.config)
    if directory is None:
        print(f"{status}; nothing was saved, as --save was not given")
    elif status == "interrupted":
        again = f"launch/pretrain.sh --config {quote(str(directory / CONFIG_FILE))} --load {quote(str(directory))}"
        print(f"interrupted, saved at step {run.progress.step}\nnext: {again}")
    else:
        print(
            f"wrote {directory}\nnext: python tools/convert_checkpoint.py --from native --to huggingface "
            f"--input {quote(str(directory))} --output {quote(f'out/{directory.name}')}"
        )


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
