"""The bar plots of downstream scores: one figure a task, one panel a split, one bar a model."""

import math
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_plm.report.results import Result, Row, Task
from megatron_plm.report.theme import Plot, Theme, render
from megatron_plm.report.verdicts import RANKS_NOTHING, badge
from megatron_plm.report.wording import number, scored

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS_PER_LINE = 3


def score_plots(tasks: Sequence[Task]) -> list[Plot]:
    """Return one plot of primary scores for each task, in order; file names derive from the tasks' names."""
    plots: list[Plot] = []
    for task in tasks:
        plain = re.sub(r"[^a-z0-9]+", "-", task.name.lower()).strip("-") or "task"
        taken = [plot.name for plot in plots]
        name = f"scores-{plain}"
        plots.append(_score_plot(task, name if name not in taken else f"{name}-{len(plots) + 1}"))
    return plots


def _score_plot(task: Task, name: str) -> Plot:
    """Return the bars of one task: value, bootstrap interval, and hatching where a split ranks nothing or a result
    carries a note."""
    splits = task.splits()
    rows = {split: [row for row in task.rows() if row.split == split] for split in splits}
    metrics = list(dict.fromkeys(row.metric for shown in rows.values() for row in shown))
    columns = min(len(splits), _PANELS_PER_LINE)
    lines = math.ceil(len(splits) / columns)
    labels = [_tick_label(result) for result in task.results]
    # inches: what the longest label needs
    bar = 0.17 * max(2, *(label.count("\n") + 1 for label in labels))
    size = (10.6 if columns > 1 else 6.4, 0.3 + lines * (0.75 + bar * len(labels)))

    def draw(figure: "Figure", theme: Theme) -> None:
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
        limits = _limits([row for shown in rows.values() for row in shown])
        for index, panel in enumerate(panels):
            if index >= len(splits):
                panel.set_visible(False)
                continue
            split = splits[index]
            _bars(panel, rows[split], task, theme)
            panel.set_yticks(range(len(labels)), labels if index % columns == 0 else [""] * len(labels))
            count = _examples(rows[split]) + ("" if task.ranks(split) else f", {RANKS_NOTHING}")
            panel.set_title(f"{split} ({count})", loc="left", color=theme.text)
            panel.set_xlim(*limits)
            panel.tick_params(labelbottom=True)
        for panel in panels[max(0, len(splits) - columns) : len(splits)]:
            panel.set_xlabel(" / ".join(metrics))

    described = "; ".join(
        f"{row.result.label} on {split} {scored(row.score)}" for split in splits for row in rows[split]
    )
    described += "".join(f"; {split} {RANKS_NOTHING}" for split in splits if not task.ranks(split))
    title = f"{task.title}, {' / '.join(metrics)} with bootstrap interval"
    return render(name, title, f"{described}.", size, draw)


def _examples(rows: Sequence[Row]) -> str:
    """Return how many examples a split's bars stand on, or that the models saw different numbers of them."""
    counts = {row.scores.num_examples for row in rows}
    if len(counts) > 1:
        return "different numbers of examples"
    count = counts.pop()
    return f"{count:,} example{'s' if count != 1 else ''}"


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Return a common range that holds 0, every interval, the whole unit range for scores inside it, and room
    for the value's text on the right."""
    ends = [end for row in rows for end in (row.score.value, row.score.low, row.score.high) if math.isfinite(end)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    high = 1.0 if high <= 1.0 else high
    return low - (0.05 * (high - low) if low < 0 else 0), high + 0.16 * (high - low)


def _bars(axes: "Axes", rows: Sequence[Row], task: Task, theme: Theme) -> None:
    """Draw one split's bars from the top down, one line for every result of the task, scored here or not."""
    by_label = {row.result.label: row for row in rows}
    for place, result in enumerate(task.results):
        row = by_label.get(result.label)
        if row is None:
            axes.text(0, place, " not scored", va="center", color=theme.muted)
            continue
        score = row.score
        if not math.isfinite(score.value):
            axes.text(0, place, " undefined", va="center", color=theme.muted)
            continue
        colour = _colour(result, theme)
        doubtful = result.note or not task.ranks(row.split)
        fill = theme.background if doubtful else colour
        hatch = "////" if doubtful else None
        axes.barh(place, score.value, height=0.62, facecolor=fill, edgecolor=colour, hatch=hatch)
        right = score.value
        if math.isfinite(score.low) and math.isfinite(score.high):
            ends = [score.low, score.high]
            axes.plot(ends, [place, place], color=theme.text, linewidth=1.4, marker="|", markersize=7, zorder=3)
            right = max(right, score.high)
        axes.annotate(
            number(score.value),
            (max(right, 0.0), place),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=theme.text,
        )
    axes.set_ylim(len(task.results) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=theme.text)


def _tick_label(result: Result) -> str:
    """Return what names a result's bar: its label, broken into lines that leave the bars their room and
    cut where it would not end, and its note's badge beneath."""
    label = "\n".join(textwrap.wrap(result.label, width=30, max_lines=2, placeholder=" …"))
    return f"{label}\n({badge(result.note)})" if result.note else label


def _colour(result: Result, theme: Theme) -> str:
    """Return blue for a pretrained model, grey for the one-hot baseline, orange for untrained weights."""
    if result.from_pretrained is not None:
        return theme.first
    return theme.third if result.base_model == "onehot" else theme.second
