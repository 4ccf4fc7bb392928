"""The command tape_eval: score a fine-tuned model on a split, as training scores it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_plm.arguments import ArgumentParser
from megatron_plm.errors import UserError
from megatron_plm.invocation import typeable
from megatron_plm.parallel.mesh import device
from tape_finetune import runs
from tape_finetune.data import Split, choose_file
from tape_finetune.flags import TAPE_ONLY, add_flag, refuse, whole_number
from tape_finetune.leakage import check_distinct, num_in_train
from tape_finetune.model import BASE_MODELS
from tape_finetune.predictions import save_predictions
from tape_finetune.progress import say
from tape_finetune.scoring import score
from tape_finetune.source import Source
from tape_finetune.tasks import TASKS

_PROGRAM = "tape_finetune/tape_eval.py"
_TAPE_ONLY = TAPE_ONLY | {
    "output_dir": "the scores are added to RUN_DIR/results.json; leave it out",
    "seed": "the intervals are drawn with the seed of the training; leave it out",
}


def main(argv: Sequence[str]) -> int:
    """Score as the flags say, print the metrics asked for and add them all to results.json; raises UserError."""
    refuse(argv, _TAPE_ONLY)
    arguments = _parser().parse(argv)
    if arguments.compat and arguments.save_predictions:
        raise UserError("--save_predictions: --compat writes nothing; leave one of the two out")
    directory: Path = arguments.run_dir
    run = runs.load_run(directory, base_model=arguments.base_model, task=arguments.task)
    run.task.copies_proteinlm |= arguments.compat == "proteinlm"
    asked = [run.task.metric_name(metric, "--metrics") for metric in arguments.metrics] or run.task.metric_names
    path = choose_file(run.files(arguments.data_dir), arguments.split, f"--split {arguments.split}")
    split = run.load(arguments.split, path)
    results = _results(directory)
    if results is not None:
        _check_same_file(directory, results, arguments.split, split.sha256)
    in_train = None if results is None else _num_in_train(run, split, results)
    say(f"{run.task.name} with {run.base_model}; proteins: {runs.describe(split, in_train)}")
    run.model.to(device(use_gpu=not arguments.no_cuda))
    source = Source(run.model, split.examples, batch_size=arguments.batch_size)
    scores = score(source, run.task, split=split.name, seed=run.seed)
    scored = {split.name: runs.split_result(split, scores, in_train)}
    say("\n".join(runs.score_lines(scored, asked)))
    if arguments.save_predictions:
        saved = directory / runs.predictions_file(split.name)
        save_predictions(saved, source, run.task)
        say(f"wrote {saved}: truth and prediction of each protein")
    if arguments.compat:
        say(f"no scores were written: the split was scored with faults of {arguments.compat}")
    elif results is None:
        say(f"no scores were written: {directory} was saved untrained and has no {runs.RESULTS_FILE}")
        say(f"next: {typeable('tape-train', ['--help'])}")
    else:
        results["splits"] |= scored
        runs.write_json(directory / runs.RESULTS_FILE, results)
        say(f"wrote {directory / runs.RESULTS_FILE}")
        say(f"next: {typeable('tape-report', ['--results', directory, '--output', 'report'])}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=_PROGRAM, description="Score a fine-tuned model on a split, with bootstrap intervals.")
    parser.add_argument("base_model", choices=BASE_MODELS, metavar="BASE_MODEL", help=", ".join(BASE_MODELS))
    parser.add_argument("task", choices=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory that tape_train wrote")
    add_flag(parser, "split", default="test", metavar="NAME", help="default: test")
    add_flag(parser, "metrics", nargs="*", default=[], metavar="NAME", help="metrics to print (default: all)")
    text = "also write predictions_SPLIT.jsonl.gz to RUN_DIR; the report draws from it"
    add_flag(parser, "save_predictions", action="store_true", help=text)
    add_flag(parser, "data_dir", type=Path, metavar="DIR", help="default: the folder of the training")
    text = "score as ProteinLM's fork does: without proteins over 512, contacts counted twice; nothing is written"
    add_flag(parser, "compat", choices=["proteinlm"], help=text)
    add_flag(parser, "batch_size", type=whole_number(1), metavar="N", help="most proteins a pass (default: no limit)")
    add_flag(parser, "no_cuda", action="store_true", help="score on the CPU, also where there is a GPU")
    return parser


def _results(directory: Path) -> dict[str, Any] | None:
    """results.json of the run; None for a model that --force_save wrote."""
    path = directory / runs.RESULTS_FILE
    return runs.read_json(path) if path.exists() else None


def _check_same_file(directory: Path, results: dict[str, Any], split: str, sha256: str) -> None:
    """Scores of one name must be of one file, and those of two names of two."""
    for name, other in results["splits"].items():
        if name != split and other["sha256"] == sha256:
            raise UserError(f"--split {split}: its file is that of the split {name!r}, which has scores; name another")
    earlier = results["splits"].get(split)
    if earlier is not None and earlier["sha256"] != sha256:
        raise UserError(
            f"{directory / runs.RESULTS_FILE} holds scores of another file as split {split!r} (sha256 "
            f"{earlier['sha256'][:12]}…, this one is {sha256[:12]}…); give this file's split another name"
        )


def _num_in_train(run: runs.Run, split: Split, results: dict[str, Any]) -> int | None:
    """How many of the split's sequences the model was trained on; None, which is told, where that data is gone."""
    if split.name == "train":
        return len(split.examples)
    earlier = results["splits"].get(split.name, {})
    if earlier.get("num_in_train") is not None:
        return earlier["num_in_train"]
    try:
        path = run.files()["train"]
    except (UserError, KeyError):
        path = None
    if path is None or not path.exists():
        say(f"the training data is no longer where it was, so no one counts how much of {split.name} stands in it")
        return None
    train = run.load("train", path)
    check_distinct([train, split])
    return num_in_train(split, train)
