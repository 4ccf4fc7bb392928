"""Training of a task model: epochs over the labelled proteins, the best one kept.

One optimizer step is `batch_size` proteins. Their loss is the sum over their labels, each times its weight, divided by
the sum of the weights, however many passes (`accumulation`) and processes the step is cut into. Gradients are cleared
after every step.

Every process has the whole model and all examples. Each computes the gradient of its share of a batch, all add them up,
and so take the same steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_plm.data.order import permute
from megatron_plm.errors import RunFailed, UserError
from megatron_plm.memory import FreedMemory
from megatron_plm.parallel.mesh import World
from megatron_plm.philox import derive_key
from megatron_plm.training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from megatron_plm.training.schedule import learning_rate
from tape_finetune.batching import shuffled_batches
from tape_finetune.efficient import layer_lr_scales, trained_tensors
from tape_finetune.model import EncoderModel, TaskModel
from tape_finetune.progress import track
from tape_finetune.scoring import score_one
from tape_finetune.source import Source
from tape_finetune.tasks import Task

_CALIBRATION_PROTEINS = 256
_CALIBRATION_MAPS = 16  # of proteins, each a number for every pair, layer and head


@dataclass(frozen=True)
class FitOptions:
    """How to train; `warmup` of None is a tenth of all steps, `patience` of None never stops early."""

    epochs: int
    batch_size: int
    accumulation: int
    learning_rate: float
    warmup: int | None
    weight_decay: float
    max_grad_norm: float
    patience: int | None
    seed: int
    layer_lr_decay: float = 1.0  # what multiplies the learning rate from block to block, from the top down
    zero_gradients: bool = True  # after each step; not to is stock TAPE's fault


@dataclass(frozen=True)
class Epoch:
    """One pass over the training split: mean loss a label, and the primary metric on the validation split."""

    epoch: int
    train_loss: float
    valid_metric: float


def fit(
    model: TaskModel,
    task: Task,
    train: Source,
    valid: Source,
    primary_metric: str,
    options: FitOptions,
    report: Callable[[Epoch], None],
) -> list[Epoch]:
    """Train, and leave the model with the weights of the epoch that is best on `valid`; `report` gets each epoch.
    Collective.

    Raises RunFailed where training diverges: at the step whose loss or gradient is not finite, or at the end of the
    epoch whose last step left such weights or outputs.
    """
    calibrate(model, train, options.seed)
    world = train.world
    optimizer = _build_optimizer(model, options)
    steps_per_epoch = math.ceil(len(train.examples) / options.batch_size)
    total = steps_per_epoch * options.epochs
    warmup = total // 10 if options.warmup is None else options.warmup
    epochs: list[Epoch] = []
    best: Epoch | None = None
    best_weights: dict[str, Tensor] = {}
    memory = FreedMemory()
    for number in range(1, options.epochs + 1):
        batches = list(shuffled_batches(len(train.examples), options.batch_size, seed=options.seed, epoch=number))
        loss_sum, weight_sum = 0.0, 0.0
        for index, batch in enumerate(track(batches, f"epoch {number}")):
            step = (number - 1) * steps_per_epoch + index
            peak = options.learning_rate
            set_learning_rate(
                optimizer, learning_rate(step, peak=peak, minimum=0.0, warmup=warmup, total=total, style="linear")
            )
            parts = [part.tolist() for part in np.array_split(batch, options.accumulation * world.size)]
            # What dropout draws is each process's own.
            torch.manual_seed(derive_key("finetune dropout", options.seed, step, *([world.rank] if world.rank else [])))
            batch_loss, batch_weight, norm = train_step(
                model, task, train, parts, optimizer, options.max_grad_norm, options.zero_gradients
            )
            if not math.isfinite(batch_loss + norm):
                raise _diverged(f"epoch {number}, step {index + 1}", f"loss {batch_loss:g} and gradient norm {norm:g}")
            loss_sum, weight_sum = loss_sum + batch_loss, weight_sum + batch_weight
            memory.bound()
        if not all(weights.isfinite().all() for _, weights in trained_tensors(model)):
            raise _diverged(f"epoch {number}", "weights that are not numbers")
        epoch = Epoch(number, loss_sum / weight_sum, score_one(valid, task, primary_metric))
        epochs.append(epoch)
        report(epoch)
        if best is None or is_better(epoch.valid_metric, best.valid_metric, primary_metric in task.lower_is_better):
            best, best_weights = epoch, {name: weights.clone() for name, weights in trained_tensors(model)}
        elif options.patience is not None and number - best.epoch >= options.patience:
            break
    model.load_state_dict(best_weights, strict=False)
    return epochs


def _build_optimizer(model: TaskModel, options: FitOptions) -> torch.optim.Optimizer:
    scales = None
    if options.layer_lr_decay != 1:
        assert isinstance(model.base, EncoderModel)
        scales = layer_lr_scales(model.base.encoder, options.layer_lr_decay)
    return build_optimizer(
        model.parameters(),
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        betas=(0.9, 0.999),
        lr_scales=scales,
    )


def train_step(
    model: TaskModel,
    task: Task,
    source: Source,
    parts: Sequence[Sequence[int]],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    zero_gradients: bool = True,
) -> tuple[float, float, float]:
    """One optimizer step over the examples of all `parts`, a forward and backward pass each; the processes share the
    parts among them. Collective.

    Returns the summed loss, the labels' summed weight and the norm of the gradient before clipping, the same
    everywhere. A batch without any label changes nothing.
    """
    world = source.world
    weight = sum(task.loss_weight(example) for part in parts for example in source.chosen(part))
    if weight == 0:
        return 0.0, 0.0, 0.0
    loss_sum = 0.0
    model.train()
    for part in parts[world.rank :: world.size]:
        if not part:
            continue
        loss = task.loss(source.outputs(part), source.chosen(part))
        (loss / weight).backward()
        loss_sum += loss.item()
    model.eval()
    _sum_gradients(model, world)
    (loss_sum,) = world.sum(loss_sum)
    norm = clip_gradients(model.parameters(), max_grad_norm).item()
    optimizer.step()
    if zero_gradients:
        optimizer.zero_grad()
    return loss_sum, weight, norm


@torch.no_grad()
def calibrate(model: TaskModel, train: Source, seed: int) -> None:
    """Set the head's feature scale, if it has one, from a sample of training proteins that `seed` decides.

    Raises UserError where the base model gives features that are not finite.
    """
    num_examples = len(train.examples)
    wanted = _CALIBRATION_MAPS if model.reads == "attention" else _CALIBRATION_PROTEINS
    sample = permute(np.arange(min(num_examples, wanted)), num_examples, derive_key("calibrate", seed))
    features = torch.cat([train.features([index]) for index in sample.tolist()])
    if not features.isfinite().all():
        raise UserError("--from_pretrained: the model's features are not numbers; give a checkpoint that is intact")
    if model.head.standardized:
        model.head.standardize.fit(features)


def _sum_gradients(model: nn.Module, world: World) -> None:
    """Add up the gradients of all processes; one that a process has none of counts as 0. Collective."""
    if world.size == 1:
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    pieces = together.split([parameter.numel() for parameter in trained])
    for parameter, piece in zip(trained, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)


def is_better(value: float, best: float, lower_is_better: bool) -> bool:
    """Whether an epoch's metric beats the best so far; an undefined one (NaN) beats nothing and loses to any."""
    if math.isnan(value) or math.isnan(best):
        return not math.isnan(value)
    return value < best if lower_is_better else value > best


def _diverged(place: str, found: str) -> RunFailed:
    return RunFailed(f"{place}: training diverged, with {found}; lower --learning_rate or use --max_grad_norm")
