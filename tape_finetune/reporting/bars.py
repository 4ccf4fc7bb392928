"""The bars of a task: every model's mean over seeds, beside the published values."""

import math
import re
import textwrap
from typing import TYPE_CHECKING

from megatron_plm.report.theme import Plot, Theme, render
from megatron_plm.report.wording import number
from tape_finetune.reporting.groups import Cell, Model, TaskScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def bar_plot(task: TaskScores) -> Plot:
    """One bar a model with the deviation over seeds (or, of one seed, its bootstrap interval) and a dot a seed; below
    them, hatched, the published values, which are on other splits."""
    split, metric = task.headline
    ours = [(model, model.cell(split, metric)) for model in task.models]
    published = task.published
    labels = [_wrapped(model.label) for model, _ in ours]
    labels += [_wrapped(f"{row.model} (published)") for row, _ in published]
    size = (8.6, 0.75 + 0.36 * len(labels))
    ends = [end for _, cell in ours if cell is not None for end in _ends(cell)] + [value for _, value in published]
    finite = [0.0, *filter(math.isfinite, ends)]
    low, high = min(finite), max(finite)
    high = 1.0 if 0.3 < high <= 1.0 else (high or 1.0)

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        for place, (model, cell) in enumerate(ours):
            colour = _colour(model, theme)
            if cell is None or not math.isfinite(cell.mean):
                text = " not scored" if cell is None else " undefined"
                axes.text(0, place, text, va="center", color=theme.muted)
                continue
            axes.barh(place, cell.mean, height=0.66, facecolor=colour, alpha=0.85)
            start, end = _ends(cell)
            axes.plot([start, end], [place, place], color=theme.text, linewidth=1.3, marker="|", markersize=6, zorder=3)
            if cell.score is None:
                axes.plot(cell.values, [place] * len(cell.values), ".", color=theme.text, markersize=5, zorder=4)
            _annotate(axes, number(cell.mean), max(0.0, end, *cell.values), place, theme.text)
        for index, (_, value) in enumerate(published):
            place = len(ours) + index
            edge = theme.muted
            axes.barh(
                place, value, height=0.66, facecolor=theme.background, edgecolor=edge, hatch="////", linewidth=0.8
            )
            _annotate(axes, number(value, 2), value, place, theme.muted)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.45, -0.55)
        axes.set_xlim(low * 1.05, high + 0.1 * (high - low))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0, labelcolor=theme.text)
        axes.set_xlabel(f"{metric} on {split}")

    told = [f"{model.label} {_told(cell)}" for model, cell in ours]
    told += [f"{row.model}, published, {number(value, 2)}" for row, value in published]
    caption = "Bars are means over seeds, with a dot for each and a line of one standard deviation to either side; "
    caption += "of a single seed the line is its bootstrap interval over proteins."
    if published:
        caption += " Hatched: published values, on TAPE's original splits."
    return render(f"bars-{plain_name(task.title)}", task.title, "; ".join(told) + ".", size, draw, caption)


def plain_name(text: str) -> str:
    """A name of letters, digits and hyphens for a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "task"


def _annotate(axes: "Axes", text: str, x: float, y: float, colour: str) -> None:
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", color=colour)


def _ends(cell: Cell) -> tuple[float, float]:
    """The ends of a bar's line."""
    if cell.score is not None:
        return cell.score.low, cell.score.high
    deviation = cell.deviation or 0.0
    return cell.mean - deviation, cell.mean + deviation


def _told(cell: Cell | None) -> str:
    if cell is None:
        return "not scored"
    spread = "" if cell.deviation is None else f" ± {number(cell.deviation)}"
    return f"{number(cell.mean)}{spread}"


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, width=34, max_lines=2, placeholder=" …"))


def _colour(model: Model, theme: Theme) -> str:
    """Blue for a pretrained model, grey for the one-hot baseline, orange for others."""
    if model.is_pretrained:
        return theme.first
    return theme.third if model.base_model == "onehot" else theme.second
