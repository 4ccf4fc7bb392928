"""Secondary structure, predicted for each residue: `ss3` is 0 helix, 1 strand, 2 coil, `ss8` DSSP's eight states.

Records hold one of them, and `valid_mask` where some residues are not scored (Rao et al. 2019, arXiv:1906.08230; data
of NetSurfP-2.0, Klausen et al. 2019, doi:10.1002/prot.25674).
"""

import argparse
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_plm.data.loader import IGNORED_LABEL
from megatron_plm.errors import UserError
from tape_finetune.tasks.records import residue_labels, valid_mask
from tape_finetune.tasks.residues import ResidueClassification
from tape_finetune.tasks.tape import TapeTask

# In the order of their numbers, with DSSP's letters.
STATES = {
    "ss3": {"H": "helix", "E": "strand", "C": "coil"},
    "ss8": {
        "G": "3-10 helix", "H": "alpha helix", "I": "pi helix", "B": "bridge", "E": "strand", "S": "bend", "T": "turn",
        "C": "coil",
    },
}  # fmt: skip


class SecondaryStructure(ResidueClassification, TapeTask):
    """`--num_classes` chooses between `ss3` and `ss8`."""

    name = "secondary_structure"
    folder = "secondary_structure"
    own_flags: ClassVar[tuple[str, ...]] = ("num_classes", "class_weights")
    classes = tuple(STATES["ss3"])

    def configure(self, arguments: argparse.Namespace) -> None:
        super().configure(arguments)
        self.classes = tuple(STATES[f"ss{arguments.num_classes or 3}"])

    @property
    def label_field(self) -> str:
        return f"ss{len(self.classes)}"

    def read_label(self, record: str, fields: dict[str, Any], name: str, sequence: str) -> NDArray[Any]:
        valid = valid_mask(record, fields, sequence)
        labels = residue_labels(record, fields, name, sequence)
        outside = valid & ((labels < 0) | (labels >= len(self.classes)))
        if outside.any():
            place = int(np.argmax(outside))
            known = ", ".join(f"{number} ({state})" for number, state in enumerate(STATES[name].values()))
            raise UserError(f"{record}: {name} is {labels[place]} at residue {place + 1}; expected one of {known}")
        return np.where(valid, labels, IGNORED_LABEL)
