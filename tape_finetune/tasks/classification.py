"""One class of several for whole proteins."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tape_finetune import metrics
from tape_finetune.data import Example, Split
from tape_finetune.heads import HeadTable
from tape_finetune.tasks.base import Observations, rounded
from tape_finetune.tasks.classes import ClassTask, balanced
from tape_finetune.tasks.head_tables import PROTEIN_HEADS
from tape_finetune.tasks.records import class_name, label_value


class Classification(ClassTask):
    """Labels are class indices, int64 without dims."""

    level = "protein"
    heads: ClassVar[HeadTable] = PROTEIN_HEADS
    batch_size = 32

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("accuracy", "mcc", "macro_f1", *(("auroc",) if len(self.classes) == 2 else ()))

    def read_label(self, record: str, fields: dict[str, Any], name: str, sequence: str) -> NDArray[Any]:  # noqa: ARG002
        return self.class_indices(record, [class_name(label_value(record, fields, name))])[0]

    def learn(self, train: Split) -> None:
        counts = np.bincount(_labels(train.examples).numpy(), minlength=len(self.classes))
        if self.is_balanced:
            self.class_weights = balanced(counts).tolist()

    def num_labels(self, example: Example) -> int:  # noqa: ARG002
        return 1

    def loss_weight(self, example: Example) -> float:
        return 1.0 if self.class_weights is None else self.class_weights[int(example.label)]

    def loss(self, outputs: Tensor, examples: Sequence[Example]) -> Tensor:
        labels = _labels(examples).to(outputs.device)
        return F.cross_entropy(outputs, labels, weight=self.weights_like(outputs), reduction="sum")

    def observe(self, outputs: Tensor, examples: Sequence[Example]) -> Observations:
        truth = _labels(examples).numpy()
        logits = outputs.numpy()
        own = logits[np.arange(len(logits)), truth][:, None]
        # Of equal ones the first goes before, as in argmax; so a constant output is right by luck alone.
        goes_before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < truth[:, None]))
        return {
            "truth": truth,
            "predicted": logits.argmax(-1),
            "place": goes_before.sum(-1),  # of the true class, from 0
            "margin": logits[:, 1] - logits[:, 0],  # of the second class, for two classes
        }

    def predictions(self, outputs: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:  # noqa: ARG002
        rows = []
        for p_C in outputs.softmax(-1):
            probabilities = dict(zip(self.classes, rounded(p_C), strict=True))
            rows.append({"label": self.classes[int(p_C.argmax())], "probabilities": probabilities})
        return rows

    def metrics(self, observations: Observations) -> dict[str, metrics.Metric]:
        truth, predicted, num_classes = observations["truth"], observations["predicted"], len(self.classes)
        compared = {"truth_n": truth, "predicted_n": predicted}
        table: dict[str, metrics.Metric] = {
            "accuracy": partial(metrics.accuracy, **compared),
            "top5_accuracy": partial(metrics.mean, values_n=(observations["place"] < 5).astype(np.float64)),
            "mcc": partial(metrics.matthews_correlation, **compared, num_classes=num_classes),
            "macro_f1": partial(metrics.macro_f1, **compared, num_classes=num_classes),
            "auroc": partial(metrics.area_under_roc, truth_n=truth, scores_n=observations["margin"]),
        }
        return {name: table[name] for name in self.metric_names}


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.from_numpy(np.stack([example.label for example in examples]))
