"""Any property of proteins, or of their residues, from a table with a sequence and a label column."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from megatron_plm.errors import UserError
from tape_finetune.data import DEFAULT_DATA_DIR, Example, check_sequence, read_records, split_files
from tape_finetune.heads import HeadTable
from tape_finetune.tasks.base import Task
from tape_finetune.tasks.classification import Classification
from tape_finetune.tasks.flags import SPLIT_FILES
from tape_finetune.tasks.head_tables import PROTEIN_HEADS, RESIDUE_HEADS
from tape_finetune.tasks.records import class_name, label_value, residue_names
from tape_finetune.tasks.regression import Regression
from tape_finetune.tasks.residues import ResidueClassification

_COLUMNS = ("sequence_column", "label_column")


class CsvTask(Task):
    """The kinds share their files and columns. JSON lines and LMDB databases are read too; columns are their fields."""

    name = "csv"
    heads: ClassVar[HeadTable] = {**PROTEIN_HEADS, **RESIDUE_HEADS}
    batch_size = 32
    own_flags: ClassVar[tuple[str, ...]] = ("kind", *_COLUMNS, *SPLIT_FILES, "class_weights")
    saved: ClassVar[tuple[str, ...]] = ("kind", "sequence_column", "label_column", "split_files")
    kind: str
    sequence_column: str
    label_column: str
    split_files: Mapping[str, str] = {}  # empty where the splits are those of a folder

    def configure(self, arguments: argparse.Namespace) -> None:
        super().configure(arguments)
        for flag in _COLUMNS:
            if getattr(arguments, flag) is None:
                raise UserError(f"the task csv needs --{flag}; --help explains it")
        self.kind, self.sequence_column, self.label_column = (
            arguments.kind,
            arguments.sequence_column,
            arguments.label_column,
        )
        given = {flag.removesuffix("_file"): getattr(arguments, flag) for flag in SPLIT_FILES}
        self.split_files = {split: str(path) for split, path in given.items() if path is not None}
        if self.split_files and arguments.data_dir is not None:
            raise UserError("--data_dir and --train_file, --valid_file, --test_file exclude each other; give one kind")
        for split in ("train", "valid"):
            if self.split_files and split not in self.split_files:
                raise UserError(f"--{split}_file is missing; with a file for one split, name those for all of them")
        files = self.files(arguments.data_dir)
        if "train" in files:  # else the caller tells which splits there are
            self.prepare(files["train"])

    def prepare(self, train_file: Path) -> None:
        """Take from the training file what must be known to read any file; raises UserError."""

    def files(self, data_dir: Path | None) -> dict[str, Path]:
        if data_dir is None and self.split_files:
            return {split: Path(path) for split, path in self.split_files.items()}
        data_dir = data_dir or DEFAULT_DATA_DIR
        if not data_dir.is_dir():
            raise UserError(f"--data_dir {data_dir}: no such folder; it should hold train.csv and valid.csv")
        files = split_files([data_dir], "")
        if not files:
            raise UserError(f"--data_dir {data_dir}: holds no .csv file; it should hold train.csv and valid.csv")
        return files

    def test_splits(self, files: Mapping[str, Path]) -> list[str]:
        """Only `test`: a folder may hold tables of other kinds."""
        return [split for split in files if split == "test"]

    def records(self, path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
        """(place for messages, fields, sequence) of each record."""
        for record, fields in read_records(path, (self.sequence_column, self.label_column)):
            yield record, fields, check_sequence(record, fields.get(self.sequence_column))

    def read(self, path: Path) -> Iterator[Example]:
        for record, fields, sequence in self.records(path):
            yield Example(record, sequence, self.read_label(record, fields, self.label_column, sequence))


class CsvRegression(Regression, CsvTask):
    """One number a protein."""

    own_flags: ClassVar[tuple[str, ...]] = ("kind", *_COLUMNS, *SPLIT_FILES)


class CsvClassification(Classification, CsvTask):
    """One class a protein; the classes are the labels found in training, numbers in numerical order."""

    own_flags: ClassVar[tuple[str, ...]] = CsvTask.own_flags

    def prepare(self, train_file: Path) -> None:
        labels = (label_value(record, fields, self.label_column) for record, fields, _ in self.records(train_file))
        self.classes = _classes(train_file, {class_name(label) for label in labels})


class CsvToken(ResidueClassification, CsvTask):
    """One class a residue: one character each in a row, or names with spaces between, or a JSON list."""

    own_flags: ClassVar[tuple[str, ...]] = CsvTask.own_flags

    def prepare(self, train_file: Path) -> None:
        found: set[str] = set()
        for record, fields, sequence in self.records(train_file):
            found.update(residue_names(record, fields, self.label_column, sequence))
        self.classes = _classes(train_file, found)


CsvTask.kinds = {"regression": CsvRegression, "classification": CsvClassification, "token": CsvToken}


def _classes(train_file: Path, found: set[str]) -> list[str]:
    """The classes in order; UserError if there is but one. A file without records is told when it is loaded."""
    if len(found) == 1:
        raise UserError(f"{train_file}: every label is {found.pop()!r}; a classification needs two classes or more")
    return sorted(found, key=_class_order(found))


def _class_order(labels: set[str]) -> Callable[[str], Any]:
    """The sort key: by number where all labels are whole numbers, else by text."""
    try:
        [int(label) for label in labels]
    except ValueError:
        return str
    return lambda label: (int(label), label)
