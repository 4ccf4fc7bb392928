"""Plots of predictions: a scatter of numbers, a confusion matrix of classes, maps of contacts."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_plm.report.theme import Plot, Theme, render
from megatron_plm.report.wording import number
from tape_finetune.reporting.bars import plain_name
from tape_finetune.reporting.groups import TaskScores
from tape_finetune.reporting.saved import Saved

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_CLASSES = 20  # of a matrix whose numbers can still be read
_NUM_MAPS = 3


def detail_plot(task: TaskScores, saved: Saved) -> Plot | None:
    """The plot that fits what is predicted; None where there is none, as of proteins without a contact."""
    kinds: dict[str, Callable[[TaskScores, Saved], Plot | None]] = {
        "value": _scatter,
        "label": _confusion,
        "residues": _confusion,
        "labels": _per_class,
        "contacts": _contact_maps,
    }
    return kinds[saved.kind](task, saved)


def _named(task: TaskScores, saved: Saved, what: str) -> tuple[str, str]:
    """The plot's name and title."""
    title = f"{task.title}, {what}: {saved.label}, seed {saved.seed}, on {saved.split}"
    return f"{plain_name(what)}-{plain_name(task.title)}", title


def _score(task: TaskScores, saved: Saved, metric: str) -> float:
    """A metric of the run that is drawn; NaN where it was not scored."""
    runs = [run for model in task.models for run in model.runs if run.directory == saved.directory]
    scores = runs[0].splits[saved.split].metrics
    return scores[metric].value if metric in scores else math.nan


def _scatter(task: TaskScores, saved: Saved) -> Plot:
    truths = [line["truth"]["value"] for line in saved.lines]
    found = [line["prediction"]["value"] for line in saved.lines]
    spearman = _score(task, saved, "spearmanr")
    name, title = _named(task, saved, "predicted and true")

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        # As many dots as there are proteins: the more, the fainter.
        alpha = min(0.8, max(0.05, 300 / len(truths)))
        axes.scatter(truths, found, s=9, color=theme.first, alpha=alpha, linewidths=0, rasterized=True)
        ends = min(truths + found), max(truths + found)
        axes.plot(ends, ends, color=theme.muted, linewidth=1, linestyle="--")
        text = f"Spearman {number(spearman)}\n{len(truths):,} proteins"
        axes.text(0.02, 0.98, text, transform=axes.transAxes, va="top", color=theme.text)
        axes.set_xlabel("true")
        axes.set_ylabel("predicted")

    alt = f"{len(truths):,} proteins, Spearman's correlation {number(spearman)}."
    return render(name, title, alt, (5.2, 4.6), draw, "Each dot is a protein; on the dashed line prediction is truth.")


