"""Saving and loading a run against `torch.save` and `torch.load` of the same tensors: time, MB/s, size, and how long
the training loop stands still for a save, in steps.

A save writes files and syncs them to the disk, which `torch.save` is made to do here too; training stands still from
its beginning to its end. With `--async-save` it stands still for the copies in the host's memory only, and goes on in
steps that share the processors with the writing: what all that costs, beyond the steps, is measured until the
checkpoint is complete. Loading is into the tensors of a run that is there, from a warm page cache.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_plm.benchmark.checks import Checks, check, check_lines
from megatron_plm.benchmark.checks import missed_checks as missed
from megatron_plm.benchmark.device import (
    NUM_WORKERS,
    add_device_flags,
    chosen_device,
    chosen_dtype,
    preset_config,
    quick_values,
    waiting_for,
)
from megatron_plm.benchmark.flags import Size, add_size, count
from megatron_plm.benchmark.rounds import Wait, machine_line
from megatron_plm.config.options import Config
from megatron_plm.config.presets import PRESETS
from megatron_plm.data.loader import Step
from megatron_plm.errors import UserError
from megatron_plm.parallel.mesh import World, joined_world
from megatron_plm.parallel.tensor import local_tensor
from megatron_plm.training.checkpoint import load_checkpoint
from megatron_plm.training.checkpoint_writer import CheckpointWriter, save_checkpoint
from megatron_plm.training.device import on_device
from megatron_plm.training.loop import train_step
from megatron_plm.training.state import Run, build_run, open_datasets

__all__ = ["add_flags", "measure", "missed", "require_peer", "table"]

BAR = 1.0  # steps that a save may cost
_MICRO_ROWS = {"cpu": 4, "cuda": 32}  # at most; a divisor of the step's
_LABELS = {
    "save": "save",
    "stall": "--async-save, stall",
    "cost": "--async-save, all it costs",
    "torch_save": "torch.save, synced",
    "load": "load",
    "torch_load": "torch.load and copy",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    parser.add_argument("--data-path", required=True, metavar="PREFIX", help="dataset of the steps")
    sizes = Size(["esm2-8m"], ["tiny"])
    add_size(parser, "--presets", str, sizes, "shapes of the models", nargs="+", choices=list(PRESETS))
    add_size(parser, "--rows", count, Size(8, 4), "rows of 1,024 tokens of the step that a save is compared with")
    add_size(parser, "--rounds", count, Size(5, 2), "saves and loads of each kind, in turn")
    text = "where the checkpoints are written, and removed (default: the folder for temporary files)"
    parser.add_argument("--directory", type=Path, metavar="DIR", help=text)
    add_device_flags(parser)
    parser.add_argument("--seed", type=int, default=1)


def require_peer() -> None:
    """The peer is torch."""


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Save and load in turn for `options.rounds` rounds; returns the seconds of each, sizes, and those of a step."""
    if options.directory and not options.directory.is_dir():
        raise UserError(f"--directory {options.directory}: there is no such folder; make it, or name another")
    device = chosen_device(options)
    bf16 = chosen_dtype(options, device) == torch.bfloat16
    found: dict[str, Any] = {}
    with joined_world(use_gpu=device.type == "cuda", force_group=bf16) as world:
        for preset in options.presets:
            with tempfile.TemporaryDirectory(prefix="benchmark-checkpoint-", dir=options.directory) as scratch:
                config = preset_config(
                    preset, data_path=(options.data_path,), seed=options.seed, bf16=bf16, keep_last=1,
                    num_workers=NUM_WORKERS[device.type],
                    micro_batch_size=math.gcd(options.rows, _MICRO_ROWS[device.type]), global_batch_size=options.rows,
                    save=scratch, async_save=True,
                )  # fmt: skip
                found[preset] = _measured(config, world, Path(scratch), options.rounds, waiting_for(device))
            shown = ", ".join(f"{side} {statistics.median(found[preset][side]):.2f} s" for side in _LABELS)
            say(f"{preset}: {shown}, a step {found[preset]['step']:.2f} s")
    return {"device": device.type, "presets": found, "checks": _checks(found, options.rows)}


def _checks(found: dict[str, Any], rows: int) -> Checks:
    return {
        preset: check(
            f"checkpoint, {preset}: stall of a save with --async-save, in steps of {rows} rows",
            statistics.median(figures["stall"]) / figures["step"],
            BAR,
            at_least=False,
        )
        for preset, figures in found.items()
    }


