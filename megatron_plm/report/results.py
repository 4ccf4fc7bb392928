"""Reading fine-tuning result directories and laying their scores out as the rows of one table."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_plm.errors import UserError
from megatron_plm.report.schema import read_object

# the model under test first, then what it is measured against
_BASE_MODEL_ORDER = ("transformer", "random", "onehot")
# rows follow the course of an experiment; test splits of any name come last
_SPLIT_ORDER = ("train", "valid")


@dataclass(frozen=True)
class Score:
    """A metric's value over a split, with the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SplitScores:
    """One split's scores; `cropped` counts the proteins that were cut to the model's length."""

    num_examples: int
    cropped: int
    metrics: dict[str, Score]


@dataclass(frozen=True)
class Epoch:
    """One pass over the training split."""

    epoch: int
    train_loss: float
    valid_metric: float


@dataclass(frozen=True)
class Result:
    """One fine-tuned model on one task: what results.json holds. `seconds` is the fine-tuning's wall time."""

    task: str
    base_model: str
    label: str
    from_pretrained: str | None
    seed: int
    command: str
    seconds: float
    num_parameters: int
    num_trained_parameters: int
    primary_metric: str
    note: str | None
    splits: dict[str, SplitScores]
    epochs: tuple[Epoch, ...]


@dataclass(frozen=True)
class Row:
    """One line of the score table: one model, split and metric of a task."""

    result: Result
    split: str
    metric: str
    score: Score

    @property
    def num_examples(self) -> int:
        """Examples of the split that were scored."""
        return self.result.splits[self.split].num_examples

    @property
    def cropped(self) -> int:
        """Examples of the split that were cut to the model's length."""
        return self.result.splits[self.split].cropped

    @property
    def is_primary(self) -> bool:
        """Whether the metric is the one that the task is judged by."""
        return self.metric == self.result.primary_metric


@dataclass(frozen=True)
class Task:
    """One task's results, ordered: pretrained model, random-initialised model, one-hot, anything else."""

    name: str
    results: tuple[Result, ...]

    def rows(self) -> list[Row]:
        """Return every score of the task, by split, then model, then metric with the primary one first."""
        return [
            Row(result, split, metric, result.splits[split].metrics[metric])
            for split in self.splits()
            for result in self.results
            if split in result.splits
            for metric in sorted(result.splits[split].metrics, key=lambda name: name != result.primary_metric)
        ]

    def splits(self) -> list[str]:
        """Return the splits that any result scored: train, valid, then test splits as first met."""
        names = dict.fromkeys(split for result in self.results for split in result.splits)
        return sorted(names, key=lambda name: _rank(name, _SPLIT_ORDER))

    def headline_splits(self) -> list[str]:
        """Return the splits a verdict may rest on: the test splits, or the others where there is none."""
        splits = self.splits()
        return [name for name in splits if name not in _SPLIT_ORDER] or splits


def read_result(directory: Path) -> Result:
    """Read DIRECTORY/results.json; raise UserError naming the file and key that is missing or wrong."""
    way_out = "give --results directories that tape_finetune/tape_train.py wrote, such as results/*"
    path = directory / "results.json"
    result = read_object(Result, path, way_out)
    names = [result.task, result.label, result.primary_metric, *result.splits]
    names += [metric for scores in result.splits.values() for metric in scores.metrics]
    names += [result.note] if result.note else []
    if not result.splits:
        raise UserError(f"{path}: 'splits' is empty; run tape_finetune/tape_eval.py on a split first")
    for name in names:
        if not name.strip() or not name.isprintable():
            raise UserError(f"{path}: the name {name!r} is empty or holds control characters; use printable text")
    for split, scores in result.splits.items():
        if result.primary_metric not in scores.metrics:
            found = ", ".join(scores.metrics) or "none"
            raise UserError(f"{path}: split {split!r} lacks its primary metric {result.primary_metric!r} (has {found})")
        for metric, score in scores.metrics.items():
            if score.low > score.high:
                raise UserError(
                    f"{path}: {split} {metric} has the interval [{score.low}, {score.high}], low above high"
                )
    return result


def group_by_task(results: Sequence[Result]) -> list[Task]:
    """Return the tasks in the order in which they first occur; equal labels in a task get their seed added.

    Raises UserError where two results of a task share label and seed, for their rows could not be told apart.
    """
    tasks: dict[str, list[Result]] = {}
    for result in results:
        tasks.setdefault(result.task, []).append(result)
    return [Task(name, _distinct_labels(group)) for name, group in tasks.items()]


def _distinct_labels(results: Sequence[Result]) -> tuple[Result, ...]:
    """Return a task's results in the order of their base models, each with a label of its own."""
    times_used = Counter(result.label for result in results)
    named = [
        replace(result, label=f"{result.label}, seed {result.seed}") if times_used[result.label] > 1 else result
        for result in results
    ]
    for label, times in Counter(result.label for result in named).items():
        if times > 1:
            raise UserError(
                f"--results: {times} results of task {results[0].task!r} are labelled {label!r}; "
                "name each directory once, and give each model a label or seed of its own"
            )
    return tuple(sorted(named, key=lambda result: _rank(result.base_model, _BASE_MODEL_ORDER)))


def overlap(first: Score, second: Score) -> bool:
    """Return whether two intervals share a point; undefined ones (not a number) count as overlapping."""
    ends = (first.low, first.high, second.low, second.high)
    return any(math.isnan(end) for end in ends) or (first.low <= second.high and second.low <= first.high)


def _rank(name: str, order: Sequence[str]) -> int:
    """Return the place of `name` in `order`, behind all of it where it isn't named there."""
    return order.index(name) if name in order else len(order)
