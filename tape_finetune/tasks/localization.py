"""Where in the cell a protein is, and whether a membrane holds it, from tables in DeepLoc's columns (Thumuluri et al.
2022, doi:10.1093/nar/gkac278): `Sequence`, `Membrane` (1 or 0) and `Localization` (names with | between)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from megatron_plm.errors import UserError
from tape_finetune.data import DEFAULT_DATA_DIR, Example, check_sequence, field, read_records, split_files
from tape_finetune.heads import HeadTable
from tape_finetune.tasks.base import Task
from tape_finetune.tasks.classification import Classification
from tape_finetune.tasks.head_tables import PROTEIN_HEADS
from tape_finetune.tasks.multilabel import MultiLabel
from tape_finetune.tasks.records import class_name, label_value

LOCATIONS = (
    "Cytoplasm",
    "Nucleus",
    "Extracellular",
    "Cell membrane",
    "Mitochondrion",
    "Plastid",
    "Endoplasmic reticulum",
    "Lysosome/Vacuole",
    "Golgi apparatus",
    "Peroxisome",
)


class Localization(Task):
    """The kinds share their files: DATA_DIR/localization/SPLIT.csv or DATA_DIR/SPLIT.csv, or the other formats."""

    name = "localization"
    heads: ClassVar[HeadTable] = PROTEIN_HEADS
    batch_size = 32
    own_flags: ClassVar[tuple[str, ...]] = ("kind", "class_weights")
    saved: ClassVar[tuple[str, ...]] = ("kind",)
    kind: ClassVar[str]
    column: ClassVar[str]
    scored: ClassVar[tuple[str, ...]]  # splits that training scores, where they are there

    def files(self, data_dir: Path | None) -> dict[str, Path]:
        data_dir = data_dir or DEFAULT_DATA_DIR
        folder = next((place for place in (data_dir / self.name, data_dir) if place.is_dir()), None)
        files = split_files([folder], "") if folder else {}
        if not files:
            raise UserError(f"--data_dir {data_dir}: holds no {self.name}/train.csv, and no train.csv itself")
        return files

    def test_splits(self, files: Mapping[str, Path]) -> list[str]:
        return [split for split in files if split in self.scored]

    def read(self, path: Path) -> Iterator[Example]:
        for record, fields in read_records(path, ("Sequence", self.column)):
            sequence = check_sequence(record, field(record, fields, "Sequence"))
            yield Example(record, sequence, self.read_label(record, fields, self.column, sequence))


class Membrane(Classification, Localization):
    """Whether a membrane holds the protein."""

    own_flags: ClassVar[tuple[str, ...]] = Localization.own_flags
    kind = "membrane"
    column = "Membrane"
    scored = ("test",)
    classes = ("soluble", "membrane")

    def read_label(self, record: str, fields: dict[str, Any], name: str, sequence: str) -> NDArray[Any]:  # noqa: ARG002
        numbers = {"0": "soluble", "1": "membrane"}
        label = class_name(label_value(record, fields, name))
        if label not in numbers:
            raise UserError(f"{record}: {name} is {label!r}; expected 1 (in or at a membrane) or 0")
        return self.class_indices(record, [numbers[label]])[0]


class Location(MultiLabel, Localization):
    """The ten places of DeepLoc 2; many proteins have several."""

    own_flags: ClassVar[tuple[str, ...]] = Localization.own_flags
    kind = "location"
    column = "Localization"
    scored = ("test", "test_hpa")  # of the human set, which holds no Membrane
    classes = LOCATIONS


Localization.kinds = {"membrane": Membrane, "location": Location}
