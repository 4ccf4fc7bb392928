"""A class for each residue."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from megatron_plm.data.loader import IGNORED_LABEL
from tape_finetune import metrics
from tape_finetune.data import Example, Split
from tape_finetune.heads import HeadTable
from tape_finetune.tasks.base import Observations, rounded
from tape_finetune.tasks.classes import ClassTask, balanced
from tape_finetune.tasks.head_tables import RESIDUE_HEADS
from tape_finetune.tasks.records import residue_names


class ResidueClassification(ClassTask):
    """Labels are class indices, int64 [L], IGNORED_LABEL where a residue has none."""

    level = "residue"
    heads: ClassVar[HeadTable] = RESIDUE_HEADS
    batch_size = 16
    metric_names = ("accuracy", "accuracy_per_protein", "mcc", "macro_f1")

    def read_label(self, record: str, fields: dict[str, Any], name: str, sequence: str) -> NDArray[Any]:
        return self.class_indices(record, residue_names(record, fields, name, sequence))

    def learn(self, train: Split) -> None:
        counts = np.zeros(len(self.classes), dtype=np.int64)
        for example in train.examples:
            counts += self._counts(example)
        if self.is_balanced:
            self.class_weights = balanced(counts).tolist()

    def num_labels(self, example: Example) -> int:
        return int(np.count_nonzero(example.label != IGNORED_LABEL))

    def loss_weight(self, example: Example) -> float:
        if self.class_weights is None:
            return float(self.num_labels(example))
        return float(self._counts(example) @ np.array(self.class_weights))

    def loss(self, outputs: Tensor, examples: Sequence[Example]) -> Tensor:
        labels = torch.from_numpy(np.concatenate([example.label for example in examples])).to(outputs.device)
        weight = self.weights_like(outputs)
        return F.cross_entropy(outputs, labels, weight=weight, ignore_index=IGNORED_LABEL, reduction="sum")

    def observe(self, outputs: Tensor, examples: Sequence[Example]) -> Observations:
        """Of each protein the number of right residues, and of the true and predicted ones of each class: [n, C]."""
        rows: dict[str, list[NDArray[np.int64]]] = {"hits": [], "true": [], "predicted": []}
        for logits_LC, example in zip(_split(outputs, examples), examples, strict=True):
            scored = example.label != IGNORED_LABEL
            true, predicted = example.label[scored], logits_LC.argmax(-1).numpy()[scored]
            for name, indices in (("hits", true[true == predicted]), ("true", true), ("predicted", predicted)):
                rows[name].append(np.bincount(indices, minlength=len(self.classes)))
        return {name: np.stack(counts) for name, counts in rows.items()}

    def predictions(self, outputs: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:
        rows = []
        has_letters = all(len(name) == 1 for name in self.classes)
        for p_LC in _split(outputs.softmax(-1), examples):
            names = [self.classes[index] for index in p_LC.argmax(-1).tolist()]
            rows.append({"labels": "".join(names) if has_letters else names, "probabilities": rounded(p_LC)})
        return rows

    def metrics(self, observations: Observations) -> dict[str, metrics.Metric]:
        """All are over the residues of the split but `accuracy_per_protein`, the mean of the proteins' own; a protein
        without a scored residue counts in none."""
        counts = {f"{name}_nC": observations[name] for name in ("hits", "true", "predicted")}
        right, scored = observations["hits"].sum(-1), observations["true"].sum(-1)
        per_protein = np.divide(right, scored, out=np.full(len(right), np.nan), where=scored > 0)
        return {
            "accuracy": partial(metrics.ratio, numerator_n=right, denominator_n=scored),
            "accuracy_per_protein": partial(metrics.mean, values_n=per_protein),
            "mcc": partial(metrics.matthews_of_counts, **counts),
            "macro_f1": partial(metrics.macro_f1_of_counts, **counts),
        }

    def _counts(self, example: Example) -> np.ndarray:
        return np.bincount(example.label[example.label != IGNORED_LABEL], minlength=len(self.classes))


def _split(outputs: Tensor, examples: Sequence[Example]) -> tuple[Tensor, ...]:
    """The rows of each protein."""
    return outputs.split([len(example.sequence) for example in examples])
