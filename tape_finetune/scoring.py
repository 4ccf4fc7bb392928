"""The scores of a model on one split."""

from collections.abc import Mapping

import numpy as np

from megatron_plm.errors import RunFailed
from megatron_plm.philox import derive_key
from tape_finetune.bootstrap import Interval, intervals, point_value
from tape_finetune.metrics import Metric
from tape_finetune.source import Source
from tape_finetune.tasks import Task
from tape_finetune.tasks.base import Observations


def score(source: Source, task: Task, *, split: str, seed: int) -> dict[str, Interval]:
    """Every metric of the task with its bootstrap interval, whose draws (seed, task, split) decide."""
    table = observe(source, task, description=f"scoring {split}")
    return intervals(table, len(source.examples), derive_key("bootstrap", seed, task.name, split))


def score_one(source: Source, task: Task, metric: str) -> float:
    """One metric without an interval."""
    return point_value(observe(source, task, description="validating")[metric], len(source.examples))


def observe(source: Source, task: Task, *, description: str) -> Mapping[str, Metric]:
    """Run the model over the split; the metrics, to be evaluated with weights for the examples in their order.

    Collective: each process runs over a share of the split, and all get the metrics of the whole, in which every
    example counts once. Raises RunFailed where the model's outputs are not finite.
    """
    batches = source.batches()

    def run(indices: list[int]) -> Observations | None:
        outputs = source.outputs(indices)
        return task.observe(outputs, source.chosen(indices)) if outputs.isfinite().all() else None

    parts = [part for part in source.share_out(batches, run, description) if part is not None]
    if len(parts) < len(batches):
        raise RunFailed(f"{description}: the model's outputs are not numbers; train with a lower --learning_rate")
    place = np.argsort(np.concatenate(batches))
    return task.metrics({name: np.concatenate([part[name] for part in parts])[place] for name in parts[0]})
