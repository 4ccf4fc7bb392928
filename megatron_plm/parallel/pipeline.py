"""Pipeline parallelism: the model cut into stages, and the passes of micro-batches through them.

PyTorch's schedules order the passes and carry activations. They cut every tensor they are given along its first dim, so
they get nothing but the number of each micro-batch: its rows every process computes itself and looks up.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
    _ComputationType,
)

from megatron_plm.config.layout import stages_of
from megatron_plm.config.options import ParallelOptions
from megatron_plm.data.loader import Batch
from megatron_plm.errors import UserError
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.parallel.tensor import local_tensor

# Logits of a micro-batch, and the micro-batch: gives the loss that is differentiated.
Criterion = Callable[[Tensor, Batch], Tensor]

_FORWARD = {
    _ComputationType.FORWARD,
    _ComputationType.SEND_F,
    _ComputationType.RECV_F,
    _ComputationType.UNSHARD,
    _ComputationType.RESHARD,
}
_SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
}
_ZBV_SINCE = (2, 13)  # torch


class Stage(nn.Module):
    """Some blocks of a model, with the embedding before the first and the head behind the last.

    Parameters have the names that they have in the model. The last stage keeps a copy of the token embedding where that
    is the head's output matrix.
    """

    def __init__(self, model: MaskedLanguageModel, blocks: range, *, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.is_first, self.is_last = is_first, is_last
        self.is_tied = model.head.weight is None
        self.has_embedding = is_first or (is_last and self.is_tied)
        for index in set(self.encoder.blocks) - {str(index) for index in blocks}:
            del self.encoder.blocks[index]
        if is_last:
            self.select, self.head = model.select, model.head
        else:
            del self.encoder.final_norm
        if not self.has_embedding:
            del self.encoder.embedding
        elif not is_first:  # of the embedding, the matrix alone
            self.encoder.embedding.positions = self.encoder.embedding.norm = None
        self.micro_batches: Sequence[Batch] = ()

    def copies(self) -> dict[str, nn.Parameter]:
        """Parameters of which the first stage has the original, by their names."""
        if self.is_first or not self.has_embedding:
            return {}
        return {f"encoder.embedding.{name}": p for name, p in self.encoder.embedding.named_parameters()}

    def keep_index_on_host(self) -> None:
        """Turn `index` into a number before any other hook sees it: FSDP2's would send it to the device, and reading it
        there would wait for all that the device has to do. Call it last."""
        self.register_forward_pre_hook(
            lambda _, arguments, named: (arguments, {**named, "index": int(named["index"])}),
            prepend=True,
            with_kwargs=True,
        )

    def forward(self, x_BLD: Tensor | None = None, *, index: Tensor | int) -> Tensor:
        """Take micro-batch `index`, int64 [1], through the stage; `x_BLD` is what the stage before gave of it."""
        batch = self.micro_batches[int(index)]
        if x_BLD is None:
            x_BLD = self.encoder.embedding(batch.tokens, batch.positions, batch.segment_ids, batch.row_keys)
        x_BLD = self.encoder.transform(x_BLD, batch.positions, batch.cu_seqlens, batch.row_keys)
        if not self.is_last:
            return x_BLD
        x_BMD = self.select(self.encoder.final_norm(x_BLD), batch.label_index)
        return self.head(x_BMD, self.encoder.embedding.tokens.weight if self.is_tied else None)


def check_schedule(options: ParallelOptions) -> None:
    """Raise UserError where this torch cannot run the schedule."""
    if options.pipeline_schedule == "zbv" and tuple(map(int, torch.__version__.split(".")[:2])) < _ZBV_SINCE:
        # Of older ones 2.11 was tried. It cannot divide the backward pass of a function of our own, such as the linear
        # map by oneDNN or a fused op, and sends to the process itself, which gloo can't.
        raise UserError(
            f"--pipeline-schedule zbv needs torch 2.13, and this is {torch.__version__}; install a newer one, or "
            "choose interleaved"
        )


def stage_owner(options: ParallelOptions, stage: int) -> int:
    """The process of the pipeline that holds `stage`."""
    pp = options.pipeline_model_parallel_size
    return next(rank for rank in range(pp) if stage in stages_of(options, rank))


@dataclass(frozen=True)
class Activations:
    """What passes from stage to stage and out of the last: shapes of this process's tensors, and their dtype."""

    between: tuple[int, ...]
    logits: tuple[int, ...]
    dtype: torch.dtype


