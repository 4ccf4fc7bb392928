"""What mutations do to a protein, by the model's log odds of the new letters against those of the wild type."""

import argparse
import csv
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_plm.data.readers import open_inputs
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_file
from megatron_plm.inference.flags import (
    add_model_flags,
    add_row_flags,
    check_output,
    likelihood_of,
    load_runner,
)
from megatron_plm.inference.likelihood import Question
from megatron_plm.inference.proteins import ProteinReader
from megatron_plm.inference.runner import Runner
from megatron_plm.inference.variants import VariantTable, WildType, needed_positions, variant_scorer

STRATEGIES = ("masked-marginals", "wt-marginals")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    add_model_flags(parser)
    add_row_flags(parser)
    parser.add_argument(
        "--variants", required=True, type=Path, metavar="FILE",
        help="CSV or TSV with a column of variants, such as A42G, A42G:L50P or WT; its other columns are kept",
    )  # fmt: skip
    parser.add_argument("--mutant-column", default="mutant", metavar="NAME", help="that column (default: mutant)")
    wild_type = parser.add_mutually_exclusive_group(required=True)
    wild_type.add_argument("--wild-type", metavar="FILE", help="sequence file with one protein, which they are of")
    wild_type.add_argument("--sequence", metavar="LETTERS", help="its letters, instead")
    parser.add_argument(
        "--first-position", type=int, default=1, metavar="N", help="the number of its first residue (default: 1)"
    )
    parser.add_argument(
        "--strategy", choices=STRATEGIES, default=STRATEGIES[0],
        help="masked-marginals: each mutated residue is hidden, one at a time; wt-marginals: none, in a single pass "
        "(default: masked-marginals)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Score the variants of a table and write it again with a column of scores."""
    check_output(options)
    table = VariantTable(options.variants, options.mutant_column)
    column = options.strategy.replace("-", "_")
    runner = load_runner(options)
    likelihood = likelihood_of(options, runner)
    wild_type, residues = _wild_type(options, runner)
    question = Question(residues, needed_positions(wild_type, table, column))
    score = likelihood.masked if options.strategy == STRATEGIES[0] else likelihood.unmasked
    (log_p_PV,) = score([question])
    score_of = variant_scorer(question.positions, log_p_PV)
    num_variants = 0
    with atomic_file(options.output) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer: Any = None
        for place, row in table.rows():
            if writer is None:
                writer = csv.DictWriter(file, [*row, column], lineterminator="\n")
                writer.writeheader()
            writer.writerow({**row, column: f"{score_of(wild_type.parse(row[table.column], place)):.6f}"})
            num_variants += 1
    print(f"scored {num_variants:,} variants of {wild_type.name}, at {len(question.positions):,} positions")
    print(f"wrote {options.output}: {column}")


def _wild_type(options: argparse.Namespace, runner: Runner) -> tuple[WildType, npt.NDArray[np.integer]]:
    """The protein and its token ids; raises UserError where there is not exactly one."""
    tokenizer = runner.tokenizer
    if not tokenizer.one_letter_a_token:
        raise UserError(
            f"{options.checkpoint}: its tokens are the pieces of {tokenizer.name}, and mutations are of residues; give "
            "a model that was pretrained with --tokenizer esm2"
        )
    if options.sequence is not None:
        name, residues = "--sequence", tokenizer.encode("".join(options.sequence.split()))
        if not len(residues):
            raise UserError("--sequence has no letters; give those of the wild type")
    else:
        proteins = list(islice(ProteinReader(open_inputs([options.wild_type]), tokenizer, numbered=False).read(), 2))
        if len(proteins) != 1:
            raise UserError(f"--wild-type {options.wild_type} holds several proteins; give a file with one")
        ((name, residues),) = proteins
    letters = [tokenizer.tokens[i] for i in residues.tolist()]
    return WildType(name, letters, options.first_position, tokenizer), residues
