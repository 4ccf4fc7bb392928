"""Embeddings of the proteins of any sequence file: the command `embed`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_plm import __version__
from megatron_plm.arguments import ArgumentParser
from megatron_plm.data.input_flags import add_input_flags, inputs_of
from megatron_plm.errors import UserError
from megatron_plm.inference.embedding import POOLINGS, Embedder, Plan
from megatron_plm.inference.embedding_file import FILE_FORMATS, Content, file_format
from megatron_plm.inference.flags import (
    SPECIALS,
    add_model_flags,
    add_reading_flags,
    add_row_flags,
    check_output,
    load_runner,
    longest_length,
    row_tokens,
    window_overlap,
)
from megatron_plm.inference.job import Job, print_outcome, run_job
from megatron_plm.inference.proteins import ProteinReader
from megatron_plm.inference.resumable import RESUMES, Column
from megatron_plm.inference.runner import Runner
from megatron_plm.memory import keep_freed_memory


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="embed", description="Embed the proteins of sequence files with a pretrained model; see docs/inference.md."
    )
    add_model_flags(parser)
    add_row_flags(parser)
    source = add_input_flags(parser, names=True)
    add_reading_flags(source)
    output = parser.add_argument_group("output")
    output.add_argument("--output", required=True, type=Path, metavar="PATH", help=f"file to write{RESUMES}")
    output.add_argument(
        "--output-format", choices=list(FILE_FORMATS), help="its format (default: as the name ends: "
        f"{', '.join(ending for entry in FILE_FORMATS.values() for ending in entry.endings)})",
    )  # fmt: skip
    output.add_argument(
        "--pooling", nargs="+", choices=POOLINGS, default=["mean"], metavar="NAME",
        help="mean: over a protein's residues; cls: the vector of its first token; residues: one for each (default: "
        "mean)",
    )  # fmt: skip
    output.add_argument(
        "--layers", nargs="+", type=int, default=[-1], metavar="N",
        help="0: the tokens' embedding, 1, 2, …: behind that block; -1: the last, behind the final norm (default)",
    )  # fmt: skip
    output.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of the written values")
    output.add_argument("--force", action="store_true", help="replace an existing file")
    return parser


def main(argv: Sequence[str]) -> None:
    """Embed as `argv` says and print what was written."""
    keep_freed_memory()
    options = build_parser().parse(argv)
    check_output(options)
    entry = file_format(options.output, options.output_format)
    inputs = inputs_of(options)
    runner = load_runner(options)
    plan = _plan(options, runner)
    values = plan.column_dtypes(runner.options.hidden_size)
    about = _about(options, plan, runner)

    def write(columns: Mapping[str, Column], path: Path) -> None:
        entry.write(Content(columns, plan.per_residue, about), path)

    job = Job(
        what="embedding",
        identity={**runner.identity(), **plan.identity()},
        dtypes=values,
        compute=Embedder(runner, plan).compute,
        cost=lambda protein: len(protein.tokens) + SPECIALS,
        budget=plan.batch_tokens,
        write=write,
        max_tokens=plan.max_tokens,
    )
    proteins = ProteinReader(inputs, runner.tokenizer, numbered=options.numbered, strict=options.strict)
    outcome = run_job(job, proteins, options.output, force=options.force)
    longer = f"of more than {plan.max_tokens:,} tokens, in windows that share {plan.overlap:,}"
    print_outcome(outcome, "embedded", longer)
    print(f"wrote {options.output}: {outcome.num_proteins:,} proteins, {', '.join(values)}, {plan.dtype}")


def _plan(options: argparse.Namespace, runner: Runner) -> Plan:
    if "residues" in options.pooling and not runner.tokenizer.one_letter_a_token:
        raise UserError(
            f"--pooling residues: the model's tokens are the pieces of {runner.tokenizer.name}, which stand for "
            "several residues each; take mean or cls"
        )
    longest = longest_length(options.max_length, runner.options)
    return Plan(
        layers=_layers(options.layers, runner.options.num_layers),
        poolings=tuple(pooling for pooling in POOLINGS if pooling in options.pooling),
        dtype=np.dtype(options.dtype),
        max_tokens=longest,
        overlap=window_overlap(options.overlap, longest),
        batch_tokens=row_tokens(options.batch_tokens, longest, runner.device),
    )


def _layers(given: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The layers in order, each once; -1 is the last."""
    for layer in given:
        if not -num_layers - 1 <= layer <= num_layers:
            raise UserError(f"--layers {layer}: the model has {num_layers} blocks; expected 0 to {num_layers}, or -1")
    return tuple(sorted({layer % (num_layers + 1) for layer in given}))


def _about(options: argparse.Namespace, plan: Plan, runner: Runner) -> Mapping[str, Any]:
    """What a reader of the file should know."""
    return {
        "checkpoint": str(options.checkpoint),
        "layers": list(plan.layers),
        "num_layers": runner.options.num_layers,
        "pooling": list(plan.poolings),
        "max_length": plan.max_tokens,
        "overlap": plan.overlap,
        "compute_dtype": str(runner.dtype).removeprefix("torch."),
        "megatron_plm": __version__,
    }
