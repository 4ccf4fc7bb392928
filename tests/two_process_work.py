"""What the tests of two processes run: one start of the processes, many runs and measurements in them."""

import functools
from pathlib import Path
from typing import Any

import torch
from pretraining_runs import checkpoint, meet_anew, pretrain, run_each

from megatron_plm.config.load import load_config
from megatron_plm.model.heads import summed_cross_entropy
from megatron_plm.parallel.mesh import joined_world
from megatron_plm.training.optimizer import clip_gradients
from megatron_plm.training.state import build_run, open_datasets

CLIP = 0.05
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
            "bf16": [*flags, "--bf16"],
            **{f"bf16_{name}": [*flags, "--bf16", *layout] for name, layout in BF16_LAYOUTS.items()},
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


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}
