"""Any number of classes for whole proteins, each decided by itself."""

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
from tape_finetune.tasks.records import label_value

_SEPARATOR = "|"


class MultiLabel(ClassTask):
    """Labels are bool [1, C], whether the protein has each class. A class is predicted where its probability, a sigmoid
    of its own output, is above one half. Each protein has C labels; `class_weights` are those of having a class, then
    those of not having it, 2·C numbers."""

    level = "protein"
    heads: ClassVar[HeadTable] = PROTEIN_HEADS
    batch_size = 32

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("micro_f1", "macro_f1", "accuracy", "jaccard", "mcc", *map(_mcc_name, self.classes))

    def read_label(self, record: str, fields: dict[str, Any], name: str, sequence: str) -> NDArray[Any]:  # noqa: ARG002
        value = label_value(record, fields, name)
        names = value if isinstance(value, list) else str(value).split(_SEPARATOR)
        label = np.zeros((1, len(self.classes)), dtype=bool)
        label[0, self.class_indices(record, [str(item).strip() for item in names])] = True
        return label

    def learn(self, train: Split) -> None:
        if self.is_balanced:
            has = _labels(train.examples).numpy().sum(0)
            pairs = np.stack([has, len(train.examples) - has], axis=1)
            self.class_weights = np.concatenate([balanced(pair) for pair in pairs]).reshape(-1, 2).T.ravel().tolist()

    def num_labels(self, example: Example) -> int:  # noqa: ARG002
        return len(self.classes)

    def loss_weight(self, example: Example) -> float:
        if self.class_weights is None:
            return float(len(self.classes))
        having, lacking = np.split(np.array(self.class_weights), 2)
        return float(np.where(example.label[0], having, lacking).sum())

    def loss(self, outputs: Tensor, examples: Sequence[Example]) -> Tensor:
        has_nC = _labels(examples).to(outputs.device)
        weights = self.weights_like(outputs)
        weight_nC = None
        if weights is not None:
            having_C, lacking_C = weights.chunk(2)
            weight_nC = torch.where(has_nC, having_C, lacking_C)
        return F.binary_cross_entropy_with_logits(outputs, has_nC.to(outputs), weight=weight_nC, reduction="sum")

    def observe(self, outputs: Tensor, examples: Sequence[Example]) -> Observations:
        return {"truth": _labels(examples).numpy(), "predicted": (outputs > 0).numpy()}

    def predictions(self, outputs: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:  # noqa: ARG002
        rows = []
        for logits_C, p_C in zip(outputs, outputs.sigmoid(), strict=True):
            names = [name for name, logit in zip(self.classes, logits_C.tolist(), strict=True) if logit > 0]
            rows.append({"labels": names, "probabilities": dict(zip(self.classes, rounded(p_C), strict=True))})
        return rows

    def metrics(self, observations: Observations) -> dict[str, metrics.Metric]:
        """`accuracy` is the share of proteins with exactly the true classes, `jaccard` the mean of |true ∩ predicted| /
        |true ∪ predicted|. `macro_f1` and `mcc` are means over the classes that some protein of the split has and some
        other lacks; of the others, for which a correlation says nothing, it is NaN."""
        truth_nC, predicted_nC = observations["truth"], observations["predicted"]
        hits_nC, either_nC = truth_nC & predicted_nC, truth_nC | predicted_nC
        num_true_C = truth_nC.sum(0)
        varies_C = (num_true_C > 0) & (num_true_C < len(truth_nC))
        of_varying = {
            "hits_nC": hits_nC[:, varies_C],
            "true_nC": truth_nC[:, varies_C],
            "predicted_nC": predicted_nC[:, varies_C],
        }
        of_class: list[metrics.Metric] = [
            partial(
                metrics.matthews_correlation,
                truth_n=truth_n.astype(int),
                predicted_n=predicted_n.astype(int),
                num_classes=2,
            )
            if varies
            else metrics.undefined
            for truth_n, predicted_n, varies in zip(truth_nC.T, predicted_nC.T, varies_C, strict=True)
        ]
        compared = [metric for metric, varies in zip(of_class, varies_C, strict=True) if varies]
        twice_hits, both = 2 * hits_nC.sum(1), truth_nC.sum(1) + predicted_nC.sum(1)
        table: dict[str, metrics.Metric] = {
            "micro_f1": partial(metrics.ratio, numerator_n=twice_hits, denominator_n=both),
            "macro_f1": partial(
                metrics.macro_f1_of_counts, **{name: flags.astype(int) for name, flags in of_varying.items()}
            ),
            "accuracy": partial(metrics.mean, values_n=(truth_nC == predicted_nC).all(1).astype(np.float64)),
            "jaccard": partial(metrics.mean, values_n=hits_nC.sum(1) / np.maximum(either_nC.sum(1), 1)),
            "mcc": partial(metrics.mean_of, of=compared) if compared else metrics.undefined,
        }
        return table | dict(zip(map(_mcc_name, self.classes), of_class, strict=True))


def _mcc_name(class_name: str) -> str:
    """The name of a class's own correlation, one word: mcc_golgi_apparatus."""
    return "mcc_" + "_".join("".join(c if c.isalnum() else " " for c in class_name.lower()).split())


def _labels(examples: Sequence[Example]) -> Tensor:
    """Whether each protein has each class, bool [n, C]."""
    return torch.from_numpy(np.concatenate([example.label for example in examples]))
