"""`megatron_converter`: ProteinLM's checkpoints to the weights of its TAPE fork, by the flags of its own script.

The script, THUDM/ProteinLM's tape/converter/megatron-converter.py, reads one file of one rank, takes the order of
query_key_value for granted, and leaves out the head. Here any checkpoint of the format `megatron` is read, and all of
it written. As there, `-dst` is an untrained model of the fork: what Megatron lacks comes from it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_plm.arguments import ArgumentParser
from megatron_plm.convert.bert import TOKEN_TYPES
from megatron_plm.convert.config_json import CONFIG_JSON, write_json
from megatron_plm.convert.keymap import check_keys
from megatron_plm.convert.megatron import FORMAT
from megatron_plm.convert.pickles import read_pickle, tensors_by_name, write_pickle
from megatron_plm.convert.pretrained import read_checkpoint
from megatron_plm.convert.proteinlm_tape import fork_config, fork_tensors
from megatron_plm.convert.weights import DTYPES, Weights, counting_non_finite, non_finite_warning
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_file, only_writer, write_errors_told


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="megatron_converter",
        description="Convert a checkpoint of ProteinLM's pretraining to weights of its TAPE fork.",
    )
    parser.add_argument("-src", "--src", required=True, type=Path, metavar="PATH", help="Megatron-LM checkpoint")
    parser.add_argument(
        "-dst",
        "--dst",
        type=Path,
        metavar="FILE",
        help="untrained pytorch_model.bin of the fork: the result has its names",
    )
    parser.add_argument("-out", "--out", required=True, type=Path, metavar="FILE", help="pytorch_model.bin to write")
    parser.add_argument(
        "-dtp", "--dtp", "--dtype", dest="dtype", type=_dtype, default="float32", metavar="TYPE",
        help=f"type of the written weights: torch.float32 (default) or another of {', '.join(DTYPES)}",
    )  # fmt: skip
    for flag, long, option in (
        ("hidden", "hidden_dim", "hidden_size"),
        ("heads", "num_heads", "num_attention_heads"),
        ("layers", "num_layers", "num_layers"),
    ):
        text = f"{option} that the checkpoint must have (default: any)"
        parser.add_argument(f"-{flag}", f"--{flag}", f"--{long}", dest=option, type=int, metavar="N", help=text)
    parser.add_argument("--trust-pickle", action="store_true", help="let the checkpoint name, and so run, any code")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    return parser


def main(argv: Sequence[str]) -> int:
    """Convert as `argv` says, and print what was written and what is not carried."""
    arguments = build_parser().parse(argv)
    out, config_file = arguments.out, arguments.out.parent / CONFIG_JSON
    if out.name == CONFIG_JSON:
        raise UserError(f"--out {out}: is the name of the configuration, which is written beside it; give another file")
    if out.is_dir() or (out.exists() and not (arguments.force and out.is_file())):
        raise UserError(f"--out {out}: exists already; give another file, or --force to replace a file")
    if not arguments.src.exists():
        raise UserError(f"--src {arguments.src}: does not exist; give a Megatron-LM checkpoint")
    place = out.parent.resolve() / out.name  # what is replaced is the link, where it is one
    for flag, path in (("src", arguments.src), ("dst", arguments.dst)):
        if out.exists() and path and path.exists() and (out.samefile(path) or place.is_relative_to(path.resolve())):
            raise UserError(f"--out {out}: is read, as --{flag} {path} or in it, so --force does not replace it")
    flags = {"trust_pickle": True} if arguments.trust_pickle else {}
    weights, non_finite = counting_non_finite(read_checkpoint(arguments.src, FORMAT.name, **flags))
    _check_shape(arguments, weights)
    tensors, lost = fork_tensors(weights, arguments.dtype)
    if arguments.dst is not None:
        tensors = _like_template(tensors, arguments.dst, DTYPES[arguments.dtype])
    with write_errors_told(out), only_writer(out), atomic_file(out) as aside:
        write_pickle(tensors, aside, zipped=False)  # the fork's own environment has torch 1.4
    print(f"wrote {out}: {sum(tensor.numel() for tensor in tensors.values()):,} values, {arguments.dtype}")
    if not config_file.exists():
        with atomic_file(config_file) as aside:
            write_json(aside, fork_config(weights.options, arguments.dtype))
        print(f"wrote {config_file}")
    for note in (*weights.notes, *lost):
        print(f"not carried: {note}")
    for warning in (*weights.warnings, *non_finite_warning(non_finite)):
        print(f"warning: {warning}")
    return 0


def _dtype(text: str) -> str:
    name = text.removeprefix("torch.")
    if name not in DTYPES:
        known = ", ".join(f"torch.{known}" for known in DTYPES)
        raise argparse.ArgumentTypeError(f"{text!r} is no type of weights that can be written; choose from {known}")
    return name


def _check_shape(arguments: argparse.Namespace, weights: Weights) -> None:
    for flag, option in (("hidden", "hidden_size"), ("heads", "num_attention_heads"), ("layers", "num_layers")):
        asked, found = getattr(arguments, option), getattr(weights.options, option)
        if asked is not None and asked != found:
            raise UserError(f"--{flag} {asked}: the checkpoint has {option} {found}; leave the flag out, or correct it")


def _like_template(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors with those that only the untrained model at `path` has; UserError if it has none for some of them."""
    try:
        template = tensors_by_name(read_pickle(path), path)
    except OSError as error:
        raise UserError(f"--dst {path}: {error.strerror}; give an untrained pytorch_model.bin of the fork") from None
    if TOKEN_TYPES in template:  # of several types Megatron's model has none
        tensors = {**tensors, TOKEN_TYPES: torch.zeros(template[TOKEN_TYPES].shape, dtype=dtype)}
    check_keys([key for key in template if key in tensors], set(tensors), set(), f"--dst {path}")
    for key, tensor in tensors.items():
        if template[key].shape != tensor.shape:
            raise UserError(
                f"--dst {path}: {key} has shape {list(template[key].shape)}, and the checkpoint gives "
                f"{list(tensor.shape)}; give an untrained model of the checkpoint's shape"
            )
    return {key: tensors.get(key, tensor.to(dtype)) for key, tensor in template.items()}
