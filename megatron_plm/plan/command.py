"""The command `plan`: which layouts of a number of GPUs fit a model, how fast each would be, and what to type."""

import argparse
import importlib
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from megatron_plm.arguments import ArgumentParser
from megatron_plm.config.load import build_parser, load_config
from megatron_plm.config.options import Config, ParallelOptions, option_fields
from megatron_plm.config.problems import problems
from megatron_plm.errors import UserError
from megatron_plm.plan.hardware import GPUS, gpu_named
from megatron_plm.plan.search import Request, ranked_plans
from megatron_plm.plan.table import PLANNED, SHOWN, as_json, as_text
from megatron_plm.tokenizers import get_tokenizer

_PROG = "plan"
_MOST_GPUS = 16384
_MOST_CHECKED = 4096  # processes
_ATTENTION_LENGTH = 512  # tokens; a residue of UniRef50, cropped at 1,024, sits in a protein of about so many


def main(argv: Sequence[str]) -> int | None:
    """Print the plans; with --check, build the first one without hardware and compare. Raises UserError."""
    # One parser for --help and the flag nearest to a wrong one, and one that leaves training's flags to load_config.
    everything = build_parser(_PROG)
    everything.description = (
        "Estimate which layouts of a number of GPUs fit a model, and rank them by speed. Flags of training fix what "
        "they name; parallelism, micro-batch and recomputation are chosen where they are not typed."
    )
    _add_flags(everything)
    typed = frozenset(vars(everything.parse(argv)))
    own = ArgumentParser(prog=_PROG, add_help=False)
    _add_flags(own)
    options, training_flags = own.parse_known_args(argv)
    request = _request(training_flags, typed, options)
    plans = ranked_plans(request)
    if options.json:
        print(json.dumps(as_json(request, plans[: options.top]), indent=2))
        return None
    for line in as_text(request, plans[: options.top]):
        print(line)
    if options.check:
        # Imported here: it needs torch, and a plan alone doesn't.
        return importlib.import_module("megatron_plm.plan.check").check(plans[0], request.vocab_size)
    return None


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plan")
    group.add_argument("--gpu", required=True, metavar="TYPE", help=f"type of GPU: {', '.join(GPUS)}")
    group.add_argument("--num-gpus", type=int, required=True, metavar="N", help="GPUs in all")
    group.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a machine (default: 8)")
    group.add_argument(
        "--global-batch-tokens", type=int, default=None, metavar="N", help="instead of --global-batch-size, in tokens"
    )
    group.add_argument(
        "--attention-length",
        type=float,
        default=None,
        metavar="N",
        help=f"tokens of the protein that a token sits in, on average (default: {_ATTENTION_LENGTH}, or a row's)",
    )
    group.add_argument("--top", type=int, default=5, metavar="N", help="layouts to show (default: 5)")
    group.add_argument("--json", action="store_true", default=False, help="print JSON instead of a table")
    group.add_argument(
        "--check",
        action="store_true",
        default=False,
        help="build the first layout without hardware, one process of each kind, and compare what it holds",
    )


def _request(training_flags: Sequence[str], typed: frozenset[str], options: argparse.Namespace) -> Request:
    gpu = gpu_named(options.gpu)
    _check_counts(options)
    config, print_config = load_config(training_flags, prog=_PROG)
    if print_config:
        raise UserError("--print-config: a plan has no configuration of its own; give it to launch/pretrain.sh")
    if gpu.bf16_flops is None and "bf16" in typed and config.training.bf16:
        raise UserError(f"--bf16: {options.gpu} does not compute in bfloat16; leave it out, or choose another --gpu")

    # Nothing that one could type would undo these two, where a file sets them.
    kept = {name for name in ("pipeline_layout", "num_virtual_stages_per_pipeline_rank") if _value(config, name)}
    fixed = (typed | kept) & frozenset(PLANNED)
    names = {field.name for field in fields(ParallelOptions)}
    training = replace(
        config.training,
        bf16=config.training.bf16 if "bf16" in typed else gpu.bf16_flops is not None,
        global_batch_size=_global_batch_size(config, typed, options.global_batch_tokens),
        micro_batch_size=config.training.micro_batch_size if "micro_batch_size" in fixed else 1,
    )
    planned = replace(
        config,
        training=training,
        parallel=ParallelOptions(**{name: _value(config, name) for name in fixed & names}),
    )
    if found := problems(replace(planned, parallel=ParallelOptions())):
        raise UserError(found[0])
    length, row = options.attention_length, config.data.seq_length
    if length is None:
        length = float(min(_ATTENTION_LENGTH, row))
    if not 0 < length <= row:
        raise UserError(f"--attention-length {length:g} must be above 0 and at most --seq-length {row}")

    shape = _shape_flags(training_flags)
    return Request(
        config=planned,
        fixed=fixed,
        gpu_name=options.gpu,
        gpu=gpu,
        num_gpus=options.num_gpus,
        gpus_per_node=options.gpus_per_node,
        vocab_size=get_tokenizer(config.model.tokenizer).vocab_size,
        attention_length=length,
        shape_flags=tuple(shape),
        unplanned=load_config(shape, prog=_PROG)[0],
    )


def _check_counts(options: argparse.Namespace) -> None:
    for name in ("num_gpus", "gpus_per_node", "top"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(options, name)}")
    count, node = options.num_gpus, options.gpus_per_node
    if count > _MOST_GPUS:
        raise UserError(f"--num-gpus {count}: plans go up to {_MOST_GPUS}")
    if count > node and count % node:
        raise UserError(
            f"--num-gpus {count} is not a multiple of --gpus-per-node {node}; give whole machines: "
            f"{count // node * node} or {-(-count // node) * node}"
        )
    if options.check and options.json:
        raise UserError("--check prints no JSON; leave out --json, or make it a second command")
    if options.check and count > _MOST_CHECKED:
        raise UserError(f"--check builds up to {_MOST_CHECKED} processes, not {count}; lower --num-gpus")


def _global_batch_size(config: Config, typed: frozenset[str], tokens: int | None) -> int:
    """Rows of a step."""
    if tokens is None:
        return config.training.global_batch_size
    if "global_batch_size" in typed:
        raise UserError("--global-batch-tokens and --global-batch-size say the same; give one of them")
    row = config.data.seq_length
    if tokens < 1 or row < 1 or tokens % row:
        raise UserError(f"--global-batch-tokens {tokens} must be a multiple of --seq-length {row}, and above 0")
    return tokens // row


def _shape_flags(training_flags: Sequence[str]) -> list[str]:
    """Those flags of training that a plan doesn't choose."""
    words: list[str] = []
    for name, value in vars(build_parser(_PROG).parse(training_flags)).items():
        flag = "--" + name.replace("_", "-")
        if name in SHOWN:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def _value(config: Config, name: str) -> Any:
    return getattr(getattr(config, option_fields()[name].group), name)
