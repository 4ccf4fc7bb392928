"""Results of several seeds as mean and standard deviation, by task, set of data and model."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_plm.errors import UserError
from megatron_plm.report.results import (
    BASE_MODEL_ORDER,
    ENOUGH_TO_RANK,
    SPLIT_ORDER,
    Result,
    Score,
    SplitScores,
    TrainSplit,
    group_by_data,
    rank,
)
from tape_finetune.reporting.published import HEADLINES, PUBLISHED, Headline, Published


@dataclass(frozen=True)
class Cell:
    """One metric of one model on one split: a value a seed; undefined ones are NaN.

    `score` is that of the only seed, with its bootstrap interval; None where there are several.
    """

    values: tuple[float, ...]
    score: Score | None

    @property
    def mean(self) -> float:
        """NaN where one of the values is."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation (n − 1); None of one seed."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) if all(map(math.isfinite, self.values)) else math.nan


@dataclass(frozen=True)
class Model:
    """The runs of one model on one task: same label, other seeds, in the seeds' order."""

    label: str
    runs: tuple[Result, ...]

    @property
    def base_model(self) -> str:
        return self.runs[0].base_model

    @property
    def is_pretrained(self) -> bool:
        return self.runs[0].from_pretrained is not None

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def seconds(self) -> float:
        """Of a training, the mean."""
        return statistics.fmean(run.seconds for run in self.runs)

    @property
    def memory(self) -> int | None:
        """The most bytes that a training had: of the GPU where there was one, else of the process. None is unknown."""
        found = [run.peak_gpu_memory or run.peak_memory for run in self.runs]
        return max((peak for peak in found if peak is not None), default=None)

    @property
    def is_on_gpu(self) -> bool:
        return any(run.peak_gpu_memory for run in self.runs)

    @property
    def notes(self) -> list[str]:
        return list(dict.fromkeys(run.note for run in self.runs if run.note))

    def cell(self, split: str, metric: str) -> Cell | None:
        """None where no run scored it."""
        scores = [
            run.splits[split].metrics[metric]
            for run in self.runs
            if split in run.splits and metric in run.splits[split].metrics
        ]
        if not scores:
            return None
        return Cell(tuple(score.value for score in scores), scores[0] if len(scores) == 1 else None)


@dataclass(frozen=True)
class TaskScores:
    """All models of one task on one set of data; `title` tells it from every other of the report."""

    name: str
    title: str
    models: tuple[Model, ...]

    @property
    def splits(self) -> dict[str, SplitScores]:
        """What the splits are: train, valid, then test splits as first met."""
        found: dict[str, SplitScores] = {}
        for run in self._runs():
            for split, scores in run.splits.items():
                found.setdefault(split, scores)
        return dict(sorted(found.items(), key=lambda item: rank(item[0], SPLIT_ORDER)))

    @property
    def train_splits(self) -> list[TrainSplit]:
        """What was trained on; several where models differ in it, none where no run says so."""
        return list(dict.fromkeys(run.train for run in self._runs() if run.train is not None))

    @property
    def test_splits(self) -> list[str]:
        """Those that no choice was made on; valid where there is no other."""
        return [split for split in self.splits if split not in SPLIT_ORDER] or list(self.splits)

    @property
    def metrics(self) -> list[str]:
        """The primary metric first."""
        names = dict.fromkeys(run.primary_metric for run in self._runs())
        for run in self._runs():
            for scores in run.splits.values():
                names.update(dict.fromkeys(scores.metrics))
        return list(names)

    @property
    def published_as(self) -> Headline | None:
        """What published values there are, where a model has the split and metric; else None."""
        headline = HEADLINES.get(self.name)
        if headline is None:
            return None
        shown = [model.cell(headline.split, headline.metric) for model in self.models]
        return headline if any(cell is not None for cell in shown) else None

    @property
    def headline(self) -> tuple[str, str]:
        """The split and the metric that stand for the task: those of the published values, where there are any."""
        published = self.published_as
        if published is not None:
            return published.split, published.metric
        return self.test_splits[0], self.metrics[0]

    @property
    def published(self) -> list[tuple[Published, float]]:
        """The published values of the headline."""
        if self.published_as is None:
            return []
        return [(row, row.values[self.name]) for row in PUBLISHED]

    def ranks(self, split: str) -> bool:
        """Whether a split has enough proteins for a comparison of models."""
        return self.splits[split].num_examples >= ENOUGH_TO_RANK

    def _runs(self) -> list[Result]:
        return [run for model in self.models for run in model.runs]


def group(results: Sequence[Result]) -> list[TaskScores]:
    """One entry a task and set of data, TAPE's tasks first; runs whose splits differ in content are never in one.

    Raises UserError where two runs of one label have the same seed, or differ in their number of parameters, their
    training split or their primary metric.
    """
    tasks = [TaskScores(name, title, _models(title, runs)) for name, title, runs in group_by_data(results)]
    return sorted(tasks, key=lambda task: rank(task.name, tuple(HEADLINES)))


def warnings(tasks: Sequence[TaskScores]) -> list[str]:
    """What must be known before any number is compared."""
    titles: dict[str, list[str]] = {}
    for task in tasks:
        titles.setdefault(task.name, []).append(task.title)
    lines = [
        f"{name} was scored on {len(several)} sets of data whose splits differ in content (see the checksums); they "
        f"are not averaged together: {'; '.join(several)}."
        for name, several in titles.items()
        if len(several) > 1
    ]
    few = [f"{task.title} {split}" for task in tasks for split in task.splits if not task.ranks(split)]
    if few:
        lines.append(f"Splits of fewer than {ENOUGH_TO_RANK} proteins rank nothing: {', '.join(few)}.")
    single = [f"{model.label} on {task.title}" for task in tasks for model in task.models if len(model.runs) == 1]
    if single:
        lines.append(
            "One seed only, whose luck no bootstrap interval covers; a claim needs several: " + "; ".join(single) + "."
        )
    return lines


def _models(title: str, runs: Sequence[Result]) -> tuple[Model, ...]:
    by_label: dict[str, list[Result]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    models = []
    for label, same in by_label.items():
        for number, run in enumerate(same):
            for other in same[:number]:
                _check_alike(title, label, other, run)
        models.append(Model(label, tuple(sorted(same, key=lambda run: run.seed))))
    return tuple(sorted(models, key=lambda model: rank(model.base_model, BASE_MODEL_ORDER)))


def _check_alike(title: str, label: str, first: Result, second: Result) -> None:
    """Raise UserError where two runs of one label cannot be seeds of one model."""
    differs = None
    if first.seed == second.seed:
        differs = f"have the same seed {first.seed}"
    elif first.base_model != second.base_model or first.num_trained_parameters != second.num_trained_parameters:
        differs = "train different models"
    elif first.train and second.train and first.train.sha256 != second.train.sha256:
        differs = "were trained on different proteins"
    elif first.primary_metric != second.primary_metric:
        differs = f"are judged by {first.primary_metric} and {second.primary_metric}"
    if differs:
        raise UserError(
            f"--results: {first.directory} and {second.directory} are both {label!r} of {title} and {differs}; name "
            "one of them, or train again with another --label"
        )
