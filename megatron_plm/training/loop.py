"""The training loop: one for every layout."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_plm.data.loader import Batch, Step
from megatron_plm.data.mixture import as_typed
from megatron_plm.errors import UserError
from megatron_plm.model.heads import summed_cross_entropy
from megatron_plm.philox import derive_key
from megatron_plm.training.checkpoint_writer import CheckpointWriter
from megatron_plm.training.device import on_device
from megatron_plm.training.guard import StopRequest, check_finite
from megatron_plm.training.metrics import RunLog
from megatron_plm.training.optimizer import clip_gradients, set_learning_rate
from megatron_plm.training.profiler import Tracer
from megatron_plm.training.run_directory import run_directory
from megatron_plm.training.schedule import learning_rate
from megatron_plm.training.state import Run
from megatron_plm.training.trace_summary import OPTIMIZER, PASSES

_LARGEST_EXPONENT = 700.0  # a mean loss beyond it has a perplexity beyond float64


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured; tensors stay on the device until a line is logged."""

    loss_sum: Tensor  # this process's share, in nats
    grad_norm: Tensor
    lr: float
    num_tokens: int  # over all processes, as are the two below
    num_labels: int
    num_cropped: int  # proteins longer than a row


def train(run: Run, log: RunLog, stop: StopRequest) -> str:
    """Train to `train_iters`, evaluating and saving on the way; returns `finished` or `interrupted`."""
    if run.progress.step >= run.config.training.train_iters:
        return "finished"
    with Tracer(run, log) as tracer, CheckpointWriter(run) as writer:
        return _train(run, log, stop, tracer, writer)


def _train(run: Run, log: RunLog, stop: StopRequest, tracer: Tracer, writer: CheckpointWriter) -> str:
    options, progress, directory = run.config.training, run.progress, run_directory(run.config)
    steps = tracer.waited_for(run.train_loader.steps(progress.cursor))
    for step in on_device(steps, run.world.device):
        metrics = train_step(run, step)
        tracer.after_step()
        if not metrics.num_labels:
            raise UserError(
                f"--data-path {as_typed(run.config.data.data_path)}: a whole batch holds no letter that the "
                "tokenizer knows, so nothing can be predicted; make the dataset again, without --keep-case if its "
                "letters are lower-case"
            )
        progress.step += 1
        progress.consumed_tokens += metrics.num_tokens
        progress.cursor = step.cursor
        finished = progress.step == options.train_iters
        stops, failed = run.world.sum(stop.requested, writer.has_failed)
        if failed:
            writer.finish()
        interrupted = not finished and stops > 0
        last = finished or interrupted
        evaluates = run.valid_loader is not None and (_due(progress.step, options.eval_interval) or last)
        saves = directory is not None and (_due(progress.step, options.save_interval) or last)
        at_once = evaluates or saves or last
        log.train(progress, metrics, due=at_once or _due(progress.step, options.log_interval), at_once=at_once)
        if evaluates and not interrupted:
            log.valid(progress.step, evaluate(run))
        if saves:
            writer.save()
            log.went_on()
        if last:
            writer.finish()
        for path in writer.written():
            log.say(f"saved {path}")
        if last:
            break
    return "interrupted" if interrupted else "finished"


def train_step(run: Run, step: Step) -> StepMetrics:
    """One optimizer step over one global batch: the summed loss over the global number of labels."""
    options = run.config.training
    model, world = run.model, run.world
    counted = step.micro_batches if world.counts_rows else []
    num_labels, num_tokens, num_cropped = world.sum(
        sum(batch.num_labels for batch in counted),
        sum(batch.num_tokens for batch in counted),
        sum(batch.num_cropped for batch in counted),
    )
    loss_sum = torch.zeros((), device=world.device)

    def criterion(logits_BMV: Tensor, batch: Batch) -> Tensor:
        loss = summed_cross_entropy(logits_BMV, batch.label_id)
        if world.counts_scores:
            loss_sum.add_(loss.detach())
        return loss / max(num_labels, 1)

    for part in model.parts:
        part.train()
    if run.config.model.attention_dropout:
        # The one thing that draws from torch's generator: by the step, so that a resumed run draws the same.
        torch.manual_seed(derive_key("attention dropout", options.seed, run.progress.step, world.rank))
    with record_function(PASSES):
        model.passes.train([model.prepared(batch) for batch in step.micro_batches], criterion)
    lr = learning_rate(
        run.progress.step,
        peak=options.lr,
        minimum=options.min_lr,
        warmup=options.lr_warmup_iters,
        total=options.train_iters,
        style=options.lr_decay_style,
    )
    set_learning_rate(run.optimizer, lr)
    with record_function(OPTIMIZER):
        grad_norm = clip_gradients(model.parameters, options.clip_grad, world, copies=list(model.copies.values()))
        run.optimizer.step()
        run.optimizer.zero_grad()
    return StepMetrics(loss_sum, grad_norm, lr, int(num_tokens), int(num_labels), int(num_cropped))


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Score the validation set, always with the same masks.

    `loss` is the training objective, over all labels. A tenth of those stand in the input and another tenth stand
    beside a wrong letter, which gives part of the answer away; so `perplexity` and `accuracy` count only the labels
    whose token is hidden behind <mask>; of a causal model, all. `unigram_perplexity` is that of the best
    prediction of the same labels without context: their own frequencies. `num_labels` is how many those are.
    """
    assert run.valid_loader is not None
    tokenizer = run.datasets.tokenizer
    counts = torch.zeros(tokenizer.vocab_size, device=run.world.device)
    sums = torch.zeros(4, device=run.world.device, dtype=torch.float64)

    def criterion(logits_BMV: Tensor, batch: Batch) -> Tensor:
        loss = summed_cross_entropy(logits_BMV, batch.label_id)
        labelled = batch.label_id >= 0
        scored = labelled
        if run.config.model.objective == "mlm":
            scored = labelled & (batch.tokens.gather(1, batch.label_index) == tokenizer.mask_id)
        logits, labels = logits_BMV[scored].float(), batch.label_id[scored]
        scored_loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        num_right = (logits.argmax(-1) == labels).sum()
        if run.world.counts_scores:
            sums.add_(torch.stack([loss, labelled.sum(), scored_loss, num_right]))
            counts.add_(torch.bincount(labels, minlength=tokenizer.vocab_size))
        return loss

    for part in run.model.parts:
        part.eval()
    for step in run.valid_loader.first_epoch(run.config.training.eval_iters):
        run.model.passes.evaluate([run.model.prepared(batch) for batch in step.micro_batches], criterion)
    loss_sum, num_labels, scored_sum, right, *label_counts = run.world.sum(*sums.tolist(), *counts.tolist())
    num_scored = sum(label_counts)
    if not num_scored:
        raise UserError(
            f"--valid-data-path {as_typed(run.config.data.valid_data_path)}: no letter of it was hidden; give "
            "more proteins, or a larger --eval-iters"
        )
    check_finite(run.progress.step, scored_sum / num_scored, 0.0)
    unigram = -sum(n / num_scored * math.log(n / num_scored) for n in label_counts if n)
    return {
        "loss": loss_sum / max(1.0, num_labels),
        "perplexity": math.exp(min(scored_sum / num_scored, _LARGEST_EXPONENT)),
        "accuracy": right / num_scored,
        "unigram_perplexity": math.exp(unigram),
        "num_labels": int(sum(label_counts)),
    }


def _due(step: int, interval: int) -> bool:
    return step % interval == 0
