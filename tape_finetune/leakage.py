"""Scored proteins that the model was trained on."""

import itertools
from collections.abc import Iterable

from megatron_plm.errors import UserError
from tape_finetune.data import Split


def check_distinct(splits: Iterable[Split]) -> None:
    """Raise UserError where two splits are files with the same content."""
    for one, other in itertools.combinations(splits, 2):
        if one.sha256 == other.sha256:
            raise UserError(
                f"{other.path} (the split {other.name!r}) holds the same as {one.path} ({one.name!r}); give each split "
                "proteins of its own, or the score measures memory"
            )


def num_in_train(split: Split, train: Split) -> int:
    """How many sequences of `split`, as cropped and without regard to case, also stand in `train`."""
    known = {example.sequence.upper() for example in train.examples}
    return sum(example.sequence.upper() in known for example in split.examples)