class PipelinePasses:
    """Forward and backward passes of the micro-batches of a step through the stages of all processes."""

    def __init__(
        self,
        stages: Sequence[Stage],
        options: ParallelOptions,
        mesh: DeviceMesh,
        device: torch.device,
        activations: Activations,
        num_micro_batches: int,
        timeout: timedelta,
    ) -> None:
        self._stages = stages
        self._device = device
        self._num_micro_batches = num_micro_batches
        self._criterion: Criterion | None = None
        group, rank = mesh.get_group("pp"), mesh.get_local_rank("pp")
        between = torch.empty(activations.between, dtype=activations.dtype, device="meta", requires_grad=True)
        logits = torch.empty(activations.logits, dtype=activations.dtype, device="meta", requires_grad=True)
        pieces = [
            PipelineStage(
                stage,
                index,
                options.num_stages,
                device,
                input_args=() if stage.is_first else (between,),
                output_args=(logits if stage.is_last else between,),
                group=group,
            )
            for stage, index in zip(stages, stages_of(options, rank), strict=True)
        ]
        build = _SCHEDULES[options.pipeline_schedule]
        multi = options.pipeline_schedule in ("interleaved", "zbv")
        self._schedule = build(pieces if multi else pieces[0], num_micro_batches, loss_fn=self._loss, scale_grads=False)
        self._shared_group: dist.ProcessGroup | None = None
        self._has_both = False
        if stages[0].is_tied:
            self._shared_group, self._has_both = _group_of_embedding(options, mesh, timeout)

    def train(self, micro_batches: Sequence[Batch], criterion: Criterion) -> None:
        """Run forward and backward passes; gradients are complete afterwards."""
        self._run(micro_batches, criterion, self._schedule.step)
        self._add_up_embedding()

    def evaluate(self, micro_batches: Sequence[Batch], criterion: Criterion) -> None:
        """Run forward passes."""
        with torch.no_grad(), _forward_only(self._schedule):
            self._run(micro_batches, criterion, self._schedule.eval)

    def _run(self, micro_batches: Sequence[Batch], criterion: Criterion, run: Callable[..., object]) -> None:
        assert len(micro_batches) == self._num_micro_batches
        self._criterion = criterion
        self._batches = micro_batches
        for stage in self._stages:
            stage.micro_batches = micro_batches
        # On the host: looking a number up must not wait for the device.
        numbers = torch.arange(len(micro_batches))
        is_last = any(stage.is_last for stage in self._stages)
        run(index=numbers, **({"target": numbers, "losses": []} if is_last else {}))
        for stage in self._stages:
            stage.micro_batches = ()

    def _loss(self, logits: Tensor, index: Tensor) -> Tensor:
        assert self._criterion is not None
        return self._criterion(logits, self._batches[int(index)])

    def _add_up_embedding(self) -> None:
        """Sum the gradients of the embedding and of its copy, which is one parameter of the model."""
        weights = [stage.encoder.embedding.tokens.weight for stage in self._stages if stage.has_embedding]
        gradients = [local_tensor(weight.grad) for weight in weights if weight.grad is not None]
        if self._has_both:
            first, last = gradients
            first += last
            last.copy_(first)
        elif self._shared_group is not None:
            dist.all_reduce(gradients[0], group=self._shared_group)


@contextlib.contextmanager
def _forward_only(schedule: Any) -> Iterator[None]:
    """Leave the backward passes out of a schedule of several stages a process, which otherwise goes through them too,
    and for zbv fails."""
    order = getattr(schedule, "pipeline_order_with_comms", None)
    if order is None:
        yield
        return
    forward = {
        rank: [action for action in actions if action.computation_type in _FORWARD] for rank, actions in order.items()
    }
    schedule.pipeline_order_with_comms = forward
    try:
        yield
    finally:
        schedule.pipeline_order_with_comms = order


def _group_of_embedding(
    options: ParallelOptions, mesh: DeviceMesh, timeout: timedelta
) -> tuple[dist.ProcessGroup | None, bool]:
    """The processes of this pipeline that hold the embedding and its copy, if this one does and they are two; and
    whether it is this one alone. Collective over all processes."""
    first, last = (stage_owner(options, stage) for stage in (0, options.num_stages - 1))
    rank = mesh.get_local_rank("pp")
    if first == last:
        return None, rank == first
    pipelines = mesh.mesh.flatten(1).transpose(0, 1)  # [pipelines, pp]
    mine = None
    for ranks in pipelines[:, [first, last]].tolist():
        group = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            mine = group
    return mine, False