def _confusion(task: TaskScores, saved: Saved) -> Plot:
    counts = Counter(saved.pairs())
    classes = _class_order({name for pair in counts for name in pair})
    if len(classes) > _MOST_CLASSES:
        return _large_confusion(task, saved, counts, classes)
    totals = {true: sum(counts[true, other] for other in classes) for true in classes}
    share = [[counts[true, other] / max(1, totals[true]) for other in classes] for true in classes]
    name, title = _named(task, saved, "confusion")
    side = max(2.6, 0.62 * len(classes))

    def draw(figure: "Figure", theme: Theme) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        axes = figure.subplots()
        colours = LinearSegmentedColormap.from_list("share", [theme.background, theme.first])
        axes.imshow(share, cmap=colours, vmin=0, vmax=1)
        for row, values in enumerate(share):
            for column, value in enumerate(values):
                shown = f"{100 * value:.0f}" if value == 0 or value >= 0.005 else "<1"
                axes.text(column, row, shown, ha="center", va="center", color=theme.text, fontsize=8)
        axes.set_xticks(range(len(classes)), classes, rotation=0 if max(map(len, classes)) <= 3 else 40, ha="center")
        axes.set_yticks(range(len(classes)), [f"{true} ({totals[true]:,})" for true in classes])
        axes.grid(False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")

    unit = "residues" if saved.kind == "residues" else "proteins"
    alt = "; ".join(f"of {true}, {100 * share[row][row]:.0f} % right" for row, true in enumerate(classes))
    caption = f"Per cent of the {unit} of each true class, whose number stands in brackets; rows add up to 100."
    return render(name, title, f"{alt}.", (side + 2.2, side + 1.3), draw, caption)


def _large_confusion(task: TaskScores, saved: Saved, counts: Counter[tuple[str, str]], classes: list[str]) -> Plot:
    """The matrix of hundreds of classes: a dot for each pair of true and predicted that occurs."""
    place = {name: index for index, name in enumerate(classes, start=1)}
    number_of = sum(counts.values())
    hits = {pair: count for pair, count in counts.items() if pair[0] == pair[1]}
    misses = {pair: count for pair, count in counts.items() if pair[0] != pair[1]}
    share = sum(hits.values()) / number_of
    favourites: Counter[str] = Counter()
    for (_, predicted), count in counts.items():
        favourites[predicted] += count
    most = ", ".join(f"{label} ({count:,})" for label, count in favourites.most_common(3))
    unit = "residues" if saved.kind == "residues" else "proteins"
    name, title = _named(task, saved, "confusion")

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        for pairs, colour in ((misses, theme.second), (hits, theme.first)):
            x, y = [place[predicted] for _, predicted in pairs], [place[true] for true, _ in pairs]
            axes.scatter(x, y, s=[5.0 * count for count in pairs.values()], color=colour, alpha=0.7, linewidths=0)
        axes.set_xlim(0, len(classes) + 1)
        axes.set_ylim(len(classes) + 1, 0)
        axes.set_aspect("equal")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")

    alt = f"{number_of:,} {unit} of {len(classes):,} classes, {100 * share:.0f} % right; predicted most often: {most}."
    caption = (
        f"The {len(classes):,} classes that are true or predicted here, in their order on both axes; the area of a dot "
        f"is the number of {unit}, blue where prediction is truth. Predicted most often: {most}."
    )
    return render(name, title, alt, (5.6, 5.6), draw, caption)


def _per_class(task: TaskScores, saved: Saved) -> Plot:
    lines = [(set(line["truth"]["labels"]), set(line["prediction"]["labels"])) for line in saved.lines]
    classes = list(saved.lines[0]["prediction"]["probabilities"])
    counts = {
        name: (
            sum(name in true and name in found for true, found in lines),
            sum(name in true for true, _ in lines),
            sum(name in found for _, found in lines),
        )
        for name in classes
    }
    f1 = [2 * hits / (true + found) if true + found else math.nan for hits, true, found in counts.values()]
    name, title = _named(task, saved, "F1 of each class")

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        axes.barh(range(len(classes)), [0 if math.isnan(x) else x for x in f1], height=0.66, color=theme.first)
        for place, value in enumerate(f1):
            shown = 0 if math.isnan(value) else value
            axes.annotate(number(value), (shown, place), (6, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(classes)), [f"{label} ({counts[label][1]:,})" for label in classes])
        axes.set_ylim(len(classes) - 0.45, -0.55)
        axes.set_xlim(0, 1.1)
        axes.grid(False, axis="y")
        axes.set_xlabel("F1")

    alt = "; ".join(f"{label} {number(value)}" for label, value in zip(classes, f1, strict=True))
    caption = "In brackets the number of proteins that have the class; a protein may have several."
    return render(name, title, f"{alt}.", (7.4, 0.75 + 0.34 * len(classes)), draw, caption)


def _contact_maps(task: TaskScores, saved: Saved) -> Plot | None:
    scored = []
    for index, line in enumerate(saved.lines):
        true = {tuple(pair) for pair in line["truth"]["contacts"]}
        best = line["prediction"]["contacts"]
        if true and best:
            scored.append((sum((i, j) in true for i, j, _ in best) / len(best), index))
    if not scored:
        return None
    scored.sort()
    places = dict.fromkeys([len(scored) - 1, len(scored) // 2, 0])
    chosen = [scored[place] for place in places][:_NUM_MAPS]
    name, title = _named(task, saved, "contact maps")

    def draw(figure: "Figure", theme: Theme) -> None:
        panels = figure.subplots(1, len(chosen), squeeze=False)[0]
        for axes, (precision, index) in zip(panels, chosen, strict=True):
            line = saved.lines[index]
            _map(axes, line, theme)
            axes.set_title(f"protein {index + 1}: {100 * precision:.0f} % of {len(line['prediction']['contacts'])}")

    alt = "; ".join(f"protein {index + 1} has {100 * share:.0f} % right" for share, index in chosen)
    caption = (
        "Lower left the true contacts; upper right the pairs with the highest probability, as many as the protein has "
        "residues, blue where they are contacts, orange where not. Of the split the best, the median and the worst "
        "protein by the share of these pairs that are contacts, named by their place in it."
    )
    return render(name, title, f"{alt}.", (3.5 * len(chosen), 4.3), draw, caption)


def _map(axes: "Axes", line: Mapping[str, Any], theme: Theme) -> None:
    """One protein: truth below the diagonal, predictions above it."""
    true = [tuple(pair) for pair in line["truth"]["contacts"]]
    known = set(true)
    length = line["length"]
    dot = max(1.0, 500.0 / length)
    hits = [(i, j) for i, j, _ in line["prediction"]["contacts"] if (i, j) in known]
    misses = [(i, j) for i, j, _ in line["prediction"]["contacts"] if (i, j) not in known]
    drawn: Sequence[tuple[Sequence[tuple[int, int]], str]] = (
        ([(i, j) for j, i in true], theme.third),
        (misses, theme.second),
        (hits, theme.first),
    )
    for pairs, colour in drawn:
        axes.scatter([j for _, j in pairs], [i for i, _ in pairs], s=dot, color=colour, marker="s", linewidths=0)
    axes.plot([1, length], [1, length], color=theme.muted, linewidth=0.6)
    axes.set_xlim(0.5, length + 0.5)
    axes.set_ylim(length + 0.5, 0.5)
    axes.set_aspect("equal")
    axes.set_xlabel("residue")


def _class_order(names: set[str]) -> list[str]:
    """Structure classes as their field has them, numbers by value, others by name."""
    if names <= set("HEC"):
        return sorted(names, key="HEC".index)
    if all(name.isdigit() for name in names):
        return sorted(names, key=int)
    return sorted(names)
