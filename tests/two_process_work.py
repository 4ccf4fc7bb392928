"""What the tests of two processes run: one start of the processes, many runs and measurements in them."""

import functools
from pathlib import Path
from typing import Any

import torch
from pretraining_runs import checkpoint, meet_anew, pretrain, run_each

from megatron_plm.config.load import load_config
from megatron_plm.parallel.apply import synchronize_gradients
from megatron_plm.parallel.mesh import joined_world
from megatron_plm.training.loop import _loss
from megatron_plm.training.optimizer import clip_gradients
from megatron_plm.training.state import build_run, open_datasets

CLIP = 0.05


def work(flags: list[str], one_process: Path, folder: Path) -> None:
    """Make the runs of two processes below `folder`; `one_process` holds those of one."""
    codes = run_each(
        {
            "plain": flags,
            "accumulate": [*flags, "--micro-batch-size=1"],
            "recompute": [*flags, "--recompute-granularity=full"],
            "bf16": [*flags, "--bf16"],
            "resumed": [*flags, f"--load={checkpoint(folder / 'plain', 10)}"],
            "from_one": [*flags, f"--load={checkpoint(one_process / 'plain', 10)}"],
        },
        folder,
    )
    meet_anew()
    codes["impossible"] = pretrain(*flags, "--global-batch-size=12")  # three micro-batches for two processes
    meet_anew()
    results = probe(flags)
    torch.save({"codes": codes, **results}, folder / f"probe_{results['rank']}.pt")


def probe(flags: list[str]) -> dict[str, Any]:
    """What this process sees of a model that is sharded over both."""
    config, _ = load_config(flags)
    with joined_world() as world:
        run = build_run(config, world, open_datasets(config))
        found = {
            "rank": world.rank,
            "size": world.size,
            "sum": world.sum(world.rank + 1, 2**51 + world.rank, 0.25),
            "any": [world.any(world.rank == 0), world.any(world.rank == 1), world.any(False), world.any(True)],
            "local_numel": sum(p.to_local().numel() for p in run.model.parameters()),
            "initial": {name: p.full_tensor().detach() for name, p in run.model.named_parameters()},
        }
        step = next(run.train_loader.steps(run.progress.cursor))
        for index, batch in enumerate(step.micro_batches):
            synchronize_gradients(run.model, enabled=index + 1 == len(step.micro_batches))
            _loss(run, batch)[0].backward()
        gradients = functools.partial(_gradients, run.model)
        found["gradients"] = gradients()
        found["norm"] = clip_gradients(run.model, 0.0).item()
        found["unclipped"] = gradients()
        clip_gradients(run.model, CLIP)
        found["clipped"] = gradients()
    return found


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}
