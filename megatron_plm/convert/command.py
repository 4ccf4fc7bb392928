"""`convert_checkpoint`: any format to any other, tensor by tensor, through the native form.

Beside the checkpoint it writes conversion.json, which says how it came about; no reader of a checkpoint looks at it.
"""

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_plm.arguments import ArgumentParser
from megatron_plm.convert import hf_amplify
from megatron_plm.convert.config_json import model_type_of, write_json
from megatron_plm.convert.format import Format
from megatron_plm.convert.lazy import meta_of
from megatron_plm.convert.output import CONVERSION_FILE, check_apart, check_replaceable, named
from megatron_plm.convert.pretrained import FORMATS, detect_format, read_checkpoint
from megatron_plm.convert.weights import (
    CONTACT_HEAD,
    DTYPES,
    INVERSE_FREQUENCIES,
    Weights,
    counting_non_finite,
    non_finite_warning,
)
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_directory
from megatron_plm.invocation import command_line, typeable
from megatron_plm.memory import return_freed_memory

_VERB = "convert-checkpoint"
_EXAMPLE_STRUCTURES = Path("examples/data/structures")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

# Flags that only some formats take, by the names of their arguments.
_READ_FLAGS = ("trust_pickle", "tokenizer")
_WRITE_FLAGS = ("shard_size", "target_tensor_parallel_size")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="convert_checkpoint",
        description="Convert a checkpoint between formats. Weights only: the optimizer's state is not carried.",
    )
    parser.add_argument("--from", dest="source", required=True, choices=FORMATS, help="format of the input")
    parser.add_argument("--to", dest="target", required=True, choices=FORMATS, help="format of the output")
    parser.add_argument("--input", required=True, type=Path, metavar="PATH", help="checkpoint, or a run directory")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="type of the written weights")
    parser.add_argument(
        "--shard-size",
        type=size_in_bytes,
        metavar="SIZE",
        help="--to huggingface: largest file of weights, as 500MB or 2GiB (default: 5GB)",
    )
    parser.add_argument(
        "--target-tensor-parallel-size",
        type=int,
        metavar="N",
        help="--to megatron: ranks that share each layer (default: 1)",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_const",
        const=True,
        help="--from megatron and fair-esm: let the files name, and so run, any code",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|FILE",
        help="vocabulary of an input whose files do not tell it: a tokenizer's name, or a file with a token a line",
    )
    parser.add_argument("--force", action="store_true", help="replace an output that is a checkpoint directory")
    return parser


def main(argv: Sequence[str]) -> int:
    """Convert as `argv` says and print what was written, what is not carried and the next command."""
    arguments = build_parser().parse(argv)
    source, output = arguments.input, named(arguments.output)
    target = FORMATS[arguments.target]
    read_flags = _given(arguments, _READ_FLAGS, FORMATS[arguments.source], "from", FORMATS[arguments.source].read_flags)
    write_flags = _given(arguments, _WRITE_FLAGS, target, "to", target.write_flags)
    check_replaceable(output, force=arguments.force)
    found = detect_format(source)
    if found != arguments.source:
        raise UserError(f"{source}: holds a {found} checkpoint, not {arguments.source}; give --from {found}")
    check_apart(source, found, output)
    if target.name == "native" and arguments.dtype != "float32":
        raise UserError(f"--dtype {arguments.dtype}: native checkpoints hold float32 weights, leave --dtype out")
    return_freed_memory()
    weights, non_finite = counting_non_finite(read_checkpoint(source, found, **read_flags))
    with atomic_directory(output, force=arguments.force) as aside:
        lost = (*weights.notes, *target.write(weights, aside, arguments.dtype, **write_flags))
        record = {"command": command_line(_VERB, argv), "from": found, "to": target.name, "input": str(source)}
        warnings = (*weights.warnings, *non_finite_warning(non_finite))
        write_json(aside / CONVERSION_FILE, {**record, **({"warnings": warnings} if warnings else {})})
    if weights.has_contact_head and not target.has_contact_head:
        lost = (*lost, f"contact_head.regression: {target.name} has no place for it")
    print(f"wrote {output}: {target.name}, {num_parameters(weights):,} parameters, {arguments.dtype}")
    if arguments.trust_pickle:
        print("read with --trust-pickle: code in the input could run")
    for note in lost:
        print(f"not carried: {note}")
    for warning in warnings:
        print(f"warning: {warning}")
    letters = weights.tokenizer.one_letter_a_token
    print(f"next: {next_command(target.name, output) if letters else typeable('pretrain', ['--help'])}")
    return 0


def num_parameters(weights: Weights) -> int:
    """Parameters of the model: its tensors without the rotary frequencies, a buffer, and the contact head."""
    others = (INVERSE_FREQUENCIES, *CONTACT_HEAD)
    return sum(tensor.numel() for name, tensor in meta_of(weights.tensors).items() if name not in others)


def next_command(target: str, output: Path) -> str:
    """A command that uses a checkpoint of format `target` at `output`, and can be typed as it stands."""
    if target == "huggingface" and model_type_of(output) != hf_amplify.MODEL_TYPE:  # whose class is not transformers'
        code = (
            "from transformers import AutoModelForMaskedLM as M, AutoTokenizer as T; "
            f"d = {json.dumps(str(output))}; "
            'print(M.from_pretrained(d)(**T.from_pretrained(d)("MKTAYIAKQR", return_tensors="pt")).logits.shape)'
        )
        return f"python -c {shlex.quote(code)}"
    if not _EXAMPLE_STRUCTURES.is_dir():
        return typeable("tape-train", ["--help"])
    flags = ["--from_pretrained", output, "--data_dir", _EXAMPLE_STRUCTURES]
    return typeable("tape-train", ["transformer", "secondary_structure", *flags])


def size_in_bytes(text: str) -> int:
    """A flag's size: 500MB, 2GiB, or a number of bytes."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]I?B)?", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size above 0, as 500MB or 2GiB")
    return int(match[1]) * _UNITS.get(match[2] or "", 1)


def _given(
    arguments: argparse.Namespace, names: Sequence[str], entry: Format, flag: str, taken: Sequence[str]
) -> dict[str, Any]:
    """Those of the flags `names` that were typed; UserError where the format takes no such flag."""
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    for name in given:
        if name not in taken:
            raise UserError(f"--{name.replace('_', '-')}: --{flag} {entry.name} has no use for it; leave it out")
    return given
