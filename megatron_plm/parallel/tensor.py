"""Tensor and sequence parallelism: which module of which architecture is cut how, as tables.

A matrix cut by columns (its output features) gives each process some attention heads, or some of the MLP's width; the
matrix behind it, cut by rows, adds their parts up (Shoeybi et al. 2019, arXiv:1909.08053). With sequence parallelism
what lies between two such pairs, norms and residuals, is cut by tokens (Korthikanti et al. 2022, arXiv:2205.05198).
The vocabulary is small: embedding and head stay whole.
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from megatron_plm.model.fused import FusedOp


@dataclass(frozen=True)
class TensorParallelTable:
    """The cuts of one architecture; patterns are those of `fnmatch`, over names of modules and parameters.

    Attributes:
        columns: linear maps whose output features are divided.
        rows: linear maps whose input features are.
        by_token: with sequence parallelism, modules that work on a share of each row's tokens, their weights whole.
        split_behind: with sequence parallelism, modules behind which a row is divided by tokens.
        join_behind: with sequence parallelism, modules of `by_token` behind which the row is put together again.
        whole: parameters that every process has a copy of, beside those of `by_token`.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    by_token: tuple[str, ...]
    split_behind: tuple[str, ...]
    join_behind: tuple[str, ...]
    whole: tuple[str, ...]


TRANSFORMER = TensorParallelTable(
    columns=("encoder.blocks.*.attention.qkv", "encoder.blocks.*.mlp.up"),
    rows=("encoder.blocks.*.attention.out", "encoder.blocks.*.mlp.down"),
    by_token=("encoder.blocks.*.attention_norm", "encoder.blocks.*.mlp_norm", "encoder.final_norm"),
    split_behind=("encoder.embedding", "encoder.dropout_keys"),
    join_behind=("encoder.final_norm",),
    whole=("encoder.embedding.*", "head.*"),
)


def apply_tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, *, sequence_parallel: bool, table: TensorParallelTable = TRANSFORMER
) -> None:
    """Cut `model` in place over the processes of `mesh`, which has one dim."""
    check_table(model, table)
    # What is not cut by features comes whole from every process, or as its share of the tokens: dim 1 of [B, L, D].
    between: Placement = Shard(1) if sequence_parallel else Replicate()
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if _matches(name, table.columns):
            plan[name] = ColwiseParallel(input_layouts=between)
        elif _matches(name, table.rows):
            plan[name] = RowwiseParallel(output_layouts=between)
        elif sequence_parallel and _matches(name, table.by_token):
            plan[name] = SequenceParallel(use_local_output=True)
        elif isinstance(module, FusedOp):
            plan[name] = _OnLocalTensors(sequence_parallel=sequence_parallel)
        if sequence_parallel and _matches(name, table.split_behind):
            module.register_forward_hook(lambda _, __, x, mesh=mesh: _redistributed(x, mesh, Replicate(), Shard(1)))
        if sequence_parallel and _matches(name, table.join_behind):
            # Behind the hook of SequenceParallel, which is registered below: hooks run in their order.
            plan[name] = _JoinedSequence()
    parallelize_module(model, mesh, plan)


class _JoinedSequence(SequenceParallel):
    """SequenceParallel whose output is put together again."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(
            lambda _, __, x: _redistributed(local_tensor(x), device_mesh, Shard(1), Replicate())
        )
        return module


class _OnLocalTensors(ParallelStyle):
    """A fused op on what this process holds, parameters too: of those that are whole under sequence parallelism each
    process makes the part of the gradient that its tokens make, of those that are cut its own."""

    def __init__(self, *, sequence_parallel: bool) -> None:
        self._of_whole = Partial() if sequence_parallel else Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:  # noqa: ARG002 (torch names it)
        module.register_forward_pre_hook(lambda _, given: tuple(map(self._local, given)))
        return module

    def _local(self, argument: object) -> object:
        if not isinstance(argument, DTensor):
            return argument
        placements = [self._of_whole if place.is_replicate() else place for place in argument.placements]
        return argument.to_local(grad_placements=placements)


def local_tensor(x: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard of a DTensor, all of any other."""
    return x.to_local() if isinstance(x, DTensor) else x


def _redistributed(x: Tensor, mesh: DeviceMesh, before: Placement, after: Placement) -> Tensor:
    """This process's tensor of `before` as that of `after`; gradients go the other way."""
    return DTensor.from_local(x, mesh, [before], run_check=False).redistribute(placements=[after]).to_local()


def check_table(model: nn.Module, table: TensorParallelTable) -> None:
    """See that every row of the table finds a module, and that every parameter is told of exactly once."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for row in (*table.columns, *table.rows, *table.by_token, *table.split_behind, *table.join_behind):
        assert fnmatch.filter(modules, row), f"the table's row {row} matches no module"
    for row in table.whole:
        assert fnmatch.filter(parameters, row), f"the table's row {row} matches no parameter"
    told = (*(f"{row}.*" for row in (*table.columns, *table.rows, *table.by_token)), *table.whole)
    for name in parameters:
        rows = [row for row in told if fnmatch.fnmatchcase(name, row)]
        assert len(rows) == 1, f"the parameter {name} is told of by {rows or 'no row'} of the table"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
