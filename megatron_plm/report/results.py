"""Reading fine-tuning result directories and laying their scores out as the rows of tables."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_plm.errors import UserError
from megatron_plm.report.schema import MaybeUndefined, read_object, read_text

_WAY_OUT = "give --results directories that tape_finetune/tape_train.py wrote, such as results/*"
# the one task whose name doesn't say what was predicted: its data do
_CSV_TASK = "csv"
# the model under test first, then what it is measured against
BASE_MODEL_ORDER = ("transformer", "random", "onehot")
# rows follow the course of an experiment; test splits of any name come last
SPLIT_ORDER = ("train", "valid")
# with fewer examples the luck of their choice decides, whatever the intervals say
ENOUGH_TO_RANK = 30


@dataclass(frozen=True)
class Score:
    """A metric's value over a split, with the ends of its bootstrap interval; not-a-number where undefined."""

    value: MaybeUndefined
    low: MaybeUndefined
    high: MaybeUndefined


@dataclass(frozen=True)
class SplitScores:
    """One split's scores; `cropped` counts the proteins that were cut to the model's length, `windowed` those that were
    read in windows of it, `num_undefined` those without a label, `num_dropped` those that `--compat proteinlm` left out
    and `num_in_train` those whose sequence was trained on (None is unknown).

    `file` is the name of the file that held the examples, `sha256` its content's.
    """

    num_examples: int
    cropped: int
    file: str
    sha256: str
    metrics: dict[str, Score]
    windowed: int = 0
    num_undefined: int = 0
    num_dropped: int = 0
    num_in_train: int | None = None


@dataclass(frozen=True)
class TrainSplit:
    """What a model was trained on; the fields are those of `SplitScores`."""

    num_examples: int
    cropped: int
    file: str
    sha256: str
    windowed: int = 0
    num_undefined: int = 0


@dataclass(frozen=True)
class ResultFile:
    """What the report needs of results.json: one fine-tuned model on one task, with the fine-tuning's wall time and the
    most memory that it had, in bytes, of the process and of the GPU; None is unknown, or no GPU."""

    task: str
    base_model: str
    label: str
    from_pretrained: str | None
    seed: int
    command: str
    seconds: float
    num_trained_parameters: int
    primary_metric: str
    note: str | None
    splits: dict[str, SplitScores]
    train: TrainSplit | None = None
    peak_memory: int | None = None
    peak_gpu_memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Result(ResultFile):
    """A result with its directory, and the name of its data: their folder as the user typed it, or the files' names.

    `task` says what was predicted where one name stands for several things: "csv (charge, regression)".
    """

    directory: str
    data: str


@dataclass(frozen=True)
class _RunFile:
    """What the report needs of the run.json beside results.json."""

    data_dir: str | None


@dataclass(frozen=True)
class Row:
    """One line of the score table: one model on one split, by its primary metric."""

    result: Result
    split: str

    @property
    def metric(self) -> str:
        """The metric that the task is judged by."""
        return self.result.primary_metric

    @property
    def score(self) -> Score:
        """The primary metric's value."""
        return self.scores.metrics[self.metric]

    @property
    def scores(self) -> SplitScores:
        """Everything that was measured on the split."""
        return self.result.splits[self.split]


@dataclass(frozen=True)
class Task:
    """One task's results on one set of data, ordered: pretrained model, random-initialised model, one-hot,
    anything else. `title` tells it from every other task of the report."""

    name: str
    title: str
    results: tuple[Result, ...]

    @property
    def shared_note(self) -> str | None:
        """The note that every result carries, if it is one and the same."""
        notes = {result.note for result in self.results}
        return self.results[0].note if len(notes) == 1 else None

    def rows(self) -> list[Row]:
        """Return the primary scores, by split, then model."""
        return [Row(result, split) for split in self.splits() for result in self.results if split in result.splits]

    def other_scores(self) -> list[tuple[str, str, list[Score | None]]]:
        """Return (split, metric, one score a result or None where it has none) for all but the primary metrics."""
        found = {
            (split, metric): [
                result.splits[split].metrics.get(metric) if split in result.splits else None for result in self.results
            ]
            for split in self.splits()
            for other in self.results
            if split in other.splits
            for metric in other.splits[split].metrics
            if metric != other.primary_metric
        }
        return [(split, metric, scores) for (split, metric), scores in found.items()]

    def splits(self) -> list[str]:
        """Return the splits that any result scored: train, valid, then test splits as first met."""
        names = dict.fromkeys(split for result in self.results for split in result.splits)
        return sorted(names, key=lambda name: rank(name, SPLIT_ORDER))

    def num_examples(self, split: str) -> int:
        """Return the number of examples in a split, the smallest where the models saw different numbers of them."""
        return min(result.splits[split].num_examples for result in self.results if split in result.splits)

    def ranks(self, split: str) -> bool:
        """Return whether a split has enough examples for a comparison of models."""
        return self.num_examples(split) >= ENOUGH_TO_RANK

    def headline_splits(self) -> list[str]:
        """Return the splits a verdict may rest on: the test splits, or the others where there is none."""
        splits = self.splits()
        return [name for name in splits if name not in SPLIT_ORDER] or splits


