"""`--check`: the layout of a plan built without hardware, and what each kind of process then holds.

Process groups are torch's fake ones, which carry nothing, and the model has shapes but no values, so one process stands
in for any rank of thousands.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_plm.config.layout import Layout
from megatron_plm.config.options import Config
from megatron_plm.parallel.apply import assemble
from megatron_plm.parallel.mesh import arranged_world
from megatron_plm.plan.memory import FP32
from megatron_plm.plan.parameters import Part, pipeline_parts
from megatron_plm.plan.search import Plan
from megatron_plm.tokenizers import get_tokenizer

_COPIES = 4  # a weight, its gradient and AdamW's two moments, all in fp32


@dataclass(frozen=True)
class Kind:
    """Processes that hold the same: a place in the pipeline, and a place among the shards."""

    part: Part
    pp_ranks: tuple[int, ...]
    shard: int
    rank: int  # the first of them, in the whole layout


def build_on_meta(config: Config) -> list[nn.Module]:
    """What this process of the group that was joined, which may be a fake one, trains: shapes without values."""
    world = arranged_world(config.parallel, torch.device("cpu"))
    # What packages of the GPU's machine have in the place of torch's holds the same.
    training = replace(config.training, norm_implementation="torch", attention_implementation="torch")
    config = replace(config, training=training)
    parts, _ = assemble(config, get_tokenizer(config.model.tokenizer), world)
    return parts


def held_parameters(modules: list[nn.Module]) -> int:
    """Numbers that this process holds of the parameters of `modules`, of one that they share once."""
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)


def kinds(config: Config, layout: Layout) -> list[Kind]:
    """Of the processes of the pipeline that have as much, the first one's first and last shard."""
    places: dict[Part, list[int]] = {}
    for pp_rank, part in enumerate(pipeline_parts(config.model, config.parallel)):
        places.setdefault(part, []).append(pp_rank)
    shards = layout.shards
    per_stage = layout.world_size // layout.pp
    return [
        Kind(part, tuple(ranks), shard, ranks[0] * per_stage + shard * layout.tp)
        for part, ranks in places.items()
        for shard in sorted({0, shards - 1})
    ]


def check(plan: Plan, vocab_size: int) -> int:
    """Build the layout of `plan`, print what each kind of process holds; returns 1 where that is not the estimate."""
    layout, differing = plan.layout, 0
    print(f"\nbuilt without hardware: {layout}, {layout.world_size} processes, one of each kind")
    for kind in kinds(plan.config, layout):
        with pretended_rank(kind.rank, layout.world_size):
            built = held_parameters(build_on_meta(plan.config))
        estimated = estimated_parameters(plan.config, layout, kind, vocab_size)
        differing += built != estimated
        verdict = "as estimated" if built == estimated else f"estimated {estimated:,}"
        print(
            f"rank {kind.rank}: pipeline rank {_ranges(kind.pp_ranks)}, blocks {'+'.join(map(str, kind.part.blocks))}, "
            f"shard {kind.shard}: {built:,} parameters ({verdict}), "
            f"{_COPIES * FP32 * built / 1e9:.3f} GB with gradients and optimizer"
        )
    return 1 if differing else 0


def estimated_parameters(config: Config, layout: Layout, kind: Kind, vocab_size: int) -> int:
    """Numbers that a process of this kind holds, by the planner's arithmetic."""
    shards = layout.shards
    units = kind.part.weights(config.model, vocab_size)
    return sum(weight.shard(layout.tp, shards, kind.shard) for unit in units for weight in unit)


@contextmanager
def pretended_rank(rank: int, world_size: int) -> Iterator[None]:
    """A process group in which this process is `rank`, and nobody else is there."""
    # Imported here: its home is torch's own tests, where importing it makes the backend known.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Set timeout is now only supported")  # nobody is waited for
            yield
    finally:
        dist.destroy_process_group()


def _ranges(ranks: tuple[int, ...]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
