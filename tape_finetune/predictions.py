"""What a fine-tuned model says of proteins, whether they have labels or not."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_plm.data.loader import IGNORED_LABEL
from megatron_plm.errors import RunFailed
from megatron_plm.files import atomic_file
from tape_finetune.data import Example
from tape_finetune.prediction_files import writing
from tape_finetune.progress import track
from tape_finetune.source import Source
from tape_finetune.tasks import Task
from tape_finetune.tasks.classes import ClassTask
from tape_finetune.tasks.contact_prediction import CONTACT_DISTANCE, MIN_SEPARATION

NO_LABEL = "-"  # of a residue


@torch.no_grad()
def predict(source: Source, task: Task) -> list[dict[str, Any]]:
    """`Task.predictions` of each example of the source, in order.

    Raises RunFailed where the model's outputs are not finite.
    """
    found: dict[int, dict[str, Any]] = {}
    for indices in source.batches():
        outputs = source.outputs(indices)
        if not outputs.isfinite().all():
            raise RunFailed("predicting: the model's outputs are not numbers; train with a lower --learning_rate")
        found.update(zip(indices, task.predictions(outputs, source.chosen(indices)), strict=True))
    return [found[index] for index in range(len(source.examples))]


def save_predictions(path: Path, source: Source, task: Task) -> None:
    """Write a line for each example of a split: its length, whether it was cropped, truth and prediction."""
    predictions = predict(source, task)
    with atomic_file(path) as aside, writing(aside, path) as write:
        for example, prediction in track(list(zip(source.examples, predictions, strict=True)), "writing"):
            about = {"length": len(example.sequence), "cropped": example.cropped}
            write([{**about, "truth": truth(example, prediction, task), "prediction": prediction}])


def truth(example: Example, prediction: dict[str, Any], task: Task) -> dict[str, Any]:
    """The label of an example in the words of its prediction: {"value"}, {"label"}, {"labels"} or {"contacts"}.

    Residues without a label have NO_LABEL; contacts are pairs counted from 1 like those predicted.
    """
    label = example.label
    if "value" in prediction:
        return {"value": float(label)}
    if "contacts" in prediction:
        i, j = np.triu_indices(len(label), k=MIN_SEPARATION)
        # Where a coordinate is unknown the distance is NaN, which is not below anything.
        near = np.linalg.norm(label[i] - label[j], axis=1) < CONTACT_DISTANCE
        return {"contacts": np.stack([i[near] + 1, j[near] + 1], axis=1).tolist()}
    if isinstance(prediction["probabilities"], list):
        assert isinstance(task, ClassTask)
        of_residues = [NO_LABEL if index == IGNORED_LABEL else task.classes[index] for index in label.tolist()]
        return {"labels": "".join(of_residues) if isinstance(prediction["labels"], str) else of_residues}
    names = list(prediction["probabilities"])
    if "label" in prediction:
        return {"label": names[int(label)]}
    return {"labels": [name for name, has in zip(names, label.ravel().tolist(), strict=True) if has]}
