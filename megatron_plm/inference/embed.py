"""Embeddings of the proteins of any sequence file: the command `embed`."""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_plm import __version__
from megatron_plm.arguments import ArgumentParser
from megatron_plm.data.input_flags import add_input_flags, inputs_of
from megatron_plm.errors import UserError
from megatron_plm.inference.embedding import POOLINGS, Embedder, Plan
from megatron_plm.inference.embedding_file import FILE_FORMATS, NAME_DTYPES, Content, file_format, name_columns
from megatron_plm.inference.flags import (
    SPECIALS,
    add_model_flags,
    add_window_flag,
    check_output,
    load_runner,
    longest_length,
    row_tokens,
    window_overlap,
)
from megatron_plm.inference.groups import Group, go_on, grouped
from megatron_plm.inference.progress import shown_residues
from megatron_plm.inference.proteins import ProteinReader, Survey
from megatron_plm.inference.resumable import publish, resumable_work
from megatron_plm.inference.runner import Runner
from megatron_plm.memory import keep_freed_memory


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="embed", description="Embed the proteins of sequence files with a pretrained model; see docs/inference.md."
    )
    add_model_flags(parser)
    add_window_flag(parser)
    source = add_input_flags(parser, names=True)
    source.add_argument("--numbered", action="store_true", help="call the proteins 1, 2, … : the input has no names")
    source.add_argument("--strict", action="store_true", help="stop at a letter that the model's vocabulary lacks")
    output = parser.add_argument_group("output")
    output.add_argument("--output", required=True, type=Path, metavar="FILE", help="file to write")
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
    check_output(options.output, force=options.force)
    entry = file_format(options.output, options.output_format)
    inputs = inputs_of(options)
    runner = load_runner(options)
    plan = _plan(options, runner)
    proteins = ProteinReader(inputs, runner.tokenizer, numbered=options.numbered, strict=options.strict)
    survey = proteins.survey() if proteins.can_read_twice else None
    values = plan.column_dtypes(runner.options.hidden_size)
    started = time.monotonic()
    with resumable_work(
        options.output, _identity(plan, runner), {**NAME_DTYPES, **values}, force=options.force
    ) as work:
        if work.records:
            print(f"going on behind the {work.records:,} proteins that a stopped run has embedded")
        embedder, num_resumed, num_windowed = Embedder(runner, plan), work.records, 0
        with shown_residues(survey.num_tokens if survey else None, "embedding") as advance:

            def done(group: Group) -> None:
                nonlocal num_windowed
                num_windowed += sum(len(protein.tokens) + SPECIALS > plan.max_tokens for protein in group.proteins)
                advance(group.num_tokens)

            def compute(groups: Any) -> Any:
                for group, columns in embedder.compute(groups):
                    lengths = [len(protein.tokens) for protein in group.proteins]
                    names = [protein.identifier for protein in group.proteins]
                    yield group, {**name_columns(names, lengths), **columns}

            groups = grouped(proteins.read(), lambda p: len(p.tokens) + SPECIALS, plan.batch_tokens)
            num_proteins = go_on(work, groups, compute, done)
        seconds = time.monotonic() - started
        content = Content(work.columns(), _per_residue(plan), _about(options, plan, runner))
        num_repeated = content.num_repeated_names(work.folder)
        publish(work, options.output, lambda path: entry.write(content, path))
    _report(
        options, plan, survey, num_proteins, num_proteins - num_resumed, seconds, num_windowed, num_repeated, values
    )


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


def _per_residue(plan: Plan) -> frozenset[str]:
    names = {plan.column("residues", layer) for layer in plan.layers}
    return frozenset(names if "residues" in plan.poolings else ())


def _identity(plan: Plan, runner: Runner) -> dict[str, Any]:
    """What the values depend on, but for the proteins."""
    return {
        "version": __version__,
        "weights": runner.digest(),
        "tokenizer": runner.tokenizer.sha256,
        "layers": list(plan.layers),
        "pooling": list(plan.poolings),
        "dtype": str(plan.dtype),
        "max_length": plan.max_tokens,
        "overlap": plan.overlap,
        "batch_tokens": plan.batch_tokens,
        "device": runner.device.type,
        "compute_dtype": str(runner.dtype),
    }


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


def _report(
    options: argparse.Namespace,
    plan: Plan,
    survey: Survey | None,
    num_proteins: int,
    num_computed: int,
    seconds: float,
    num_windowed: int,
    num_repeated: int,
    values: Mapping[str, Any],
) -> None:
    print(f"embedded {num_computed:,} proteins in {seconds:,.1f} s")
    if survey is not None and survey.unknown:
        letters = ", ".join(f"{letter} {count:,}" for letter, count in sorted(survey.unknown.items()))
        print(f"unknown letters: {survey.unknown.total():,}, read as the unknown token: {letters}")
    if num_windowed:
        print(
            f"longer than {plan.max_tokens:,} tokens: {num_windowed:,} proteins, in windows that share {plan.overlap:,}"
        )
    if num_repeated:
        print(f"repeated names: {num_repeated:,} proteins have the name of an earlier one; each has its own row")
    print(f"wrote {options.output}: {num_proteins:,} proteins, {', '.join(values)}, {plan.dtype}")
