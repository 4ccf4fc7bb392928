"""The command tape_report: all tasks of some models over several seeds, beside the published values."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_plm.arguments import ArgumentParser
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_directory
from megatron_plm.invocation import typeable
from megatron_plm.report.command import require_drawing_packages
from megatron_plm.report.results import read_result
from tape_finetune.flags import add_flag
from tape_finetune.progress import say, track
from tape_finetune.reporting.bars import bar_plot
from tape_finetune.reporting.detail import detail_plot
from tape_finetune.reporting.groups import TaskScores, group, warnings
from tape_finetune.reporting.pages import Section, document, html, markdown, overview
from tape_finetune.reporting.saved import find_saved
from tape_finetune.runs import write_json

_JSON, _PLOTS = "report.json", "plots"


def main(argv: Sequence[str]) -> int:
    """Write the report that the flags ask for and print its first table; raises UserError."""
    arguments = _parser().parse(argv)
    output: Path = arguments.output
    _check_target(output, force=arguments.force)
    require_drawing_packages()
    tasks = group([read_result(directory) for directory in arguments.results])
    sections = [_section(number, task) for number, task in track(list(enumerate(tasks, start=1)), "drawing")]
    with atomic_directory(output, force=arguments.force) as aside:
        (aside / _PLOTS).mkdir()
        for section in sections:
            for plot in section.plots:
                (aside / _PLOTS / f"{plot.name}.png").write_bytes(plot.light)
        text = markdown(arguments.title, sections, _PLOTS)
        (aside / "report.md").write_text(text, encoding="utf-8", errors="replace")
        (aside / "report.html").write_bytes(html(arguments.title, sections))
        write_json(aside / _JSON, document(arguments.title, sections))
    _print(tasks)
    say(f"wrote {output}: report.html, report.md, {_JSON}, {_PLOTS}/")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="tape_finetune/report.py",
        description="Report all tasks of some models, mean and deviation over seeds, beside the published values, as "
        "HTML, Markdown and JSON.",
    )
    text = "directories that tape_train wrote; those of one label and other seeds become one row"
    add_flag(parser, "results", type=Path, nargs="+", required=True, metavar="RUN_DIR", help=text)
    add_flag(parser, "output", type=Path, required=True, metavar="DIR", help="directory to write")
    add_flag(parser, "title", default="Benchmark of protein language models", help="heading of the report")
    add_flag(parser, "force", action="store_true", help="replace an earlier report, and nothing else")
    return parser


def _check_target(output: Path, *, force: bool) -> None:
    """Raise UserError where no report can be written, or --force would replace what is none."""
    if not os.path.lexists(output):
        return
    if not force:
        raise UserError(f"{output} exists already; give another --output, or --force to replace it")
    if output.is_symlink() or not output.is_dir() or not ((output / _JSON).is_file() or not any(output.iterdir())):
        raise UserError(f"{output}: holds no {_JSON}, so it is no report that --force may replace; give another")


def _section(number: int, task: TaskScores) -> Section:
    saved = find_saved(task)
    plots = [bar_plot(task)]
    remarks = []
    if saved is None:
        run = task.models[0].runs[0]
        flags = [
            run.base_model,
            run.task.split(" ")[0],
            run.directory,
            "--split",
            task.headline[0],
            "--save_predictions",
        ]
        remarks.append(f"No predictions were saved, so none are drawn. This saves some: {typeable('tape-eval', flags)}")
    else:
        plot = detail_plot(task, saved)
        if plot is None:
            remarks.append("The saved predictions are not drawn: they hold no contact.")
        else:
            plots.append(plot)
    # Two titles may differ in no more than what a file's name leaves out.
    return Section(task, tuple(replace(plot, name=f"{number}-{plot.name}") for plot in plots), tuple(remarks))


def _print(tasks: Sequence[TaskScores]) -> None:
    for line in warnings(tasks):
        say(f"note: {line}")
    table = overview(tasks)
    for index, column in enumerate(table.columns[1:], start=1):
        say(f"\n{column}")
        width = max(len(row[0]) for row in table.rows)
        for row in table.rows:
            if row[index] != "–":
                say(f"  {row[0]:<{width}}  {row[index]}")
    say("")
