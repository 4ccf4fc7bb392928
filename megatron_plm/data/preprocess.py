"""Sequence files to an indexed dataset, or one for each split: the command `preprocess_data`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_plm.arguments import ArgumentParser
from megatron_plm.data.formats import STANDARD_INPUT
from megatron_plm.data.input_flags import add_input_flags, inputs_of
from megatron_plm.data.pipeline import Summary, preprocess
from megatron_plm.data.progress import shown_progress
from megatron_plm.data.rearrange import Selection
from megatron_plm.data.report import dataset_lines, file_lines, input_lines, print_lines, selection_lines
from megatron_plm.data.splits import parse_splits, split_prefix
from megatron_plm.errors import UserError
from megatron_plm.invocation import command_line, typeable
from megatron_plm.memory import keep_freed_memory
from megatron_plm.tokenizers import MODEL_SUFFIX, TOKENIZER_NAMES, Tokenizer, open_tokenizer

__all__ = ["main", "preprocess"]

_HIGHEST_SEED = 2**63 - 1
# tokenizer: the smallest preset that has it
_PRESETS = {
    "esm2": "esm2-8m",
    "proteinlm": "proteinlm-200m",
    "tape-iupac": "tape-transformer",
    "amplify": "amplify-120m",
}


def main(argv: Sequence[str]) -> int | None:
    """The command line of `preprocess`; see `--help`."""
    keep_freed_memory()
    options = _parse(argv)
    tokenizer = open_tokenizer(options.tokenizer)
    selection = _selection(options)
    _check_prefix(options.output_prefix)
    inputs = inputs_of(options)
    with shown_progress(sum(source.size for source in inputs), "tokenizing") as progress:
        summary = preprocess(
            inputs,
            options.output_prefix,
            tokenizer,
            selection=selection,
            fold_case=not options.keep_case,
            strict=options.strict,
            workers=options.workers,
            force=options.force,
            command=command_line("preprocess-data", argv),
            progress=progress,
        )
    _report(summary, selection, options.output_prefix, tokenizer)
    return None


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="preprocess_data",
        description="Turn sequence files into a dataset for pretraining: PREFIX.bin, PREFIX.idx and PREFIX.json.",
    )
    source = add_input_flags(parser, names=True)
    source.add_argument(
        "--tokenizer",
        default="esm2",
        metavar="NAME",
        help=f"one of {', '.join(TOKENIZER_NAMES)}, or a sentencepiece model FILE{MODEL_SUFFIX} (default: esm2)",
    )
    source.add_argument("--strict", action="store_true", help="stop at a letter that the tokenizer doesn't know")
    source.add_argument(
        "--keep-case", action="store_true", help="don't read lower-case letters as upper-case: they are unknown"
    )
    choice = parser.add_argument_group("what is kept, and in which order")
    choice.add_argument("--min-length", type=int, metavar="N", help="leave out sequences of fewer than N tokens")
    choice.add_argument("--max-length", type=int, metavar="N", help="leave out sequences of more than N tokens")
    choice.add_argument("--dedup", action="store_true", help="keep only the first of sequences with the same letters")
    choice.add_argument(
        "--clusters",
        metavar="FILE",
        help="table of two tab-separated columns, cluster and member, plain or compressed: each cluster becomes one "
        "document, of which an epoch draws one member; a sequence that it doesn't name is a cluster of its own",
    )
    choice.add_argument(
        "--split",
        metavar="NAME=FRACTION,...",
        help="write PREFIX_train, PREFIX_valid, PREFIX_test, as train=0.98,valid=0.01,test=0.01 says: by a hash of the "
        "letters (with --clusters, of the cluster's name), so that the same protein is always in the same split",
    )
    choice.add_argument("--shuffle", action="store_true", help="write the sequences, or clusters, in random order")
    choice.add_argument("--seed", type=int, metavar="N", help="of --shuffle (default: 1)")
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, metavar="PREFIX", help="where to write, without extension")
    output.add_argument("--force", action="store_true", help="replace an existing dataset")
    output.add_argument("--workers", type=int, default=1, metavar="N", help="tokenizing threads (default: 1)")
    options = parser.parse(argv)
    if options.workers < 1:
        raise UserError(f"--workers must be 1 or more, not {options.workers}")
    return options


def _selection(options: argparse.Namespace) -> Selection:
    """What the flags of the second group ask for; raises UserError where they contradict each other."""
    low, high = options.min_length, options.max_length
    for flag, value in (("--min-length", low), ("--max-length", high)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be 1 or more, not {value}")
    if low is not None and high is not None and low > high:
        raise UserError(f"--min-length {low} is above --max-length {high}: nothing would be left")
    if options.clusters == STANDARD_INPUT:
        raise UserError("--clusters -: a table may have to be read twice: write it to a file first")
    if options.seed is not None and not options.shuffle:
        raise UserError("--seed is that of --shuffle: give --shuffle too, or leave it out")
    seed = 1 if options.seed is None else options.seed
    if not 0 <= seed <= _HIGHEST_SEED:
        raise UserError(f"--seed must be 0 to {_HIGHEST_SEED}, not {seed}")
    return Selection(
        min_length=low,
        max_length=high,
        dedup=options.dedup,
        splits=None if options.split is None else parse_splits(options.split),
        shuffle_seed=seed if options.shuffle else None,
        clusters=options.clusters,
    )


def _check_prefix(prefix: str) -> None:
    if prefix.endswith(os.sep) or Path(prefix).is_dir():
        raise UserError(
            f"--output-prefix '{prefix}' is a folder: expected FOLDER/NAME, to write NAME.bin, NAME.idx and NAME.json "
            "in it"
        )


def _report(summary: Summary, selection: Selection, prefix: str, tokenizer: Tokenizer) -> None:
    print_lines(dataset_lines(summary.datasets, tokenizer))
    print_lines(selection_lines(summary, selection))
    print_lines(input_lines(summary, tokenizer))
    print_lines(file_lines(summary.datasets))
    names = selection.split_names
    train = split_prefix(prefix, "train" if "train" in names else names[0])
    valid = ["--valid-data-path", split_prefix(prefix, "valid")] if "valid" in names else []
    preset = _PRESETS.get(tokenizer.name)
    model = ["--preset", preset] if preset else ["--preset", "tiny", "--tokenizer", tokenizer.name]
    flags = [*model, "--data-path", train, *valid, "--save", f"runs/{Path(prefix).name}"]
    print(f"next:            {typeable('pretrain', flags)}")
