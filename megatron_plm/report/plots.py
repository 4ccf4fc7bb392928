"""The plots of a pretraining run, one small figure for each question."""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_plm.report.records import Run, Train, Valid
from megatron_plm.report.theme import Plot, Theme, label_line_ends, render
from megatron_plm.report.wording import duration, large_count, number, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (5.2, 3.1)
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def training_plots(run: Run) -> list[Plot]:
    """Return the plots that the run has data for: no training plots before the first step, and no validation
    plots before the first validation."""
    training = [_loss(run), _learning_rate(run), _throughput(run), _fill(run)] if run.train else []
    validation = [_perplexity(run), _accuracy(run)] if run.valid else []
    # outcome before machinery
    return training[:1] + validation + training[1:]


def _steps_axis(axes: "Axes", last_step: int, label: str) -> None:
    """Give an axes its step axis from 0 to the last step and name what it shows."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, max(1, last_step))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.set_xlabel("training step")
    axes.set_ylabel(label)


def _marker(points: Sequence[object]) -> str:
    """Return a marker that shows points as such while they are few: a single one makes no line."""
    return "o" if len(points) <= 30 else ""


def _loss(run: Run) -> Plot:
    """Training and validation loss by step."""
    steps, losses = [record.step for record in run.train], [record.loss for record in run.train]
    valid_steps, valid_losses = [record.step for record in run.valid], [record.loss for record in run.valid]

    limits = readable_range(run)
    highest = number(_highest_loss(run.train), 2)
    caption = (
        "The mean over all labels. Perplexity and accuracy count only those hidden behind <mask>, not those left in "
        "place or replaced by another letter, so perplexity is not exp(loss)."
    )
    if limits is not None:
        caption += (
            f" The axis is made for the later steps; the losses of the first ones, up to {highest}, lie above it."
        )

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        axes.plot(steps, losses, color=theme.third, linewidth=1.0, marker=_marker(steps), markersize=2.5)
        ends = [(losses[-1], f"training {number(losses[-1])}", theme.muted)]
        if run.valid:
            axes.plot(
                valid_steps,
                valid_losses,
                color=theme.first,
                marker=_marker(valid_steps),
                markersize=3.5,
                clip_on=limits is not None and max(valid_losses) > limits[1],
            )
            ends.append((valid_losses[-1], f"validation {number(valid_losses[-1])}", theme.first))
        _steps_axis(axes, _last_step(run), "loss (nats per label)")
        if limits is not None:
            axes.set_ylim(*limits)
            note = f"first steps: up to {highest} ↑"
            axes.text(0.99, 0.97, note, transform=axes.transAxes, ha="right", va="top", color=theme.muted)
        figure.draw_without_rendering()
        label_line_ends(axes, ends)

    first, last = f"{number(losses[0])} at step {steps[0]}", f"{number(losses[-1])} at step {steps[-1]}"
    alt = f"Training loss from {first} to {last}"
    if run.valid:
        alt += f"; validation loss from {number(valid_losses[0])} to {number(valid_losses[-1])}"
    return render("loss", "Loss", f"{alt}.", _SIZE, draw, caption)


def readable_range(run: Run) -> tuple[float, float] | None:
    """Return the loss axis' ends where the first tenth of the steps would take more than half of it, else None.

    The range then holds every loss but those of the first tenth that lie above all later ones.
    """
    records: list[Train | Valid] = [*run.train, *run.valid]
    later = [record for record in records if record.step > _last_step(run) / 10]
    losses = [record.loss for record in records if math.isfinite(record.loss)]
    bottom, top = min(losses, default=0.0), _highest_loss(later)
    if not bottom < top or _highest_loss(records) - top <= top - bottom:
        return None
    margin = 0.08 * (top - bottom)
    return bottom - margin, top + margin


def _highest_loss(records: Sequence[Train | Valid]) -> float:
    """Return the highest loss that is a number, minus infinity where there is none."""
    return max((record.loss for record in records if math.isfinite(record.loss)), default=-math.inf)


def _perplexity(run: Run) -> Plot:
    """Validation perplexity by step against the unigram baseline of the same split."""
    steps, values = [record.step for record in run.valid], [record.perplexity for record in run.valid]
    baselines = [record.unigram_perplexity for record in run.valid]

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        # one value a split, so a horizontal line over the whole width
        axes.plot([0, *steps], [baselines[0], *baselines], color=theme.second, linestyle=(0, (5, 2)))
        axes.plot(steps, values, color=theme.first, marker=_marker(steps), markersize=3.5, clip_on=False)
        _steps_axis(axes, _last_step(run), "perplexity of masked residues")
        figure.draw_without_rendering()
        ends = [
            (baselines[-1], f"unigram {number(baselines[-1], 2)}", theme.second),
            (values[-1], f"model {number(values[-1], 2)}", theme.first),
        ]
        label_line_ends(axes, ends)

    alt = (
        f"Validation perplexity from {number(values[0], 2)} at step {steps[0]} to {number(values[-1], 2)} at "
        f"step {steps[-1]}; the unigram baseline lies at {number(baselines[-1], 2)}."
    )
    caption = (
        "Over the labels hidden behind <mask>. The unigram baseline is the best guess without context for the same "
        "labels: how common each amino acid is among them."
    )
    return render("perplexity", "Validation perplexity (lower is better)", alt, _SIZE, draw, caption)


def _accuracy(run: Run) -> Plot:
    """Share of masked residues that the model's first guess gets right."""
    steps, percents = [record.step for record in run.valid], [record.accuracy * 100 for record in run.valid]
    title = "Masked accuracy on validation (higher is better)"
    label = "masked residues named correctly (%)"
    caption = "Over the labels hidden behind <mask>: how often the model's first guess is right."
    return _one_line(run, "accuracy", title, label, steps, percents, f"{number(percents[-1], 1)} %", caption=caption)


