"""Where a measurement runs: on the GPU, where there is one, or on the CPU. Nothing of CUDA is called at import."""

import argparse
import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from megatron_plm.benchmark.rounds import no_wait
from megatron_plm.config.load import config_from_values
from megatron_plm.config.options import Config, ModelOptions
from megatron_plm.config.presets import PRESETS
from megatron_plm.config.problems import problems
from megatron_plm.errors import UserError
from megatron_plm.model.initialize import Piece
from megatron_plm.model.layers import RotaryEmbedding
from megatron_plm.plan.hardware import GPUS, Gpu

# Threads that make a training's batches: on a CPU they would take the model's own.
NUM_WORKERS = {"cpu": 0, "cuda": 4}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype; `chosen_device` and `chosen_dtype` read them."""
    choices, text = ("cpu", "cuda"), "where all sides run (default: the GPU, where there is one)"
    parser.add_argument("--device", choices=choices, default=None, help=text)
    text = "numbers that all sides compute with (default: bfloat16 on a GPU, float32 on a CPU)"
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default=None, help=text)


def chosen_device(options: argparse.Namespace) -> torch.device:
    """The device; raises UserError where a GPU is asked for and torch sees none."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave the flag out to measure on the CPU")
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def chosen_dtype(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """What the sides compute with."""
    return _DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]


def waiting_for(device: torch.device) -> Callable[[], object]:
    """A call that returns when the device has done what it was given."""
    return torch.cuda.synchronize if device.type == "cuda" else no_wait


@contextlib.contextmanager
def peak_gpu_memory(device: torch.device) -> Iterator[dict[str, int | None]]:
    """Notes under "bytes" the most memory that tensors took on a GPU inside the block; None on a CPU, where only a
    process as a whole is told apart."""
    found: dict[str, int | None] = {"bytes": None}
    if device.type != "cuda":
        yield found
        return
    free_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    found["bytes"] = torch.cuda.max_memory_allocated(device)


def free_memory(device: torch.device) -> None:
    """Hand back what no tensor holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gpu_in_table(name: str, memory: float) -> Gpu | None:
    """The planner's figures of the GPU that torch calls so and that has so many bytes; None of one it doesn't know."""
    words = name.lower().replace("-", " ").split()
    if {"h100", "pcie"} <= set(words):  # of other clocks and fewer units than the one of the table
        return None
    for known, gpu in GPUS.items():
        model = known.split("-")[0]
        if model in words and 0.9 < memory / gpu.memory < 1.15:
            return gpu
    return None


def gpu_here(device: torch.device) -> Gpu | None:
    """The planner's figures of this device."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return gpu_in_table(properties.name, properties.total_memory)


def preset_config(preset: str, *, world_size: int = 1, **values: object) -> Config:
    """A run of a preset's shape with options of its own; raises UserError for what describes no run of so many
    processes."""
    config = config_from_values({**PRESETS[preset], **values})
    found = problems(config, world_size=world_size)
    if found:
        raise UserError(found[0])
    return config


@torch.no_grad()
def quick_values(module: nn.Module, options: ModelOptions, seed: int, *, piece: Callable[[Tensor], Piece]) -> None:
    """Values of the initial weights' size from torch's generator, where the device draws: of 3 billion weights in
    a moment, where those of the library, the same at every layout, take minutes."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        held, _ = piece(parameter)
        if parameter.dim() == 1:
            held.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        else:
            held.normal_(std=options.init_method_std)
    for part in module.modules():
        if isinstance(part, RotaryEmbedding):
            part.fill()
