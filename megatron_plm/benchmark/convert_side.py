"""One side of the conversion benchmark, as a process: `python -m megatron_plm.benchmark.convert_side SIDE …`.

The last line of its output is a JSON object; whoever starts this process watches its memory.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_plm.benchmark.processes import anonymous_memory
from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.command import main as convert_checkpoint
from megatron_plm.convert.huggingface import write_huggingface
from megatron_plm.convert.lazy import LazyTensors, empty_meta
from megatron_plm.convert.weights import Weights, native_shapes
from megatron_plm.errors import run_command
from megatron_plm.tokenizers import get_tokenizer


def make(directory: str, num_bytes: str, hidden_size: str, shard_size: str) -> dict[str, Any]:
    """Write an ESM-2 of about so many bytes of float32, its weights random, as transformers does: in shards."""
    width, tokenizer = int(hidden_size), get_tokenizer("esm2")
    layers = max(1, round(int(num_bytes) / (4 * 12 * width**2)))
    options = ModelOptions(num_layers=layers, hidden_size=width, num_attention_heads=width // 64)
    shapes = native_shapes(options, tokenizer)

    def draw(name: str) -> Tensor:
        return torch.randn(shapes[name], generator=torch.Generator().manual_seed(len(name)))

    meta = {name: empty_meta(shape, torch.float32) for name, shape in shapes.items()}
    Path(directory).mkdir()
    write_huggingface(Weights(options, tokenizer, LazyTensors(meta, draw)), Path(directory), shard_size=int(shard_size))
    sizes = [shape.numel() * 4 for shape in shapes.values()]
    return {"bytes": sum(sizes), "largest_tensor": max(sizes)}


def convert(*flags: str) -> dict[str, Any]:
    """tools/convert_checkpoint.py; `memory_before` is that of a process which has imported all it needs."""
    before = anonymous_memory(os.getpid())
    start = time.perf_counter()
    convert_checkpoint(flags)
    return {"seconds": time.perf_counter() - start, "memory_before": before}


SIDES: dict[str, Callable[..., dict[str, Any]]] = {"make": make, "convert": convert}


def main(argv: Sequence[str]) -> int:
    print(json.dumps(SIDES[argv[0]](*argv[1:])))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
