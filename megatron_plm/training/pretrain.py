"""The pretraining command: from flags to a finished run directory."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from shlex import join, quote
from typing import Any

import torch

from megatron_plm.checkpoint_format import CHECKPOINTS, CONFIG_FILE, LATEST, find_checkpoint
from megatron_plm.config.load import load_config, print_config_and_stop, to_toml
from megatron_plm.config.options import Config, problems
from megatron_plm.errors import RunFailed, UserError, run_command
from megatron_plm.files import atomic_file
from megatron_plm.machine import package_versions, processor_name
from megatron_plm.parallel.mesh import World, joined_world, world_size
from megatron_plm.training.checkpoint import load_checkpoint
from megatron_plm.training.guard import StopRequest
from megatron_plm.training.loop import train
from megatron_plm.training.metrics import RunLog
from megatron_plm.training.state import Datasets, Run, build_run, open_datasets, run_directory

EXIT_CODES = {"finished": 0, "interrupted": 75}  # 75 is EX_TEMPFAIL: run me again; what fails raises
EXIT_CODE_FILE = "MEGATRON_PLM_EXIT_CODE_FILE"  # set by launch/pretrain.sh around torchrun


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says; returns the exit code. Raises UserError for what the user can mend."""
    config, print_config = load_config(argv)
    found = problems(config, world_size=world_size())
    if found:
        raise UserError("\n       ".join(found))
    if print_config:
        return print_config_and_stop(config)
    datasets = open_datasets(config)
    _check_directory(config)
    with joined_world(force_group=config.training.bf16) as world:
        return EXIT_CODES[_pretrain(config, world, datasets, argv)]


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
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path(path).write_text(str(code))
    # Another node may lack a file that this one has, and would wait for the workers that left.
    may_differ = code not in EXIT_CODES.values() and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    return code if may_differ else 0


def _pretrain(config: Config, world: World, datasets: Datasets, argv: Sequence[str]) -> str:
    stop = StopRequest()
    run = build_run(config, world, datasets)
    loaded = load_checkpoint(run, Path(config.training.load)) if config.training.load else None
    directory = run_directory(config)
    if directory and world.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_file(directory / CONFIG_FILE) as aside:
            aside.write_text(to_toml(config), encoding="utf-8")
        _write_status(directory, "running")
    log = RunLog(run)
    description = _description(run, argv)
    log.start(description)
    log.say(
        f"{description['num_parameters']:,} parameters, {len(datasets.train):,} proteins, "
        f"{world.size} process{'es' if world.size > 1 else ''} on {world.device.type}"
        + (f", going on from {loaded} at step {run.progress.step}" if loaded else "")
    )
    status = "failed"
    try:
        status = train(run, log, stop)
    except UserError as error:
        raise RunFailed(str(error)) from None
    finally:
        log.end(run.progress.step, status)
        if directory and world.is_main:
            _write_status(directory, status)
    if world.is_main:
        _say_what_next(run, status)
    return status


def _write_status(directory: Path, status: str) -> None:
    with atomic_file(directory / "status") as aside:
        aside.write_text(status + "\n", encoding="utf-8")


def _check_directory(config: Config) -> None:
    """Refuse a run directory that cannot be written or holds a run that this one does not go on with; before any
    process group exists."""
    directory, load = run_directory(config), config.training.load
    if directory is None:
        return
    holds_run = (directory / CHECKPOINTS).exists() or (directory / "metrics.jsonl").exists()
    way_out = f"go on with it by --load {directory}, or give another folder"
    if holds_run and load is None:
        raise UserError(f"--save {directory}: holds a run already; {way_out}")
    # Going on from elsewhere would mix two runs, and from an older checkpoint overwrite the newer ones one by one.
    if holds_run and load and find_checkpoint(Path(load)) != (directory / CHECKPOINTS / LATEST).resolve():
        raise UserError(
            f"--save {directory}: holds a run already, and --load {load} is not its latest checkpoint; {way_out}"
        )
    nearest = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--save {directory}: {nearest} cannot be written to; choose a folder with write permission")


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
