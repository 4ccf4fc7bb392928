"""Numbers of whole proteins."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from megatron_plm.errors import UserError
from tape_finetune import metrics
from tape_finetune.data import Example, Split
from tape_finetune.heads import HeadTable
from tape_finetune.tasks.base import Observations, Task
from tape_finetune.tasks.head_tables import PROTEIN_HEADS
from tape_finetune.tasks.records import label_value


class Regression(Task):
    """Labels are numbers, float64 without dims. The head predicts them with the training labels' mean and deviation
    taken out, and the loss is the squared error on that scale; predictions and metrics are in the labels' unit."""

    level = "protein"
    heads: ClassVar[HeadTable] = PROTEIN_HEADS
    batch_size = 32
    num_outputs = 1
    metric_names: tuple[str, ...] = ("spearmanr", "mse")
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"mse"})
    saved: ClassVar[tuple[str, ...]] = ("mean", "deviation")
    mean, deviation = 0.0, 1.0

    def read_label(self, record: str, fields: dict[str, Any], name: str, sequence: str) -> NDArray[Any]:  # noqa: ARG002
        value = label_value(record, fields, name)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = np.nan
        if not np.isfinite(number):
            raise UserError(f"{record}: the label {value!r} is no number; expected one number a protein")
        return np.asarray(number)

    def learn(self, train: Split) -> None:
        labels = _labels(train.examples).numpy()
        if np.ptp(labels) == 0:
            raise UserError(f"{train.path}: every label is {labels[0]:g}; a regression needs labels that differ")
        self.mean, self.deviation = float(labels.mean()), float(labels.std())

    def num_labels(self, example: Example) -> int:  # noqa: ARG002
        return 1

    def loss(self, outputs: Tensor, examples: Sequence[Example]) -> Tensor:
        target = ((_labels(examples) - self.mean) / self.deviation).to(outputs)
        return F.mse_loss(outputs[:, 0], target, reduction="sum")

    def observe(self, outputs: Tensor, examples: Sequence[Example]) -> Observations:
        return {"truth": _labels(examples).numpy(), "predicted": self._values(outputs).numpy()}

    def predictions(self, outputs: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:  # noqa: ARG002
        return [{"value": value} for value in self._values(outputs).tolist()]

    def metrics(self, observations: Observations) -> dict[str, metrics.Metric]:
        compared = {"truth_n": observations["truth"], "predicted_n": observations["predicted"]}
        return {
            "spearmanr": partial(metrics.spearman, **compared),
            "mse": partial(metrics.mean_squared_error, **compared),
        }

    def _values(self, outputs: Tensor) -> Tensor:
        """Predictions in the labels' unit, float64 [n]."""
        return outputs[:, 0].double() * self.deviation + self.mean


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.from_numpy(np.stack([example.label for example in examples]))
