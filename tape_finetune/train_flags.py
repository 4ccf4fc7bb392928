"""The command line of tape_train: TAPE's and ProteinLM's flags, and each task's own."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_plm.arguments import ArgumentParser
from megatron_plm.errors import UserError, suggestion
from megatron_plm.parallel.mesh import world_size
from tape_finetune.fit import FitOptions
from tape_finetune.flags import TAPE_ONLY, add_flag, number, plain_name, refuse, whole_number
from tape_finetune.lora import DEFAULT_TARGETS, LoraOptions
from tape_finetune.model import BASE_MODELS
from tape_finetune.tasks import TASKS
from tape_finetune.tasks.flags import add_task_flags, check_task_flags

PROGRAM = "tape_finetune/tape_train.py"
NOT_SAVED = "FALSE"  # ProteinLM's default of --force_save
_TAPE_ONLY = TAPE_ONLY | {
    "log_dir": "the course of training is written to results.json; --output_dir chooses where",
    "num_log_iter": "every epoch prints one line; leave it out",
    "resume_from_checkpoint": "nothing is kept of a training that was stopped; start it again without this flag",
    "loss_scale": "--bf16 needs none; leave it out",
}
_DESCRIPTION = "Fine-tune a base model on a labelled task and score it on the validation and test splits."


def parse_train_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`; raises UserError for an unknown or ill-typed flag, and for one that belongs to another task."""
    refuse(argv, _TAPE_ONLY)
    arguments = build_parser().parse(argv)
    check_task_flags(arguments, TASKS)
    _check_efficient(arguments)
    heads = TASKS[arguments.task].of_kind(arguments.kind).heads
    arguments.head = arguments.head or next(iter(heads))
    if arguments.head not in heads:
        known = ", ".join(heads) + suggestion(arguments.head, heads)
        raise UserError(f"--head {arguments.head}: the heads of {arguments.task} are {known}")
    _check_windows(arguments)
    return arguments


