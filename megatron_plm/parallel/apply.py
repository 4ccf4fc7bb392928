"""Turns the plain model into the one that trains: activation checkpointing, then sharding. Only this file knows the
order."""

import warnings

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.parallel.mesh import World


def parallelize(model: MaskedLanguageModel, world: World, *, bf16: bool, recompute: bool) -> None:
    """Change `model` in place for `world`; without a mesh and without recomputation it stays as it is.

    FSDP2 shards each block and the rest over the processes. With `bf16` it also carries the precision policy: compute
    in bfloat16, gradients reduced and weights kept in fp32. Gradients are summed over processes, not averaged: the
    loss is divided by the global number of labels already.
    """
    blocks = model.encoder.blocks
    if recompute:
        for index, block in enumerate(blocks):
            blocks[index] = checkpoint_wrapper(block)
    if world.mesh is None:
        assert not bf16, "bf16 needs a mesh"
        return
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    )
    # FSDP2 warns of in-place operations on the output, a view; the loss reads it and changes nothing.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in (*blocks, model):
        fully_shard(module, mesh=world.mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def synchronize_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass reduces gradients over the processes: needed only for the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
