"""The command tape_train: fine-tune a base model on a labelled task, and score it on every test split."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_plm.errors import UserError
from megatron_plm.files import atomic_directory
from megatron_plm.invocation import command_line
from megatron_plm.memory import keep_freed_memory
from tape_finetune import runs
from tape_finetune.bootstrap import Interval
from tape_finetune.data import Split, choose_file
from tape_finetune.fit import Epoch, calibrate, fit
from tape_finetune.leakage import check_distinct, num_in_train
from tape_finetune.model import BaseModel, TaskModel, build_base, num_parameters
from tape_finetune.progress import say
from tape_finetune.scoring import score
from tape_finetune.source import Source
from tape_finetune.tasks import TASKS, Task
from tape_finetune.train_flags import NOT_SAVED, fit_options, parse_train_flags

_LABELS = {
    "transformer": "Pretrained Transformer",
    "random": "Random-initialised Transformer",
    "onehot": "One-hot",
}


def main(argv: Sequence[str]) -> int:
    """Train as the flags say and write the run directory; raises UserError."""
    start = time.monotonic()
    keep_freed_memory()
    arguments = parse_train_flags(argv)
    directory = _directory(arguments)
    runs.check_target(directory, force=arguments.force)
    task = TASKS[arguments.task].from_arguments(arguments)
    base = build_base(arguments.base_model, arguments.from_pretrained, arguments.seed)
    max_length = _max_length(arguments.max_length, base)
    splits = _load_splits(task, arguments, max_length)  # before the head, which may have an output for each class
    task.learn(splits["train"])
    run = _build_run(task, base, max_length, arguments)
    if arguments.force_save != NOT_SAVED:
        return _save_untrained(run, splits["train"], directory, arguments)

    in_train = {name: num_in_train(split, splits["train"]) for name, split in splits.items() if name != "train"}
    counts = ", ".join(runs.describe(split, in_train.get(name)) for name, split in splits.items())
    say(f"{task.name} with {run.base_model} and the head {run.head}; proteins: {counts}")
    scores, epochs = _train_and_score(run, splits, arguments)
    scored = {name: runs.split_result(splits[name], scores[name], in_train[name]) for name in scores}
    results = {
        "task": task.name,
        "base_model": arguments.base_model,
        "label": arguments.label or _label(arguments.base_model, arguments.freeze),
        # Whose weights these are: an architecture alone is no pretraining.
        "from_pretrained": str(arguments.from_pretrained) if arguments.base_model == "transformer" else None,
        "seed": arguments.seed,
        "command": command_line("tape-train", argv),
        "seconds": round(time.monotonic() - start, 3),
        "num_parameters": num_parameters(run.model),
        "num_trained_parameters": num_parameters(run.model, trained_only=True),
        "primary_metric": run.primary_metric,
        "note": arguments.note,
        "splits": scored,
        "epochs": [asdict(epoch) for epoch in epochs],
    }
    with atomic_directory(directory, force=arguments.force) as aside:
        runs.save_run(aside, run)
        runs.write_json(aside / runs.RESULTS_FILE, results)
    say("\n".join(runs.score_lines(scored, task.metric_names)))
    say(f"wrote {directory}: {runs.RESULTS_FILE}, {runs.RUN_FILE}, {runs.WEIGHTS_FILE}")
    say(f"next: {_eval_command(arguments, directory, list(scored)[-1])}")
    return 0


def _directory(arguments: argparse.Namespace) -> Path:
    """What will be written: a run directory, or the untrained model of --force_save."""
    if arguments.force_save != NOT_SAVED:
        return Path(arguments.force_save)
    name = runs.directory_name(arguments.task, arguments.base_model, arguments.time_or_name)
    return arguments.output_dir / (arguments.exp_name or name)


def _load_splits(task: Task, arguments: argparse.Namespace, max_length: int | None) -> dict[str, Split]:
    """train, valid and the test splits, checked; raises UserError, also where two are one and the same."""
    files = task.files(arguments.data_dir)
    names = ("train", "valid", *task.test_splits(files))
    chosen = {name: choose_file(files, name, f"{task.name} data") for name in names}
    splits = {name: task.load(name, path, max_length) for name, path in chosen.items()}
    check_distinct(splits.values())
    return splits


def _build_run(task: Task, base: BaseModel, max_length: int | None, arguments: argparse.Namespace) -> runs.Run:
    primary_metric = task.metric_name(arguments.primary_metric or task.metric_names[0], "--primary_metric")
    head = task.heads[arguments.head](base.num_features, task.num_outputs)
    head.initialize(arguments.seed)
    return runs.Run(
        model=TaskModel(base, head, task.level),
        task=task,
        base_model=arguments.base_model,
        head=arguments.head,
        primary_metric=primary_metric,
        max_length=max_length,
        data_dir=arguments.data_dir,
        seed=arguments.seed,
    )


def _max_length(given: int | None, base: BaseModel) -> int | None:
    """Residues beyond which proteins are cropped; UserError if the model could not take as many as were given."""
    longest = base.max_residues
    if given is not None and longest is not None and given > longest:
        raise UserError(f"--max_length {given}: the model has learned positions for {longest} residues; give no more")
    return longest if given is None else given


def _train_and_score(
    run: runs.Run, splits: Mapping[str, Split], arguments: argparse.Namespace
) -> tuple[dict[str, dict[str, Interval]], list[Epoch]]:
    """The scores of every split but train, and the course of training."""
    model, task = run.model, run.task
    sources = {name: Source(model, split.examples) for name, split in splits.items()}
    if arguments.freeze or num_parameters(model.base) == 0:
        model.base.requires_grad_(False)
        for name, source in sources.items():
            source.keep_features(name)
    epochs = fit(
        model, task, sources["train"], sources["valid"], run.primary_metric, fit_options(arguments), _print_epoch(run)
    )
    scores = {name: score(sources[name], task, split=name, seed=run.seed) for name in splits if name != "train"}
    return scores, epochs


def _save_untrained(run: runs.Run, train: Split, directory: Path, arguments: argparse.Namespace) -> int:
    """--force_save: the model as training would find it."""
    calibrate(run.model, Source(run.model, train.examples), run.seed)
    with atomic_directory(directory, force=arguments.force) as aside:
        runs.save_run(aside, run)
    say(f"wrote {directory}: {runs.RUN_FILE}, {runs.WEIGHTS_FILE}, untrained")
    say(f"next: {_eval_command(arguments, directory, 'valid')}")
    return 0


def _print_epoch(run: runs.Run) -> Callable[[Epoch], None]:
    def report(epoch: Epoch) -> None:
        valid = f"validation {run.primary_metric} {epoch.valid_metric:.4f}"
        say(f"epoch {epoch.epoch}: training loss {epoch.train_loss:.4f}  {valid}")

    return report


def _label(base_model: str, frozen: bool) -> str:
    """The model's name in tables; one-hot features have nothing that could be frozen."""
    return _LABELS[base_model] + (" (frozen)" if frozen and base_model != "onehot" else "")


def _eval_command(arguments: argparse.Namespace, directory: Path, split: str) -> str:
    return command_line("tape-eval", [arguments.base_model, arguments.task, directory, "--split", split])
