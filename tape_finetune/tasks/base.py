"""What a task has to say: where its labels are, which head fits, what the loss and the scores are."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from numpy.typing import NDArray
from torch import Tensor

from megatron_plm.errors import UserError, suggestion
from tape_finetune.data import Example, Split, content_sha256
from tape_finetune.heads import HeadTable, Level
from tape_finetune.metrics import Metric

_LONGEST_OF_PROTEINLM = 512  # residues of a test protein

Observations = Mapping[str, NDArray[Any]]  # per example one row, what the metrics need to know of it


class Task(ABC):
    """One downstream task. Its heads and metrics are tables; the first entry is the default, or the primary one."""

    name: ClassVar[str]
    level: ClassVar[Level]
    heads: ClassVar[HeadTable]
    batch_size: ClassVar[int]  # the default, proteins a step
    own_flags: ClassVar[tuple[str, ...]] = ()  # of tasks/flags.py
    kinds: ClassVar[Mapping[str, type["Task"]]] = {}  # by the value of --kind; empty where a task has but one
    # Attributes that a run keeps, as JSON; those of base classes besides.
    saved: ClassVar[tuple[str, ...]] = ("copies_proteinlm",)
    copies_proteinlm: bool = False  # its faults in test splits and in counting contacts, by --compat proteinlm
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    metric_aliases: ClassVar[Mapping[str, str]] = {}  # other names that `--metrics` takes

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Outputs of the head."""

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """The names of `metrics`, in their order."""

    @classmethod
    def of_kind(cls, kind: str | None) -> type["Task"]:
        """The class that --kind names, itself where a task has no kinds; UserError if it names none."""
        if not cls.kinds:
            return cls
        if kind is None or kind not in cls.kinds:
            known = ", ".join(cls.kinds) + (suggestion(kind, cls.kinds) if kind else "")
            problem = f"--kind {kind}: the kinds of {cls.name} are" if kind else f"the task {cls.name} needs --kind:"
            raise UserError(f"{problem} {known}")
        return cls.kinds[kind]

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "Task":
        """Set the task up for training; raises UserError."""
        task = cls.of_kind(arguments.kind)()
        task.configure(arguments)
        return task

    def configure(self, arguments: argparse.Namespace) -> None:
        """Take what the task's own flags say; raises UserError."""
        self.copies_proteinlm = arguments.compat == "proteinlm"

    def learn(self, train: Split) -> None:  # noqa: B027
        """Take from the training labels what the loss must know of them; raises UserError naming the file."""

    def state(self) -> dict[str, Any]:
        """What `from_state` needs, as JSON."""
        return {name: getattr(self, name) for name in self._saved_names()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Task":
        """The task of a saved run."""
        return cls.of_kind(state.get("kind"))()._restored(state)

    @abstractmethod
    def files(self, data_dir: Path | None) -> dict[str, Path]:
        """The files of the splits in `data_dir`, or in the default place; raises UserError where there are none."""

    def test_splits(self, files: Mapping[str, Path]) -> list[str]:
        """The splits that are scored once, at the end of training."""
        return [split for split in files if split not in ("train", "valid")]

    def load(self, split: str, path: Path, max_length: int | None, *, windows: bool = False) -> Split:
        """Read and check a split, and crop what is longer than `max_length`, or with `windows` mark it as to be read in
        such. Raises UserError naming the file, and the record at fault."""
        read = list(self.read(path))
        kept = [example for example in read if not self._drops(split, example)]
        examples = tuple(example.fit(max_length, windows=windows) for example in kept)
        if not examples:
            raise UserError(f"{path}: the split {split!r} holds no record; give a file with labelled proteins")
        num_undefined = sum(not self.num_labels(example) for example in examples)
        if num_undefined == len(examples):
            cropped = any(example.cropped for example in examples)
            within = f" within --max_length {max_length}; take a larger one" if cropped else "; give a file that has"
            raise UserError(f"{path}: no protein of the split {split!r} has a label to learn or to score{within}")
        return Split(split, path, content_sha256(path), examples, num_undefined, len(read) - len(kept))

    @abstractmethod
    def read(self, path: Path) -> Iterator[Example]:
        """The checked records of a file; raises UserError naming the one at fault."""

    @abstractmethod
    def read_label(self, record: str, fields: dict[str, Any], name: str, sequence: str) -> NDArray[Any]:
        """The label of a record from its field `name`; raises UserError naming `record` where it doesn't fit."""

    @abstractmethod
    def num_labels(self, example: Example) -> int:
        """How many labels the example has."""

    def loss_weight(self, example: Example) -> float:
        """The sum of the weights that its labels have in the loss; without weights their number."""
        return float(self.num_labels(example))

    @abstractmethod
    def loss(self, outputs: Tensor, examples: Sequence[Example]) -> Tensor:
        """The sum of the loss over the labels of the examples, each times its weight, from the head's outputs for
        them; a scalar. Over the sum of `loss_weight` it is the mean loss of a label."""

    @abstractmethod
    def observe(self, outputs: Tensor, examples: Sequence[Example]) -> Observations:
        """What the metrics need, arrays with one row an example, from the head's outputs for them."""

    @abstractmethod
    def predictions(self, outputs: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """One JSON object an example from the head's outputs for them; their labels are not read.

        A class is {"label": name, "probabilities": {name: p}}, several {"labels": [name, …], "probabilities": {name:
        p}}, a number {"value": in the labels' unit}, classes of residues {"labels": one letter a residue, or a list of
        names, "probabilities": [L][classes]}, contacts {"contacts": [[i, j, p], …]}, i < j counted from 1.
        Probabilities are rounded to 6 places.
        """

    def metric_name(self, asked: str, flag: str) -> str:
        """The task's own name of a metric; raises UserError, naming `flag`, where it has no such metric."""
        name = self.metric_aliases.get(asked, asked)
        if name not in self.metric_names:
            raise UserError(
                f"{flag} {asked}: doesn't fit the task {self.name}, whose metrics are {', '.join(self.metric_names)}"
                f"{suggestion(asked, self.metric_names)}"
            )
        return name

    @abstractmethod
    def metrics(self, observations: Observations) -> dict[str, Metric]:
        """The metrics over all examples of a split, by name."""

    def _drops(self, split: str, example: Example) -> bool:
        """Whether ProteinLM's fork would leave the protein out of the split."""
        return (
            self.copies_proteinlm and split not in ("train", "valid") and len(example.sequence) > _LONGEST_OF_PROTEINLM
        )

    @classmethod
    def _saved_names(cls) -> list[str]:
        return [name for base in reversed(cls.__mro__) for name in vars(base).get("saved", ())]

    def _restored(self, state: Mapping[str, Any]) -> Self:
        for name in self._saved_names():
            setattr(self, name, state[name])
        return self


def rounded(probabilities: Tensor) -> Any:
    """Probabilities as lists of JSON numbers with 6 places."""
    return probabilities.double().round(decimals=6).tolist()