def read_result(directory: Path) -> Result:
    """Read DIRECTORY/results.json, and the data's folder and what was predicted from run.json if that is there.

    Raises UserError naming the file and key that is missing or wrong.
    """
    path, run_path = directory / "results.json", directory / "run.json"
    content = read_object(ResultFile, path, _WAY_OUT)
    if not content.splits:
        raise UserError(f"{path}: 'splits' is empty; run tape_finetune/tape_eval.py on a split first")
    data_dir = read_object(_RunFile, run_path, _WAY_OUT).data_dir if run_path.exists() else None
    data = data_dir if data_dir is not None else _file_names(content)
    variant = _variant(content.task, _task_state(run_path)) if run_path.exists() else ""
    result = Result(**vars(content), directory=str(directory), data=data)
    result = replace(result, task=f"{result.task} ({variant})") if variant else result
    _check(result, path)
    return result


def _task_state(run_path: Path) -> Mapping[str, Any]:
    """What run.json, a JSON object, says of its task; empty where it says nothing."""
    task = json.loads(read_text(run_path, _WAY_OUT)).get("task")
    state = task.get("state") if isinstance(task, dict) else None
    return state if isinstance(state, dict) else {}


def _variant(task: str, state: Mapping[str, Any]) -> str:
    """What a run of the task predicts; empty where the name says it, or nothing does."""
    if not state:
        return ""
    if task == _CSV_TASK:
        return f"{state.get('label_column')}, {state.get('kind')}"
    if task == "localization":
        return str(state.get("kind", ""))
    classes = state.get("classes")
    # TAPE's published values are of three.
    return f"{len(classes)} classes" if task == "secondary_structure" and classes and len(classes) != 3 else ""


def _check(result: Result, path: Path) -> None:
    """Raise UserError where a name can't be shown or a score can't be."""
    names = [result.task, result.label, result.primary_metric, result.data, *result.splits]
    names += [scores.file for scores in result.splits.values()]
    names += [metric for scores in result.splits.values() for metric in scores.metrics]
    names += [result.note] if result.note else []
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


def group_by_task(results: Sequence[Result]) -> list[Task]:
    """Return one group for each task and set of data, those without a headline split that ranks last, else in the
    order in which they first occur; equal labels in a group get their seed added, and then their directory.

    Raises UserError where a directory is named twice.
    """
    tasks = [Task(name, title, _distinct_labels(group)) for name, title, group in group_by_data(results)]
    return sorted(tasks, key=lambda task: not any(map(task.ranks, task.headline_splits())))


def group_by_data(results: Sequence[Result]) -> list[tuple[str, str, list[Result]]]:
    """Return (task, title, results) for each task and set of data: results are in one group where every split that
    two of them scored is the same file, by content."""
    groups: dict[str, list[list[Result]]] = {}
    for result in results:
        known = groups.setdefault(result.task, [])
        for group in known:
            if all(_same_data(result, member) for member in group):
                group.append(result)
                break
        else:
            known.append([result])
    return [
        (name, title, group)
        for name, same_task in groups.items()
        for title, group in zip(_titles(name, same_task), same_task, strict=True)
    ]


def _same_data(first: Result, second: Result) -> bool:
    """Return whether every split that both scored is the same file, by content."""
    shared = first.splits.keys() & second.splits.keys()
    if not shared:
        return first.data == second.data
    return all(first.splits[split].sha256 == second.splits[split].sha256 for split in shared)


def _titles(name: str, groups: Sequence[Sequence[Result]]) -> list[str]:
    """Return a title for each group of a task: as much about its data as tells the groups apart."""
    shown = [group[0] for group in groups]
    plain = [name for _ in shown]
    folders = [f"{name}: {result.data}" for result in shown]
    files = [f"{folder} ({_file_names(result)})" for folder, result in zip(folders, shown, strict=True)]
    contents = [
        f"{folder} (sha256 {', '.join(scores.sha256[:8] for scores in result.splits.values())})"
        for folder, result in zip(folders, shown, strict=True)
    ]
    for titles in (folders, files) if name.split(" ")[0] == _CSV_TASK else (plain, folders, files):
        if len(set(titles)) == len(titles):
            return titles
    return contents


def _file_names(result: ResultFile) -> str:
    """Return the names of the files that the splits came from."""
    return ", ".join(dict.fromkeys(scores.file for scores in result.splits.values()))


def _distinct_labels(results: Sequence[Result]) -> tuple[Result, ...]:
    """Return a task's results in the order of their base models, each with a label of its own."""
    named = results
    for more in (lambda result: f"seed {result.seed}", lambda result: result.directory):
        times_used = Counter(result.label for result in named)
        named = [
            replace(result, label=f"{result.label}, {more(result)}") if times_used[result.label] > 1 else result
            for result in named
        ]
    for label, times in Counter(result.label for result in named).items():
        if times > 1:
            raise UserError(f"--results: {times} results of task {results[0].task!r} are {label!r}; name each once")
    return tuple(sorted(named, key=lambda result: rank(result.base_model, BASE_MODEL_ORDER)))


def rank(name: str, order: Sequence[str]) -> int:
    """Return the place of `name` in `order`, behind all of it where it isn't named there."""
    return order.index(name) if name in order else len(order)
