"""Names that some versions of a library write for the same tensors."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from megatron_plm.convert.lazy import LazyTensors, renamed
from megatron_plm.errors import UserError

Renames = Sequence[tuple[re.Pattern[str], str]]

# TensorFlow's names of a norm's parts, which BERT's first checkpoints had.
NORM_NAMES: Renames = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)


def with_current_names(tensors: Mapping[str, Tensor], renames: Renames, directory: Path) -> LazyTensors:
    """The tensors of `directory` under their present names; UserError if one is there under both."""
    names: dict[str, str] = {}
    for key in tensors:
        name = key
        for pattern, replacement in renames:
            name = pattern.sub(replacement, name)
        if name in names:
            raise UserError(f"{directory}: it holds {name} twice, once under an older name; keep one of the two")
        names[name] = key
    return renamed(tensors, names)