def _measured(config: Config, world: World, folder: Path, num_rounds: int, wait: Wait) -> dict[str, Any]:
    run = build_run(config, world, open_datasets(config), fill=quick_values)
    steps = on_device(run.train_loader.steps(run.progress.cursor), world.device)
    train_step(run, next(steps))

    def step_seconds() -> float:
        return _seconds(lambda: train_step(run, next(steps)), wait)

    tensors, file = plain_tensors(run), folder / "plain.pt"
    times: dict[str, list[float]] = {side: [] for side in _LABELS}
    sides: dict[str, Callable[[], object]] = {
        "save": lambda: save_checkpoint(run, folder),
        "torch_save": lambda: _save_plain(tensors, file),
        "load": lambda: load_checkpoint(run, folder),
        "torch_load": lambda: _load_plain(tensors, file),
    }
    with CheckpointWriter(run) as writer:
        _save_beside_steps(run, writer, steps, wait)  # takes the memory for the copies, which later ones use again
        alone = [step_seconds()]  # before and behind each: the machine's speed drifts
        for _ in range(num_rounds):
            stall, seconds, num_steps = _save_beside_steps(run, writer, steps, wait)
            alone.append(step_seconds())
            times["stall"].append(stall)
            times["cost"].append(seconds - num_steps * statistics.mean(alone[-2:]))
            run.progress.step += 1  # a checkpoint of its own
            for side, work in sides.items():
                times[side].append(_seconds(work, wait))
    checkpoint = (folder / "checkpoints/latest").resolve()
    return {
        **times,
        "step": statistics.median(alone),
        "bytes": sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
        "torch_bytes": file.stat().st_size,
        "num_parameters": run.model.num_parameters,
    }


def _save_beside_steps(
    run: Run, writer: CheckpointWriter, steps: Iterator[Step], wait: Wait
) -> tuple[float, float, int]:
    """Begin to save and train until the checkpoint is complete; the seconds of the beginning and in all, and steps."""
    run.progress.step += 1
    wait()
    start = time.perf_counter()
    writer.save()
    stall, num_steps = time.perf_counter() - start, 0
    while not (writer.written() or writer.has_failed):
        train_step(run, next(steps))
        wait()
        num_steps += 1
    writer.finish()
    return stall, time.perf_counter() - start, num_steps


def _seconds(work: Callable[[], object], wait: Wait) -> float:
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def plain_tensors(run: Run) -> dict[str, Tensor]:
    """Weights and AdamW's moments of a run in one process by name, as plain tensors that share its memory."""
    found = {}
    for name, parameter in run.model.originals.items():
        found[name] = local_tensor(parameter.detach())
        found |= {f"{name}/{key}": local_tensor(value) for key, value in run.optimizer.state[parameter].items()}
    return found


def _save_plain(tensors: dict[str, Tensor], file: Path) -> None:
    with file.open("wb") as out:
        torch.save(tensors, out)
        out.flush()
        os.fsync(out.fileno())


def _load_plain(tensors: dict[str, Tensor], file: Path) -> None:
    loaded = torch.load(file, weights_only=True, map_location=next(iter(tensors.values())).device)
    for name, tensor in tensors.items():
        tensor.copy_(loaded[name])


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = []
    for preset, figures in result["presets"].items():
        size = figures["bytes"]
        lines.append(
            f"{preset}, {figures['num_parameters']:,} parameters: {size / 1e6:,.1f} MB, of torch.save "
            f"{figures['torch_bytes'] / 1e6:,.1f} MB"
        )
        lines.append(f"{'':<28}{'median':>10}{'min':>10}{'max':>10}{'MB/s':>10}")
        for side, label in _LABELS.items():
            each = figures[side]
            median = statistics.median(each)
            speed = "" if side in ("stall", "cost") else f"{size / 1e6 / median:>10,.0f}"
            lines.append(f"{label:<28}{median:>8.3f} s{min(each):>8.3f} s{max(each):>8.3f} s{speed}")
        lines.append(f"{'a step of training':<28}{figures['step']:>8.3f} s")
    return "\n".join([*lines, "", *check_lines(result["checks"]), machine_line(result)])
