"""Building the one HTML page: everything it shows is inside it, nothing is loaded, no script runs."""

import base64
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from megatron_plm.report import verdicts, wording
from megatron_plm.report.plots import training_plots
from megatron_plm.report.provenance import Command
from megatron_plm.report.records import Run
from megatron_plm.report.results import Task
from megatron_plm.report.score_plots import score_plots
from megatron_plm.report.theme import Plot

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class Fact:
    """One figure of the page's head: what it is, its value, and a remark beneath."""

    name: str
    value: str
    remark: str


def draw_plots(run: Run, tasks: Sequence[Task]) -> tuple[list[Plot], list[Plot]]:
    """Return the plots of pretraining and, one a task, of the downstream scores."""
    return training_plots(run), score_plots(tasks)


def build_page(
    title: str,
    run: Run,
    tasks: Sequence[Task],
    commands: Sequence[Command],
    training: Sequence[Plot],
    scores: Sequence[Plot],
) -> bytes:
    """Return the page as UTF-8 HTML.

    Args:
        title: the page's heading.
        run: the pretraining run.
        tasks: the downstream tasks, in the order of the page.
        commands: the commands of the experiment, in the order of the work.
        training: plots of the run.
        scores: one plot a task, in the order of `tasks`.
    """
    page = page_template("megatron_plm.report").render(
        title=title,
        run=run,
        summary=[wording.what_was_trained(run), wording.what_came_out(run)],
        caveat=wording.caveat(run, tasks),
        facts=_facts(run),
        remarks=_remarks(run),
        training=training,
        tasks=[
            (task, plot, verdicts.verdicts(task), verdicts.footnotes(task))
            for task, plot in zip(tasks, scores, strict=True)
        ],
        commands=commands,
        ranks_nothing=verdicts.RANKS_NOTHING,
    )
    # JSON can smuggle in half a surrogate pair, which UTF-8 cannot hold
    return page.encode("utf-8", errors="replace")


def page_template(package: str) -> "Template":
    """Return the template page.html of a package, with the style and the filters that all pages share."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=wording.number,
        scored=wording.scored,
        badge=verdicts.badge,
        data_uri=_data_uri,
    )
    environment.globals["style"] = Markup(files("megatron_plm.report").joinpath("style.css").read_text("utf-8"))
    return environment.from_string(files(package).joinpath("page.html").read_text(encoding="utf-8"))


def _data_uri(png: bytes) -> str:
    """Return a PNG as the address of an image embedded in the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _facts(run: Run) -> list[Fact]:
    """Return the page's head figures."""
    start = run.starts[-1]
    facts = [
        Fact("Proteins", f"{start.train_sequences:,}", f"{wording.large_count(start.train_residues)} residues"),
        Fact("Parameters", wording.large_count(start.num_parameters), f"seed {start.seed}"),
    ]
    if run.train:
        tokens = wording.large_count(run.consumed_tokens)
        facts.append(Fact("Training time", wording.duration(run.seconds), f"{run.train[-1].step:,} steps"))
        speed = statistics.median(record.tokens_per_second for record in run.train)
        facts.append(Fact("Tokens read", tokens, f"{wording.short_number(speed)} tokens/s (median)"))
    if run.valid:
        last = run.valid[-1]
        below = f"{wording.against_baseline(run)} the baseline's {wording.number(last.unigram_perplexity, 2)}"
        facts.append(Fact("Validation perplexity", wording.number(last.perplexity, 2), below))
        accuracy = f"{wording.number(last.accuracy * 100, 1)} %"
        facts.append(Fact("Masked accuracy", accuracy, f"of {last.num_labels:,} masked residues"))
    return facts


def _remarks(run: Run) -> list[str]:
    """Return what a reader must know of the run's record itself."""
    remarks = []
    if len(run.starts) > 1:
        remarks.append(
            f"The run was started {len(run.starts)} times. Training records that a later start superseded "
            f"are not shown ({run.num_repeated_steps:,})."
        )
    earlier = run.train[0].consumed_tokens - run.train[0].tokens if run.train else 0
    if earlier > 0:
        remarks.append(
            f"The run went on from a checkpoint of another run: {wording.large_count(earlier)} tokens were read "
            "before its first record, in time that is not counted here."
        )
    if run.truncated:
        remarks.append("The last line of metrics.jsonl was cut off, as happens when a run is killed; it was left out.")
    divergence = wording.diverged(run)
    if divergence is not None:
        remarks.append(divergence)
    return remarks
