"""The pretraining command: from flags to a finished run directory."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_plm import __version__
from megatron_plm.checkpoint_format import CHECKPOINTS, CONFIG_FILE, write_config
from megatron_plm.config.layout import bubble_fraction, num_micro_batches, stage_layers
from megatron_plm.config.load import load_config, to_toml
from megatron_plm.config.options import Config
from megatron_plm.config.problems import problems
from megatron_plm.errors import RunFailed, UserError, run_command, tell
from megatron_plm.files import atomic_file
from megatron_plm.invocation import EXIT_CODE_FILE, command_line, typeable
from megatron_plm.kernels.accelerators import TORCH, require_accelerators
from megatron_plm.kernels.library import fused_path, require_kernels
from megatron_plm.kernels.linear import linear_path
from megatron_plm.kernels.rotary import rotary_path
from megatron_plm.machine import package_versions, processor_name
from megatron_plm.memory import keep_freed_memory
from megatron_plm.model.attention import attention_path
from megatron_plm.parallel.mesh import (
    OtherOptions,
    World,
    check_devices,
    device,
    joined_world,
    local_rank,
    process_rank,
    told_once,
    world_size,
)
from megatron_plm.parallel.pipeline import check_schedule
from megatron_plm.parallel.presence import OthersFailed
from megatron_plm.training.checkpoint import load_checkpoint, load_pretrained_weights
from megatron_plm.training.guard import StopRequest
from megatron_plm.training.loop import train
from megatron_plm.training.metrics import RunLog
from megatron_plm.training.profiler import check_memory_history, traced_steps
from megatron_plm.training.run_directory import (
    RunStatus,
    begins_anew,
    check_run_directory,
    own_run_directory,
    run_directory,
)
from megatron_plm.training.state import Datasets, Run, build_run, open_datasets

EXIT_CODES = {"finished": 0, "interrupted": 75}  # 75 is EX_TEMPFAIL: run me again; what fails raises


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says; returns the exit code. Raises UserError for what the user can mend."""
    keep_freed_memory()
    try:
        config, print_config = load_config(argv)
        found = problems(config, world_size=world_size())
        if found:
            raise UserError("\n       ".join(found))
        if print_config:
            sys.stdout.write(to_toml(config) if local_rank() == 0 else "")
            return 0
        check_devices()
        check_schedule(config.parallel)
        check_memory_history(config, device())
        if config.training.fused_kernels:
            require_kernels(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        require_accelerators(
            device(),
            norm=config.training.norm_implementation,
            attention=config.training.attention_implementation,
            optimizer=config.training.optimizer_implementation,
        )
        datasets = open_datasets(config)
        check_run_directory(config)
    except UserError as error:
        error.told = local_rank() > 0  # all processes of a machine find it alike
        raise
    with _end_of_the_others(), contextlib.ExitStack() as stack:
        try:
            world = stack.enter_context(
                joined_world(
                    config.parallel,
                    force_group=config.training.bf16,
                    timeout_minutes=config.training.distributed_timeout_minutes,
                    description=f"version = {__version__}\n{to_toml(config)}data = {datasets.train.sha256}",
                )
            )
        except OtherOptions as error:
            error.told = process_rank() > 0
            raise
        with told_once(world):
            stack.enter_context(own_run_directory(config, world))
            return EXIT_CODES[_pretrain(config, world, datasets, argv)]


@contextlib.contextmanager
def _end_of_the_others() -> Iterator[None]:
    """Crash where another process has gone or hangs: a stopped one would never end, so that torchrun has to end it."""
    try:
        yield
    except OthersFailed as error:
        tell(error)
        raise SystemExit(error.exit_code) from None


def launch(argv: Sequence[str]) -> int:
    """`main` under launch/pretrain.sh: the exit code also goes to the file that the script names.

    torchrun reports every worker's non-zero code as a crash of its own, so a worker that ended in order (finished,
    saved after a signal, or stopped by an error that all workers find alike and have told) ends with 0 there, and the
    script exits with the code in the file.
    """
    path = os.environ.get(EXIT_CODE_FILE)
    try:
        code = run_command(main, argv)
    except SystemExit as stop:
        # The code of the one that failed stays, whichever of the two writes first.
        is_known = isinstance(stop.__context__, OthersFailed) and path is not None and _is_written(Path(path))
        if path is not None and isinstance(stop.code, int) and not is_known:
            Path(path).write_text(str(stop.code))
        raise
    if path is None:
        return code
    if local_rank() == 0:
        Path(path).write_text(str(code))
    # Another node may lack a file that this one has, and would wait for the workers that left.
    may_differ = code not in EXIT_CODES.values() and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    return code if may_differ else 0


def _is_written(path: Path) -> bool:
    return path.exists() and bool(path.read_text())


def _pretrain(config: Config, world: World, datasets: Datasets, argv: Sequence[str]) -> str:
    stop = StopRequest()
    run = build_run(config, world, datasets)
    begun_with = _load(run)
    traced_steps(config, run.progress.step)  # raises where there are none to trace
    directory = run_directory(config)
    if directory and world.is_main:
        with atomic_file(directory / CONFIG_FILE) as aside:
            write_config(aside, config)
    with RunStatus(config, world) as ending:
        log = RunLog(run)
        description = _description(run, argv)
        log.start(description)
        log.say(
            f"{description['num_parameters']:,} parameters, {datasets.train.num_sequences:,} proteins, "
            f"{world.size} process{'es' if world.size > 1 else ''} on {world.device.type}{begun_with}\n"
            f"{_layout_told(config, world)}{description['kernels']}"
            + ("" if directory else "\nnothing will be saved, as --save was not given")
        )
        status = "failed"
        try:
            status = train(run, log, stop)
            ending.end(status)
        except UserError as error:
            raise RunFailed(str(error)) from None
        finally:
            # A disk that is full is told by the error on its way, not by what can't be written about it.
            with contextlib.suppress(*((OSError, UserError) if status == "failed" else ())):
                log.end(run.progress.step, status)
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
        words += f", beginning with {load_pretrained_weights(run, Path(options.pretrained_checkpoint))}"
    return words


def _description(run: Run, argv: Sequence[str]) -> dict[str, Any]:
    world = run.world
    dtype = torch.bfloat16 if run.config.training.bf16 else torch.float32
    training = run.config.training
    attention = attention_path(
        world.device,
        dtype,
        dropout=run.config.model.attention_dropout > 0,
        implementation=training.attention_implementation,
    )
    maps = linear_path(world.device, dtype, cut=world.layout.tp > 1, compiled=training.compile)
    others = [f"fused ops: {fused_path(world.device)}"] if training.fused_kernels else []
    if run.config.model.position_embedding_type == "rope" and not training.fused_kernels:
        others.append(f"rotation: {rotary_path(world.device, dtype)}")
    chosen = {"norms": training.norm_implementation, "AdamW": training.optimizer_implementation}
    others += [f"{what}: {package}" for what, package in chosen.items() if package != TORCH]
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else processor_name()
    return {
        "command": command_line("pretrain", argv),
        "step": run.progress.step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": package_versions(),
        "machine": f"{device}, {torch.get_num_threads()} threads a process",
        "kernels": "; ".join([f"attention: {attention}", f"linear maps: {maps}", *others]),
        "world_size": world.size,
        "num_parameters": run.model.num_parameters,
        "seed": training.seed,
        "train_sequences": run.datasets.train.num_sequences,
        "train_residues": run.datasets.train.num_tokens,
    }


def _layout_told(config: Config, world: World) -> str:
    """Lines about the layout, where there is one to speak of."""
    layout, parallel = world.layout, config.parallel
    if world.size == 1:
        return ""
    lines = [f"layout: {layout}"]
    if layout.pp > 1:
        num = num_micro_batches(config.training, layout.dp)
        stages = ", ".join(str(len(blocks)) for blocks in stage_layers(parallel, config.model.num_layers))
        lines.append(
            f"pipeline {parallel.pipeline_schedule}: blocks of the stages {stages}; {num} micro-batches, bubble "
            f"{bubble_fraction(parallel, num):.0%}"
        )
        if parallel.data_parallel_sharding == "zero3" and layout.shards > 1:
            lines.append("note: zero3 gathers the weights for every micro-batch of a pipeline; zero2 gathers them once")
    return "\n".join(lines) + "\n"


def _say_what_next(run: Run, status: str) -> None:
    directory = run_directory(run.config)
    if directory is None:
        print(f"{status}; nothing was saved, as --save was not given")
    elif status == "interrupted":
        again = typeable("pretrain", ["--config", directory / CONFIG_FILE, "--load", directory])
        print(f"interrupted, saved at step {run.progress.step}\nnext: {again}")
    elif not run.datasets.tokenizer.one_letter_a_token or run.config.model.objective == "clm":
        # no other format has its tokens, or its objective
        more = ["--config", directory / CONFIG_FILE, "--load", directory]
        more += ["--train-iters", 2 * run.config.training.train_iters]
        print(f"wrote {directory}\nnext: {typeable('pretrain', more)}")
    else:
        model = run.config.model  # none of transformers' has learned positions and norms before attention and MLP
        target = "proteinlm-tape" if model.max_position_embeddings and model.norm_placement == "pre" else "huggingface"
        flags = ["--from", "native", "--to", target, "--input", directory, "--output", f"out/{directory.name}"]
        print(f"wrote {directory}\nnext: {typeable('convert-checkpoint', flags)}")


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