def _learning_rate(run: Run) -> Plot:
    """Learning rate by step, in units of its largest power of ten."""
    steps, rates = [record.step for record in run.train], [record.lr for record in run.train]
    largest = max((rate for rate in rates if math.isfinite(rate)), default=0.0)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    label = "learning rate" + (f" (×10{str(exponent).translate(_SUPERSCRIPTS)})" if exponent else "")
    scaled = [rate / 10.0**exponent for rate in rates]
    return _one_line(run, "learning-rate", "Learning rate", label, steps, scaled, short_number(scaled[-1]))


def _throughput(run: Run) -> Plot:
    """Tokens that the optimizer consumed a second."""
    steps, rates = [record.step for record in run.train], [record.tokens_per_second for record in run.train]
    title = f"Throughput ({large_count(run.consumed_tokens)} tokens in {duration(run.seconds)})"
    caption = (
        "Each point is the mean over the steps since the point before; the median is "
        f"{short_number(statistics.median(rates))}. Padding is not counted, nor the time of evaluation and saving: a "
        "dip means that the steps themselves were slow, as when another program uses the machine."
    )
    end = short_number(rates[-1])
    return _one_line(run, "throughput", title, "tokens per second", steps, rates, end, caption=caption)


def _fill(run: Run) -> Plot:
    """Part of the rows' positions that hold a token; the rest is padding, computed for nothing."""
    steps, percents = [record.step for record in run.train], [record.fill * 100 for record in run.train]
    title = "Row fill (the rest is padding)"
    end = f"{number(percents[-1], 1)} %"
    return _one_line(run, "fill", title, "row positions filled (%)", steps, percents, end, ceiling=100.0)


def _one_line(
    run: Run,
    name: str,
    title: str,
    label: str,
    steps: Sequence[int],
    values: Sequence[float],
    end: str,
    ceiling: float | None = None,
    caption: str = "",
) -> Plot:
    """Return a plot of one line over steps, from 0 to its largest value or `ceiling`, labelled `end`."""
    from matplotlib.ticker import FuncFormatter

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        axes.plot(
            steps,
            values,
            color=theme.first,
            linewidth=1.2,
            marker=_marker(steps),
            markersize=3.0,
            clip_on=False,
        )
        _steps_axis(axes, _last_step(run), label)
        largest = max((value for value in values if math.isfinite(value)), default=0.0)
        axes.set_ylim(0, (ceiling or largest or 1.0) * 1.05)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        figure.draw_without_rendering()
        label_line_ends(axes, [(values[-1], end, theme.first)])

    first = f"{short_number(values[0])} at step {steps[0]}"
    alt = f"{label[0].upper()}{label[1:]}: {first}, last {end} at step {steps[-1]}."
    return render(name, title, alt, _SIZE, draw, caption)


def _last_step(run: Run) -> int:
    """Return the last step of either curve, the right end of every step axis."""
    return max([record.step for record in run.train[-1:]] + [record.step for record in run.valid[-1:]])
