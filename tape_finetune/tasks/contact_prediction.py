"""Contacts between residues: pairs whose C-alphas are closer than 8 Å, at least 6 residues apart in the sequence.

Records hold `tertiary`, the C-alphas' coordinates in Å [L, 3], and `valid_mask` where some are unknown (Rao et al.
2019, arXiv:1906.08230). The data is named after its source, ProteinNet (AlQuraishi 2019,
doi:10.1186/s12859-019-2932-0).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from megatron_plm.errors import UserError
from tape_finetune import metrics
from tape_finetune.data import Example
from tape_finetune.heads import ContactHead, HeadTable, LinearContactHead
from tape_finetune.pair_heads import AttentionContactHead, ResidualContactHead
from tape_finetune.tasks.base import Observations, rounded
from tape_finetune.tasks.records import coordinates, valid_mask
from tape_finetune.tasks.tape import TapeTask

CONTACT_DISTANCE = 8.0  # Å between C-alphas
MIN_SEPARATION = 6  # residues along the sequence
# Separations |i − j| from … to below …; the named ranges are CASP's.
RANGES: dict[str, tuple[int, float]] = {
    "": (MIN_SEPARATION, np.inf),
    "_short": (6, 12),
    "_medium": (12, 24),
    "_long": (24, np.inf),
}
SHARES = {"precision_at_l5": 5, "precision_at_l2": 2, "precision_at_l": 1}  # how many pairs are taken: L over this
METRICS = (*SHARES, "auprc")


class ContactPrediction(TapeTask):
    """Labels are coordinates, float32 [L, 3], NaN where a residue's are unknown.

    A pair counts once (i < j) and only where both residues are known. `precision_at_l5` is the share of contacts among
    the max(1, L // 5) pairs of a protein with the highest scores, L being its length, averaged over proteins. Where
    there are fewer pairs, in all or in a named range, all are taken; a protein without any is left out of that mean.
    `--compat proteinlm` counts every pair twice, so that half as many fill the places.
    `auprc` is the area under the precision–recall curve of a protein's pairs, averaged over proteins with a contact.
    """

    name = "contact_prediction"
    folder = "proteinnet"
    label_field = "tertiary"
    level = "pair"
    heads: ClassVar[HeadTable] = {
        "product_difference": ContactHead,
        "linear": LinearContactHead,
        "resnet": ResidualContactHead,
        "resnet30": partial(ResidualContactHead, num_blocks=30),
        "attention": AttentionContactHead,
    }
    batch_size = 4
    num_outputs = 1
    metric_names = tuple(f"{metric}{name}" for name in RANGES for metric in METRICS)
    metric_aliases: ClassVar[dict[str, str]] = {"L5": "precision_at_l5"}  # ProteinLM's name

    def read_label(self, record: str, fields: dict[str, Any], name: str, sequence: str) -> NDArray[Any]:
        valid = valid_mask(record, fields, sequence)
        points = coordinates(record, fields, name, sequence)
        broken = valid & ~np.isfinite(points).all(1)
        if broken.any():
            place = int(np.argmax(broken)) + 1
            raise UserError(
                f"{record}: {name} is no number at residue {place}, which valid_mask calls known; "
                "set its valid_mask to 0 or give coordinates"
            )
        return np.where(valid[:, None], points, np.float32(np.nan))

    def num_labels(self, example: Example) -> int:
        known = np.isfinite(example.label[:, 0])
        # Known residues that lie at least MIN_SEPARATION before each residue.
        before = np.cumsum(known)[:-MIN_SEPARATION]
        return int(before[known[MIN_SEPARATION:]].sum())

    def loss(self, outputs: Tensor, examples: Sequence[Example]) -> Tensor:
        total = outputs.new_zeros(())
        for logits_LL, example in zip(_split_pairs(outputs, examples), examples, strict=True):
            i, j, is_contact = _pairs(example)
            target = torch.from_numpy(is_contact).to(outputs.dtype)
            chosen = logits_LL[torch.from_numpy(i), torch.from_numpy(j)]
            total = total + F.binary_cross_entropy_with_logits(chosen, target, reduction="sum")
        return total

    def observe(self, outputs: Tensor, examples: Sequence[Example]) -> Observations:
        rows = []
        for logits_LL, example in zip(_split_pairs(outputs, examples), examples, strict=True):
            i, j, is_contact = _pairs(example)
            scores, length = logits_LL.numpy()[i, j], len(example.sequence)
            row = []
            for low, high in RANGES.values():
                inside = (j - i >= low) & (j - i < high)
                in_range = scores[inside], is_contact[inside]
                copies = 2 if self.copies_proteinlm else 1  # (i, j) and (j, i)
                doubled = [np.repeat(values, copies) for values in in_range]
                row += [metrics.precision_at(max(1, length // share), *doubled) for share in SHARES.values()]
                row.append(metrics.average_precision(*in_range))
            rows.append(row)
        return dict(zip(self.metric_names, np.array(rows).T, strict=True))

    def predictions(self, outputs: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """{"contacts": [[i, j, p], …]}: of each protein the L pairs with the highest probability among those at least
        MIN_SEPARATION apart, the highest first; of equal ones the first in the sequence."""
        rows = []
        for logits_LL in _split_pairs(outputs, examples):
            length = len(logits_LL)
            i, j = np.triu_indices(length, k=MIN_SEPARATION)
            probability = logits_LL.sigmoid().numpy()[i, j]
            best = np.argsort(-probability, kind="stable")[:length]
            first, second, p = i[best] + 1, j[best] + 1, rounded(torch.from_numpy(probability[best]))
            rows.append({"contacts": [list(pair) for pair in zip(first.tolist(), second.tolist(), p, strict=True)]})
        return rows

    def metrics(self, observations: Observations) -> dict[str, metrics.Metric]:
        return {name: partial(metrics.mean, values_n=observations[name]) for name in self.metric_names}


def _split_pairs(outputs: Tensor, examples: Sequence[Example]) -> Iterator[Tensor]:
    """The logits of each protein, [L, L]."""
    lengths = [len(example.sequence) for example in examples]
    squares = outputs.split([length**2 for length in lengths])
    return (square.view(length, length) for square, length in zip(squares, lengths, strict=True))


def _pairs(example: Example) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
    """The pairs that count, as indices i < j, and whether each is a contact."""
    known = np.flatnonzero(np.isfinite(example.label[:, 0]))
    a, b = np.triu_indices(len(known), k=1)
    i, j = known[a], known[b]
    far = j - i >= MIN_SEPARATION
    i, j = i[far], j[far]
    squared = ((example.label[i] - example.label[j]) ** 2).sum(1)
    return i, j, squared < CONTACT_DISTANCE**2
