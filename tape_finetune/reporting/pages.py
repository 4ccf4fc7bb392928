"""The report as Markdown, JSON and one self-contained HTML page, all of the same tables."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_plm import __version__
from megatron_plm.report.page import page_template
from megatron_plm.report.theme import Plot
from megatron_plm.report.wording import number
from tape_finetune.reporting.groups import Cell, Model, TaskScores, warnings
from tape_finetune.reporting.published import HEADLINES, NOTE, PROTEINLM, PUBLISHED, TAPE

_MISSING = "–"
# An underscore inside a word, and brackets that no address follows, mean nothing to it.
_MARKS = re.compile(r"[\\`*<>#]|(?<!\w)_|_(?!\w)|\](?=[(\[:])")


@dataclass(frozen=True)
class Section:
    """One task's part of the report, with its plots: bars first, then one of the predictions where they are there."""

    task: TaskScores
    plots: tuple[Plot, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table as text; `published` says of each row whether its values are others'."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    published: tuple[bool, ...] = ()

    def is_published(self, row: int) -> bool:
        return bool(self.published) and self.published[row]


def shown(cell: Cell | None) -> str:
    """`0.712 ± 0.004 (3)` over three seeds, `0.712 [0.690, 0.731]` of one, with its interval."""
    if cell is None:
        return _MISSING
    if cell.score is not None:
        return f"{number(cell.mean)} [{number(cell.score.low)}, {number(cell.score.high)}]"
    return f"{number(cell.mean)} ± {number(cell.deviation or 0.0)} ({len(cell.values)})"


def overview(tasks: Sequence[TaskScores]) -> Table:
    """All models by the headline of each task, the published ones below, marked."""
    labels = dict.fromkeys(model.label for task in tasks for model in task.models)
    columns = tuple(f"{task.title}: {task.headline[1]} on {task.headline[0]}" for task in tasks)
    rows = []
    for label in labels:
        cells = []
        for task in tasks:
            model = next((model for model in task.models if model.label == label), None)
            cells.append(shown(model.cell(*task.headline)) if model is not None else _MISSING)
        rows.append((label, *cells))
    ours = len(rows)
    if any(task.published for task in tasks):
        for row in PUBLISHED:
            values = [number(row.values[task.name], 2) if task.published else _MISSING for task in tasks]
            rows.append((f"{row.model} (published, original splits)", *values))
    marks = tuple(index >= ours for index in range(len(rows)))
    return Table("The metric that stands for each task", ("model", *columns), tuple(rows), marks)


def task_table(task: TaskScores) -> Table:
    """The primary metric of every model on every split."""
    metric = task.headline[1]
    columns = ("model", "seeds", *task.splits, "parameters trained", "seconds a run", "peak memory")
    rows = [
        (
            model.label + "".join(f" ({note})" for note in model.notes),
            ", ".join(map(str, model.seeds)),
            *(shown(model.cell(split, metric)) for split in task.splits),
            f"{model.runs[0].num_trained_parameters:,}",
            number(model.seconds, 1),
            _memory(model),
        )
        for model in task.models
    ]
    return Table(f"{metric}, mean ± standard deviation (seeds)", columns, tuple(rows))


def metrics_table(task: TaskScores) -> Table:
    """All metrics on the test splits."""
    rows = [
        (split, metric, *(shown(model.cell(split, metric)) for model in task.models))
        for split in task.test_splits
        for metric in task.metrics
    ]
    return Table("All metrics", ("split", "metric", *(model.label for model in task.models)), tuple(rows))


def splits_table(task: TaskScores) -> Table:
    """What the splits are, what was done to their proteins, and their checksums."""
    headline = task.published_as
    rows = []
    for train in task.train_splits:
        counts = (train.cropped, train.windowed, 0, train.num_undefined)
        shown_counts = (f"{train.num_examples:,}", _MISSING, *(f"{count:,}" for count in counts), _MISSING)
        rows.append(("train", train.file, *shown_counts, train.sha256))
    for split, scores in task.splits.items():
        if split == "train" and task.train_splits:
            continue
        original = f"{headline.num_examples:,}" if headline is not None and split == headline.split else _MISSING
        counts = (scores.cropped, scores.windowed, scores.num_dropped, scores.num_undefined)
        in_train = _MISSING if scores.num_in_train is None else f"{scores.num_in_train:,}"
        shown_counts = (f"{scores.num_examples:,}", original, *(f"{count:,}" for count in counts), in_train)
        rows.append((split, scores.file, *shown_counts, scores.sha256))
    counted = ("cropped", "in windows", "left out", "without a label", "also in train")
    return Table("Splits", ("split", "file", "proteins", "in the original split", *counted, "sha256"), tuple(rows))


def sources(tasks: Sequence[TaskScores]) -> list[str]:
    """Where the published values of the first table are from; empty where it has none."""
    if not any(task.published for task in tasks):
        return []
    models = {source: [row.model for row in PUBLISHED if row.source == source] for source in (TAPE, PROTEINLM)}
    return [NOTE, *(f"{', '.join(names)}: {source}." for source, names in models.items())]


def notes(task: TaskScores) -> list[str]:
    """What must be known of a task's published values."""
    headline = task.published_as
    return [headline.note] if headline is not None and headline.note else []


def markdown(title: str, sections: Sequence[Section], plot_folder: str) -> str:
    """The report as Markdown; plots are files in `plot_folder` beside it."""
    tasks = [section.task for section in sections]
    lines = [f"# {_escaped(title)}", "", *(f"- {_escaped(line)}" for line in warnings(tasks)), ""]
    lines += ["## All tasks", "", *_markdown_table(overview(tasks)), ""]
    lines += [line for source in sources(tasks) for line in (_escaped(source), "")]
    for section in sections:
        task = section.task
        lines += [f"## {_escaped(task.title)}", ""]
        for plot in section.plots:
            lines += [f"![{_escaped(plot.alt)}]({plot_folder}/{plot.name}.png)", ""]
        lines += [line for note in (*notes(task), *section.remarks) for line in (_escaped(note), "")]
        for table in (task_table(task), metrics_table(task), splits_table(task)):
            lines += [f"{_escaped(table.title)}:", "", *_markdown_table(table), ""]
        lines += ["Commands:", "", "```", *_commands(task), "```", ""]
    return "\n".join(lines)


def html(title: str, sections: Sequence[Section]) -> bytes:
    """The report as a page that loads nothing, as UTF-8."""
    tasks = [section.task for section in sections]
    page = page_template("tape_finetune.reporting").render(
        title=title,
        warnings=warnings(tasks),
        overview=overview(tasks),
        sources=sources(tasks),
        sections=[
            {
                "title": section.task.title,
                "anchor": f"task-{index}",
                "plots": section.plots,
                "notes": [*notes(section.task), *section.remarks],
                "table": task_table(section.task),
                "details": (metrics_table(section.task), splits_table(section.task)),
                "commands": _commands(section.task),
            }
            for index, section in enumerate(sections, start=1)
        ],
        version=__version__,
    )
    return page.encode("utf-8", errors="replace")


def document(title: str, sections: Sequence[Section]) -> dict[str, Any]:
    """The report as JSON: every value of every seed, null where it is undefined."""
    return {
        "title": title,
        "megatron_plm": __version__,
        "warnings": warnings([section.task for section in sections]),
        "tasks": [_task_document(section.task) for section in sections],
        "published": {
            "note": NOTE,
            "metrics": {name: asdict(headline) for name, headline in HEADLINES.items()},
            "models": [asdict(row) for row in PUBLISHED],
        },
    }


def _task_document(task: TaskScores) -> dict[str, Any]:
    split, metric = task.headline
    return {
        "task": task.name,
        "title": task.title,
        "headline": {"split": split, "metric": metric, "has_published_values": task.published_as is not None},
        "train": [asdict(train) for train in task.train_splits],
        "splits": {
            name: {
                **{key: value for key, value in asdict(scores).items() if key != "metrics"},
                "ranks": task.ranks(name),
            }
            for name, scores in task.splits.items()
        },
        "models": [
            {
                "label": model.label,
                "base_model": model.base_model,
                "num_trained_parameters": model.runs[0].num_trained_parameters,
                "seconds": model.seconds,
                "peak_memory": model.memory,
                "peak_memory_of": "GPU" if model.is_on_gpu else "process",
                "notes": model.notes,
                "runs": [{"directory": run.directory, "seed": run.seed, "command": run.command} for run in model.runs],
                "scores": {
                    name: {
                        metric: _cell_document(cell)
                        for metric in task.metrics
                        if (cell := model.cell(name, metric)) is not None
                    }
                    for name in task.splits
                },
            }
            for model in task.models
        ],
    }


def _memory(model: Model) -> str:
    """The most memory of a training, with what had it."""
    if model.memory is None:
        return _MISSING
    return f"{model.memory / 1e6:,.0f} MB" + (" (GPU)" if model.is_on_gpu else "")


def _cell_document(cell: Cell) -> dict[str, Any]:
    interval = [] if cell.score is None else [_finite(cell.score.low), _finite(cell.score.high)]
    return {
        "mean": _finite(cell.mean),
        "sd": None if cell.deviation is None else _finite(cell.deviation),
        "values": [_finite(value) for value in cell.values],
        "interval": interval or None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _commands(task: TaskScores) -> list[str]:
    return [run.command for model in task.models for run in model.runs]


def _markdown_table(table: Table) -> list[str]:
    lines = ["| " + " | ".join(map(_cell_text, table.columns)) + " |"]
    lines.append("|" + "---|" * len(table.columns))
    for index, row in enumerate(table.rows):
        cells = [f"*{_cell_text(cell)}*" if table.is_published(index) else _cell_text(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell_text(text: str) -> str:
    return _escaped(text).replace("|", "\\|")


def _escaped(text: str) -> str:
    """Text whose signs Markdown would read as its own."""
    return _MARKS.sub(r"\\\g<0>", text)
