"""Any property of whole proteins from a CSV table with a sequence and a label column."""

import argparse
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_plm.errors import UserError
from tape_finetune import metrics
from tape_finetune.data import DEFAULT_DATA_DIR, Example, check_sequence, read_csv
from tape_finetune.flags import add_flag
from tape_finetune.heads import LinearHead, MLPHead
from tape_finetune.tasks.base import HeadTable, Observations, Task, rounded

_SPLITS = ("train", "valid", "test")
_CLASSES_SHOWN = 10


class CsvTask(Task):
    """The two kinds share their files and columns; `from_arguments` and `from_state` choose the kind."""

    name = "csv"
    level = "protein"
    heads: ClassVar[HeadTable] = {"mlp": MLPHead, "linear": LinearHead}
    batch_size = 32
    kind: str

    def __init__(self, sequence_column: str, label_column: str, split_files: Mapping[str, str]) -> None:
        self.sequence_column = sequence_column
        self.label_column = label_column
        self.split_files = dict(split_files)  # empty where the splits are those of a folder

    @classmethod
    def add_flags(cls, parser: argparse._ActionsContainer) -> None:
        add_flag(parser, "sequence_column", metavar="NAME", help="column with the amino acids")
        add_flag(parser, "label_column", metavar="NAME", help="column to predict")
        add_flag(parser, "kind", choices=list(_KINDS), help="what the labels are")
        for split in _SPLITS:
            text = f"the split {split!r}, instead of DATA_DIR/{split}.csv"
            add_flag(parser, f"{split}_file", metavar="FILE", type=Path, help=text)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "CsvTask":
        for flag in ("sequence_column", "label_column", "kind"):
            if getattr(arguments, flag) is None:
                raise UserError(f"the task csv needs --{flag}; --help explains it")
        given = {split: getattr(arguments, f"{split}_file") for split in _SPLITS}
        split_files = {split: str(path) for split, path in given.items() if path is not None}
        if split_files and arguments.data_dir is not None:
            raise UserError("--data_dir and --train_file, --valid_file, --test_file exclude each other; give one kind")
        for split in ("train", "valid"):
            if split_files and split not in split_files:
                raise UserError(f"--{split}_file is missing; with a file for one split, name those for all of them")
        kind = _KINDS[arguments.kind]
        task = kind(arguments.sequence_column, arguments.label_column, split_files)
        files = task.files(arguments.data_dir)
        if "train" in files:  # else the caller tells which splits there are
            task.learn(files["train"])
        return task

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "CsvTask":
        state = dict(state)
        learned = state.pop("learned")
        task = _KINDS[state.pop("kind")](**state)
        task.restore(learned)
        return task

    def state(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "sequence_column": self.sequence_column,
            "label_column": self.label_column,
            "split_files": self.split_files,
            "learned": self.learned(),
        }

    @abstractmethod
    def learn(self, train_file: Path) -> None:
        """Take from the training labels what the task must know of them; raises UserError."""

    @abstractmethod
    def learned(self) -> Any:
        """What `learn` found, as JSON."""

    @abstractmethod
    def restore(self, learned: Any) -> None:
        """Take what `learned` gave."""

    @abstractmethod
    def label(self, record: str, text: str) -> np.ndarray:
        """A label as an array without dims; raises UserError naming `record`."""

    def files(self, data_dir: Path | None) -> dict[str, Path]:
        if data_dir is None and self.split_files:
            return {split: Path(path) for split, path in self.split_files.items()}
        data_dir = data_dir or DEFAULT_DATA_DIR
        if not data_dir.is_dir():
            raise UserError(f"--data_dir {data_dir}: no such folder; it should hold train.csv and valid.csv")
        files: dict[str, Path] = {}
        for path in sorted([*data_dir.glob("*.csv"), *data_dir.glob("*.csv.gz")]):
            split = path.name.removesuffix(".gz").removesuffix(".csv")
            if split in files:
                raise UserError(f"{path} and {files[split]} are both the split {split!r}; remove one of them")
            files[split] = path
        if not files:
            raise UserError(f"--data_dir {data_dir}: holds no .csv file; it should hold train.csv and valid.csv")
        return files

    def test_splits(self, files: Mapping[str, Path]) -> list[str]:
        """Only `test`: a folder may hold tables of other kinds."""
        return [split for split in files if split == "test"]

    def rows(self, path: Path) -> Iterator[tuple[str, str, str]]:
        """(place for messages, sequence, label) of each row, labels that are missing refused."""
        for record, (sequence, label) in read_csv(path, (self.sequence_column, self.label_column)):
            if not label or label.lower() == "nan":
                raise UserError(
                    f"{record}: the label in column {self.label_column!r} is missing; give it or remove the row"
                )
            yield record, sequence, label

    def read(self, path: Path) -> Iterator[Example]:
        for record, sequence, label in self.rows(path):
            yield Example(record, check_sequence(record, sequence), self.label(record, label))

    def num_labels(self, example: Example) -> int:  # noqa: ARG002
        return 1


