"""What a fine-tuned model says of proteins, whether they have labels or not."""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_plm.errors import RunFailed
from tape_finetune.source import Source
from tape_finetune.tasks import Task


@torch.no_grad()
def predict(source: Source, task: Task, batches: Iterable[list[int]] | None = None) -> list[dict[str, Any]]:
    """`Task.predictions` of each example of the source, in order; `batches` are by default the source's own.

    Raises RunFailed where the model's outputs are not finite.
    """
    found: dict[int, dict[str, Any]] = {}
    for indices in source.batches() if batches is None else batches:
        outputs = source.outputs(indices)
        if not outputs.isfinite().all():
            raise RunFailed("predicting: the model's outputs are not numbers; train with a lower --learning_rate")
        found.update(zip(indices, task.predictions(outputs.float().cpu(), source.chosen(indices)), strict=True))
    return [found[index] for index in range(len(source.examples))]
