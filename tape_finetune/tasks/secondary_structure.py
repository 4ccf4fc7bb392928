"""Secondary structure in three classes, predicted for each residue: 0 helix, 1 strand, 2 coil.

Records hold `ss3`, and `valid_mask` where some residues are not scored (Rao et al. 2019, arXiv:1906.08230; data of
NetSurfP-2.0, Klausen et al. 2019, doi:10.1002/prot.25674).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_plm.data.loader import IGNORED_LABEL
from megatron_plm.errors import UserError
from tape_finetune import metrics
from tape_finetune.data import Example, check_sequence, field, read_jsonl, tape_files
from tape_finetune.heads import ConvHead, LinearHead
from tape_finetune.tasks.base import HeadTable, Observations, Task, rounded
from tape_finetune.tasks.records import check_length, residue_labels, valid_mask

CLASSES = "HEC"
NUM_CLASSES = len(CLASSES)


class SecondaryStructure(Task):
    """Labels are int64 [L], IGNORED_LABEL where a residue is not scored."""

    name = "secondary_structure"
    level = "residue"
    heads: ClassVar[HeadTable] = {"conv": ConvHead, "linear": LinearHead}
    batch_size = 16
    num_outputs = NUM_CLASSES
    metric_names = ("accuracy", "accuracy_per_protein")

    def files(self, data_dir: Path | None) -> dict[str, Path]:
        return tape_files(data_dir, self.name)

    def read(self, path: Path) -> Iterator[Example]:
        for record, value in read_jsonl(path):
            sequence = check_sequence(record, field(record, value, "primary"))
            check_length(record, value, sequence)
            valid = valid_mask(record, value, sequence)
            labels = residue_labels(record, value, "ss3", sequence)
            outside = valid & ((labels < 0) | (labels >= NUM_CLASSES))
            if outside.any():
                place = int(np.argmax(outside))
                raise UserError(
                    f"{record}: ss3 is {labels[place]} at residue {place + 1}; "
                    "expected 0 (helix), 1 (strand) or 2 (coil)"
                )
            yield Example(record, sequence, np.where(valid, labels, IGNORED_LABEL))

    def num_labels(self, example: Example) -> int:
        return int(np.count_nonzero(example.label != IGNORED_LABEL))

    def loss(self, outputs: Tensor, examples: Sequence[Example]) -> Tensor:
        labels = torch.from_numpy(np.concatenate([example.label for example in examples]))
        return F.cross_entropy(outputs, labels, ignore_index=IGNORED_LABEL, reduction="sum")

    def observe(self, outputs: Tensor, examples: Sequence[Example]) -> Observations:
        labels = np.concatenate([example.label for example in examples])
        lengths = [len(example.sequence) for example in examples]
        starts = np.cumsum([0, *lengths[:-1]])
        is_right = outputs.argmax(-1).numpy() == labels
        return {
            "right": np.add.reduceat(is_right.astype(np.int64), starts),
            "scored": np.add.reduceat((labels != IGNORED_LABEL).astype(np.int64), starts),
        }

    def predictions(self, outputs: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """{"labels": "HHEC…", "probabilities": [L][H, E, C]} of each protein."""
        rows = []
        for p_LC in outputs.softmax(-1).split([len(example.sequence) for example in examples]):
            letters = "".join(CLASSES[index] for index in p_LC.argmax(-1).tolist())
            rows.append({"labels": letters, "probabilities": rounded(p_LC)})
        return rows

    def metrics(self, observations: Observations) -> dict[str, metrics.Metric]:
        """`accuracy` is over all residues, `accuracy_per_protein` the mean of the proteins' own; a protein without a
        scored residue counts in neither."""
        right, scored = observations["right"], observations["scored"]
        per_protein = np.divide(right, scored, out=np.full(len(right), np.nan), where=scored > 0)
        return {
            "accuracy": partial(metrics.ratio, numerator_n=right, denominator_n=scored),
            "accuracy_per_protein": partial(metrics.mean, values_n=per_protein),
        }
