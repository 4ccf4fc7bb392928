"""The command `report`: from a pretraining run and fine-tuning results to a page, plots and a score table."""

import contextlib
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_plm.arguments import ArgumentParser
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_file
from megatron_plm.report.page import build_page, draw_plots
from megatron_plm.report.provenance import experiment
from megatron_plm.report.records import Run, read_run
from megatron_plm.report.results import Task, group_by_task, read_result
from megatron_plm.report.verdicts import RANKS_NOTHING, badge, footnotes
from megatron_plm.report.wording import against_baseline, number, scored

_NUMBERS = ("value [low, high]", "examples", "trained", "seconds")
_COLUMNS = ("model", "split", *_NUMBERS)
# letters in a line of plain text
_LINE = 100


def main(argv: Sequence[str]) -> int | None:
    """Write the report that the flags in `argv` ask for, print the scores; raise UserError on bad input."""
    arguments = _parser().parse(argv)
    output: Path = arguments.output
    if output.suffix != ".html" or output.is_dir():
        raise UserError(f"--output {output}: expected the name of a file that ends in .html")
    require_drawing_packages()
    run = read_run(arguments.pretraining)
    tasks = group_by_task([read_result(directory) for directory in arguments.results])
    commands = experiment(run, tasks)
    training, scores = draw_plots(run, tasks)
    page = build_page(arguments.title, run, tasks, commands, training, scores)
    plots = {output.with_name(f"{output.stem}-{plot.name}.png"): plot.light for plot in (*training, *scores)}
    _write_all((output, page), plots)
    _print_scores(run, tasks)
    print(f"wrote {output} and {len(plots)} plots beside it ({output.stem}-*.png)")
    print(f"next: python -m webbrowser {shlex.quote(output.resolve().as_uri())}")
    return None


def _parser() -> ArgumentParser:
    """Return the command's flags."""
    parser = ArgumentParser(
        prog="report",
        description="Write one self-contained HTML page, and its plots as PNG files, about a pretraining run "
        "and the downstream results of its model.",
    )
    parser.add_argument(
        "--pretraining",
        type=Path,
        required=True,
        metavar="RUN_DIR",
        help="run directory of launch/pretrain.sh",
    )
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        metavar="RESULTS_DIR",
        help="output directories of tape_finetune/tape_train.py, each with a results.json; default: none",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR/report.html", help="page to write")
    parser.add_argument("--title", default="Protein language model report", help="heading of the page")
    return parser


def require_drawing_packages() -> None:
    """Raise UserError unless the packages of the extra `report` are there."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"the report needs {error.name}; install it with: pip install 'megatron-plm[report]'") from None


def _write_all(page: tuple[Path, bytes], plots: Mapping[Path, bytes]) -> None:
    """Write all files aside, then rename them, the page last: where it is new, so are its plots.

    Raises UserError where the page's folder can't be made or written; no temporary file is left then.
    """
    folder = page[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"--output: cannot make the folder {folder} ({error.strerror}); name another"
        raise UserError(message) from None
    with contextlib.ExitStack() as stack:
        # the stack renames in reverse order
        for path, content in (page, *plots.items()):
            stack.enter_context(atomic_file(path)).write_bytes(content)


def _print_scores(run: Run, tasks: Sequence[Task]) -> None:
    """Print the validation perplexity and the tables of primary scores, styled on a terminal, plainly aligned
    elsewhere."""
    if run.valid:
        last = run.valid[-1]
        print(
            f"validation perplexity {number(last.perplexity, 2)}, {against_baseline(run)} the unigram "
            f"baseline {number(last.unigram_perplexity, 2)} (step {last.step:,})"
        )
    tables = _tables(tasks)
    if sys.stdout.isatty():
        _print_rich(tables)
    else:
        _print_plain(tables)


@dataclass(frozen=True)
class _Table:
    """The primary scores of one task by one metric, as text in the order of `_COLUMNS`."""

    title: str
    rows: list[list[str]]
    footnotes: list[str]


def _tables(tasks: Sequence[Task]) -> list[_Table]:
    """Return one table for each task, or one for each metric where its models were judged by different ones."""
    tables = []
    for task in tasks:
        shared = f" ({badge(task.shared_note)})" if task.shared_note else ""
        rows: dict[str, list[list[str]]] = {}
        for row in task.rows():
            note = row.result.note if not task.shared_note else None
            cells = [
                f"{row.result.label} ({badge(note)})" if note else row.result.label,
                row.split if task.ranks(row.split) else f"{row.split} ({RANKS_NOTHING})",
                scored(row.score),
                f"{row.scores.num_examples:,}",
                f"{row.result.num_trained_parameters:,}",
                number(row.result.seconds, 1),
            ]
            rows.setdefault(row.metric, []).append(cells)
        tables += [_Table(f"{task.title}, {metric}{shared}", cells, footnotes(task)) for metric, cells in rows.items()]
    return tables


def _print_plain(tables: Sequence[_Table]) -> None:
    """Print the tables in columns of spaces that line up from one to the next."""
    lines = [_COLUMNS, *(row for table in tables for row in table.rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(_COLUMNS))]
    for table in tables:
        print(f"\n{table.title}")
        for line in (_COLUMNS, *table.rows):
            cells = [
                cell.rjust(width) if column in _NUMBERS else cell.ljust(width)
                for cell, width, column in zip(line, widths, _COLUMNS, strict=True)
            ]
            print(f"  {'  '.join(cells).rstrip()}")
        for footnote in table.footnotes:
            print(textwrap.fill(footnote, width=_LINE, initial_indent="  ", subsequent_indent="  "))
    if tables:
        print()


def _print_rich(tables: Sequence[_Table]) -> None:
    """Print the tables with rich, so that the lines fit a terminal of 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    # Text everywhere, for brackets in a plain string would be read as rich's markup
    for table in tables:
        console.print(Text(table.title, style="bold"))
        shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in _COLUMNS:
            numeric = column in _NUMBERS
            shown.add_column(Text(column), justify="right" if numeric else "left", no_wrap=numeric)
        for row in table.rows:
            shown.add_row(*map(Text, row))
        console.print(shown)
        for footnote in table.footnotes:
            console.print(Text(f" {footnote}", style="dim"))
        if table.footnotes:
            console.print()
