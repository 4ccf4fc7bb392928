"""The command tape_train: fine-tune a base model on a labelled task, and score it on every test split."""

import argparse
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from megatron_plm.errors import UserError
from megatron_plm.files import atomic_directory
from megatron_plm.invocation import command_line, typeable
from megatron_plm.memory import keep_freed_memory, peak_memory
from megatron_plm.parallel.mesh import World, check_devices, joined_world, local_rank, told_once
from tape_finetune import runs
from tape_finetune.base_model import BaseModel
from tape_finetune.bootstrap import Interval
from tape_finetune.data import Split, choose_file
from tape_finetune.efficient import recompute_blocks, train_in_bf16
from tape_finetune.fit import Epoch, calibrate, fit
from tape_finetune.leakage import check_distinct, num_in_train
from tape_finetune.lora import ADAPTERS, Adapters, import_peft
from tape_finetune.model import (
    ENCODER,
    EncoderModel,
    TaskModel,
    build_base,
    build_head,
    discard_final_norm,
    export_encoder,
    num_parameters,
)
from tape_finetune.progress import say
from tape_finetune.scoring import score
from tape_finetune.source import Source
from tape_finetune.tasks import TASKS, Task
from tape_finetune.train_flags import NOT_SAVED, fit_options, lora_options, parse_train_flags

_LABELS = {
    "transformer": "Pretrained Transformer",
    "random": "Random-initialised Transformer",
    "onehot": "One-hot",
    "lstm": "LSTM",
    "resnet": "ResNet",
}


def main(argv: Sequence[str]) -> int:
    """Train as the flags say and write the run directory; raises UserError.

    Of several processes, which torchrun starts, each reads the data and trains on a share of every batch; the first
    one writes and speaks.
    """
    keep_freed_memory()
    try:
        arguments = parse_train_flags(argv)
        directory = _directory(arguments)
        runs.check_target(directory, force=arguments.force)
        if not arguments.no_cuda:
            check_devices()
        if arguments.lora_rank:
            import_peft()
    except UserError as error:
        error.told = local_rank() > 0  # all processes of a machine find it alike
        raise
    meeting = joined_world(use_gpu=not arguments.no_cuda, description=f"flags = {shlex.join(argv)}")
    with meeting as world, told_once(world):
        return _train(arguments, directory, world, argv)


def _train(arguments: argparse.Namespace, directory: Path, world: World, argv: Sequence[str]) -> int:
    start = time.monotonic()
    task = TASKS[arguments.task].from_arguments(arguments)
    base = build_base(arguments.base_model, arguments.from_pretrained, arguments.seed)
    max_length = _max_length(arguments, base)
    splits = _load_splits(task, arguments, max_length)  # before the head, which may have an output for each class
    task.learn(splits["train"])
    run = _build_run(task, base, max_length, arguments, world.size)
    run.model.to(world.device)
    if arguments.force_save != NOT_SAVED:
        if world.is_main:
            _save_untrained(run, splits["train"], directory, arguments)
        return 0

    in_train = {name: num_in_train(split, splits["train"]) for name, split in splits.items() if name != "train"}
    counts = ", ".join(runs.describe(split, in_train.get(name)) for name, split in splits.items())
    say(f"{task.name} with {run.base_model} and the head {run.head}; proteins: {counts}")
    trained = _train_and_score(run, splits, arguments, world)
    if not world.is_main:
        return 0
    scored = {name: runs.split_result(splits[name], found, in_train[name]) for name, found in trained.scores.items()}
    results = {
        "task": task.name,
        "base_model": arguments.base_model,
        "label": arguments.label or _label(arguments),
        # Whose weights these are: an architecture alone is no pretraining.
        "from_pretrained": str(arguments.from_pretrained) if _has_pretrained_weights(arguments) else None,
        "seed": arguments.seed,
        "command": command_line("tape-train", argv),
        "seconds": round(time.monotonic() - start, 3),
        "num_parameters": num_parameters(run.model),
        "num_trained_parameters": trained.num_parameters,
        "num_adapter_parameters": trained.adapters.num_parameters if trained.adapters else 0,
        "primary_metric": run.primary_metric,
        "note": arguments.note,
        "num_processes": world.size,
        "device": world.device.type,
        "peak_memory": peak_memory(),
        "peak_gpu_memory": torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None,
        "train": runs.split_facts(splits["train"]),
        "splits": scored,
        "epochs": [asdict(epoch) for epoch in trained.epochs],
    }
    parts = []
    with atomic_directory(directory, force=arguments.force) as aside:
        runs.save_run(aside, run)
        runs.write_json(aside / runs.RESULTS_FILE, results)
        if trained.adapters:
            trained.adapters.save(aside / ADAPTERS)
            parts.append(f"{ADAPTERS}/")
        if arguments.export_encoder:
            export_encoder(run.model.base, arguments.from_pretrained, aside / ENCODER)
            parts.append(f"{ENCODER}/")
    say("\n".join(runs.score_lines(scored, task.metric_names)))
    say(f"wrote {directory}: {runs.RESULTS_FILE}, {', '.join([runs.RUN_FILE, runs.WEIGHTS_FILE, *parts])}")
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
    windows = arguments.long_proteins == "window"
    splits = {name: task.load(name, path, max_length, windows=windows) for name, path in chosen.items()}
    check_distinct(splits.values())
    return splits


