"""Where TAPE's tasks have their records: DATA_DIR/FOLDER/FOLDER_SPLIT.lmdb, .jsonl or .csv (Rao et al. 2019,
arXiv:1906.08230)."""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from tape_finetune.data import Example, check_sequence, field, read_records, tape_files
from tape_finetune.tasks.base import Task
from tape_finetune.tasks.records import check_length


class TapeTask(Task):
    """Records hold `primary`, the sequence, and the label in a field of the task's."""

    folder: ClassVar[str]

    @property
    @abstractmethod
    def label_field(self) -> str:
        """The field with the label."""

    def files(self, data_dir: Path | None) -> dict[str, Path]:
        return tape_files(data_dir, self.folder)

    def read(self, path: Path) -> Iterator[Example]:
        for record, fields in read_records(path, ("primary", self.label_field)):
            sequence = check_sequence(record, field(record, fields, "primary"))
            check_length(record, fields, sequence)
            yield Example(record, sequence, self.read_label(record, fields, self.label_field, sequence))
