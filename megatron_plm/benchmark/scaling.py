"""Weak scaling: the same rows for each process, more and more processes, by the kind of layout.

Efficiency is useful tokens a second of a process, over those of one process alone. Each process has so many threads of
a CPU, also where it is alone, or a GPU. Data parallelism (`dp`: whole copies; `fsdp`: weights shared out too) gives
each process rows of its own; tensor parallelism (`tp`, with sequence parallelism) gives all of them together as many
rows as they would have, and shares the work of each out. Processes meet over gloo on a CPU and over NCCL on GPUs.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from megatron_plm.benchmark.flags import Size, add_size, count, seconds
from megatron_plm.benchmark.rounds import machine_line
from megatron_plm.benchmark.spawned import become_process, meet
from megatron_plm.config.options import Config
from megatron_plm.config.presets import PRESETS
from megatron_plm.errors import UserError

__all__ = ["add_flags", "measure", "missed", "require_peer", "table"]

KINDS = {"dp": "copies (DDP)", "fsdp": "weights shared out (FSDP2)", "tp": "tensor and sequence parallel"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    parser.add_argument("--data-path", required=True, metavar="PREFIX", help="dataset to train on")
    sizes = Size("esm2-8m", "tiny")
    add_size(parser, "--preset", str, sizes, "shape of the model", choices=list(PRESETS))
    text = "numbers of processes, beside one (default: 2, 4, ... up to the GPUs, or cores, that there are)"
    parser.add_argument("--processes", type=count, nargs="+", metavar="N", help=text)
    text = f"layouts of several processes: {', '.join(KINDS)} (default: all)"
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND", help=text)
    add_size(parser, "--rows", count, Size(4, 2), "packed rows of a step for each process")
    add_size(parser, "--seq-length", count, Size(1024, 128), "tokens of a row")
    add_size(parser, "--rounds", count, Size(3, 1), "rounds; each measures every layout once, in turn")
    add_size(parser, "--seconds", seconds, Size(10.0, 0.2), "time of each layout in one round")
    parser.add_argument("--threads", type=count, default=1, help="of each process on a CPU (default: 1)")
    add_device_flags(parser)
    parser.add_argument("--seed", type=int, default=1)


def require_peer() -> None:
    """The peer is one process of our own."""


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Train in every layout in turn; returns useful tokens a second of all its processes together, and efficiency.

    Raises UserError for more processes than GPUs, and for what is no layout of the model, before anything is measured.
    """
    import torch

    device = chosen_device(options)
    bf16 = chosen_dtype(options, device) == torch.bfloat16
    places = torch.cuda.device_count() if device.type == "cuda" else (os.cpu_count() or 1)
    numbers = options.processes or [n for n in (2, 4, 8, 16) if n <= places]
    if device.type == "cuda" and max(numbers, default=1) > places:
        raise UserError(f"--processes {max(numbers)}: there are {places} GPUs here; give at most so many")
    config_of = functools.partial(_config, options=options, device=device.type, bf16=bf16)
    layouts = {"one": (1, config_of("fsdp", 1))}
    for number in sorted(set(numbers) - {1}):
        layouts |= {f"{kind} {number}": (number, config_of(kind, number)) for kind in options.kinds}
    speeds: dict[str, list[float]] = {name: [] for name in layouts}
    for number in range(1, options.rounds + 1):
        for name, (processes, config) in layouts.items():
            speeds[name].append(_run(config, processes, options, device.type))
        say(
            f"round {number} of {options.rounds}, tokens/s: {', '.join(f'{n} {s[-1]:,.0f}' for n, s in speeds.items())}"
        )
    found = {}
    for name, (processes, _) in layouts.items():
        each = [all_ / processes / alone for all_, alone in zip(speeds[name], speeds["one"], strict=True)]
        found[name] = {
            "processes": processes,
            "kind": name.split()[0],
            "tokens_per_second": speeds[name],
            "efficiency": statistics.median(each),
        }
    return {"device": device.type, "places": places, "layouts": found, "checks": {}}


def _config(kind: str, processes: int, *, options: argparse.Namespace, device: str, bf16: bool) -> Config:
    rows = options.rows * processes
    values: dict[str, Any] = {
        "dp": {"data_parallel_sharding": "none", "micro_batch_size": options.rows},
        "fsdp": {"data_parallel_sharding": "zero3", "micro_batch_size": options.rows},
        "tp": {"tensor_model_parallel_size": processes, "sequence_parallel": processes > 1, "micro_batch_size": rows},
    }[kind]
    return preset_config(
        options.preset, world_size=processes, data_path=(options.data_path,), seq_length=options.seq_length,
        global_batch_size=rows, num_workers=NUM_WORKERS[device], seed=options.seed, bf16=bf16, **values,
    )  # fmt: skip


def _run(config: Config, processes: int, options: argparse.Namespace, device: str) -> float:
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory(prefix="benchmark-scaling-") as scratch:
        arguments = (processes, config, options.seconds, options.threads, device, Path(scratch))
        spawn(_process, args=arguments, nprocs=processes)
        return json.loads((Path(scratch) / "speed.json").read_text(encoding="utf-8"))


def _process(
    rank: int, processes: int, config: Config, seconds: float, threads: int, device: str, folder: Path
) -> None:
    from megatron_plm.parallel.mesh import joined_world
    from megatron_plm.training.device import on_device
    from megatron_plm.training.loop import train_step
    from megatron_plm.training.state import build_run, open_datasets

    become_process(rank, processes, threads=threads)
    meet(rank, folder / "port")
    with joined_world(config.parallel, use_gpu=device == "cuda", force_group=config.training.bf16) as world:
        run = build_run(config, world, open_datasets(config), fill=quick_values)
        steps = on_device(run.train_loader.steps(run.progress.cursor), world.device)
        wait = waiting_for(world.device)

        def step() -> int:
            return train_step(run, next(steps)).num_tokens

        start = time.perf_counter()
        step()
        step()
        wait()
        # All take as many steps: as many as the first one finds to last so long.
        (num_steps,) = world.sum(max(1.0, seconds / (time.perf_counter() - start) * 2) if rank == 0 else 0.0)
        tokens, begin = 0, time.perf_counter()
        for _ in range(int(num_steps)):
            tokens += step()
        wait()
        speed = tokens / (time.perf_counter() - begin)
        world.barrier()
        if rank == 0:
            (folder / "speed.json").write_text(json.dumps(speed), encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'':<40}{'processes':>10}{'tokens/s (median)':>20}{'efficiency':>12}"]
    for figures in result["layouts"].values():
        label = "one process" if figures["processes"] == 1 else KINDS[figures["kind"]]
        median = statistics.median(figures["tokens_per_second"])
        lines.append(f"{label:<40}{figures['processes']:>10}{median:>20,.0f}{figures['efficiency']:>12.0%}")
    places = result["places"]
    most = max(figures["processes"] for figures in result["layouts"].values())
    if most * (result["options"]["threads"] if result["device"] == "cpu" else 1) > places:
        lines.append(f"note: {most} processes share {places} cores: these figures show what the layout costs, not more")
    options = result["options"]
    lines.append(f"{options['preset']}, {options['rows']} rows of {options['seq_length']:,} tokens for each process")
    return "\n".join([*lines, machine_line(result)])
