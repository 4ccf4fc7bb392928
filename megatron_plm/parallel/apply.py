"""Turns the plain model into the one that trains. Only this file knows the order: context parallelism, tensor and
sequence parallelism, stages, activation checkpointing, compilation, sharding; then memory, and values."""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from megatron_plm.config.layout import Layout, num_micro_batches, stage_layers, stages_of
from megatron_plm.config.options import Config, ModelOptions
from megatron_plm.data.loader import Batch
from megatron_plm.data.masking import Masking
from megatron_plm.data.packing import row_limits
from megatron_plm.kernels.accelerators import TORCH, attention_by, replace_norms
from megatron_plm.model.fused import FusedBlock
from megatron_plm.model.initialize import Piece, initialize
from megatron_plm.model.transformer import Block, MaskedLanguageModel
from megatron_plm.parallel.context import apply_context_parallel, own_labels
from megatron_plm.parallel.mesh import World
from megatron_plm.parallel.pipeline import Activations, Criterion, PipelinePasses, Stage
from megatron_plm.parallel.tensor import apply_tensor_parallel
from megatron_plm.tokenizers import Tokenizer


class Fill(Protocol):
    """Gives all parameters and buffers of a module their values in place, as `initialize` does."""

    def __call__(
        self, module: nn.Module, options: ModelOptions, seed: int, *, piece: Callable[[Tensor], Piece]
    ) -> None: ...


class Passes(Protocol):
    """Forward and backward passes of the micro-batches of one step, whatever the layout.

    The criterion is called with the logits of each micro-batch where they are: in a pipeline, by the processes of the
    last stage only.
    """

    def train(self, micro_batches: Sequence[Batch], criterion: Criterion) -> None:
        """Run forward and backward passes: the gradients are complete afterwards."""

    def evaluate(self, micro_batches: Sequence[Batch], criterion: Criterion) -> None:
        """Run forward passes."""


@dataclass(frozen=True)
class ParallelModel:
    """What this process holds of the model.

    Attributes:
        parts: the model, or some stages of it; their parameters have the names that they have in the model.
        originals: its parameters by name: what the optimizer changes and a checkpoint saves. (FSDP2 puts other objects
            into the modules while weights are gathered.)
        copies: by name, parameters whose original another stage has: they have the same gradients, and count once.
        passes: takes micro-batches, as `prepared` gives them, through the whole model.
        num_parameters: of the whole model.
    """

    parts: list[nn.Module]
    originals: dict[str, nn.Parameter]
    copies: dict[str, nn.Parameter]
    passes: Passes
    world: World
    num_parameters: int

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters here, copies too."""
        return [*self.originals.values(), *self.copies.values()]

    def prepared(self, batch: Batch) -> Batch:
        """A micro-batch on this process's device, with the labels that this process scores."""
        batch = batch.to(self.world.device)
        cp = self.world.layout.cp
        return batch if cp == 1 else own_labels(batch, cp, self.world.coordinate("cp"))


def build_model(config: Config, tokenizer: Tokenizer, world: World, *, fill: Fill = initialize) -> ParallelModel:
    """Build this process's part of the model that `config` describes, with its initial weights.

    The weights are the same for every layout. No process ever holds more than its part. A measurement of speed, for
    which any values will do, may `fill` them in faster.
    """
    parts, num_parameters = assemble(config, tokenizer, world)
    for part in parts:
        part.to_empty(device=world.device)
        fill(part, config.model, config.training.seed, piece=piece_here)
    copies = {name: p for part in parts if isinstance(part, Stage) for name, p in part.copies().items()}
    copied = {id(p) for p in copies.values()}
    named = [(name, p) for part in parts for name, p in part.named_parameters()]
    originals = {name: p for name, p in named if id(p) not in copied}
    return ParallelModel(parts, originals, copies, _passes(parts, config, tokenizer, world), world, num_parameters)


def assemble(config: Config, tokenizer: Tokenizer, world: World) -> tuple[list[nn.Module], int]:
    """This process's parts of the model, with shapes and no memory, and the number of parameters of the whole."""
    layers = stage_layers(config.parallel, config.model.num_layers)
    pp = world.layout.pp
    parts: list[nn.Module] = []
    for stage in stages_of(config.parallel, world.coordinate("pp")):
        with torch.device("meta"):
            block_type = FusedBlock if config.training.fused_kernels else Block
            model = MaskedLanguageModel(config.model, tokenizer, block_type)
        if config.training.norm_implementation != TORCH:
            replace_norms(model, config.training.norm_implementation)
        if (varlen := attention_by(config.training.attention_implementation)) is not None:
            model.encoder.attend_by(varlen)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if world.cp_group is not None:
            apply_context_parallel(model, world.cp_group, world.coordinate("cp"))
        if world.layout.tp > 1:
            assert world.mesh is not None
            apply_tensor_parallel(model, world.mesh["tp"], sequence_parallel=config.parallel.sequence_parallel)
        is_first, is_last = stage == 0, stage == len(layers) - 1
        part = model if pp == 1 else Stage(model, layers[stage], is_first=is_first, is_last=is_last)
        blocks = [block for block in part.modules() if isinstance(block, Block)]
        for block in blocks:
            recompute(block, config.training.recompute_granularity, draws=config.model.attention_dropout > 0)
            if config.training.compile:
                block.compile()
        _shard(part, blocks, config, world)
        if isinstance(part, Stage):
            part.keep_index_on_host()
        parts.append(part)
    return parts, num_parameters


