"""What the tests of two processes run: one start of the processes, many runs and measurements in them."""

import errno
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pretraining_runs import checkpoint, meet_anew, pretrain, run_each
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor

from megatron_plm.benchmark.parity_cases import MODELS
from megatron_plm.config.load import load_config
from megatron_plm.model.heads import summed_cross_entropy
from megatron_plm.parallel.mesh import joined_world
from megatron_plm.parallel.tensor import local_tensor
from megatron_plm.training.optimizer import clip_gradients
from megatron_plm.training.state import Run, build_run, open_datasets

CLIP = 0.05
GRADIENT_LAYOUTS = {
    "tp": ["--tensor-model-parallel-size=2"],
    "tp_sp": ["--tensor-model-parallel-size=2", "--sequence-parallel"],
    "cp": ["--context-parallel-size=2"],
    "pp": ["--pipeline-model-parallel-size=2", "--micro-batch-size=2"],
    "tp_sp_fused": ["--tensor-model-parallel-size=2", "--sequence-parallel", "--fused-kernels"],
}
GRADIENT_MODELS = {  # three heads, of which context parallelism over two processes makes four
    **{name: flags.split() for name, flags in MODELS.items()},
    "three heads": ["--hidden-size=36", "--num-attention-heads=3"],
}
GRADIENTS = [
    *(("ESM-2", layout) for layout in GRADIENT_LAYOUTS),
    ("TAPE", "tp_sp"), ("TAPE", "cp"), ("AMPLIFY", "tp_sp"), ("three heads", "cp"),
    ("TAPE", "tp_sp_fused"), ("AMPLIFY", "tp_sp_fused"),
]  # fmt: skip
IMPOSSIBLE = {  # the layouts that can't be, of two processes
    "batch": ["--global-batch-size=12"],  # three micro-batches
    "heads": ["--tensor-model-parallel-size=2", "--num-attention-heads=1"],
    "layers": ["--pipeline-model-parallel-size=2", "--micro-batch-size=2", "--num-layers=1"],
    "world": ["--tensor-model-parallel-size=3"],
}
BF16_LAYOUTS = {
    "tp": ["--tensor-model-parallel-size=2", "--sequence-parallel"],
    "cp": ["--context-parallel-size=2"],
    "pp": [
        "--pipeline-model-parallel-size=2", "--pipeline-schedule=zbv", "--pipeline-layout=0,1,1,0",
        "--micro-batch-size=2",
    ],
}  # fmt: skip


def work(flags: list[str], one_process: Path, folder: Path) -> None:
    """Make the runs of two processes below `folder`; `one_process` holds those of one."""
    codes = run_each(
        {
            "plain": flags,
            "accumulate": [*flags, "--micro-batch-size=1"],
            "recompute": [*flags, "--recompute-granularity=full"],
            "async": [*flags, "--async-save"],
            "bf16": [*flags, "--bf16"],
            **{f"bf16_{name}": [*flags, "--bf16", *layout] for name, layout in BF16_LAYOUTS.items()},
            "resumed": [*flags, f"--load={checkpoint(folder / 'plain', 10)}"],
            "from_one": [*flags, f"--load={checkpoint(one_process / 'plain', 10)}"],
        },
        folder,
    )
    codes["full"] = _with_a_full_disk(flags, folder / "full")
    codes |= {f"impossible {name}": pretrain(*flags, *more) for name, more in IMPOSSIBLE.items()}  # nobody meets
    meet_anew()
    results = probe(flags)
    results["gradients_at"] = {}
    for model, layout in GRADIENTS:
        meet_anew()
        found = whole_gradients([*flags, *GRADIENT_MODELS[model], *GRADIENT_LAYOUTS[layout]])
        results["gradients_at"][f"{model} {layout}"] = found
    torch.save({"codes": codes, **results}, folder / f"probe_{results['rank']}.pt")


def _with_a_full_disk(flags: list[str], run: Path) -> int:
    """The exit code of a run that saves beside its training, where the second process cannot write."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    meet_anew()
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr(FileSystemWriter, "write_data", full)
        return pretrain(*flags, "--async-save", "--save-interval=5", f"--save={run}")


def probe(flags: list[str]) -> dict[str, Any]:
    """What this process sees of a model that is sharded over both."""
    config, _ = load_config(flags)
    with joined_world(config.parallel) as world:
        run = build_run(config, world, open_datasets(config))
        found = {
            "rank": world.rank,
            "size": world.size,
            "sum": world.sum(world.rank + 1, 2**51 + world.rank, 0.25),
            "any": [world.any(world.rank == 0), world.any(world.rank == 1), world.any(False), world.any(True)],
            "local_numel": sum(p.to_local().numel() for p in run.model.parts[0].parameters()),
            "initial": {name: p.full_tensor().detach() for name, p in run.model.parts[0].named_parameters()},
        }
        step = next(run.train_loader.steps(run.progress.cursor))
        run.model.passes.train(step.micro_batches, lambda logits, batch: summed_cross_entropy(logits, batch.label_id))
        (model,) = run.model.parts
        gradients = functools.partial(_gradients, model)
        found["gradients"] = gradients()
        found["norm"] = clip_gradients(model.parameters(), 0.0, world).item()
        found["unclipped"] = gradients()
        clip_gradients(model.parameters(), CLIP, world)
        found["clipped"] = gradients()
    return found


def whole_gradients(flags: list[str]) -> dict[str, torch.Tensor]:
    """The gradient of every parameter that this process has, a copy of one too, as it is when the optimizer comes: put
    together where processes hold shares, this process's own where they hold the same."""
    config, _ = load_config(flags)
    with joined_world(config.parallel) as world:
        run = build_run(config, world, open_datasets(config))
        train_step_gradients(run)
        named = {**run.model.originals, **{f"copy of {name}": p for name, p in run.model.copies.items()}}
        return {name: _whole_gradient(p) for name, p in named.items()}


def train_step_gradients(run: Run) -> None:
    """Leave the gradients of the first step's summed loss in the parameters, as `train_step` does."""
    step = next(run.train_loader.steps(run.progress.cursor))
    batches = [run.model.prepared(batch) for batch in step.micro_batches]
    run.model.passes.train(batches, lambda logits, batch: summed_cross_entropy(logits, batch.label_id))
    clip_gradients(run.model.parameters, 0.0, run.world, copies=list(run.model.copies.values()))


def _whole_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """As the optimizer takes it, which adds what this process holds of it to what it holds of the parameter."""
    own = local_tensor(parameter.grad)
    if not isinstance(parameter, DTensor) or all(placement.is_replicate() for placement in parameter.placements):
        return own
    return DTensor.from_local(
        own, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}