def build_parser() -> ArgumentParser:
    """Every flag with its help."""
    parser = ArgumentParser(prog=PROGRAM, description=_DESCRIPTION)
    parser.add_argument("base_model", choices=BASE_MODELS, metavar="BASE_MODEL", help=", ".join(BASE_MODELS))
    parser.add_argument("task", choices=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    positive = whole_number(1)
    heads = "; ".join(f"{name}: {', '.join(task.heads)}" for name, task in TASKS.items())

    group = parser.add_argument_group("input and output")
    add_flag(group, "from_pretrained", type=Path, metavar="PATH", help="checkpoint; for random only its architecture")
    add_flag(group, "data_dir", type=Path, metavar="DIR", help="folder of the task's data (default: data)")
    add_flag(group, "output_dir", type=Path, metavar="DIR", default=Path("results"), help="default: results")
    names = group.add_mutually_exclusive_group()
    add_flag(names, "time_or_name", metavar="time|NAME", default="time", help="end of the run directory's name")
    add_flag(names, "exp_name", type=plain_name, metavar="NAME", help="the run directory's whole name")
    add_flag(group, "force", action="store_true", help="replace a run directory of that name, and nothing else")
    text = "save the model with its untrained head to PATH and stop"
    add_flag(group, "force_save", metavar="PATH", default=NOT_SAVED, help=text)
    add_flag(group, "label", metavar="TEXT", help="name of the model in tables")
    add_flag(group, "note", metavar="TEXT", help="remark that goes with the scores")

    group = parser.add_argument_group("model")
    add_flag(group, "freeze", action="store_true", help="train the head only, on features that are made once")
    add_flag(group, "head", metavar="NAME", help=f"{heads} (default: the first)")
    add_flag(group, "max_length", type=positive, metavar="N", help="crop longer proteins to N residues")
    text = "what to do with longer ones: window, for tasks on residues, reads them N at a time (default: crop)"
    add_flag(group, "long_proteins", choices=["crop", "window"], default="crop", help=text)

    group = parser.add_argument_group("training")
    sizes = ", ".join(f"{name} {task.batch_size}" for name, task in TASKS.items())
    add_flag(group, "batch_size", type=positive, metavar="N", help=f"proteins a step (default: {sizes})")
    text = "cut each batch into N passes, to save memory (default: 1)"
    add_flag(group, "gradient_accumulation_steps", type=positive, metavar="N", default=1, help=text)
    add_flag(group, "num_train_epochs", type=positive, metavar="N", default=10, help="default: 10")
    text = "at its peak (default: 1e-4, or 1e-3 where only the head is trained)"
    add_flag(group, "learning_rate", type=number(0, above=True), metavar="X", help=text)
    add_flag(group, "warmup_steps", type=whole_number(0), metavar="N", help="default: a tenth of all steps")
    add_flag(group, "weight_decay", type=number(0), metavar="X", default=0.01, help="default: 0.01")
    add_flag(group, "max_grad_norm", type=number(0), metavar="X", default=1.0, help="0 is no limit (default: 1)")
    text = "stop after N epochs without a better one (default: -1, never)"
    add_flag(group, "patience", type=_patience, metavar="N", help=text)
    add_flag(group, "primary_metric", metavar="NAME", help="what chooses the best epoch (default: the task's first)")
    add_flag(group, "seed", type=whole_number(0), metavar="N", default=42, help="default: 42")

    _add_efficient_flags(parser)

    group = parser.add_argument_group("TAPE's flags for what is done in any case")
    add_flag(group, "no_cuda", action="store_true", help="train on the CPU, also where there is a GPU")
    add_flag(group, "eval_freq", type=int, choices=[1], help="validate after every epoch")
    add_flag(group, "save_freq", choices=["improvement"], help="keep the best epoch")

    add_task_flags(parser.add_argument_group("single tasks"), TASKS)
    return parser


def fit_options(arguments: argparse.Namespace) -> FitOptions:
    """How to train, with the defaults that depend on what is trained."""
    head_only = arguments.freeze or arguments.base_model == "onehot"
    usual_rate = 1e-3 if head_only else 5e-4 if arguments.lora_rank else 1e-4
    return FitOptions(
        epochs=arguments.num_train_epochs,
        batch_size=arguments.batch_size or TASKS[arguments.task].of_kind(arguments.kind).batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate or usual_rate,
        warmup=arguments.warmup_steps,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        patience=arguments.patience,
        seed=arguments.seed,
        layer_lr_decay=arguments.layer_lr_decay or 1.0,
        zero_gradients=arguments.compat != "tape",
    )


def lora_options(arguments: argparse.Namespace) -> LoraOptions | None:
    """The adapters asked for, if any."""
    if arguments.lora_rank is None:
        return None
    return LoraOptions(
        rank=arguments.lora_rank,
        alpha=16.0 if arguments.lora_alpha is None else arguments.lora_alpha,
        dropout=0.05 if arguments.lora_dropout is None else arguments.lora_dropout,
        targets=tuple((arguments.lora_targets or ",".join(DEFAULT_TARGETS)).split(",")),
    )


def _add_efficient_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("training of large Transformers, all of it together if you like")
    text = "train low-rank adapters of rank N instead of the encoder's weights; needs the package peft"
    add_flag(group, "lora_rank", type=whole_number(1), metavar="N", help=text)
    add_flag(group, "lora_alpha", type=number(0, above=True), metavar="X", help="scale: X / rank (default: 16)")
    add_flag(group, "lora_dropout", type=_share, metavar="P", help="of what the adapters read (default: 0.05)")
    text = f"matrices of each block that get one, with commas (default: {','.join(DEFAULT_TARGETS)})"
    add_flag(group, "lora_targets", metavar="NAMES", help=text)
    text = "compute each block again in the backward pass, to save memory"
    add_flag(group, "gradient_checkpointing", action="store_true", help=text)
    add_flag(group, "bf16", action="store_true", help="train in bfloat16, with weights and scores in float32")
    text = "multiply the learning rate by X from each block to the one below (default: 1)"
    add_flag(group, "layer_lr_decay", type=number(0, above=True), metavar="X", help=text)
    text = "also write the trained encoder to RUN_DIR/encoder, a native checkpoint"
    add_flag(group, "export_encoder", action="store_true", help=text)
    text = "copy a fault of the old code, to reproduce its numbers; docs/finetuning.md says which"
    add_flag(group, "compat", choices=["tape", "proteinlm"], help=text)


def _check_efficient(arguments: argparse.Namespace) -> None:
    """Raise UserError for flags that would have no effect."""
    for name in ("lora_alpha", "lora_dropout", "lora_targets"):
        if getattr(arguments, name) is not None and arguments.lora_rank is None:
            raise UserError(f"--{name}: has no use without --lora_rank; give that too, or leave this out")
    of_encoder = ("lora_rank", "gradient_checkpointing", "bf16", "layer_lr_decay", "export_encoder")
    for name in of_encoder:
        if not getattr(arguments, name):
            continue
        if arguments.base_model not in ("transformer", "random"):
            raise UserError(f"--{name}: is for Transformers, not for {arguments.base_model}; leave it out")
        if arguments.freeze:
            raise UserError(f"--{name}: the encoder is not trained with --freeze; leave one of the two out")
    if arguments.lora_rank and arguments.layer_lr_decay:
        raise UserError("--layer_lr_decay: is for the encoder's weights, which --lora_rank leaves; leave one out")
    if arguments.gradient_checkpointing and arguments.head == "attention":
        raise UserError(
            "--gradient_checkpointing: --head attention takes the weights of attention out of each block, which is not "
            "computed again for them; leave one of the two out"
        )
    if arguments.export_encoder and arguments.base_model == "random":
        raise UserError("--export_encoder: is for the base model transformer, whose language model goes with it")
    if arguments.compat == "tape" and world_size() > 1:
        raise UserError("--compat tape: the fault is of TAPE in one process; start without torchrun")


def _check_windows(arguments: argparse.Namespace) -> None:
    """Raise UserError where features of single residues, which windows can be put together from, are not read."""
    task = TASKS[arguments.task].of_kind(arguments.kind)
    if arguments.long_proteins == "window" and (task.level != "residue" or arguments.head == "tape"):
        what = f"--head {arguments.head}" if task.level == "residue" else f"the task {arguments.task}"
        raise UserError(f"--long_proteins window: {what} does not read single residues; leave it out to crop")


def _share(text: str) -> float:
    """A probability below 1."""
    value = number(0)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, not {text!r}")
    return value


def _patience(text: str) -> int | None:
    """TAPE writes no patience as -1."""
    return None if text == "-1" else whole_number(1)(text)