def recompute(block: Block, granularity: str, *, draws: bool) -> None:
    """Let the backward pass recompute the block: all of it, or what is not dear ("selective"). `draws` says whether it
    draws random numbers, which must then come again."""
    if granularity == "none":
        return
    run_again = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=draws)
    if granularity == "selective":
        keep = functools.partial(create_selective_checkpoint_contexts, _dear_ops())
        run_again = functools.partial(run_again, context_fn=keep)
    block.forward = run_again  # type: ignore[method-assign]


def _dear_ops() -> list[torch._ops.OpOverload]:
    """What selective recomputation keeps: matrix products, attention and communication."""
    with contextlib.suppress(ImportError):  # makes its op known, in builds that have it
        importlib.import_module("torch.nn.attention.varlen")
    aten, found = torch.ops.aten, []
    names = [
        (aten, "mm"),
        (aten, "addmm"),
        (aten, "linear"),
        (aten, "_scaled_dot_product_flash_attention"),
        (aten, "_scaled_dot_product_flash_attention_for_cpu"),
        (aten, "_scaled_dot_product_efficient_attention"),
        (aten, "_scaled_dot_product_cudnn_attention"),
        (torch.ops.torch_attn, "_varlen_attn"),
        (torch.ops.flash_attn, "_flash_attn_varlen_forward"),
        (torch.ops.mkldnn, "_linear_pointwise"),
        (torch.ops.megatron_plm, "packed_attention"),
        (torch.ops._c10d_functional, "all_gather_into_tensor"),
        (torch.ops._c10d_functional, "reduce_scatter_tensor"),
        (torch.ops._c10d_functional, "all_reduce"),
        (torch.ops._c10d_functional, "all_to_all_single"),
    ]
    for namespace, name in names:
        if hasattr(namespace, name):  # builds of torch differ in what they have
            found.append(getattr(namespace, name).default)
    return found


def _shard(part: nn.Module, blocks: Sequence[Block], config: Config, world: World) -> None:
    """FSDP2: each block, and the rest of the part, is a unit of gathering and of gradient summation.

    It also carries the precision policy: with bf16, compute in bfloat16, gradients summed and weights kept in fp32.
    Gradients are summed over processes, not averaged: the loss is divided by the global number of labels already.
    """
    bf16, layout = config.training.bf16, world.layout
    if layout.dp * layout.cp == 1 and not bf16:
        return
    assert world.mesh is not None
    mesh = world.mesh["dp_replicate", "dp_shard_cp"] if layout.dp_replicate > 1 else world.mesh["dp_shard_cp"]
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    )
    # FSDP2 warns of in-place operations on the output, a view; the loss reads it and changes nothing.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    gathers_again = _gathers_again(config, layout)
    for module in (*blocks, part):
        # What follows the blocks is needed again at once: it stays gathered.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=gathers_again and module is not part)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _gathers_again(config: Config, layout: Layout) -> bool:
    """Whether a block's weights are gathered for each of its passes, rather than once a step."""
    # What nobody shares need not be gathered again; zbv, besides, takes gradients when the weights would be gone.
    return layout.shards > 1 and config.parallel.data_parallel_sharding == "zero3"


def piece_here(parameter: Tensor) -> Piece:
    """What this process holds of a parameter."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    _, start = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), start


def _passes(parts: list[nn.Module], config: Config, tokenizer: Tokenizer, world: World) -> Passes:
    layout, training = world.layout, config.training
    if layout.pp == 1:
        return SequentialPasses(parts[0], gathers_again=_gathers_again(config, layout))
    assert world.mesh is not None
    rows = training.micro_batch_size
    limits = row_limits(config.data, Masking.from_options(config.data, config.model.objective))
    pieces = layout.cp * (layout.tp if config.parallel.sequence_parallel else 1)
    activations = Activations(
        between=(rows, limits.tokens // pieces, config.model.hidden_size),
        logits=(rows, min(limits.labels, limits.tokens), tokenizer.vocab_size),
        dtype=torch.bfloat16 if training.bf16 else torch.float32,
    )
    stages = [part for part in parts if isinstance(part, Stage)]
    return PipelinePasses(
        stages,
        config.parallel,
        world.mesh,
        world.device,
        activations,
        num_micro_batches(training, layout.dp),
        world.timeout,
    )


class SequentialPasses:
    """One micro-batch after the other through a model that is here as a whole, or whose shards are gathered."""

    def __init__(self, model: nn.Module, *, gathers_again: bool) -> None:
        self._model = model
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._stays_gathered = [unit for unit in units if unit is model or not gathers_again]

    def train(self, micro_batches: Sequence[Batch], criterion: Criterion) -> None:
        """Run forward and backward passes; gradients are summed over the processes in the last one only, and what stays
        gathered after a forward pass is given back no sooner."""
        for index, batch in enumerate(micro_batches):
            if isinstance(self._model, FSDPModule):
                is_last = index + 1 == len(micro_batches)
                self._model.set_requires_gradient_sync(is_last)
                for module in self._stays_gathered:
                    module.set_reshard_after_backward(is_last, recurse=False)
            criterion(self._logits(batch), batch).backward()

    def evaluate(self, micro_batches: Sequence[Batch], criterion: Criterion) -> None:
        """Run forward passes."""
        with torch.no_grad():
            for batch in micro_batches:
                criterion(self._logits(batch), batch)

    def _logits(self, batch: Batch) -> Tensor:
        return self._model(
            batch.tokens, batch.positions, batch.segment_ids, batch.cu_seqlens, batch.label_index, batch.row_keys
        )
