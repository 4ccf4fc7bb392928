"""The command tape_eval: score a fine-tuned model on a split, as training scores it."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_plm.arguments import ArgumentParser
from megatron_plm.errors import UserError
from tape_finetune import runs
from tape_finetune.data import choose_file
from tape_finetune.flags import add_flag
from tape_finetune.model import BASE_MODELS
from tape_finetune.scoring import score
from tape_finetune.source import Source
from tape_finetune.tasks import TASKS

_PROGRAM = "tape_finetune/tape_eval.py"


def main(argv: Sequence[str]) -> int:
    """Score as the flags say, print the metrics asked for and add them all to results.json; raises UserError."""
    arguments = _parser().parse(argv)
    directory: Path = arguments.run_dir
    run = runs.load_run(directory, base_model=arguments.base_model, task=arguments.task)
    asked = [run.task.metric_name(metric, "--metrics") for metric in arguments.metrics] or run.task.metric_names
    path = choose_file(run.files(arguments.data_dir), arguments.split, f"--split {arguments.split}")
    split = run.task.load(arguments.split, path, run.max_length)
    results = _results(directory)
    if results is not None:
        _check_same_file(directory, results, arguments.split, split.sha256)
    source = Source(run.model, split.examples)
    scores = score(source, run.task, split=split.name, seed=run.seed)
    scored = {split.name: runs.split_result(split, scores)}
    print("\n".join(runs.score_lines(scored, asked)))
    if results is None:
        print(f"wrote nothing: {directory} was saved untrained and has no {runs.RESULTS_FILE}")
    else:
        results["splits"] |= scored
        runs.write_json(directory / runs.RESULTS_FILE, results)
        print(f"wrote {directory / runs.RESULTS_FILE}")
    print(f"next: {_next_command(directory, results)}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=_PROGRAM, description="Score a fine-tuned model on a split, with bootstrap intervals.")
    parser.add_argument("base_model", choices=BASE_MODELS, metavar="BASE_MODEL", help=", ".join(BASE_MODELS))
    parser.add_argument("task", choices=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory that tape_train wrote")
    add_flag(parser, "split", default="test", metavar="NAME", help="default: test")
    add_flag(parser, "metrics", nargs="*", default=[], metavar="NAME", help="metrics to print (default: all)")
    add_flag(parser, "data_dir", type=Path, metavar="DIR", help="default: the folder of the training")
    return parser


def _results(directory: Path) -> dict[str, Any] | None:
    """results.json of the run; None for a model that --force_save wrote."""
    path = directory / runs.RESULTS_FILE
    return runs.read_json(path) if path.exists() else None


def _next_command(directory: Path, results: dict[str, Any] | None) -> str:
    """A command that can be typed as it stands: the report where the pretraining run is known."""
    if results is None:
        return "python tape_finetune/tape_train.py --help"
    pretrained = Path(results["from_pretrained"] or "")
    for place in (pretrained, *pretrained.parents):
        if (place / "metrics.jsonl").is_file():
            report = ["--pretraining", str(place), "--results", str(directory), "--output", "report.html"]
            return shlex.join(["python", "tools/report.py", *report])
    return "python tools/report.py --help"


def _check_same_file(directory: Path, results: dict[str, Any], split: str, sha256: str) -> None:
    """Scores of one name must be of one file."""
    earlier = results["splits"].get(split)
    if earlier is not None and earlier["sha256"] != sha256:
        raise UserError(
            f"{directory / runs.RESULTS_FILE} holds scores of another file as split {split!r} (sha256 "
            f"{earlier['sha256'][:12]}…, this one is {sha256[:12]}…); give this file's split another name"
        )