class CsvClassification(CsvTask):
    """Labels are class indices, int64; the classes are the labels found in training, numbers in numerical order."""

    kind = "classification"
    classes: tuple[str, ...] = ()
    num_outputs = 0
    metric_names: tuple[str, ...] = ("accuracy", "mcc", "macro_f1")

    def learn(self, train_file: Path) -> None:
        found = {label for _, _, label in self.rows(train_file)}
        if len(found) == 1:
            raise UserError(f"{train_file}: every label is {found.pop()!r}; a classification needs two classes or more")
        self.restore(sorted(found, key=_class_order(found)))

    def learned(self) -> Any:
        return list(self.classes)

    def restore(self, learned: Any) -> None:
        self.classes = tuple(learned)
        self._index = {label: index for index, label in enumerate(self.classes)}
        self.num_outputs = len(self.classes)
        self.metric_names = CsvClassification.metric_names + (("auroc",) if self.num_outputs == 2 else ())

    def label(self, record: str, text: str) -> np.ndarray:
        if text not in self._index:
            more = ", …" if len(self.classes) > _CLASSES_SHOWN else ""
            known = ", ".join(self.classes[:_CLASSES_SHOWN]) + more
            raise UserError(f"{record}: the label {text!r} is not a class of the training split ({known})")
        return np.asarray(self._index[text])

    def loss(self, outputs: Tensor, examples: Sequence[Example]) -> Tensor:
        return F.cross_entropy(outputs, _labels(examples), reduction="sum")

    def observe(self, outputs: Tensor, examples: Sequence[Example]) -> Observations:
        margin = (outputs[:, 1] - outputs[:, 0]).numpy()  # of the second class, for two classes
        return {"truth": _labels(examples).numpy(), "predicted": outputs.argmax(-1).numpy(), "margin": margin}

    def predictions(self, outputs: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:  # noqa: ARG002
        rows = []
        for p_C in outputs.softmax(-1):
            probabilities = dict(zip(self.classes, rounded(p_C), strict=True))
            rows.append({"label": self.classes[int(p_C.argmax())], "probabilities": probabilities})
        return rows

    def metrics(self, observations: Observations) -> dict[str, metrics.Metric]:
        truth, predicted, num_classes = observations["truth"], observations["predicted"], len(self.classes)
        compared = {"truth_n": truth, "predicted_n": predicted}
        table = {
            "accuracy": partial(metrics.accuracy, **compared),
            "mcc": partial(metrics.matthews_correlation, **compared, num_classes=num_classes),
            "macro_f1": partial(metrics.macro_f1, **compared, num_classes=num_classes),
            "auroc": partial(metrics.area_under_roc, truth_n=truth, scores_n=observations["margin"]),
        }
        return {name: cast(metrics.Metric, table[name]) for name in self.metric_names}


class CsvRegression(CsvTask):
    """Labels are numbers, float64. The head predicts them with the training labels' mean and deviation taken out, and
    the loss is the squared error on that scale; predictions and metrics are in the labels' unit."""

    kind = "regression"
    num_outputs = 1
    metric_names = ("spearmanr", "mse")
    lower_is_better = frozenset({"mse"})
    mean, deviation = 0.0, 1.0

    def learn(self, train_file: Path) -> None:
        labels = np.array([self.label(record, text) for record, _, text in self.rows(train_file)])
        if len(labels) and np.ptp(labels) == 0:
            raise UserError(f"{train_file}: every label is {labels[0]:g}; a regression needs labels that differ")
        if len(labels):
            self.restore([float(labels.mean()), float(labels.std())])

    def learned(self) -> Any:
        return [self.mean, self.deviation]

    def restore(self, learned: Any) -> None:
        self.mean, self.deviation = learned

    def label(self, record: str, text: str) -> np.ndarray:
        try:
            value = float(text)
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            raise UserError(f"{record}: the label {text!r} is no number; --kind classification takes words")
        return np.asarray(value)

    def loss(self, outputs: Tensor, examples: Sequence[Example]) -> Tensor:
        target = ((_labels(examples) - self.mean) / self.deviation).to(outputs.dtype)
        return F.mse_loss(outputs[:, 0], target, reduction="sum")

    def observe(self, outputs: Tensor, examples: Sequence[Example]) -> Observations:
        return {"truth": _labels(examples).numpy(), "predicted": self._values(outputs).numpy()}

    def predictions(self, outputs: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:  # noqa: ARG002
        return [{"value": value} for value in self._values(outputs).tolist()]

    def metrics(self, observations: Observations) -> dict[str, metrics.Metric]:
        compared = {"truth_n": observations["truth"], "predicted_n": observations["predicted"]}
        return {
            "spearmanr": partial(metrics.spearman, **compared),
            "mse": partial(metrics.mean_squared_error, **compared),
        }

    def _values(self, outputs: Tensor) -> Tensor:
        """Predictions in the labels' unit, float64 [n]."""
        return outputs[:, 0].double() * self.deviation + self.mean


_KINDS: dict[str, type[CsvTask]] = {kind.kind: kind for kind in (CsvRegression, CsvClassification)}


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.from_numpy(np.stack([example.label for example in examples]))


def _class_order(labels: set[str]) -> Callable[[str], Any]:
    """The sort key: by number where all labels are whole numbers, else by text."""
    try:
        [int(label) for label in labels]
    except ValueError:
        return str
    return lambda label: (int(label), label)
