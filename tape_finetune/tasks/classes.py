"""Tasks whose outputs are classes: the classes' names, and their weights in the loss."""

import argparse
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, tensor

from megatron_plm.errors import UserError
from tape_finetune.tasks.base import Task
from tape_finetune.tasks.flags import BALANCED

_CLASSES_SHOWN = 10


class ClassTask(Task):
    """`classes` names the outputs; `class_weights` is None where every class counts alike in the loss."""

    own_flags: ClassVar[tuple[str, ...]] = ("class_weights",)
    saved: ClassVar[tuple[str, ...]] = ("classes", "class_weights")
    classes: Sequence[str] = ()
    class_weights: list[float] | None = None
    is_balanced = False

    def configure(self, arguments: argparse.Namespace) -> None:
        super().configure(arguments)
        self.is_balanced = arguments.class_weights == BALANCED

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    def class_indices(self, record: str, names: Sequence[str]) -> NDArray[np.int64]:
        """The outputs of classes; raises UserError naming `record` where there is no such class."""
        try:
            return np.array([self.classes.index(name) for name in names], dtype=np.int64)
        except ValueError:
            wrong = next(name for name in names if name not in self.classes)
        more = ", …" if len(self.classes) > _CLASSES_SHOWN else ""
        shown = ", ".join(self.classes[:_CLASSES_SHOWN]) + more
        raise UserError(f"{record}: the label {wrong!r} is none of the {len(self.classes)} classes: {shown}")

    def weights_like(self, outputs: Tensor) -> Tensor | None:
        """The classes' weights as a loss takes them, [C]."""
        return None if self.class_weights is None else tensor(self.class_weights).to(outputs)


def balanced(counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """n/(k·n_c): n labels in all, k classes that occur, n_c labels of the class; 1 for one that doesn't occur.

    So each class has the same part in the loss, and the weights of the labels add up to n. It is scikit-learn's
    "balanced", after King & Zeng 2001 (doi:10.1093/oxfordjournals.pan.a004868).
    """
    occurs = counts > 0
    return np.where(occurs, counts.sum() / (occurs.sum() * np.maximum(counts, 1)), 1.0)