def _build_run(
    task: Task, base: BaseModel, max_length: int | None, arguments: argparse.Namespace, num_processes: int
) -> runs.Run:
    primary_metric = task.metric_name(arguments.primary_metric or task.metric_names[0], "--primary_metric")
    head = build_head(task.heads, arguments.head, base, task.num_outputs)
    if num_processes > 1 and any(isinstance(module, nn.BatchNorm1d) for module in head.modules()):
        raise UserError(f"--head {arguments.head}: has a BatchNorm, over one process's batch; start without torchrun")
    head.initialize(arguments.seed)
    if arguments.compat == "proteinlm":
        discard_final_norm(base)
    return runs.Run(
        model=TaskModel(base, head, task.level),
        task=task,
        base_model=arguments.base_model,
        head=arguments.head,
        primary_metric=primary_metric,
        max_length=max_length,
        data_dir=arguments.data_dir,
        seed=arguments.seed,
        compat=arguments.compat,
        windows=arguments.long_proteins == "window",
    )


def _max_length(arguments: argparse.Namespace, base: BaseModel) -> int | None:
    """Residues beyond which proteins are cropped, or the size of windows; UserError if the model could not take as many
    as were given, or there is no limit for --long_proteins."""
    given, longest = arguments.max_length, base.max_residues
    if given is not None and longest is not None and given > longest:
        raise UserError(f"--max_length {given}: the model has learned positions for {longest} residues; give no more")
    if given is None and longest is None and arguments.long_proteins == "window":
        raise UserError("--long_proteins window: this model takes proteins of any length; give --max_length too")
    return longest if given is None else given


@dataclass(frozen=True)
class _Trained:
    """What came out of training: the scores of every split but train, the course of training, how many parameters were
    trained, and the adapters, which are merged into the model."""

    scores: dict[str, dict[str, Interval]]
    epochs: list[Epoch]
    num_parameters: int
    adapters: Adapters | None


def _train_and_score(
    run: runs.Run, splits: Mapping[str, Split], arguments: argparse.Namespace, world: World
) -> _Trained:
    model, task = run.model, run.task
    sources = {name: Source(model, split.examples, world=world) for name, split in splits.items()}
    if arguments.freeze or num_parameters(model.base) == 0:
        model.base.requires_grad_(False)
        for name, source in sources.items():
            source.keep_features(name)
    adapters = _prepare(model.base, arguments)
    num_trained = num_parameters(model, trained_only=True)
    if adapters:
        share = adapters.num_parameters / num_parameters(model.base)
        say(f"adapters: {adapters.num_parameters:,} parameters, {share:.2%} of what the base model has with them")
    epochs = fit(
        model, task, sources["train"], sources["valid"], run.primary_metric, fit_options(arguments), _print_epoch(run)
    )
    if adapters:
        adapters.merge()
    scores = {name: score(sources[name], task, split=name, seed=run.seed) for name in splits if name != "train"}
    return _Trained(scores, epochs, num_trained, adapters)


def _prepare(base: BaseModel, arguments: argparse.Namespace) -> Adapters | None:
    """Make the base model train as the flags say; returns its adapters, if it gets any."""
    if not isinstance(base, EncoderModel):
        return None
    options, adapters = lora_options(arguments), None
    if options:
        adapters = Adapters(base.encoder, options, arguments.seed, arguments.from_pretrained)
    if arguments.bf16:
        train_in_bf16(base.encoder)
    if arguments.gradient_checkpointing:
        draws = base.options.attention_dropout > 0 or (options is not None and options.dropout > 0)
        recompute_blocks(base.encoder, draws=draws)
    return adapters


def _save_untrained(run: runs.Run, train: Split, directory: Path, arguments: argparse.Namespace) -> None:
    """--force_save: the model as training would find it."""
    calibrate(run.model, Source(run.model, train.examples), run.seed)
    with atomic_directory(directory, force=arguments.force) as aside:
        runs.save_run(aside, run)
    say(f"wrote {directory}: {runs.RUN_FILE}, {runs.WEIGHTS_FILE}, untrained")
    say(f"next: {_eval_command(arguments, directory, 'valid')}")


def _print_epoch(run: runs.Run) -> Callable[[Epoch], None]:
    def report(epoch: Epoch) -> None:
        valid = f"validation {run.primary_metric} {epoch.valid_metric:.4f}"
        say(f"epoch {epoch.epoch}: training loss {epoch.train_loss:.4f}  {valid}")

    return report


def _has_pretrained_weights(arguments: argparse.Namespace) -> bool:
    """Whether the base model has weights of a checkpoint; of `random` it takes the architecture only."""
    return arguments.from_pretrained is not None and arguments.base_model != "random"


def _label(arguments: argparse.Namespace) -> str:
    """The model's name in tables; one-hot features have nothing that could be frozen."""
    how = "frozen" if arguments.freeze and arguments.base_model != "onehot" else "LoRA" if arguments.lora_rank else ""
    remarks = ", ".join(filter(None, (how, arguments.compat and f"compat {arguments.compat}")))
    return _LABELS[arguments.base_model] + (f" ({remarks})" if remarks else "")


def _eval_command(arguments: argparse.Namespace, directory: Path, split: str) -> str:
    return typeable("tape-eval", [arguments.base_model, arguments.task, directory, "--split", split])
